"""Flickr8k and Flickr30k as published: a text file of captions and a list of file names for each split."""

from collections.abc import Iterator
from pathlib import Path

from prune_tell.data.photos import (
    Photo,
    PhotoDataset,
    Verify,
    checked_records,
    encodable,
    existing_root,
    image_folder,
    printable,
    read_lines,
)
from prune_tell.data.records import Problems, Split, datasets
from prune_tell.errors import UserError


@datasets.register("flickr")
def flickr(
    *,
    problems: Problems,
    root: str | None = None,
    captions: str = "Flickr8k.token.txt",
    train_list: str = "Flickr_8k.trainImages.txt",
    val_list: str | None = "Flickr_8k.devImages.txt",
    test_list: str | None = "Flickr_8k.testImages.txt",
    images: str | None = None,
    verify: Verify = "quick",
    name: str = "flickr",
) -> PhotoDataset:
    """Read `NAME.jpg#0<TAB>caption` lines and split lists; a caption whose image is in no list is ignored.

    Args:
        problems: the report of what can't be used.
        root: the folder of the data set; the other paths start there.
        captions: the file of captions (`Flickr8k.token.txt`, `results_20130124.token`).
        train_list: one file name a line; required.
        val_list: the same; the split is empty where the file is absent or null.
        test_list: the same.
        images: the folder of the photographs; if null, `images` or the official name, else `root`.
        verify: see `prune_tell.data.photos.checked_records`.
        name: of the data set.

    Raises:
        UserError: for a missing folder, caption file or training list.
    """
    base = existing_root(root, f"{captions}, {train_list} and the photographs, for example data.root=/data/{name}")
    required = {"captions": captions, "train_list": train_list}
    for key, value in required.items():
        if not (base / value).is_file():
            raise UserError(f"data.{key}={value} is not a file under {base}")
    lists: dict[Split, str | None] = {"train": train_list, "val": val_list, "test": test_list}
    listed = [(split, file) for split, file in lists.items() if file is not None and (base / file).is_file()]
    names = {split: [line.strip() for _, line in read_lines(base / file)] for split, file in listed}
    wanted = {file_name for found in names.values() for file_name in found}
    texts: dict[str, list[str]] = {}
    for file_name, text in _caption_lines(base / captions, wanted, problems):
        texts.setdefault(file_name, []).append(text)
    folder = image_folder(base, images)
    photos = (
        Photo(file_name, split, folder / file_name, texts.get(file_name, ()))
        for split, found in names.items()
        for file_name in found
    )
    return PhotoDataset(name, checked_records(photos, problems=problems, verify=verify, source=base / captions))


def _caption_lines(file: Path, wanted: set[str], problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield (file name, caption) for the wanted images; name the lines that can't be understood."""
    for where, line in read_lines(file):
        key, tab, text = line.partition("\t")
        file_name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            problems.add("malformed line", where, f"{printable(line[:80])!r} is not NAME#NUMBER<TAB>caption")
        elif not file_name:
            problems.add("caption without image", where, f"{printable(line[:80])!r} names no image")
        elif file_name not in wanted:
            continue
        elif not encodable(line):
            problems.add("undecodable text", where, "the line is not UTF-8")
        else:
            yield file_name, text
