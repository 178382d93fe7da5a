"""Your own captions: CSV, TSV or JSON lines with `image,caption[,split]`; `captions.txt` without a header."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_tell.data.photos import (
    SPLIT_NAMES,
    Photo,
    PhotoDataset,
    Verify,
    checked_records,
    encodable,
    existing_root,
    printable,
    read_lines,
    read_text,
)
from prune_tell.data.records import Problems, Split, datasets
from prune_tell.errors import UserError

DELIMITERS = {".csv": ",", ".txt": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: an image with any number of captions, and the split it asks for (empty: none)."""

    where: str
    image: str
    captions: list[Any]
    split: str


@dataclass(slots=True)
class Group:
    """All rows of one image."""

    split: Split | None = None
    captions: list[Any] = field(default_factory=list)


@datasets.register("table")
def table(
    *,
    problems: Problems,
    file: str | None = None,
    root: str | None = None,
    val_share: float = 0.1,
    test_share: float = 0.1,
    verify: Verify = "quick",
    name: str = "table",
) -> PhotoDataset:
    """Read a table of captions; several rows of an image give it several captions.

    An image whose rows name no split is put into one by a hash of its name, so that it stays there when the
    table grows or is reordered.

    Args:
        problems: the report of what can't be used.
        file: a `.csv` or `.txt` (comma), `.tsv` (tab) or `.jsonl`/`.ndjson` file. Columns `image`, `caption`
            and, if you like, `split`; others are ignored. Without a header, a CSV has image, caption.
            A JSON line may have `captions`, a list, instead.
        root: where relative image paths start; the folder of `file` if null.
        val_share: about this share of the images without a split validates (0 to 1).
        test_share: the same for the test split.
        verify: see `prune_tell.data.photos.checked_records`.
        name: of the data set.

    Raises:
        UserError: for a missing file, an unknown kind of file, missing columns, or shares out of range.
    """
    if val_share < 0 or test_share < 0 or val_share + test_share >= 1:
        raise UserError(
            f"data.val_share={val_share}, data.test_share={test_share}: at least 0 each and together below 1"
        )
    if file is None:
        raise UserError("data.file is not set: set it to your table of captions, for example data.file=captions.csv")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"data.file={file} is not a file")
    folder = path.parent if root is None else existing_root(root, "the images that data.file names")
    groups: dict[str, Group] = {}
    for row in _rows(path, problems):
        _add_row(groups, row, problems)
    photos = (
        Photo(image, group.split or hashed_split(image, val_share, test_share), folder / image, group.captions)
        for image, group in groups.items()
    )
    return PhotoDataset(name, checked_records(photos, problems=problems, verify=verify, source=path))


def hashed_split(image: str, val_share: float, test_share: float) -> Split:
    """Choose the split of an image by its name alone."""
    digest = hashlib.sha256(image.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < val_share:
        return "val"
    return "test" if place < val_share + test_share else "train"


def _add_row(groups: dict[str, Group], row: Row, problems: Problems) -> None:
    """Add a row to the group of its image, unless it is unusable or contradicts an earlier row."""
    if not all(encodable(text) for text in (row.image, *row.captions) if isinstance(text, str)):
        problems.add("undecodable text", row.where, "the row is not UTF-8")
        return
    if not row.image.strip():
        problems.add("caption without image", row.where, "the image column is empty")
        return
    split = SPLIT_NAMES.get(row.split.strip().lower())
    if row.split.strip() and split is None:
        choices = ", ".join(SPLIT_NAMES)
        problems.add("malformed line", row.where, f"split '{printable(row.split)}' is unknown (one of: {choices})")
        return
    image = os.path.normpath(row.image.strip())
    group = groups.setdefault(image, Group(split))
    if group.split is None:
        group.split = split
    elif split is not None and split != group.split:
        detail = f"{image} is in {group.split} and again in {split}; the first is kept"
        problems.add("duplicate id", row.where, detail)
        return
    group.captions += row.captions


def _rows(path: Path, problems: Problems) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_rows(path, problems)
    if suffix in DELIMITERS:
        return _csv_rows(path, DELIMITERS[suffix], problems)
    allowed = ", ".join((*DELIMITERS, *JSON_LINES))
    raise UserError(f"data.file={path} has an unknown ending (one of: {allowed})")


def _json_rows(path: Path, problems: Problems) -> Iterator[Row]:
    for where, line in read_lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            problems.add("malformed line", where, f"not valid JSON: {printable(error)}")
            continue
        image = entry.get("image") if isinstance(entry, dict) else None
        captions = entry.get("captions", []) if isinstance(entry, dict) else None
        if not isinstance(image, str) or not isinstance(captions, list):
            detail = "not an object with 'image' (text) and 'caption' (text) or 'captions' (a list)"
            problems.add("malformed line", where, detail)
            continue
        if "caption" in entry:
            captions = [entry["caption"], *captions]
        yield Row(where, image, captions, str(entry.get("split") or ""))


def _csv_rows(path: Path, delimiter: str, problems: Problems) -> Iterator[Row]:
    # Strict, so that a stray quote is an error here instead of swallowing the lines up to the next one.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        first_line = reader.line_num + 1
        where = f"{path}:{first_line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = f"lines {first_line} to {reader.line_num}" if reader.line_num > first_line else "the line"
            problems.add("malformed line", where, f"{lost} can't be read: {error}")
            continue
        if not any(cell.strip() for cell in row):
            continue
        if columns is None:
            columns = _header(row, path)
            if columns:
                continue
            columns = ["image", "caption"]
        if columns[-1] == "caption" and len(row) > len(columns):  # commas of a caption that was not quoted
            row[len(columns) - 1 :] = [delimiter.join(row[len(columns) - 1 :])]
        if len(row) != len(columns):
            problems.add("malformed line", where, f"{len(row)} columns where {len(columns)} are expected")
            continue
        cells = dict(zip(columns, row, strict=True))
        yield Row(where, cells["image"], [cells["caption"]], cells.get("split", ""))


def _header(row: list[str], path: Path) -> list[str]:
    """Return the column names if `row` is a header, an empty list if it is data."""
    columns = [cell.strip().lower() for cell in row]
    if {"image", "caption"} <= set(columns):
        return columns
    if len(row) >= 2 and Path(row[0].strip()).suffix:
        return []
    found = ", ".join(printable(cell.strip()) for cell in row)
    raise UserError(
        f"data.file={path} should begin with a header that has 'image' and 'caption' (and perhaps 'split'), "
        f"or have the columns image, caption and no header; its first line is: {found}"
    )
