"""The COCO download against a server on this machine: whole, resumed, damaged, unreachable."""

import hashlib
import importlib.util
import io
import sys
import threading
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_coco.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_coco", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["download_coco"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


CAPTIONS = zipped(
    {
        "annotations/captions_train2017.json": b"{}",
        "annotations/captions_val2017.json": b"[]",
        "annotations/instances_val2017.json": b"not wanted",
    }
)
PHOTOGRAPHS = zipped({"val2017/": b"", "val2017/1.jpg": b"one" * 50_000, "val2017/2.jpg": b"two" * 50_000})


class Handler(BaseHTTPRequestHandler):
    """Serves `files` with ranges; what it does wrong is set on the server."""

    server: "Server"

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        body = self.server.files.get(self.path)
        if self.server.errors:
            self.send_error(self.server.errors.pop(0))
            return
        if body is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        for name, value in self.server.extra_headers.items():
            self.send_header(name, value)
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: self.server.stops.pop(0)] if self.server.stops else rest)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""


class Server(ThreadingHTTPServer):
    """What the tests set and read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/annotations/c.zip": CAPTIONS, "/zips/val2017.zip": PHOTOGRAPHS}
        self.requests: list[tuple[str, str | None]] = []
        self.stops: list[int] = []  # after how many bytes the next answers break off
        self.errors: list[int] = []  # what the next answers are
        self.extra_headers: dict[str, str] = {}
        self.ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def archives(captions: bytes = CAPTIONS, photographs: bytes = PHOTOGRAPHS, known: bool = True) -> Any:
    def md5(content: bytes) -> str | None:
        return hashlib.md5(content).hexdigest() if known else None

    size = len(photographs)
    return {
        2017: {
            "annotations": script.Archive(
                "annotations/c.zip", len(captions), md5(captions), "annotations", "captions_", "2017.json", 2, 4
            ),
            "val": script.Archive("zips/val2017.zip", size, md5(photographs), "val2017", "", ".jpg", 2, 300_000),
        }
    }


def run(root: Path, server: Server, *options: str, table: Any = None) -> int:
    waits: list[float] = []
    arguments = ["--root", str(root), "--host", server.address, *options]
    status = script.main(arguments, table or archives(), waits.append)
    server.waits = waits  # type: ignore[attr-defined]
    return int(status)


def test_everything_is_fetched_unpacked_and_then_left_alone(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "coco"
    assert run(root, server) == 0
    assert (root / "val2017" / "2.jpg").read_bytes() == b"two" * 50_000
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [
        "1.jpg",
        "2.jpg",
        "c.zip",
        "captions_train2017.json",
        "captions_val2017.json",
        "val2017.zip",
    ]
    output = capsys.readouterr()
    assert output.out == "annotations: complete\nval2017: complete\n"
    assert "check val2017.zip" in output.err
    before = list(server.requests)
    assert run(root, server) == 0
    assert server.requests == before


def test_only_and_delete_zips(tmp_path: Path, server: Server) -> None:
    assert run(tmp_path, server, "--only", "annotations", "--delete-zips") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["annotations"]
    assert [path for path, _ in server.requests] == ["/annotations/c.zip"]


def test_a_download_goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    part = tmp_path / "val2017.zip.part"
    part.write_bytes(PHOTOGRAPHS[:1000])
    assert run(tmp_path, server, "--only", "val") == 0
    assert server.requests == [("/zips/val2017.zip", "bytes=1000-")]
    assert (tmp_path / "val2017.zip").read_bytes() == PHOTOGRAPHS
    assert not part.exists()


def test_a_broken_connection_is_taken_up_again(tmp_path: Path, server: Server) -> None:
    server.stops = [5000, 7000] + [1000] * 20  # as often as it takes, while there is progress
    assert run(tmp_path, server, "--only", "val") == 0
    assert [asked for _, asked in server.requests][:3] == [None, "bytes=5000-", "bytes=12000-"]
    assert server.waits == [1.0] * 22  # type: ignore[attr-defined]


def test_a_server_without_ranges_starts_over(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    (tmp_path / "val2017.zip.part").write_bytes(b"x" * 1000)
    assert run(tmp_path, server, "--only", "val") == 0
    assert len(server.requests) == 1
    assert (tmp_path / "val2017.zip").read_bytes() == PHOTOGRAPHS


def test_a_part_that_is_too_long_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    (tmp_path / "val2017.zip.part").write_bytes(PHOTOGRAPHS + b"more")
    assert run(tmp_path, server, "--only", "val") == 0
    assert server.requests == [("/zips/val2017.zip", None)]


def test_a_server_in_trouble_is_tried_again_but_not_forever(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.errors = [503, 503]
    assert run(tmp_path, server, "--only", "val") == 0
    server.errors = [500] * 99
    assert run(tmp_path / "other", server, "--only", "val") == 1
    assert "the server answers 500" in capsys.readouterr().err
    assert 99 - len(server.errors) == script.ATTEMPTS + 1


@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_download_is_refused_and_deleted(
    tmp_path: Path, server: Server, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = bytearray(PHOTOGRAPHS)
    damaged[1000] ^= 1
    server.files["/zips/val2017.zip"] = bytes(damaged)
    if not known:  # then the server's own word counts
        digest = hashlib.md5(PHOTOGRAPHS).digest()
        server.extra_headers = {"Content-MD5": b64encode(digest).decode(), "ETag": '"abc-2"'}
    assert run(tmp_path, server, "--only", "val", table=archives(known=known)) == 1
    assert "val2017.zip arrived damaged and was deleted (its MD5 is " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_etag_counts_only_where_it_is_an_md5(tmp_path: Path, server: Server) -> None:
    server.extra_headers = {"ETag": f'"{hashlib.md5(PHOTOGRAPHS).hexdigest()}-2"'}
    assert run(tmp_path, server, "--only", "val", table=archives(known=False)) == 0
    server.extra_headers = {"ETag": f'"{"0" * 32}"'}
    assert run(tmp_path / "other", server, "--only", "val", table=archives(known=False)) == 1


def test_without_any_checksum_the_crcs_find_damage(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = PHOTOGRAPHS.replace(b"twotwo", b"twatwo", 1)
    server.files["/zips/val2017.zip"] = damaged
    assert run(tmp_path, server, "--only", "val", table=archives(known=False)) == 1
    assert "is damaged (Bad CRC-32" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "val2017").iterdir()] == ["1.jpg"]  # no half a file


def test_a_file_of_another_size_is_not_fetched(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["/zips/val2017.zip"] = b"<html>please log in</html>"
    assert run(tmp_path, server, "--only", "val") == 1
    error = capsys.readouterr().err
    assert f"has 26 bytes where {len(PHOTOGRAPHS):,} are expected: is there a proxy" in error
    assert list(tmp_path.iterdir()) == []


def test_without_network_it_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = "http://127.0.0.1:9"  # the discard port: nothing answers
    waits: list[float] = []
    assert script.main(["--root", str(tmp_path), "--host", offline], archives(), waits.append) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"download_coco: {offline}/annotations/c.zip can't be reached (")
    assert f"fetch {offline}/annotations/c.zip, {offline}/zips/val2017.zip elsewhere" in error
    assert f"put the zip files into {tmp_path} and run this command again" in error
    assert waits == []  # nobody waits for a network that isn't there
    (tmp_path / "c.zip").write_bytes(CAPTIONS)
    (tmp_path / "val2017.zip").write_bytes(PHOTOGRAPHS)
    assert script.main(["--root", str(tmp_path), "--host", offline], archives()) == 0
    assert (tmp_path / "annotations" / "captions_val2017.json").read_bytes() == b"[]"


def test_a_wrong_file_put_there_by_hand_is_kept_and_named(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val2017.zip").write_bytes(PHOTOGRAPHS[:-1])
    assert run(tmp_path, server, "--only", "val") == 1
    assert f"{tmp_path / 'val2017.zip'} is not the official file: it has" in capsys.readouterr().err
    assert (tmp_path / "val2017.zip").exists()


def test_an_absent_file_on_the_server_is_told(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files.clear()
    assert run(tmp_path, server, "--only", "val") == 1
    assert "the server answers 404" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "val2017/../../evil.jpg", "val2017\\evil.jpg", "C:evil"])
def test_unsafe_names_unpack_nothing(
    tmp_path: Path, server: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = zipped({"val2017/1.jpg": b"1", "val2017/2.jpg": b"2", name: b"evil"})
    server.files["/zips/val2017.zip"] = content
    root = tmp_path / "deep" / "root"
    assert run(root, server, "--only", "val", table=archives(photographs=content)) == 1
    assert "holds the unsafe name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["val2017.zip"]


def test_an_archive_with_files_missing_is_refused(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    content = zipped({"val2017/1.jpg": b"1"})
    server.files["/zips/val2017.zip"] = content
    assert run(tmp_path, server, "--only", "val", table=archives(photographs=content)) == 1
    assert "holds 1 of the 2 files expected in val2017/" in capsys.readouterr().err


def test_an_interrupted_unpacking_is_completed(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "val2017"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"x" * 150_000)  # the right size, the wrong content
    assert run(tmp_path, server, "--only", "val") == 0
    assert (folder / "1.jpg").read_bytes() == b"one" * 50_000


def test_a_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage)
    assert run(tmp_path, server) == 0
    big = archives()
    archive = big[2017]["val"]
    big[2017]["val"] = script.Archive(*(list(vars(archive).values())[:-1]), 40_000_000_000)
    assert run(tmp_path / "other", server, table=big) == 1
    assert "GB free and 40.0 GB are needed (--delete-zips takes about half)" in capsys.readouterr().err
    assert not (tmp_path / "other" / "c.zip").exists()


def test_what_is_there_needs_no_room(tmp_path: Path) -> None:
    todo = list(archives()[2017].values())
    everything = len(CAPTIONS) + len(PHOTOGRAPHS) + 4 + 300_000
    assert script.missing_bytes(todo, tmp_path, delete_zips=False) == everything
    assert script.missing_bytes(todo, tmp_path, delete_zips=True) == len(PHOTOGRAPHS) + 4 + 300_000
    (tmp_path / "c.zip").write_bytes(CAPTIONS)
    (tmp_path / "val2017.zip.part").write_bytes(PHOTOGRAPHS[:1000])
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "1.jpg").write_bytes(b"one" * 50_000)
    left = everything - len(CAPTIONS) - 1000 - 150_000
    assert script.missing_bytes(todo, tmp_path, delete_zips=False) == left


def test_the_official_table_is_consistent() -> None:
    for year, parts in script.ARCHIVES.items():
        assert set(parts) == set(script.PARTS)
        assert parts["annotations"].wants(f"annotations/captions_val{year}.json")
        assert not parts["annotations"].wants(
            f"annotations/captions_val{4031 - year}.json"
        )  # both years may share a root
        for part in ("train", "val"):
            assert parts[part].address == f"zips/{part}{year}.zip"
            assert parts[part].wants(f"{part}{year}/a.jpg")
            assert not parts[part].wants(f"{part}{year}/a.jpg.part")
    checksums = [archive.md5 for parts in script.ARCHIVES.values() for archive in parts.values()]
    assert len(set(checksums)) == 6
    assert sum(script.ARCHIVES[2017][part].files for part in ("train", "val")) == 123_287
    assert sum(script.ARCHIVES[2014][part].files for part in ("train", "val")) == 123_287
