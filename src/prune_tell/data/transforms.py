"""From a photograph to the tensor a backbone expects, with torchvision's transforms.

The recipe is data: it comes from the weights, can be overridden in the config, and is saved with the checkpoint, so
that captioning later sees exactly what training saw.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from prune_tell.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become input.

    Attributes:
        image_size: rows and columns the backbone gets.
        mean, std: per channel, on the 0..1 scale.
        interpolation: `bilinear`, `bicubic` or `nearest`.
        fit: `crop` keeps the shape (shorter side to size / crop_ratio, then the centre), `squash` the whole picture.
        crop_ratio: share of the shorter side that the centre crop keeps.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    fit: Literal["crop", "squash"] = "crop"
    crop_ratio: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Rebuild from `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def build_transform(
    recipe: Preprocessing, *, augment: bool = False, mirror: bool = False
) -> Callable[[Image.Image], Tensor]:
    """Build the transform of a recipe.

    Args:
        recipe: sizes and statistics.
        augment: for training: a random crop of at least 70 % of the area and a slight colour jitter instead of the
            centre crop.
        mirror: augmentation also mirrors every other image.

    Returns:
        A function from an RGB image to a float32 tensor `(3, rows, columns)`.
    """
    if recipe.interpolation not in ("bilinear", "bicubic", "nearest"):
        raise UserError(f"backbone.interpolation={recipe.interpolation} is unknown (bilinear, bicubic or nearest)")
    mode = v2.InterpolationMode(recipe.interpolation)
    rows, columns = recipe.image_size
    steps: list[Any]
    if augment:
        steps = [
            v2.RandomResizedCrop(
                (rows, columns), scale=(0.7, 1.0), ratio=(0.85, 1.18), interpolation=mode, antialias=True
            ),
            v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15),
            *([v2.RandomHorizontalFlip()] if mirror else []),
        ]
    elif recipe.fit == "squash":
        steps = [v2.Resize((rows, columns), interpolation=mode, antialias=True)]
    else:
        shorter = round(max(rows, columns) / recipe.crop_ratio)
        steps = [v2.Resize(shorter, interpolation=mode, antialias=True), v2.CenterCrop((rows, columns))]
    tail = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=recipe.mean, std=recipe.std)]
    transform: Callable[[Image.Image], Tensor] = v2.Compose([v2.ToImage(), *steps, *tail])
    return transform


def to_display(image: Tensor, recipe: Preprocessing) -> Tensor:
    """Undo the normalisation: `(3, rows, columns)` in 0..1, for pictures."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (image.cpu() * std + mean).clamp(0, 1)
