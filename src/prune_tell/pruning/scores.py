"""What makes a token important: one score per grid token, higher means kept longer.

Shape letters: B batch, N grid tokens, D width.
"""

import torch
from torch import Tensor, nn

from prune_tell.errors import UserError
from prune_tell.registry import Registry

scorers: Registry[nn.Module] = Registry("pruning.score")


@scorers.register("norm")
class NormScore(nn.Module):
    """The Euclidean norm of a token: no parameters, no attention needed, works for any backbone."""

    def __init__(self, *, width: int) -> None:
        super().__init__()

    def forward(self, tokens_BND: Tensor, attention_BN: Tensor | None) -> Tensor:
        return tokens_BND.norm(dim=-1)


@scorers.register("cls_attention")
class ClsAttentionScore(nn.Module):
    """The attention the CLS token pays to each grid token in the last block, averaged over heads.

    The attention arrives with the backbone's features; a backbone without a CLS token has none.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()

    def forward(self, tokens_BND: Tensor, attention_BN: Tensor | None) -> Tensor:
        if attention_BN is None:
            raise UserError(
                "pruning.score=cls_attention needs a backbone with a CLS token and self-attention (a ViT); "
                "use norm or learned with this one"
            )
        return attention_BN


@scorers.register("learned")
class LearnedScore(nn.Module):
    """A small head, LayerNorm -> Linear -> GELU -> Linear, trained through the gate of the kept tokens."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        hidden = max(width // 4, 1)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, tokens_BND: Tensor, attention_BN: Tensor | None) -> Tensor:
        scores_BN: Tensor = self.head(tokens_BND).squeeze(-1)
        return scores_BN


@scorers.register("random")
class RandomScore(nn.Module):
    """Chance: the control every score must beat. Draws from torch's global generator."""

    def __init__(self, *, width: int) -> None:
        super().__init__()

    def forward(self, tokens_BND: Tensor, attention_BN: Tensor | None) -> Tensor:
        return torch.rand(tokens_BND.shape[:2], device=tokens_BND.device)
