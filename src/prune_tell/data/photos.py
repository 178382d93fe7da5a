"""Captioned photographs on disk: the part that every annotation format shares.

A format module turns its annotation files into `Photo` entries; `checked_records` sorts out what can't be
used and `PhotoDataset` serves the rest. What can be wrong, as counted in the report of `Problems`:

- `"missing image"`: an annotated image has no file;
- `"unreadable image"`: its file is empty, cut short or no picture;
- `"duplicate id"`: an image occurs twice, within a split or across splits (the first is kept);
- `"image without caption"`, `"empty caption"`, `"caption without image"`;
- `"undecodable text"`, `"malformed line"`, `"malformed entry"`: text that can't be understood.
"""

import json
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from prune_tell.data.records import SPLITS, Problems, Record, Split
from prune_tell.errors import UserError

Verify = Literal["quick", "full", "none"]

# How annotation files call the three splits; Karpathy's `restval` (COCO val images left over) trains.
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k-images", "flickr30k_images")

# Per format: what introduces the pixels, what ends the file. Other formats have no cheap sign of their end.
JPEG_MARKS = (b"\xff\xda", b"\xff\xd9")  # start of scan, end of image
MARKS = {"JPEG": JPEG_MARKS, "MPO": JPEG_MARKS, "PNG": (b"IDAT", b"IEND\xaeB`\x82")}

# Threads hide the latency of cold and network disks; a batch per task keeps their overhead small.
THREADS = 8
FILES_PER_TASK = 64


@dataclass(frozen=True, slots=True)
class Photo:
    """One image as its annotation file describes it, before any check.

    Attributes:
        image_id: the data set's own id.
        split: where the annotation file puts it.
        path: where its file should be.
        captions: as found; an item that is not a string counts as an empty caption.
    """

    image_id: int | str
    split: Split
    path: Path
    captions: Sequence[Any]


@dataclass(frozen=True)
class PhotoDataset:
    """Captioned photographs (see `prune_tell.data.records.Dataset`).

    Attributes:
        name: what reports and caches call it.
        splits: the records of each split, in the order of the annotation files.
    """

    name: str
    splits: Mapping[Split, Sequence[Record]]

    def records(self, split: Split) -> Sequence[Record]:
        """Return the records of `split`; an empty sequence where the data set has no such split."""
        return self.splits.get(split, ())

    def open(self, record: Record) -> Image.Image:
        """Return the photograph of `record`, see `open_photo`."""
        return open_photo(Path(str(record.location)))


def fold(text: str) -> str:
    """Collapse every run of whitespace (newlines too) to one blank and trim the ends; change nothing else."""
    return " ".join(text.split())


