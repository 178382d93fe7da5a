"""Run a captioner over a split: teacher-forced loss, generated captions, and how fast both were.

Shape letters: B images, Q packed words, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from prune_tell.data.loader import Batch, Failure
from prune_tell.data.records import Record
from prune_tell.data.tokenizer import Tokenizer
from prune_tell.decoding.generate import generate
from prune_tell.errors import UserError
from prune_tell.models.captioner import Captioner
from prune_tell.training.losses import word_loss


@dataclass(frozen=True)
class Generation:
    """How captions are written; `configs/train.yaml` sets it under `generation`.

    Attributes:
        beams: 1 is greedy search.
        max_length: most tokens of a caption, BOS and EOS included.
        length_penalty: GNMT's exponent; 0 leaves scores alone, more favours longer captions.
    """

    beams: int = 1
    max_length: int = 30
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        # `generate` checks them, too: this is the check before an epoch of training.
        if self.beams < 1:
            raise UserError(f"generation.beams={self.beams} is out of range: 1 (greedy) or more")
        if self.max_length < 2:
            raise UserError(f"generation.max_length={self.max_length} is out of range: 2 (BOS and EOS) or more")


@dataclass
class SplitResult:
    """What a captioner did on a split.

    Attributes:
        captions: image id -> caption.
        log_probabilities: image id -> summed log-probability of the caption's words.
        references: image id -> human captions, of the images that were captioned.
        loss, token_accuracy: teacher-forced, per word, PAD not counted.
        kept_tokens, total_tokens: grid tokens per image after and before reduction (means).
        images_per_second: encoder and reduction; captions_per_second: decoding alone.
        failures: images that could not be read.
        records: of the captioned images, in order.
    """

    captions: dict[int | str, str] = field(default_factory=dict)
    log_probabilities: dict[int | str, float] = field(default_factory=dict)
    references: dict[int | str, list[str]] = field(default_factory=dict)
    loss: float = 0.0
    token_accuracy: float = 0.0
    kept_tokens: float = 0.0
    total_tokens: float = 0.0
    images_per_second: float = 0.0
    captions_per_second: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def clock(device: torch.device) -> float:
    """The time, after all work queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def caption_split(
    captioner: Captioner,
    batches: Iterable[Batch | list[Failure]],
    tokenizer: Tokenizer,
    generation: Generation | None,
    *,
    device: torch.device,
    autocast: Callable[[], Any],
) -> SplitResult:
    """Score and caption every image.

    Args:
        captioner: put in eval mode here, and back afterwards.
        batches: from `eval_loader`; wrap it for a progress bar.
        generation: None measures loss and accuracy only.
        autocast: makes the context that sets the precision.
    """
    result = SplitResult()
    loss = correct = words = 0.0
    kept = total = images = 0
    seconds_look = seconds_decode = 0.0
    training = captioner.training
    captioner.eval()
    for batch in batches:
        if isinstance(batch, list):
            result.failures += batch
            continue
        result.failures += batch.failures
        result.records += batch.records
        batch = batch.to(device)
        with autocast():
            start = clock(device)
            sight = captioner.look(batch.visual)
            seconds_look += clock(device) - start
            c = batch.captions
            logits_BQV, _ = captioner.decoder(c.words_BQ, c.positions_BQ, c.mask(), sight.memory)
            sums = word_loss(logits_BQV, c.targets_BQ)
            loss, correct, words = (
                loss + float(sums.loss),
                correct + float(sums.correct),
                words + float(sums.words),
            )
            size = len(batch.records)
            kept += sight.reduction.tokens_BKD.shape[1] * size
            total += sight.reduction.assignment_BN.shape[1] * size
            images += size
            if generation is None:
                continue
            start = clock(device)
            written = generate(
                captioner.decoder,
                sight,
                beams=generation.beams,
                max_length=generation.max_length,
                alpha=generation.length_penalty,
            )
            seconds_decode += clock(device) - start
        for record, ids, log_probability in zip(
            batch.records, written.words, written.log_probability_B.tolist(), strict=True
        ):
            result.captions[record.image_id] = tokenizer.decode(ids)
            result.log_probabilities[record.image_id] = log_probability
            result.references[record.image_id] = list(record.captions)
    captioner.train(training)
    result.loss, result.token_accuracy = loss / max(words, 1), correct / max(words, 1)
    result.kept_tokens, result.total_tokens = kept / max(images, 1), total / max(images, 1)
    result.images_per_second = images / seconds_look if seconds_look else 0.0
    result.captions_per_second = images / seconds_decode if seconds_decode else 0.0
    return result
