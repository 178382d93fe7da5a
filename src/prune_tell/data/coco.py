"""COCO captions: the official annotation files, and Karpathy's JSON (also made for Flickr8k and 30k)."""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from prune_tell.data.photos import (
    SPLIT_NAMES,
    Photo,
    PhotoDataset,
    Verify,
    checked_records,
    existing_root,
    image_folder,
    printable,
    read_json,
)
from prune_tell.data.records import Problems, Split, datasets
from prune_tell.errors import UserError

YEARS = (2014, 2017)
OFFICIAL_FILES = (
    "COCO's annotations/ and train/val images, for example data.root=/data/coco "
    "(python scripts/download_coco.py --root /data/coco fetches them)"
)


@datasets.register("coco")
def coco(
    *,
    problems: Problems,
    root: str | None = None,
    year: int = 2017,
    images: str | None = None,
    test_images: int = 0,
    verify: Verify = "quick",
    name: str = "coco",
) -> PhotoDataset:
    """Read COCO's official caption files: the train file trains, the val file validates.

    The captions of COCO's own test images are not public; `test_images` sets a part of the val file aside.

    Args:
        problems: the report of what can't be used.
        root: holds `annotations/captions_{train,val}YEAR.json` and the folders `trainYEAR` and `valYEAR`.
        year: 2014 or 2017.
        images: the folder under `root` that holds `trainYEAR` and `valYEAR`, if it is not `root` or `images`.
        test_images: so many images from the end of the val file become the test split; 0 leaves it empty.
        verify: see `prune_tell.data.photos.checked_records`.
        name: of the data set.

    Raises:
        UserError: for a missing folder or file, a file of another format, or a value out of range.
    """
    if year not in YEARS:
        raise UserError(f"data.year={year} is unknown (one of: 2014, 2017)")
    if test_images < 0:
        raise UserError(f"data.test_images={test_images} is out of range (0 or more)")
    base = existing_root(root, OFFICIAL_FILES)
    folder = base if images is None and (base / f"train{year}").is_dir() else image_folder(base, images)
    photos: list[Photo] = []
    for part in ("train", "val"):
        annotations = base / "annotations" / f"captions_{part}{year}.json"
        pictures = folder / f"{part}{year}"
        for path, there in ((annotations, annotations.is_file()), (pictures, pictures.is_dir())):
            if not there:
                raise UserError(f"data.root={root} has no {path.relative_to(base)}: it should hold {OFFICIAL_FILES}")
        found = list(_official_photos(annotations, pictures, SPLIT_NAMES[part], problems))
        if part == "val" and test_images:
            if test_images > len(found):
                raise UserError(
                    f"data.test_images={test_images} is more than the {len(found):,} images of {annotations}"
                )
            test = (Photo(photo.image_id, "test", photo.path, photo.captions) for photo in found[-test_images:])
            found[-test_images:] = list(test)
        photos += found
    return PhotoDataset(name, checked_records(photos, problems=problems, verify=verify, source=base / "annotations"))


def _official_photos(file: Path, folder: Path, split: Split, problems: Problems) -> Iterator[Photo]:
    """Yield the images of one official annotation file, indexed by pycocotools, in the file's order."""
    index = COCO()
    index.dataset = read_json(file)
    try:
        with redirect_stdout(sys.stderr):  # pycocotools prints its progress
            index.createIndex()
        images = index.dataset["images"]
        captions = {image_id: [entry["caption"] for entry in found] for image_id, found in index.imgToAnns.items()}
        entries = [(entry["id"], folder / entry["file_name"]) for entry in images]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a COCO caption file ({type(error).__name__}: {error})") from error
    for image_id, found in captions.items():
        for caption in found if image_id not in index.imgs else ():
            problems.add("caption without image", f"{file}: image_id {image_id}", f"no such image: {caption!r}")
    for image_id, path in entries:
        yield Photo(image_id, split, path, captions.get(image_id, ()))


@datasets.register("karpathy")
def karpathy(
    *,
    problems: Problems,
    root: str | None = None,
    annotations: str = "dataset_coco.json",
    images: str | None = None,
    verify: Verify = "quick",
    name: str = "karpathy",
) -> PhotoDataset:
    """Read the splits of Karpathy and Fei-Fei (https://arxiv.org/abs/1412.2306); `restval` is part of train.

    Args:
        problems: the report of what can't be used.
        root: the folder of the data set.
        annotations: path of `dataset_{coco,flickr8k,flickr30k}.json` from `root`.
        images: the folder of the photographs under `root`; if null, a usual name that exists, else `root`.
            COCO's entries name a folder below it (`train2014`, `val2014`).
        verify: see `prune_tell.data.photos.checked_records`.
        name: of the data set.

    Raises:
        UserError: for a missing folder or file, or a file of another format.
    """
    holds = f"{annotations} and the photographs, for example data.root=/data/{name}"
    if "coco" in annotations:
        holds += f" (python scripts/download_coco.py --root /data/{name} --year 2014 fetches the photographs)"
    base = existing_root(root, holds)
    file = base / annotations
    if not file.is_file():
        raise UserError(
            f"data.annotations={annotations} is not a file under {base}: "
            "put the JSON file of Karpathy's caption_datasets.zip there"
        )
    content = read_json(file)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{file} is not one of Karpathy's JSON files: it has no list 'images'")
    photos = _karpathy_photos(entries, file, image_folder(base, images), problems)
    return PhotoDataset(name, checked_records(photos, problems=problems, verify=verify, source=file))


def _karpathy_photos(entries: list[Any], file: Path, folder: Path, problems: Problems) -> Iterator[Photo]:
    for number, entry in enumerate(entries):
        try:
            file_name = entry["filename"]
            image_id = int(entry["cocoid"]) if "cocoid" in entry else file_name
            captions = [sentence["raw"] for sentence in entry["sentences"]]
            path = folder / entry.get("filepath", "") / file_name
            photo = Photo(image_id, SPLIT_NAMES[entry["split"]], path, captions)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            detail = f"a key is missing or has a wrong value ({type(error).__name__}: {error})"
            problems.add("malformed entry", f"{file}: images[{number}]", printable(detail))
        else:
            yield photo
