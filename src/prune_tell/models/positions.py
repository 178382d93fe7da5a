"""Where a word stands in its caption, and where a token stands in the picture.

Shape letters: B batch, T positions, N grid tokens, D width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from prune_tell.errors import UserError

Positions = Literal["sinusoidal", "learned", "none"]


def sinusoid(positions_T: Tensor, D: int) -> Tensor:
    """Sine and cosine features of positions, interleaved (Vaswani et al. 2017, section 3.5).

    `PE[t, 2i] = sin(t / 10000^(2i/D))`, `PE[t, 2i+1] = cos(t / 10000^(2i/D))`.

    Args:
        positions_T: positions, any float or integer values.
        D: an even width.

    Returns:
        `(T, D)` float32.
    """
    frequencies = torch.exp(torch.arange(0, D, 2, device=positions_T.device) * (-math.log(10_000.0) / D))
    angles = positions_T.float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class WordPositions(nn.Module):
    """Adds the position of each word to its embedding.

    Args:
        kind: `sinusoidal` (fixed) or `learned`.
        d_model: width D.
        max_length: longest caption in tokens, BOS included.

    Raises:
        UserError: if `d_model` is odd and `kind` sinusoidal.
    """

    def __init__(self, *, kind: Literal["sinusoidal", "learned"], d_model: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        if kind == "learned":
            self.table_TD = nn.Parameter(torch.randn(max_length, d_model) * 0.02)
        else:
            if d_model % 2:
                raise UserError(
                    f"decoder.d_model={d_model} is odd, but decoder.positions=sinusoidal needs an even width"
                )
            self.register_buffer("table_TD", sinusoid(torch.arange(max_length), d_model), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the position vectors for integer `positions` of any shape, with D appended."""
        return self.table_TD[positions]


class GridPositions(nn.Module):
    """Gives every grid token its place (row, column), for backbones whose tokens don't carry it.

    Half of the width encodes the row, half the column, both scaled to a 0..100 range so that grids of
    different sizes share a coordinate system. `learned` adds a linear map on top; `none` gives zeros
    to nobody: it returns None and costs nothing.

    Args:
        kind: `sinusoidal`, `learned` or `none`.
        d_model: width D.

    Raises:
        UserError: if `d_model` is not divisible by 4 (unless `kind` is `none`).
    """

    def __init__(self, *, kind: Positions, d_model: int) -> None:
        super().__init__()
        if kind != "none" and d_model % 4:
            raise UserError(
                f"decoder.d_model={d_model} is not divisible by 4, which decoder.grid_positions={kind} needs"
            )
        self.kind = kind
        self.d_model = d_model
        self.map = nn.Linear(d_model, d_model) if kind == "learned" else nn.Identity()

    def forward(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return `(N, D)` positions of a `(rows, columns)` grid, row by row; None for `none`."""
        if self.kind == "none":
            return None
        rows, columns = grid
        half = self.d_model // 2
        row_RD = sinusoid((torch.arange(rows, device=device) + 0.5) * (100.0 / rows), half)
        column_CD = sinusoid((torch.arange(columns, device=device) + 0.5) * (100.0 / columns), half)
        place_RCD = torch.cat([row_RD[:, None].expand(-1, columns, -1), column_CD[None].expand(rows, -1, -1)], dim=-1)
        place_ND: Tensor = self.map(place_RCD.flatten(0, 1))
        return place_ND
