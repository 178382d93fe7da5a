"""An exponential moving average of the trained weights: it scores better than the last step's and costs one copy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages the trainable parameters of a model.

    Args:
        model: whose parameters to follow.
        decay: share of the old average that survives a step; in the first steps less, `min(decay, (1 + t) / (10 + t))`,
            so that the random start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a finished optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the model for the duration of a `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name] = kept

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """Return what a resumed run needs."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Restore `state_dict`."""
        steps, average = state["steps"], state["average"]
        assert isinstance(steps, int)
        assert isinstance(average, dict)
        self.steps = steps
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
