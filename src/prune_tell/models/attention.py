"""Multi-head attention, once for self-attention over words and once for cross-attention over tokens.

Shape letters: B batch (images), Q query positions, S key positions, K kept visual tokens, H heads, E head width,
D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_tell.errors import UserError
from prune_tell.models.dropout import Dropout


class Attention(nn.Module):
    """Queries attend to keys and values that the caller projects with `keys_values`.

    Projecting apart from attending is what lets a cache hold keys and values: visual ones are computed once
    per image, words' ones once per word.

    Args:
        d_model: width D.
        heads: H, a divisor of D.
        dropout: dropout on the attention weights while training.

    Raises:
        UserError: if `heads` does not divide `d_model`.
    """

    def __init__(self, *, d_model: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            divisors = [h for h in range(1, min(d_model, 32) + 1) if d_model % h == 0]
            raise UserError(f"decoder.heads={heads} does not divide decoder.d_model={d_model} (allowed: {divisors})")
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def split(self, x_BSD: Tensor) -> Tensor:
        """`(B, S, D)` -> `(B, H, S, E)`."""
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Project `x_BSD` to keys and values, both `(B, H, S, E)`."""
        k_BSD, v_BSD = self.key_value(x_BSD).chunk(2, dim=-1)
        return self.split(k_BSD), self.split(v_BSD)

    def forward(
        self,
        x_BQD: Tensor,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        mask: Tensor | None = None,
        *,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x_BQD: the positions that ask.
            k_BHSE: keys, v_BHSE: values.
            mask: broadcastable to `(B, H, Q, S)`; True where a query may look, or a float added to the scores.
            weights: also return the attention weights (leaves the fused kernel: same result, more memory).

        Returns:
            The output `(B, Q, D)`, and the weights `(B, H, Q, S)`, or None if they were not asked for.
        """
        q_BHQE = self.split(self.query(x_BQD))
        weights_BHQS = None
        # For a caption's few positions, the CPU's fused kernel is three times slower in its backward pass.
        if weights or (self.training and not x_BQD.is_cuda):
            scores_BHQS = q_BHQE @ k_BHSE.transpose(-2, -1) * q_BHQE.shape[-1] ** -0.5
            if mask is not None:
                boolean = mask.dtype == torch.bool
                scores_BHQS = scores_BHQS.masked_fill(~mask, -torch.inf) if boolean else scores_BHQS + mask
            weights_BHQS = scores_BHQS.softmax(dim=-1, dtype=torch.float32)  # the CPU's autocast would take bfloat16
            y_BHQE = self.dropout(weights_BHQS).to(v_BHSE.dtype) @ v_BHSE
        else:
            dropout = self.dropout.p if self.training else 0.0
            y_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BHSE, v_BHSE, attn_mask=mask, dropout_p=dropout)
        y_BQD: Tensor = self.out(y_BHQE.transpose(1, 2).flatten(2))
        return y_BQD, weights_BHQS if weights else None
