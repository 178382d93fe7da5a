"""Scores as papers print them.

`python -m prune_tell.evaluate checkpoint=RUN split=val`, or `predictions=FILE references=FILE`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from tqdm import tqdm

from prune_tell.build import (
    build_dataset,
    cached_features,
    data_settings,
    load_run,
    make_items,
    merged_generation,
    pick_device,
    split_records,
)
from prune_tell.config import convert, plain, run_verb
from prune_tell.data.loader import eval_loader
from prune_tell.data.records import SPLITS
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import caption_split
from prune_tell.evaluation.files import read_predictions, read_references
from prune_tell.evaluation.scorers import METRICS, CaptionScorer, Scores
from prune_tell.train import write_captions
from prune_tell.training.checkpoint import Which
from prune_tell.training.loop import autocast_for
from prune_tell.training.settings import Precision


def evaluate(cfg: DictConfig) -> Scores:
    """Score a checkpoint on a split, or a file of captions against a file of references.

    Args:
        cfg: a composed `evaluate` config.

    Raises:
        UserError: if neither or both are asked for, or anything in them is wrong.
    """
    metrics = convert(list[str], plain(cfg.metrics), "metrics")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"metrics={unknown[0]} is unknown (one or more of: {', '.join(METRICS)})")
    files = [cfg.predictions is not None, cfg.references is not None]
    if (cfg.checkpoint is not None) == any(files) or (any(files) and not all(files)):
        raise UserError("evaluate needs either checkpoint=RUN, or predictions=FILE together with references=FILE")
    if cfg.checkpoint is None:
        out = Path(cfg.out or ".")
        scores = CaptionScorer(read_references(Path(cfg.references))).score(
            read_predictions(Path(cfg.predictions)), metrics
        )
    else:
        out = Path(cfg.out or Path(cfg.checkpoint) / f"evaluate_{cfg.split}")
        scores = evaluate_checkpoint(cfg, out, metrics)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(scores.to_json(), indent=1))
    for name, value in scores.scores.items():
        print(f"{name:<8} {'null' if value is None else f'{100 * value:6.1f}'}")
    tqdm.write(
        f"scores x100; {out / 'scores.json'} holds them on the 0..1 scale, with those of every image",
        file=sys.stderr,
    )
    return scores


def evaluate_checkpoint(cfg: DictConfig, out: Path, metrics: list[str]) -> Scores:
    """Caption a split of the run's own data set, or of the one that `data.*` overrides describe."""
    if cfg.split not in SPLITS:
        raise UserError(f"split={cfg.split} is unknown (one of: {', '.join(SPLITS)})")
    device = pick_device(cfg.device)
    autocast = autocast_for(device, convert(Precision, cfg.precision, "precision"))
    max_images = convert(PositiveInt | None, cfg.max_images, "max_images")
    batch_size = convert(PositiveInt, cfg.batch_size, "batch_size")
    run = load_run(Path(cfg.checkpoint), device=device, which=convert(Which | None, cfg.which, "which"))
    if cfg.data:
        run.cfg = OmegaConf.merge(run.cfg, {"data": cfg.data})  # type: ignore[assignment]
    generation = merged_generation(run, plain(cfg.generation))
    dataset, problems = build_dataset(run.cfg)
    records = split_records(dataset, cfg.split)[:max_images]
    cache = cached_features(run.captioner, run.recipe, records, dataset, run.cfg, device=device, what=cfg.split)
    settings = data_settings(run.cfg)
    items = make_items(records, dataset, run.tokenizer, run.recipe, settings, seed=0, training=False, cache=cache)
    batches = tqdm(
        eval_loader(items, batch_size=batch_size, num_workers=settings.num_workers),
        desc=f"captioning {cfg.split}",
    )
    result = caption_split(run.captioner, batches, run.tokenizer, generation, device=device, autocast=autocast)
    for failure in result.failures:
        problems.add("unreadable image", str(failure.image_id), failure.reason)
    scores = CaptionScorer(result.references).score(result.captions, metrics)
    out.mkdir(parents=True, exist_ok=True)
    write_captions(out / "captions.json", result.captions)
    problems.write(out / "data_problems.json")
    summary: dict[str, Any] = {
        "split": cfg.split,
        "loss": result.loss,
        "token_accuracy": result.token_accuracy,
    }
    summary |= {
        "scores": scores.scores,
        "kept_tokens": result.kept_tokens,
        "total_tokens": result.total_tokens,
    }
    summary |= {
        "images_per_second": result.images_per_second,
        "captions_per_second": result.captions_per_second,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return scores


def main() -> None:
    """Run from the command line."""
    run_verb("evaluate", evaluate)


if __name__ == "__main__":
    main()
