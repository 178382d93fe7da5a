"""`python -m prune_tell.caption checkpoint=RUN images=FILE_OR_DIR`: prints `file<TAB>caption`, one line per image."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from prune_tell.build import LoadedRun, load_run, pick_device
from prune_tell.config import convert, plain, run_verb
from prune_tell.data.photos import open_photo
from prune_tell.data.transforms import build_transform
from prune_tell.decoding.generate import generate
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation
from prune_tell.pictures.attention import draw_attention
from prune_tell.training.loop import autocast_for

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """List files as given, and the pictures in folders (all depths) in the order of their names.

    Raises:
        UserError: if a place does not exist, or there is no picture at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
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
    places = convert(list[str], [cfg.images] if isinstance(cfg.images, str) else plain(cfg.images), "images")
    files = find_images(places)
    device = pick_device(cfg.device)
    run = load_run(Path(cfg.checkpoint), device=device, which=cfg.which)
    generation = Generation(
        **(plain(run.cfg.generation) | {k: v for k, v in plain(cfg.generation).items() if v is not None})
    )
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    unreadable: list[str] = []
    with tqdm(total=len(files), desc="captions", unit="image", disable=len(files) == 1) as bar:
        for start in range(0, len(files), cfg.batch_size):
            batch = files[start : start + cfg.batch_size]
            rows += caption_batch(run, batch, generation, cfg, device, out, unreadable)
            bar.update(len(batch))
    (out / "captions.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False), encoding="utf-8")
    for reason in unreadable:
        print(f"unreadable, left out: {reason}", file=sys.stderr)
    if not rows:
        raise UserError(f"images={cfg.images}: none of the {len(files)} files could be read")
    return rows


def caption_batch(
    run: LoadedRun,
    files: Sequence[Path],
    generation: Generation,
    cfg: DictConfig,
    device: torch.device,
    out: Path,
    unreadable: list[str],
) -> list[dict[str, str]]:
    """Caption some files, print their lines, and draw their attention if asked for."""
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
    with torch.inference_mode(), autocast_for(device, cfg.precision)():
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
    if cfg.attention:
        draw_attention(
            run.captioner,
            images_BCHW,
            sight,
            written.words,
            run.tokenizer,
            run.recipe,
            [out / f"{f.stem}_attention.png" for f in readable],
        )
    return rows


def main() -> None:
    """Run from the command line."""
    run_verb("caption", caption)


if __name__ == "__main__":
    main()
