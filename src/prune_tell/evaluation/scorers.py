"""Scores captions as papers do: BLEU, METEOR, ROUGE-L, CIDEr and SPICE over PTB-tokenized text.

The formulas are those of pycocoevalcap, so that a score here is the score in a paper's table.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_test
from pycocoevalcap.rouge.rouge import Rouge

from prune_tell.errors import UserError
from prune_tell.evaluation import spice as spice_tool
from prune_tell.evaluation.meteor import meteor
from prune_tell.evaluation.ptb import tokenize

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")


@dataclass(frozen=True)
class Scores:
    """What a set of captions scored.

    Attributes:
        scores: `Bleu_1`..`Bleu_4`, `METEOR`, `ROUGE_L`, `CIDEr`, `SPICE`, as far as they were asked for. All
            in 0..1 but CIDEr, which goes to 10 (good captioners get 1.2 to 1.5 on COCO). Tables print x100.
        reasons: for each score that is None, one sentence that says why.
        per_image: image id (as text) -> the same names -> the score of that image alone.
    """

    scores: dict[str, float | None]
    reasons: dict[str, str]
    per_image: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `scores.json`: the scores by name, `reasons` and `per_image`."""
        return {**self.scores, "reasons": self.reasons, "per_image": self.per_image}


class CaptionScorer:
    """Scores predictions against one set of references, which is tokenized once, when first needed."""

    def __init__(self, references: Mapping[int | str, Sequence[str]], *, timeout: float = 600.0) -> None:
        """Keep the references.

        Args:
            references: image id -> its human captions. Ids `42` and `"42"` are the same image.
            timeout: seconds that each run of a Java tool may take.

        Raises:
            UserError: if there are fewer than two images, or one has no references.
        """
        self._references = _by_text_id(references, "references")
        self._timeout = timeout
        for image_id, captions in self._references.items():
            if isinstance(captions, str) or not captions:
                raise UserError(f"references: image {image_id} has {captions!r} (allowed: a list of captions)")
        if len(self._references) < 2:
            raise UserError(
                f"references: {len(self._references)} image(s), but scores need 2 or more "
                "(CIDEr weighs words by how few images they occur in, so one image always scores 0)"
            )

    def score(self, predictions: Mapping[int | str, str], metrics: Sequence[str] = METRICS) -> Scores:
        """Score one caption per image.

        Args:
            predictions: image id -> caption, for exactly the references' images. An empty caption scores 0.
            metrics: which of `METRICS` to compute.

        Returns:
            The scores of the corpus and of each image.

        Raises:
            UserError: for an unknown metric, other images than the references', or failing Java.
        """
        for name in metrics:
            if name not in METRICS:
                raise UserError(f"metrics: '{name}' is unknown (allowed: {', '.join(METRICS)})")
        by_id = _by_text_id(predictions, "predictions")
        self._check_same_images(by_id)
        captions = tokenize([by_id[image_id] for image_id in self._references], timeout=self._timeout)

        scores: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        per_image: dict[str, dict[str, float]] = {image_id: {} for image_id in self._references}
        for metric in metrics:
            if metric == "SPICE" and (reason := spice_tool.why_not(timeout=self._timeout)):
                scores[metric], reasons[metric] = None, reason
                continue
            for name, corpus, images in self._compute(metric, captions):
                scores[name] = float(corpus)
                for image_id, value in zip(self._references, images, strict=True):
                    per_image[image_id][name] = float(value)
        return Scores(scores, reasons, per_image)

    def _compute(self, metric: str, captions: list[str]) -> list[tuple[str, float, Sequence[float]]]:
        """Return `(name, corpus score, image scores)` for each score that `metric` consists of."""
        references = self._tokenized
        if metric == "METEOR":
            return [(metric, *meteor(captions, references, timeout=self._timeout))]
        if metric == "SPICE":
            return [(metric, *spice_tool.spice(captions, references, timeout=self._timeout))]
        if metric == "CIDEr":
            self._cider.ctest = [cook_test(caption) for caption in captions]
            images = self._cider.compute_cider()
            return [(metric, float(np.mean(images)), images)]
        gts = dict(enumerate(references))
        res = {index: [caption] for index, caption in enumerate(captions)}
        if metric == "ROUGE_L":
            return [(metric, *Rouge().compute_score(gts, res))]
        corpus, of_images = Bleu(4).compute_score(gts, res, verbose=0)
        return [(f"Bleu_{n}", corpus[n - 1], of_images[n - 1]) for n in (1, 2, 3, 4)]

    @cached_property
    def _tokenized(self) -> list[list[str]]:
        """The tokenized references of each image, in the order of `self._references`."""
        flat = iter(tokenize([c for cs in self._references.values() for c in cs], timeout=self._timeout))
        return [[next(flat) for _ in captions] for captions in self._references.values()]

    @cached_property
    def _cider(self) -> CiderScorer:
        """A CIDEr-D scorer that holds the references' n-grams and in how many images each occurs."""
        scorer = CiderScorer()
        for captions in self._tokenized:
            scorer.cook_append(None, captions)
        scorer.compute_doc_freq()
        # The scorer's own defaultdict would keep every n-gram it is ever asked about.
        scorer.document_frequency = Counter(scorer.document_frequency)
        return scorer

    def _check_same_images(self, predictions: Mapping[str, str]) -> None:
        """Raise `UserError` unless the predictions are of exactly the references' images."""
        missing = [image_id for image_id in self._references if image_id not in predictions]
        extra = [image_id for image_id in predictions if image_id not in self._references]
        if not missing and not extra:
            return
        wrong = []
        if extra:
            wrong.append(f"{len(extra)} predictions have no references (e.g. image {extra[0]})")
        if missing:
            wrong.append(f"{len(missing)} references have no prediction (e.g. image {missing[0]})")
        raise UserError(
            f"predictions ({len(predictions)} images) and references ({len(self._references)}) do not match: "
            f"{' and '.join(wrong)}; give the references of exactly the split that was captioned"
        )


def _by_text_id(items: Mapping[int | str, Any], what: str) -> dict[str, Any]:
    """Return `items` with ids as text; raise `UserError` if two ids are then the same."""
    result: dict[str, Any] = {}
    for image_id, value in items.items():
        if str(image_id) in result:
            raise UserError(f"{what}: image {image_id} is there twice, as a number and as text")
        result[str(image_id)] = value
    return result
