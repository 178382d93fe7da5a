"""The knobs of training, in one place; `configs/trainer/*.yaml` sets them."""

import math
from dataclasses import dataclass
from typing import Literal

from prune_tell.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per optimizer step (each with `data.captions_per_image` captions).
        accumulate: cut a batch into so many micro-batches to save memory; the result is the same.
        lr: peak learning rate; a backbone may have its own (`backbone.lr`).
        weight_decay: AdamW's, on matrices only (not on biases, norms and embeddings).
        betas: AdamW's.
        warmup: share of all steps in which the rate rises linearly.
        schedule: `cosine` falls to `final_lr * lr`, `linear` likewise, `constant` stays.
        final_lr: the last rate as a share of `lr`.
        clip: gradient norm limit; 0 for none.
        label_smoothing: share of the target probability spread over the vocabulary.
        ema: decay of the weight average that is validated and kept; 0 for none.
        precision: `auto` is bf16 on CUDA and fp32 on the CPU; fp16 (CUDA only) uses a gradient scaler.
        compile: run the decoder through torch.compile.
        validate_every: steps between validations; None for once an epoch.
        validate_images: how many val images a validation captions; None for all.
        validate_metrics: which scores a validation computes.
        checkpoint_every: steps between saves of `last`; None for at validations.
        log_every: steps between lines in `metrics.jsonl` and TensorBoard.
        track: the metric that chooses `best`: a score (higher is better) `loss` (lower), or `step` (the newest).
        patience: validations without improvement before training stops; None for never.
        max_steps: stop after so many steps; None for all epochs.
        measure_train_accuracy: at the end, also measure token accuracy on the training captions in eval mode.
    """

    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = 0.01
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: Precision = "auto"
    compile: bool = False
    validate_every: int | None = None
    validate_images: int | None = None
    validate_metrics: tuple[Literal["Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE"], ...] = (
        "Bleu",
        "ROUGE_L",
        "CIDEr",
    )
    checkpoint_every: int | None = None
    log_every: int = 10
    track: Literal["CIDEr", "Bleu_4", "ROUGE_L", "METEOR", "loss", "step"] = "CIDEr"
    patience: int | None = None
    max_steps: int | None = None
    measure_train_accuracy: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "epochs",
            "batch_size",
            "accumulate",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "patience",
        )
        for name in (*at_least_one, "max_steps", "validate_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"trainer.{name}={value} is out of range: 1 or more")
        for name, low, high in (
            ("lr", 0.0, 10.0),
            ("weight_decay", 0.0, 10.0),
            ("warmup", 0.0, 1.0),
            ("final_lr", 0.0, 1.0),
            ("label_smoothing", 0.0, 0.999),
            ("ema", 0.0, 0.99999),
            ("clip", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"trainer.{name}={value} is out of range: {low} to {high}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(
                f"trainer.betas={list(self.betas)} is out of range: two numbers from 0 up to, not including, 1"
            )
        metric = self.track.split("_")[0] if self.track.startswith("Bleu") else self.track
        if metric not in ("loss", "step") and metric not in self.validate_metrics:
            raise UserError(
                f"trainer.track={self.track} is not among trainer.validate_metrics={list(self.validate_metrics)}"
            )
