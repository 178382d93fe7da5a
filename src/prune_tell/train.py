"""`python -m prune_tell.train backbone=vit prune_ratio=0.3`: train a captioner, score it, draw its curves."""

import json
import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from prune_tell.build import (
    build_captioner,
    build_dataset,
    cached_features,
    data_settings,
    make_items,
    model_options,
    pick_device,
    preprocessing_for,
    train_tokenizer,
    training_records,
)
from prune_tell.config import arguments, convert, plain, run_dir, run_verb
from prune_tell.data.loader import CaptionItems, eval_loader
from prune_tell.data.records import SPLITS, Dataset, Record, Split
from prune_tell.data.transforms import to_display
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation, SplitResult, caption_split
from prune_tell.evaluation.scorers import CaptionScorer
from prune_tell.models.captioner import Captioner
from prune_tell.pictures.curves import draw_curves
from prune_tell.training.checkpoint import find_checkpoint, load_checkpoint
from prune_tell.training.loop import Progress, autocast_for, fit
from prune_tell.training.memory import peak_memory, reset_peak_memory
from prune_tell.training.settings import TrainSettings
from prune_tell.training.tracking import Tracker

MEASURED = (
    "token_accuracy",
    "loss",
    "scores",
    "kept_tokens",
    "total_tokens",
    "images_per_second",
    "captions_per_second",
    "train_token_accuracy",
)
"""Keys of every summary; null where there was nothing to measure on."""


