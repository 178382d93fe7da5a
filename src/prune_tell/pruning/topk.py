"""Top-k pruning: keep the best-scored tokens, drop the rest.

Shape letters: B batch, N grid tokens, K kept tokens, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from prune_tell.pruning.reduction import Reduction, gather_tokens, keep_all, kept_count, reducers
from prune_tell.pruning.scores import LearnedScore, scorers


def best_positions(scores_BN: Tensor, K: int) -> Tensor:
    """The positions `(B, K)` of the K highest scores, in grid order: K = N is exactly the unpruned sequence."""
    return scores_BN.detach().topk(K, dim=1).indices.sort(dim=1).values


def gumbel_like(scores_BN: Tensor) -> Tensor:
    """Standard Gumbel noise, `-log(-log(u))` with u uniform in (0, 1)."""
    uniform_BN = torch.rand_like(scores_BN, dtype=torch.float32).clamp(1e-12, 1 - 1e-7)
    return -torch.log(-torch.log(uniform_BN))


def topk(tokens_BND: Tensor, scores_BN: Tensor, K: int) -> Reduction:
    """Keep the K tokens with the highest scores, in grid order.

    Args:
        tokens_BND: grid tokens.
        scores_BN: one importance per token; no gradient flows through the choice.
        K: how many stay, 1 <= K <= N.
    """
    return gather_tokens(tokens_BND, best_positions(scores_BN, K))


@reducers.register("topk")
class TopK(nn.Module):
    """Top-k pruning by a score.

    Args:
        width: token width D.
        prune_ratio: share of grid tokens to remove, in [0, 1).
        kept_tokens: an absolute budget instead of the ratio.
        score: `norm`, `cls_attention`, `learned` or `random`.
    """

    def __init__(
        self,
        *,
        width: int,
        prune_ratio: float = 0.0,
        kept_tokens: int | None = None,
        score: Literal["norm", "cls_attention", "learned", "random"] = "learned",
    ) -> None:
        super().__init__()
        kept_count(1, prune_ratio, kept_tokens)  # a wrong budget ends here, before any work
        self.prune_ratio = prune_ratio
        self.kept_tokens = kept_tokens
        self.scorer = scorers[score](width=width)

    def forward(self, tokens_BND: Tensor, attention_BN: Tensor | None = None) -> Reduction:
        K = kept_count(tokens_BND.shape[1], self.prune_ratio, self.kept_tokens)
        if tokens_BND.shape[1] == K:
            return keep_all(tokens_BND)
        scores_BN = self.scorer(tokens_BND, attention_BN)
        learned = isinstance(self.scorer, LearnedScore)
        # Tokens that are never kept never get a gradient and would stay out for good: training draws the kept ones
        # without replacement, in proportion to exp(score), through Gumbel noise (Kool et al. 2019).
        kept_BK = best_positions(scores_BN + gumbel_like(scores_BN) if learned and self.training else scores_BN, K)
        reduction = gather_tokens(tokens_BND, kept_BK)
        if learned:
            # The choice itself has no gradient: the kept tokens carry their score as a gate, so the head learns
            # from how useful they were. 2 * sigmoid starts near 1 and leaves the token scale alone.
            gate_BK1 = 2 * torch.sigmoid(scores_BN.gather(1, kept_BK)).unsqueeze(-1)
            reduction = reduction._replace(tokens_BKD=reduction.tokens_BKD * gate_BK1)
        return reduction
