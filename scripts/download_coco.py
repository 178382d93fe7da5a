#!/usr/bin/env python
"""Fetch, check and unpack what captioning needs of COCO: the captions and the train and val photographs.

    python scripts/download_coco.py --root /data/coco                     # 2017, about 20 GB
    python scripts/download_coco.py --root /data/coco --year 2014         # for Karpathy's splits
    python scripts/download_coco.py --root /data/coco --only annotations  # the captions alone

Run the same command again after an interruption: it goes on where it stopped and leaves alone what is complete.
"""

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import BinaryIO, cast

from tqdm import tqdm

HOST = "http://images.cocodataset.org"  # COCO's own address; it has no valid certificate, hence the checksums
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
ATTEMPTS = 6
HEX_MD5_LENGTH = 32
PARTS = ("annotations", "val", "train")


class DownloadError(Exception):
    """What went wrong and what to do about it, in a sentence or two."""


class OfflineError(DownloadError):
    """The server can't be reached at all."""


@dataclass(frozen=True)
class Archive:
    """A zip file on the server, and what is wanted from it.

    Attributes:
        address: below the host.
        size: bytes of the zip file.
        md5: its checksum; None to rely on what the server says.
        folder: the wanted members lie in this folder, ...
        prefix: ... begin like this ...
        suffix: ... and end like this.
        files: how many they are.
        unpacked: bytes they take.
    """

    address: str
    size: int
    md5: str | None
    folder: str
    prefix: str
    suffix: str
    files: int
    unpacked: int

    @property
    def name(self) -> str:
        """The name of the zip file."""
        return self.address.rpartition("/")[2]

    def wants(self, member: str) -> bool:
        """Whether a member is one of the wanted files."""
        folder, _, name = member.rpartition("/")
        return folder == self.folder and name.startswith(self.prefix) and name.endswith(self.suffix)

    def present(self, root: Path) -> list[os.DirEntry[str]]:
        """The wanted files that are there already."""
        folder = root / self.folder
        entries = list(os.scandir(folder)) if folder.is_dir() else []
        return [entry for entry in entries if self.wants(f"{self.folder}/{entry.name}")]

    def is_unpacked(self, root: Path) -> bool:
        """Whether all files are there. Each gets its name only once it is whole, so counting is enough."""
        return len(self.present(root)) >= self.files

    def unpacked_bytes(self, root: Path) -> int:
        """The size of the wanted files that are there already."""
        return sum(entry.stat().st_size for entry in self.present(root))


def _captions(year: int, size: int, md5: str) -> Archive:
    address = f"annotations/annotations_trainval{year}.zip"
    return Archive(address, size, md5, "annotations", "captions_", f"{year}.json", files=2, unpacked=110_000_000)


def _photographs(part: str, size: int, md5: str, files: int) -> Archive:
    return Archive(f"zips/{part}.zip", size, md5, part, "", ".jpg", files, unpacked=size)


