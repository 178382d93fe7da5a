"""`python -m prune_tell.caption checkpoint=RUN images=FILE_OR_DIR`: prints `file<TAB>caption`, one line per image."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt
from torch import Tensor
from tqdm import tqdm

from prune_tell.build import LoadedRun, load_run, merged_generation, pick_device
from prune_tell.config import convert, plain, run_verb
from prune_tell.data.photos import open_photo
from prune_tell.data.transforms import build_transform
from prune_tell.decoding.generate import generate
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation
from prune_tell.pictures.attention import draw_attention
from prune_tell.training.checkpoint import Which
from prune_tell.training.loop import autocast_for
from prune_tell.training.settings import Precision

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """List files as given, and the pictures in folders (all depths) in the order of their names.

    Raises:
        UserError: if a place does not exist, or there is no picture at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            pictures = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
            found += sorted(path for path in pictures if not path.stem.endswith("_attention"))  # our own drawings
        elif place.exists():
            found.append(place)
        else:
            raise UserError(f"images={place} does not exist (a picture, a folder of pictures, or a list of them)")
    if not found:
        raise UserError(f"images={', '.join(map(str, places))} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return found


def caption(cfg: DictConfig) -> list[dict[str, str]]:
    """Caption files and folders; unreadable files are reported on stderr and the rest go on.

    Args:
        cfg: a composed `caption` config.

    Returns:
        Rows `{image_id, caption}`, as written to `captions.json`.
    """
    if cfg.checkpoint is None or cfg.images is None:
        key = "checkpoint" if cfg.checkpoint is None else "images"
        raise UserError(f"{key} is not set: caption needs checkpoint=RUN images=FILE_OR_DIR")
    batch_size = convert(PositiveInt, cfg.batch_size, "batch_size")
    with_attention = convert(bool, cfg.attention, "attention")
    places = convert(list[str], [cfg.images] if isinstance(cfg.images, str) else plain(cfg.images), "images")
    files = find_images(places)
    device = pick_device(cfg.device)
    autocast = autocast_for(device, convert(Precision, cfg.precision, "precision"))
    run = load_run(Path(cfg.checkpoint), device=device, which=convert(Which | None, cfg.which, "which"))
    generation = merged_generation(run, plain(cfg.generation))
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = picture_paths(files, out) if with_attention else {}
    rows: list[dict[str, str]] = []
    unreadable: list[str] = []
    with tqdm(total=len(files), desc="captions", unit="image", disable=len(files) == 1) as bar:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            rows += caption_batch(run, batch, generation, pictures, device, autocast, unreadable)
            bar.update(len(batch))
    (out / "captions.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False), encoding="utf-8")
    for reason in unreadable:
        print(f"unreadable, left out: {reason}", file=sys.stderr)
    if not rows:
        raise UserError(f"images={cfg.images}: none of the {len(files)} files could be read")
    return rows


def picture_paths(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Name an attention picture for each file; files of the same name in different folders get a number."""
    paths: dict[Path, Path] = {}
    for file in files:
        names = (f"{file.stem}{number}_attention.png" for number in ("", *(f"_{n}" for n in range(2, len(files) + 2))))
        paths[file] = next(out / name for name in names if out / name not in paths.values())
    return paths


def caption_batch(
    run: LoadedRun,
    files: Sequence[Path],
    generation: Generation,
    pictures: Mapping[Path, Path],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    unreadable: list[str],
) -> list[dict[str, str]]:
    """Caption some files, print their lines, and draw the attention of those that `pictures` names."""
    transform = build_transform(run.recipe)
    readable: list[Path] = []
    images: list[Tensor] = []
    for file in files:
        try:
            images.append(transform(open_photo(file)))
            readable.append(file)
        except OSError as error:
            unreadable.append(str(error))
    if not images:
        return []
    with torch.inference_mode(), autocast():
        images_BCHW = torch.stack(images).to(device)
        sight = run.captioner.look(images_BCHW)
        written = generate(
            run.captioner.decoder,
            sight,
            beams=generation.beams,
            max_length=generation.max_length,
            alpha=generation.length_penalty,
        )
    rows: list[dict[str, Any]] = []
    for file, words in zip(readable, written.words, strict=True):
        text = " ".join(run.tokenizer.decode(words).split())
        print(f"{file}\t{text}", flush=True)
        rows.append({"image_id": str(file), "caption": text})
    if pictures:
        paths = [pictures[file] for file in readable]
        draw_attention(run.captioner, images_BCHW, sight, written.words, run.tokenizer, run.recipe, paths)
    return rows


def main() -> None:
    """Run from the command line."""
    run_verb("caption", caption)


if __name__ == "__main__":
    main()
