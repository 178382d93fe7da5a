"""Fewer tokens, and never a doubt about which: the data every dropping and merging method returns.

Shape letters: B batch, N tokens on the grid, K kept tokens, P prefix tokens (CLS, registers), D width.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prune_tell.errors import UserError
from prune_tell.registry import Registry


class Reduction(NamedTuple):
    """The outcome of reducing N grid tokens to K.

    Attributes:
        tokens_BKD: the kept (dropping) or combined (merging) tokens.
        assignment_BN: for every grid position the index of the kept token that stands for it, or -1 where it was
            dropped. Pictures and later stages are drawn through it.
        size_BK: how many grid positions each kept token stands for.
    """

    tokens_BKD: Tensor
    assignment_BN: Tensor
    size_BK: Tensor


class Reducer(Protocol):
    """A method that reduces grid tokens; prefix tokens never reach it."""

    def __call__(self, tokens_BND: Tensor, scores_BN: Tensor | None = None) -> Reduction:
        """Reduce `tokens_BND`.

        Args:
            tokens_BND: grid tokens, row by row.
            scores_BN: importances measured by the encoder (CLS attention), where it has them.
        """
        ...


def kept_count(total: int, prune_ratio: float = 0.0, kept_tokens: int | None = None) -> int:
    """How many of `total` grid tokens stay: `max(1, ceil(total * (1 - prune_ratio)))`, or `kept_tokens`.

    The only place where a ratio becomes a count. `total` is the real grid of the batch at hand, so
    the same ratio means 138 of 196 tokens for a ViT-B/16 and 35 of 49 for a ConvNeXt.

    Args:
        total: number of grid tokens N (>= 1), prefix tokens not counted.
        prune_ratio: share of tokens to remove, in [0, 1).
        kept_tokens: an absolute budget that overrides the ratio; a budget above N keeps all N.

    Raises:
        UserError: if either budget is out of range.
    """
    if kept_tokens is not None:
        if kept_tokens < 1:
            raise UserError(f"kept_tokens={kept_tokens} is out of range: at least 1 token must stay")
        return min(kept_tokens, total)
    if not 0.0 <= prune_ratio < 1.0:
        raise UserError(f"prune_ratio={prune_ratio} is out of range: 0 (keep all tokens) up to, not including, 1")
    # The rounding guards against 196 * (1 - 0.3) = 137.20000000000002 and 10 * (1 - 0.7) = 3.0000000000000004.
    return max(1, math.ceil(round(total * (1.0 - prune_ratio), 6)))


def keep_all(tokens_BND: Tensor) -> Reduction:
    """The reduction that reduces nothing: the very same tokens, each standing for itself."""
    B, N, _ = tokens_BND.shape
    assignment_BN = torch.arange(N, device=tokens_BND.device).expand(B, N)
    return Reduction(tokens_BND, assignment_BN, tokens_BND.new_ones(B, N))


def gather_tokens(tokens_BND: Tensor, kept_BK: Tensor) -> Reduction:
    """Keep the tokens at the grid positions `kept_BK` (unique in a row); the others leave the graph."""
    B, N, D = tokens_BND.shape
    K = kept_BK.shape[1]
    tokens_BKD = tokens_BND.gather(1, kept_BK.unsqueeze(-1).expand(B, K, D))
    order_BK = torch.arange(K, device=kept_BK.device).expand(B, K)
    assignment_BN = kept_BK.new_full((B, N), -1).scatter(1, kept_BK, order_BK)
    return Reduction(tokens_BKD, assignment_BN, tokens_BND.new_ones(B, K))


def mean_by_assignment(values_BND: Tensor, assignment_BN: Tensor, K: int) -> Tensor:
    """Average grid values over the positions each kept token stands for (positions, coordinates, maps).

    Returns:
        `(B, K, D)`; dropped positions (-1) count for nobody.
    """
    B, N, D = values_BND.shape
    member_BN = assignment_BN >= 0
    index_BN1 = assignment_BN.clamp_min(0).unsqueeze(-1)
    values_BND = values_BND * member_BN.unsqueeze(-1)
    total_BKD = values_BND.new_zeros(B, K, D).scatter_add(1, index_BN1.expand(B, N, D), values_BND)
    count_BK1 = values_BND.new_zeros(B, K, 1).scatter_add(1, index_BN1, member_BN.unsqueeze(-1).to(values_BND))
    return total_BKD / count_BK1.clamp_min(1)


def scatter_to_grid(values_BK: Tensor, assignment_BN: Tensor, fill: float = 0.0) -> Tensor:
    """Paint a value per kept token back on every grid position it stands for; dropped positions get `fill`."""
    painted_BN = values_BK.gather(1, assignment_BN.clamp_min(0))
    return torch.where(assignment_BN >= 0, painted_BN, torch.full_like(painted_BN, fill))


reducers: Registry[nn.Module] = Registry("pruning.method")
"""Builders `(*, width, prune_ratio, kept_tokens, **options) -> Reducer`; `configs/pruning/*.yaml` name them."""
