"""Hiding visual tokens at random while training: augmentation that costs less than nothing.

Shape letters: B batch, K tokens, D width.
"""

import torch
from torch import Tensor, nn

from prune_tell.errors import UserError
from prune_tell.pruning.reduction import gather_tokens, kept_count


class TokenDropout(nn.Module):
    """Shows a training step a random part of each image's tokens (Liu et al. 2022, PatchDropout), evaluation all.

    For a frozen backbone with cached features it is the only augmentation of the picture there is. Hidden tokens are
    gathered away, so that the decoder's keys and values get cheaper, too.

    Args:
        p: share of the tokens that is hidden, 0 <= p < 1.

    Raises:
        UserError: if `p` is out of range.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise UserError(f"decoder.token_dropout={p} is out of range: 0 up to, not including, 1")
        self.p = p

    def forward(self, tokens_BKD: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return tokens_BKD
        order_BK = torch.rand(tokens_BKD.shape[:2], device=tokens_BKD.device).argsort(dim=1)
        return gather_tokens(tokens_BKD, order_BK[:, : kept_count(tokens_BKD.shape[1], self.p)]).tokens_BKD

    def extra_repr(self) -> str:
        return f"p={self.p}"
