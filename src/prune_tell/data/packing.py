"""An image's captions as one row of words: one encoder pass, one cross-attention, hardly any padding.

Five captions of 8 to 20 words, padded one by one, are half padding. Laid end to end they share the row; a mask
keeps every word inside its own caption.

Shape letters: B images, Q words in a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_tell.data.tokenizer import PAD


class PackedCaptions(NamedTuple):
    """Teacher-forcing inputs and targets of a batch.

    Attributes:
        words_BQ: the given words, BOS first in each caption; PAD fills the row's end.
        targets_BQ: the word that follows each given word, EOS last; PAD where there is nothing to predict.
        positions_BQ: position of a word in its caption, 0 for BOS.
        caption_BQ: which caption of the image a word belongs to; -1 for padding.
    """

    words_BQ: Tensor
    targets_BQ: Tensor
    positions_BQ: Tensor
    caption_BQ: Tensor

    def mask(self) -> Tensor:
        """True where a word may look at another: same caption, not later, not padding. `(B, Q, Q)`.

        Padding looks at itself alone, because an empty softmax would be NaN; nothing looks at padding.
        """
        same_BQQ = self.caption_BQ.unsqueeze(2) == self.caption_BQ.unsqueeze(1)
        earlier_BQQ = self.positions_BQ.unsqueeze(2) >= self.positions_BQ.unsqueeze(1)
        real_B1Q = (self.words_BQ != PAD).unsqueeze(1)
        itself_QQ = torch.eye(self.words_BQ.shape[1], dtype=torch.bool, device=self.words_BQ.device)
        return (same_BQQ & earlier_BQQ & real_B1Q) | itself_QQ

    def to(self, device: torch.device) -> "PackedCaptions":
        """Move all tensors to `device`."""
        return PackedCaptions(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack_captions(images: Sequence[Sequence[Sequence[int]]]) -> PackedCaptions:
    """Pack token ids into teacher-forcing rows; the only place where labels are shifted.

    Args:
        images: per image, per caption, the ids `[BOS, ..., EOS]`. An image may have no caption.
    """
    Q = max((sum(len(ids) - 1 for ids in captions) for captions in images), default=0)
    packed = torch.zeros(4, len(images), max(Q, 1), dtype=torch.long)
    packed[3] = -1
    for row, captions in enumerate(images):
        start = 0
        for number, ids in enumerate(captions):
            end = start + len(ids) - 1
            packed[0, row, start:end] = torch.tensor(ids[:-1])
            packed[1, row, start:end] = torch.tensor(ids[1:])
            packed[2, row, start:end] = torch.arange(len(ids) - 1)
            packed[3, row, start:end] = number
            start = end
    return PackedCaptions(*packed.unbind(0))