def train(cfg: DictConfig, out: Path | None = None) -> float:
    """Train as `cfg` says and leave everything in the run's folder.

    Args:
        cfg: a composed `train` config.
        out: the run's folder; `cfg.run_dir` where None.

    Returns:
        The tracked metric of the best weights (higher is better; a loss comes negative), for sweeps.

    Raises:
        UserError: for an impossible config, before any work starts.
    """
    settings = TrainSettings(**arguments(TrainSettings, plain(cfg.trainer), key="trainer"))
    generation = Generation(**arguments(Generation, plain(cfg.generation), key="generation"))
    data, device = data_settings(cfg), pick_device(cfg.device)
    seed, backbone_lr = convert(int, cfg.seed, "seed"), convert(float | None, cfg.backbone.lr, "backbone.lr")
    autocast = autocast_for(device, settings.precision)
    convert(float, cfg.prune_ratio, "prune_ratio")
    convert(Split, cfg.final_split, "final_split")
    model_options(cfg)
    out = out or Path(cfg.run_dir)
    resume = wants_resume(cfg, out)
    torch.manual_seed(seed)
    reset_peak_memory(device)
    begun = time.time()

    # The data, the words, the model.
    dataset, problems = build_dataset(cfg)
    train_records, val_records = training_records(dataset, data), dataset.records("val")
    final_records = final_split_records(cfg, dataset)
    for what, count in (("val", len(val_records[: settings.validate_images])), (cfg.final_split, len(final_records))):
        if count == 1:
            raise UserError(f"the {what} split has 1 image to score, but scores need 2 or more (or none at all)")
    tokenizer = train_tokenizer(train_records, data)
    captioner = build_captioner(cfg, vocab_size=len(tokenizer), max_length=data.max_length).to(device)
    recipe = preprocessing_for(captioner.backbone, plain(cfg.backbone))
    out.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{out}: {describe(captioner, len(train_records), len(val_records), len(tokenizer), device)}")
    problems.write(out / "data_problems.json")
    if problems.items:
        tqdm.write(f"data problems (named in {out / 'data_problems.json'}): {problems.counts()}")

    def items(records: Any, training: bool, what: str) -> CaptionItems:
        cache = cached_features(captioner, recipe, records, dataset, cfg, device=device, what=what)
        views = [
            cached_features(captioner, recipe, records, dataset, cfg, device=device, what=what, view=view)
            for view in range(1, data.cached_views if training and cache else 1)
        ]
        return make_items(
            records,
            dataset,
            tokenizer,
            recipe,
            data,
            seed=seed,
            training=training,
            cache=cache,
            views=[view for view in views if view],
        )

    train_items = items(train_records, True, "train")
    val_items = items(val_records[: settings.validate_images], False, "val")
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg, resolve=True),
        "tokenizer.json": tokenizer.to_text(),
        "preprocessing.json": json.dumps(recipe.to_dict(), indent=1),
    }
    (out / "config.yaml").write_text(files["config.yaml"], encoding="utf-8")

    def show(tracker: Tracker, step: int, result: SplitResult) -> None:
        tracker.show(step, [(to_display(picture(r), recipe), result.captions[r.image_id]) for r in result.records[:4]])
        draw_curves(out)

    def picture(record: Any) -> torch.Tensor:
        return make_items([record], dataset, tokenizer, recipe, data, seed=0, training=False, cache=None)[0, 0].visual  # type: ignore[union-attr,return-value]

    progress = fit(
        captioner,
        train_items=train_items,
        val_items=val_items,
        tokenizer=tokenizer,
        settings=settings,
        generation=generation,
        out=out,
        files=files,
        problems=problems,
        device=device,
        seed=seed,
        num_workers=data.num_workers,
        backbone_lr=backbone_lr,
        resume=resume,
        on_validation=show,
    )
    problems.write(out / "data_problems.json")
    load_checkpoint(find_checkpoint(out, "best"), captioner)

    # The final scores, on all of the chosen split, with every metric.
    def measure(split_items: CaptionItems, how: Generation | None, title: str) -> SplitResult:
        batches = tqdm(eval_loader(split_items, batch_size=64, num_workers=data.num_workers), desc=title, unit="batch")
        return caption_split(captioner, batches, tokenizer, how, device=device, autocast=autocast)

    summary: dict[str, Any] = {"split": cfg.final_split} | dict.fromkeys(MEASURED)
    if final_records:
        what = str(cfg.final_split)
        final_items = val_items if what == "val" and not settings.validate_images else items(final_records, False, what)
        result = measure(final_items, generation, f"captioning {what}")
        scores = CaptionScorer(result.references).score(result.captions)
        write_captions(out / "captions.json", result.captions)
        summary |= {"token_accuracy": result.token_accuracy, "loss": result.loss, "scores": scores.scores}
        summary |= {"score_reasons": scores.reasons, "images": len(result.captions)}
        summary |= {"kept_tokens": result.kept_tokens, "total_tokens": result.total_tokens}
        summary |= {
            "images_per_second": result.images_per_second,
            "captions_per_second": result.captions_per_second,
        }
    if settings.measure_train_accuracy:
        plain_items = make_items(
            train_records,
            dataset,
            tokenizer,
            recipe,
            data,
            seed=seed,
            training=False,
            cache=train_items.cache,
        )
        result = measure(plain_items, None, "accuracy on training captions")
        summary |= {"train_token_accuracy": result.token_accuracy, "train_loss": result.loss}
    summary |= closing(captioner, cfg, progress, device, seed)
    summary |= {"features_cached": train_items.cache is not None, "total_seconds": round(time.time() - begun, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw_curves(out)
    tqdm.write(report(summary, out))
    return progress.best


def final_split_records(cfg: DictConfig, dataset: Dataset) -> Sequence[Record]:
    """The split that the summary scores; only an absent val split is fine, because it was not asked for."""
    records = dataset.records(cfg.final_split)
    if not records and cfg.final_split != "val":
        full = ", ".join(split for split in SPLITS if dataset.records(split))
        raise UserError(f"final_split={cfg.final_split} has no images in this data set (with images: {full})")
    return records


def wants_resume(cfg: DictConfig, out: Path) -> bool:
    """`resume=auto` goes on where `out/checkpoints/last` stands, and starts anew where there is none.

    Raises:
        UserError: for another value, or a run that is already there and would be overwritten.
    """
    if cfg.resume not in ("auto", "never"):
        raise UserError(f"resume={cfg.resume} is not valid: auto (go on from run_dir's last checkpoint) or never")
    try:
        last = find_checkpoint(out, "last")
    except UserError:
        return False
    if cfg.resume == "never":
        raise UserError(
            f"run_dir={out} already holds a run: resume=auto goes on with it, another run_dir starts a new one"
        )
    before, now = OmegaConf.load(last / "config.yaml"), OmegaConf.create(plain(cfg))
    for node in (before, now):
        for key in ("resume", "run_dir"):
            OmegaConf.update(node, key, None)
    if before != now:
        changed = [key for key in now if before.get(key) != now[key]]
        raise UserError(
            f"run_dir={out} was started with another config (changed: {', '.join(map(str, changed))}): "
            "take another run_dir"
        )
    return True


def describe(captioner: Captioner, train: int, val: int, words: int, device: torch.device) -> str:
    """One line about what is going to be trained."""
    backbone = captioner.backbone
    total = sum(p.numel() for p in captioner.parameters())
    trained = sum(p.numel() for p in captioner.parameters() if p.requires_grad)
    rows, columns = backbone.grid
    return (
        f"{train} training and {val} validation images, {words} words; "
        f"{rows}x{columns} tokens of width {backbone.width}; "
        f"{total / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained) on {device}"
    )


def write_captions(path: Path, captions: dict[int | str, str]) -> None:
    """Write captions in COCO's results format."""
    rows = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    path.write_text(json.dumps(rows, indent=0, ensure_ascii=False), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    packages = ("prune-tell", "torch", "torchvision", "timm", "numpy", "tokenizers", "pycocoevalcap")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def closing(
    captioner: Captioner, cfg: DictConfig, progress: Progress, device: torch.device, seed: int
) -> dict[str, Any]:
    """The part of the summary that is about the run, not its quality."""
    return {
        "best": progress.best if math.isfinite(progress.best) else None,  # JSON has no -Infinity
        "best_step": progress.best_step,
        "steps": progress.step,
        "tracked": cfg.trainer.track,
        "parameters": sum(p.numel() for p in captioner.parameters()),
        "peak_memory_bytes": peak_memory(device),
        "seconds": round(progress.seconds, 1),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The name on the chip."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(summary: dict[str, Any], out: Path) -> str:
    """The last words of a run."""
    scores = {name: value for name, value in (summary["scores"] or {}).items() if value is not None}
    told = ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
    kept = f"{summary['kept_tokens'] or 0:.0f} of {summary['total_tokens'] or 0:.0f} tokens kept"
    return (
        f"{summary['split']} (x100): {told}; {kept}\n{out}: captions.json, summary.json, curves.png, checkpoints/best"
    )


def main() -> None:
    """Run from the command line."""
    run_verb("train", lambda cfg: train(cfg, run_dir(cfg)))


if __name__ == "__main__":
    main()
