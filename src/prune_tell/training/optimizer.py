"""AdamW with decay groups, and the learning rate over time."""

import math
from typing import Any

import torch
from torch import nn

from prune_tell.models.positions import WordPositions
from prune_tell.training.settings import TrainSettings


def build_optimizer(
    model: nn.Module, settings: TrainSettings, *, backbone_lr: float | None = None
) -> torch.optim.AdamW:
    """Group the trainable parameters by learning rate and by whether weight decay makes sense for them.

    Decay pulls matrices towards zero. Biases, norms (one-dimensional) and embeddings (a rare word's row would only
    decay) are left alone. Each group carries its peak rate as `peak_lr`.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | WordPositions) for p in m.parameters()}
    for module in model.modules():  # a timm model names its own: position embeddings, CLS token
        if hasattr(module, "no_weight_decay"):
            named = dict(module.named_parameters())
            embeddings |= {id(named[name]) for name in module.no_weight_decay() if name in named}  # type: ignore[operator]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone = name.startswith("backbone.")
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups.setdefault((in_backbone, decays), []).append(parameter)
    options: list[dict[str, Any]] = []
    for (in_backbone, decays), parameters in groups.items():
        peak = backbone_lr if in_backbone and backbone_lr is not None else settings.lr
        decay = settings.weight_decay if decays else 0.0
        options.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(options, lr=settings.lr, betas=settings.betas, fused=True)


def lr_factor(step: int, total: int, settings: TrainSettings) -> float:
    """The learning rate at a step as a share of its peak: linear warm-up, then the schedule.

    Args:
        step: steps done, 0 <= step < total.
        total: all steps of the run.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.final_lr + (1 - settings.final_lr) * shape


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` of its peak; return the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
