"""Dropout that does not cost a CPU a third of its training step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes each element with probability `p` while training and scales the rest by `1 / (1 - p)`.

    On an accelerator this is torch's own. On a CPU torch draws one random number per element on one thread; here one
    64-bit draw serves four elements with 16 bits each, so `p` is met to 1/65,536.

    Args:
        p: probability of zeroing, 0 <= p < 1.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)  # -32768 .. 32767
        keep = uniform >= round(self.p * 65_536) - 32_768
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"
