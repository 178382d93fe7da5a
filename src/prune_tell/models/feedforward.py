"""The position-wise network of a decoder layer."""

from typing import Literal

from torch import Tensor, nn

from prune_tell.models.dropout import Dropout

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class FeedForward(nn.Module):
    """Linear, activation, dropout, Linear.

    Args:
        d_model: width in and out.
        hidden: width between.
        activation: `relu` (as in the original Transformer) or `gelu`.
        dropout: after the activation.
    """

    def __init__(
        self, *, d_model: int, hidden: int, activation: Literal["relu", "gelu"] = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(d_model, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)
        self.contract = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.contract(self.dropout(self.activation(self.expand(x))))
        return y