# Pixels


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever PIL raises over a bad file into an `OSError` that names the file."""
    try:
        yield
    except FileNotFoundError:  # names the file already, and callers tell it apart
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is not a picture of any known format") from error
    except Exception as error:  # a broken file can raise nearly anything: SyntaxError, struct.error, EOFError, ...
        raise OSError(f"{path} can't be read: {error or type(error).__name__}") from error


def open_photo(path: Path) -> Image.Image:
    """Read a picture of any mode as upright 8-bit RGB; what is transparent becomes white.

    Raises:
        OSError: naming `path`, if it is missing, no picture, damaged, or too large to be decoded safely.
    """
    with _reading(path), Image.open(path) as image:
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception as error:  # the pixels are good: a damaged note on orientation is no reason to lose them
            warnings.warn(f"{path}: damaged EXIF data, taken as upright ({error})", stacklevel=2)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: deep grey is scaled (not clipped), transparency is laid on white."""
    if image.mode.startswith(("I", "F")):
        return _scale_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scale_deep_grey(image: Image.Image) -> Image.Image:
    """Map modes I;16, I and F linearly to 0..255: from 0 to the top of the range that they seem to use."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = float(values.max())
    ranges = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0)
    full = next((value for value in ranges if top <= value), top)
    return Image.fromarray((values.clip(0, full) * (255 / full) + 0.5).astype(np.uint8))


# Checks


def checked_records(
    photos: Iterable[Photo], *, problems: Problems, verify: Verify, source: Path
) -> dict[Split, tuple[Record, ...]]:
    """Make records of the photographs that can be used, and name the rest in `problems`.

    Args:
        photos: what the annotation files list.
        problems: the report; raises at the first problem if it is set to refuse.
        verify: `"quick"` opens every file, reads its header and looks for its end mark (formats that have
            none, unlike JPEG and PNG, are decoded); `"full"` decodes every file; `"none"` touches no file.
        source: the annotation file, for messages.

    Returns:
        The records of each split, in the order of `photos`.

    Raises:
        UserError: if `verify` is unknown, nothing is left, or `problems` refuses.
    """
    if verify not in get_args(Verify):
        raise UserError(f"data.verify={verify} is unknown (one of: {', '.join(get_args(Verify))})")
    known: dict[int | str, Split] = {}
    candidates: list[tuple[Split, Record, Path]] = []
    listed = 0
    for photo in photos:
        listed += 1
        if photo.image_id in known:
            places = f"in {known[photo.image_id]} and again in {photo.split}"
            problems.add("duplicate id", printable(photo.image_id), f"it is {places}; the first is kept")
            continue
        known[photo.image_id] = photo.split
        if not encodable(str(photo.image_id)):
            problems.add("undecodable text", printable(photo.path), "the name of the image is not UTF-8")
            continue
        captions = tuple(_usable_captions(photo, problems))
        if captions:
            candidates.append((photo.split, Record(photo.image_id, photo.path, captions), photo.path))
        else:
            problems.add("image without caption", printable(photo.path), "no usable caption names this image")
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    with closing(_with_faults(candidates, verify)) as pairs:  # a refusal stops the remaining checks
        for (split, record, path), fault in pairs:
            if fault is None:
                splits[split].append(record)
            else:
                problems.add(fault[0], printable(path), fault[1])
    if not any(splits.values()):
        first = f"; the first problem: {problems.items[0]['detail']}" if problems.items else ""
        raise UserError(f"{source}: none of the {listed:,} images it lists can be used{first}")
    return {split: tuple(records) for split, records in splits.items()}


def _usable_captions(photo: Photo, problems: Problems) -> Iterator[str]:
    for caption in photo.captions:
        text = fold(caption) if isinstance(caption, str) else ""
        if not text:
            problems.add("empty caption", printable(photo.path), f"a caption is {caption!r}")
        elif not encodable(text):
            problems.add("undecodable text", printable(photo.path), f"a caption holds invalid characters: {text!r}")
        else:
            yield text


Fault = tuple[str, str]  # kind and detail, as `Problems.add` takes them
Candidate = tuple[Split, Record, Path]


def _with_faults(candidates: list[Candidate], verify: Verify) -> Generator[tuple[Candidate, Fault | None], None, None]:
    """Pair every candidate with what is wrong with its file, in order; with a bar if it takes a while."""
    if verify == "none":
        yield from ((candidate, None) for candidate in candidates)
        return
    Image.init()  # load PIL's format readers once, before the threads would race for it
    tasks = [candidates[i : i + FILES_PER_TASK] for i in range(0, len(candidates), FILES_PER_TASK)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        with tqdm(total=len(candidates), desc="checking photographs", unit="file", delay=2, leave=False) as bar:
            for task, faults in zip(
                tasks, pool.map(lambda task: [file_fault(c[2], verify) for c in task], tasks), strict=True
            ):
                yield from zip(task, faults, strict=True)
                bar.update(len(task))
    finally:
        pool.shutdown(cancel_futures=True)


def file_fault(path: Path, verify: Verify) -> Fault | None:
    """Return what is wrong with an image file as (kind, detail); None if nothing was found."""
    try:
        with _reading(path), path.open("rb") as file:
            if not file.read(1):
                return "unreadable image", f"{path} is empty"
            file.seek(0)
            with Image.open(file) as image:
                marks = MARKS.get(image.format or "")
            if marks and not _has_end(file, *marks):
                return "unreadable image", f"{path} is cut short: it has no end mark"
        if verify == "full" or not marks:
            open_photo(path)
    except FileNotFoundError:
        return "missing image", f"{printable(path)} does not exist"
    except OSError as error:
        return "unreadable image", printable(error)
    return None


def _has_end(file: BinaryIO, start: bytes, end: bytes) -> bool:
    """Whether the end mark comes after the pixels: at the very end, or before padding or appended data."""
    file.seek(-len(end), os.SEEK_END)
    if file.read() == end:
        return True
    file.seek(0)
    content = file.read()  # rare: padding, a camera's trailer, or a file cut short
    return content.rfind(end) > content.rfind(start)


# Annotation files


def image_folder(root: Path, images: str | None) -> Path:
    """Return the folder of the photographs: `images` if given, else a usual name that exists, else `root`."""
    if images is not None:
        folder = root / images
        if not folder.is_dir():
            raise UserError(f"data.images={images} is not a folder under {root}")
        return folder
    return next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)


def existing_root(root: str | None, holds: str) -> Path:
    """Return `data.root` as a path.

    Args:
        root: as configured.
        holds: what the folder should hold and where to get it, for the message.

    Raises:
        UserError: if it is not set or no folder.
    """
    if root is None:
        raise UserError(f"data.root is not set: set it to the folder that holds {holds}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data.root={root} is not a folder: set it to the folder that holds {holds}")
    return path


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark; undecodable bytes stay visible to `encodable`.

    Raises:
        UserError: if the file can't be opened.
    """
    try:
        return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield `(FILE:NUMBER, line)` for every line that is not blank; only a newline ends a line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is missing or not valid JSON in UTF-8.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def encodable(text: str) -> bool:
    """Whether `text` is free of what is left of undecodable bytes (or of half a JSON escape)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value: object) -> str:
    """Return `value` as text that can be written to any UTF-8 file."""
    return str(value).encode(errors="backslashreplace").decode()
