"""What training minimises.

Shape letters: B images, Q packed words, V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from prune_tell.data.tokenizer import PAD


class WordLoss(NamedTuple):
    """Sums over the real words of a batch; PAD counts nowhere.

    Attributes:
        loss: summed cross-entropy in nats (smoothed, if asked for), with a graph.
        correct: words whose likeliest prediction is right.
        words: number of words.
    """

    loss: Tensor
    correct: Tensor
    words: Tensor


def word_loss(logits_BQV: Tensor, targets_BQ: Tensor, *, label_smoothing: float = 0.0) -> WordLoss:
    """Cross-entropy of the next word, summed, so that the caller can divide by the words of *all* micro-batches.

    Args:
        logits_BQV: predictions.
        targets_BQ: the words that really follow; PAD where there is none.
        label_smoothing: share of the target probability spread evenly (Szegedy et al. 2016, section 7).
    """
    loss = F.cross_entropy(
        logits_BQV.flatten(0, 1).float(),
        targets_BQ.flatten(),
        ignore_index=PAD,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    real_BQ = targets_BQ != PAD
    correct = (logits_BQV.detach().argmax(dim=-1) == targets_BQ) & real_BQ
    return WordLoss(loss, correct.sum(), real_BQ.sum())
