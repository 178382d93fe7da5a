"""The training loop: one function, read from top to bottom."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prune_tell.data.loader import Batch, CaptionItems, Failure, eval_loader, train_loader
from prune_tell.data.records import Problems
from prune_tell.data.tokenizer import Tokenizer
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation, SplitResult, caption_split
from prune_tell.evaluation.scorers import CaptionScorer
from prune_tell.models.captioner import Captioner
from prune_tell.training.checkpoint import find_checkpoint, load_checkpoint, load_state, save_checkpoint
from prune_tell.training.ema import WeightAverage
from prune_tell.training.losses import word_loss
from prune_tell.training.optimizer import build_optimizer, lr_factor, set_lr
from prune_tell.training.settings import Precision, TrainSettings
from prune_tell.training.tracking import Tracker


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best: float = -math.inf  # of the tracked metric, higher is better (a loss counts negative)
    best_step: int = 0
    without_gain: int = 0
    seconds: float = 0.0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, correct, words in this epoch
    log_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # the same since the last logged line
    passed_over: int = 0  # batches in which nothing could be read


def autocast_for(device: torch.device, precision: Precision) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of autocast contexts for a device and precision.

    Raises:
        UserError: for fp16 on a CPU, which has no use for it.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise UserError("trainer.precision=fp16 needs a CUDA device: use bf16 or fp32 on the CPU")
    if precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def usable(
    stream: Iterator[Batch | list[Failure]], problems: Problems, progress: Progress, per_epoch: int
) -> Iterator[Batch]:
    """Report unreadable items (once) and pass the batches on; a batch with nothing readable is passed over.

    Raises:
        UserError: if that goes on for an epoch, because the stream would never end.
    """
    in_a_row, told = 0, set()
    for batch in stream:
        for failure in batch if isinstance(batch, list) else batch.failures:
            if failure.image_id not in told:
                told.add(failure.image_id)
                problems.add("unreadable image", str(failure.image_id), failure.reason)
        if isinstance(batch, Batch):
            in_a_row = 0
            yield batch
            continue
        progress.passed_over += 1
        in_a_row += 1
        if in_a_row == per_epoch:
            raise UserError(f"data: no training image can be read (e.g. {batch[0].image_id}: {batch[0].reason})")


def fit(
    captioner: Captioner,
    *,
    train_items: CaptionItems,
    val_items: CaptionItems,
    tokenizer: Tokenizer,
    settings: TrainSettings,
    generation: Generation,
    out: Path,
    files: dict[str, str],
    problems: Problems,
    device: torch.device,
    seed: int = 0,
    num_workers: int = 0,
    backbone_lr: float | None = None,
    resume: bool = False,
    on_validation: Callable[[Tracker, int, SplitResult], None] | None = None,
) -> Progress:
    """Train a captioner.

    Args:
        captioner: on `device`.
        train_items, val_items: the data; val may be empty, then the last weights are the best.
        tokenizer: for the captions that validation writes.
        settings, generation: the knobs.
        out: the run's folder; gets `metrics.jsonl`, `tensorboard/` and `checkpoints/`.
        files: text files that belong into every checkpoint.
        problems: collects unreadable images.
        resume: go on from `out/checkpoints/last`; the weights end up the same as without the interruption.
        on_validation: called after each validation, for pictures.

    Returns:
        The final progress; `checkpoints/best` holds the weights to use.
    """
    autocast = autocast_for(device, settings.precision)
    optimizer = build_optimizer(captioner, settings, backbone_lr=backbone_lr)
    average = WeightAverage(captioner, settings.ema) if settings.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    progress = Progress()
    torch.manual_seed(seed + 1)  # dropout; the weights were drawn from `seed`

    if resume:
        last = find_checkpoint(out, "last")
        load_checkpoint(last, captioner)
        state = load_state(last)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if average:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        progress = Progress(**state["progress"])

    model: nn.Module = torch.compile(captioner) if settings.compile else captioner  # type: ignore[assignment]
    loader = train_loader(
        train_items,
        batch_size=settings.batch_size,
        seed=seed,
        start=progress.step + progress.passed_over,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    per_epoch = math.ceil(len(train_items) / settings.batch_size)
    total_steps = min(settings.epochs * per_epoch, settings.max_steps or settings.epochs * per_epoch)
    validate_every = settings.validate_every or per_epoch
    val_loader = eval_loader(val_items, batch_size=64, num_workers=num_workers) if len(val_items) else None
    scorer: CaptionScorer | None = None
    tracker = Tracker(out, resume_step=progress.step if resume else None)
    trainable = [p for p in captioner.parameters() if p.requires_grad]
    frozen = captioner.backbone.frozen
    begun = time.time() - progress.seconds

    def save(name: str, **extra: Any) -> None:
        progress.seconds = time.time() - begun
        meta = {
            "step": progress.step,
            "epoch": progress.step / per_epoch,
            "best": progress.best if math.isfinite(progress.best) else None,  # JSON has no -Infinity
            "seed": seed,
        }
        folder = out / "checkpoints" / name
        save_checkpoint(folder, captioner, files=files, meta=meta, frozen_backbone=frozen, **extra)

    def save_last() -> None:
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "average": average.state_dict() if average else None,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "progress": vars(progress),
        }
        save("last", state=state)

    def out_of_patience() -> bool:
        return settings.patience is not None and progress.without_gain >= settings.patience

    captioner.train()
    stream = usable(iter(loader), problems, progress, per_epoch)
    untold = torch.zeros(3, device=device)  # loss, correct words and words that nobody has looked at yet
    bar: Any = None
    while progress.step < total_steps and not out_of_patience():
        epoch, done_in_epoch = divmod(progress.step, per_epoch)
        if bar is None:
            title = f"Epoch {epoch + 1}/{math.ceil(total_steps / per_epoch)}"
            bar = tqdm(
                total=min(per_epoch, total_steps - epoch * per_epoch),
                initial=done_in_epoch,
                desc=title,
                unit="step",
            )

        # One optimizer step. Micro-batches are cut from one batch and all divided by *its* number of words,
        # so that accumulation changes the memory and nothing else.
        batch = next(stream)
        words_in_batch = int((batch.captions.targets_BQ != 0).sum())
        factor = lr_factor(progress.step, total_steps, settings)
        lr = set_lr(optimizer, factor)
        for part in batch.split(settings.accumulate):
            part = part.to(device)
            with autocast():
                output = model(part.visual, part.captions)
                loss = word_loss(output.logits_BQV, part.captions.targets_BQ, label_smoothing=settings.label_smoothing)
            scaler.scale(loss.loss / max(words_in_batch, 1)).backward()
            untold += torch.stack([loss.loss.detach(), loss.correct, loss.words])
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainable, settings.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update()
        progress.step += 1

        # Tell. Reading numbers makes a GPU wait, so they are read only when someone looks.
        bar.update()
        logging = progress.step % settings.log_every == 0 or progress.step == total_steps
        ending = progress.step % per_epoch == 0 or progress.step == total_steps
        validating = progress.step % validate_every == 0 or progress.step == total_steps
        saving = validating or bool(settings.checkpoint_every and progress.step % settings.checkpoint_every == 0)
        if logging or ending or saving:
            for index, value in enumerate(untold.tolist()):
                progress.epoch_sums[index] += value
                progress.log_sums[index] += value
            untold.zero_()
            if not math.isfinite(progress.epoch_sums[0]):
                raise UserError(
                    f"the loss is {progress.epoch_sums[0]} at step {progress.step}: training has diverged; a lower "
                    f"trainer.lr (now {settings.lr}) or trainer.clip (now {settings.clip}) helps"
                )
            bar.set_postfix_str("acc={token_accuracy:.2%}, loss={loss:.4f}".format(**means(progress.epoch_sums)))
        if logging:
            line = means(progress.log_sums) | {"lr": lr, "grad_norm": float(norm)}
            tracker.log("train", progress.step, progress.step / per_epoch, line)
            progress.log_sums = [0.0, 0.0, 0.0]
        if ending:
            bar.close()
            bar = None
            line = means(progress.epoch_sums) | {"seconds": time.time() - begun}
            tracker.log("epoch", progress.step, progress.step / per_epoch, line)
            progress.epoch_sums = [0.0, 0.0, 0.0]

        # Look how good it is, and keep the best.
        if validating and val_loader is not None:
            with average.applied() if average else nullcontext():
                result = caption_split(captioner, val_loader, tokenizer, generation, device=device, autocast=autocast)
                scorer = scorer or CaptionScorer(result.references)
                scores = scorer.score(result.captions, settings.validate_metrics).scores
                line = {"loss": result.loss, "token_accuracy": result.token_accuracy}
                line |= {name: value for name, value in scores.items() if value is not None}
                tracker.log("val", progress.step, progress.step / per_epoch, line)
                tqdm.write(validation_line(progress.step, line))
                if on_validation:
                    on_validation(tracker, progress.step, result)
                value = tracked_value(settings.track, progress.step, line)
                progress.without_gain += 1
                if value > progress.best:
                    progress.best, progress.best_step, progress.without_gain = value, progress.step, 0
                    save("best")
        if saving:
            save_last()

    if out_of_patience():
        tqdm.write(f"no gain in {settings.patience} validations: stopped at step {progress.step}")
    if val_loader is None:
        with average.applied() if average else nullcontext():
            save("best")
    if bar is not None:
        bar.close()
    tracker.close()
    progress.seconds = time.time() - begun
    return progress


def tracked_value(track: str, step: int, line: dict[str, float]) -> float:
    """The number that chooses the best weights, higher is better: a score, a negative loss, or the step itself."""
    if track == "step":
        return float(step)
    return -line["loss"] if track == "loss" else line[track]


def means(sums: list[float]) -> dict[str, float]:
    """Loss and accuracy per word from the sums of loss, correct words and words."""
    loss, correct, words = sums
    return {"loss": loss / max(words, 1), "token_accuracy": correct / max(words, 1)}


def validation_line(step: int, values: dict[str, float]) -> str:
    """One line about a validation: loss and accuracy, scores x100 as papers print them."""
    scores = [f"{name} {100 * values[name]:.1f}" for name in ("Bleu_4", "ROUGE_L", "METEOR", "CIDEr") if name in values]
    told = [f"loss {values['loss']:.3f}", f"acc {values['token_accuracy']:.1%}", *scores]
    return f"validation at step {step}: {', '.join(told)}{' (scores x100)' if scores else ''}"