ARCHIVES: dict[int, dict[str, Archive]] = {
    2014: {
        "annotations": _captions(2014, 252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
        "val": _photographs("val2014", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3", 40_504),
        "train": _photographs("train2014", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88", 82_783),
    },
    2017: {
        "annotations": _captions(2017, 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
        "val": _photographs("val2017", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 5_000),
        "train": _photographs("train2017", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118_287),
    },
}


# Download


def download(url: str, part: Path, size: int, wait: Callable[[float], None] = time.sleep) -> str | None:
    """Fetch `url` into `part`, going on where an earlier attempt stopped, until `size` bytes are there.

    Args:
        url: http address.
        part: the unfinished file.
        size: what it must come to.
        wait: called with the seconds to pause before a new attempt.

    Returns:
        The MD5 that the server gives for the file, if it gives one and was asked.

    Raises:
        OfflineError: if the server can't be reached or refuses.
        DownloadError: if it has another file, or keeps breaking off.
    """
    md5, failures = None, 0
    while (before := _size(part)) != size:
        reason = "the connection broke off"
        try:
            md5 = _fetch(url, part, size)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500:
                raise OfflineError(f"{url}: {reason}.") from error
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if failures == 0:
                raise OfflineError(f"{url} can't be reached ({reason}).") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        failures = failures + 1 if _size(part) <= before else 1
        if failures > ATTEMPTS:
            raise DownloadError(
                f"{url}: {_size(part):,} of {size:,} bytes are there, then {reason}; "
                "run the same command again to go on."
            )
        if _size(part) != size:
            wait(min(2.0 ** (failures - 1), 30))
    return md5


def _fetch(url: str, part: Path, size: int) -> str | None:
    """Make one attempt; return the server's MD5. Network trouble raises `OSError`."""
    if _size(part) > size:
        part.unlink()
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise DownloadError(f"{url}: the server sends another part of the file than the one asked for.")
        if not resumed:  # it ignores ranges: from the beginning
            start = 0
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != size:
            raise DownloadError(
                f"{url} has {start + int(length):,} bytes where {size:,} are expected: "
                "is there a proxy that answers in its place?"
            )
        _save(response, part, start=start, size=size)
        return _server_md5(response.headers)


def _save(response: BinaryIO, part: Path, *, start: int, size: int) -> None:
    bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=part.stem)
    with bar, _writing(part, "ab" if start else "wb") as file:
        while chunk := response.read(CHUNK_BYTES):
            try:
                file.write(chunk)
            except OSError as error:
                raise DownloadError(f"{part} can't be written: {error.strerror}.") from error
            bar.update(len(chunk))


def _writing(path: Path, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, path.open(mode, buffering=0))
    except OSError as error:
        raise DownloadError(f"{path} can't be written: {error.strerror}.") from error


def _server_md5(headers: Message) -> str | None:
    """Return the MD5 in Content-MD5, or in an ETag that is a plain MD5 (not that of a multi-part upload)."""
    if content := headers.get("Content-MD5"):
        return b64decode(content).hex()
    tag = (headers.get("ETag") or "").strip('"').lower()
    return tag if len(tag) == HEX_MD5_LENGTH and set(tag) <= set("0123456789abcdef") else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# Check and unpack


def fault(path: Path, size: int, md5: str | None) -> str | None:
    """Return what is wrong with a zip file by its size and checksum; None if nothing is."""
    if _size(path) != size:
        return f"it has {_size(path):,} bytes where {size:,} are expected"
    if md5 is None:
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"check {path.name}") as bar,
    ):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return None if digest.hexdigest() == md5 else f"its MD5 is {digest.hexdigest()} where {md5} is expected"


def unpack(path: Path, archive: Archive, root: Path) -> None:
    """Unpack the wanted members into `root`, each checked against its CRC before it gets its name.

    Raises:
        DownloadError: for a damaged zip file, an unsafe member name, or a wrong number of members.
    """
    try:
        with zipfile.ZipFile(path) as content:
            for name in content.namelist():
                if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
                    raise DownloadError(f"{path} holds the unsafe name {name!r}; nothing was unpacked.")
            members = [member for member in content.infolist() if archive.wants(member.filename)]
            if len(members) != archive.files:
                found = f"{len(members):,} of the {archive.files:,} files"
                raise DownloadError(f"{path} holds {found} expected in {archive.folder}/; nothing was unpacked.")
            (root / archive.folder).mkdir(exist_ok=True)
            for member in tqdm(members, unit="file", desc=f"unpack {path.name}"):
                _unpack_member(content, member, root / member.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{path} is damaged ({error}): delete it and run the same command again.") from error


def _unpack_member(content: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one member as a plain file, under a temporary name until it is whole; skip one that is there."""
    if _size(target) == member.file_size and target.is_file() and zlib.crc32(target.read_bytes()) == member.CRC:
        return
    unfinished = target.with_name(target.name + ".part")
    try:
        with content.open(member) as source, unfinished.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)  # raises BadZipFile where the CRC differs
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def obtain(archive: Archive, root: Path, *, host: str, wait: Callable[[float], None]) -> None:
    """Bring the files of one archive into `root`: from a zip file that is there, else from the server."""
    path = root / archive.name
    if path.is_file():
        if problem := fault(path, archive.size, archive.md5):
            raise DownloadError(f"{path} is not the official file: {problem}. Delete it to have it fetched.")
    else:
        part = root / f"{archive.name}.part"
        server_md5 = download(f"{host}/{archive.address}", part, archive.size, wait)
        if problem := fault(part, archive.size, archive.md5 or server_md5):
            part.unlink()
            raise DownloadError(f"{archive.name} arrived damaged and was deleted ({problem}): run the command again.")
        part.replace(path)
    unpack(path, archive, root)


# Command


def missing_bytes(archives: Sequence[Archive], root: Path, *, delete_zips: bool) -> int:
    """Return how many more bytes the disk must take."""
    fetch = [a.size - max(_size(root / a.name), _size(root / f"{a.name}.part")) for a in archives]
    files = sum(max(0, a.unpacked - a.unpacked_bytes(root)) for a in archives)
    return files + (max(fetch, default=0) if delete_zips else sum(fetch))


def run(
    archives: Sequence[Archive], root: Path, *, host: str, delete_zips: bool, wait: Callable[[float], None]
) -> None:
    """Obtain every archive that is not complete yet."""
    root.mkdir(parents=True, exist_ok=True)
    todo = [archive for archive in archives if not archive.is_unpacked(root)]
    need, free = missing_bytes(todo, root, delete_zips=delete_zips), shutil.disk_usage(root).free
    if need > free:
        hint = "" if delete_zips else " (--delete-zips takes about half)"
        raise DownloadError(f"{root} has {free / 1e9:.1f} GB free and {need / 1e9:.1f} GB are needed{hint}.")
    for archive in archives:
        if archive in todo:
            try:
                obtain(archive, root, host=host, wait=wait)
            except OfflineError as error:
                rest = ", ".join(f"{host}/{a.address}" for a in todo if not (root / a.name).is_file())
                raise OfflineError(
                    f"{error} Without a network here, fetch {rest} elsewhere, put the zip files into "
                    f"{root.resolve()} and run this command again: it checks and unpacks them."
                ) from error
            if delete_zips:
                (root / archive.name).unlink()
        print(f"{archive.folder}: complete")


def main(
    argv: Sequence[str] | None = None,
    archives: Mapping[int, Mapping[str, Archive]] = ARCHIVES,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where the data set lives (data.root)")
    parser.add_argument("--year", type=int, choices=sorted(archives), default=2017)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="fetch only these")
    parser.add_argument("--delete-zips", action="store_true", help="delete each zip file once it is unpacked")
    parser.add_argument("--host", default=HOST, help="a mirror with the same paths (default: %(default)s)")
    arguments = parser.parse_args(argv)
    chosen = [archive for part, archive in archives[arguments.year].items() if part in (arguments.only or PARTS)]
    try:
        host = arguments.host.rstrip("/")
        run(chosen, arguments.root, host=host, delete_zips=arguments.delete_zips, wait=wait)
    except (DownloadError, OSError) as error:
        print(f"download_coco: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download_coco: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
