"""Where the decoder looked: cross-attention over the kept tokens, painted back on the photo.

Shape letters: B images, P prefix tokens, K kept tokens, N grid positions, Q words, H heads, L layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_tell.data.packing import pack_captions
from prune_tell.data.tokenizer import Tokenizer
from prune_tell.data.transforms import Preprocessing, to_display
from prune_tell.models.captioner import Captioner, Sight
from prune_tell.pruning.reduction import scatter_to_grid


@torch.inference_mode()
def word_attention(captioner: Captioner, sight: Sight, words: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Attention of every written word to every grid position.

    The caption is read once more with teacher forcing, which gives the same attention as writing it did. Mean over
    layers and heads; what went to prefix tokens is left out, and a merged token's share is divided among the positions
    it stands for.

    Args:
        captioner: in eval mode.
        sight: the images.
        words: their captions `[BOS, ..., EOS]` (EOS missing where the length ran out).

    Returns:
        Maps `(B, Q, N)` (0 at dropped positions), and which positions were kept or merged, `(B, N)` bool.
    """
    packed = pack_captions([[list(ids)] for ids in words]).to(sight.reduction.assignment_BN.device)
    _, maps = captioner.decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), sight.memory, weights=True)
    weights_LBHQK = torch.stack([m.float() for m in maps if m is not None])
    weights_BQK = weights_LBHQK.mean(dim=(0, 2))[..., sight.prefix :] / sight.reduction.size_BK.unsqueeze(1)
    assignment_BN = sight.reduction.assignment_BN
    columns = [scatter_to_grid(weights_BQK[:, q], assignment_BN) for q in range(weights_BQK.shape[1])]
    return torch.stack(columns, dim=1), assignment_BN >= 0


def draw_attention(
    captioner: Captioner,
    images_BCHW: Tensor,
    sight: Sight,
    words: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    recipe: Preprocessing,
    paths: Sequence[Path],
) -> None:
    """Draw one PNG per image: the photo, what was kept, the mean attention, and one panel per word.

    The numbers lie beside each picture as `.npz` (`attention_QN`, `kept_N`, `grid`, `words`).
    """
    maps_BQN, kept_BN = word_attention(captioner, sight, words)
    for index, path in enumerate(paths):
        labels = tokenizer.tokens(list(words[index])[1:])
        photo = to_display(images_BCHW[index], recipe).permute(1, 2, 0).numpy()
        maps_QN, kept_N = maps_BQN[index, : len(labels)].cpu().numpy(), kept_BN[index].cpu().numpy()
        draw_panels(photo, maps_QN, kept_N, sight.grid, labels, tokenizer.decode(words[index]), path)
        np.savez(path.with_suffix(".npz"), attention_QN=maps_QN, kept_N=kept_N, grid=sight.grid, words=labels)


def draw_panels(
    photo: np.ndarray,
    maps_QN: np.ndarray,
    kept_N: np.ndarray,
    grid: tuple[int, int],
    labels: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Lay out the panels of one image; dropped positions are hatched grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = photo.shape[:2]
    extent = (0, columns, rows, 0)
    kept = kept_N.reshape(grid)
    shown = [label for label in labels if label != "<eos>"]
    panels = 3 + len(shown)
    across = min(panels, 6)
    down = -(-panels // across)
    figure = Figure(figsize=(2.1 * across, 2.3 * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")

    def heat(ax: Any, values_N: np.ndarray, name: str, top: float) -> None:
        ax.imshow(photo, extent=extent)
        ax.imshow(
            values_N.reshape(grid),
            extent=extent,
            cmap="inferno",
            alpha=0.6,
            vmin=0,
            vmax=top,
            interpolation="nearest",
        )
        ax.set_title(name, fontsize=9, parse_math=False)

    axes[0].imshow(photo, extent=extent)
    axes[0].set_title("photo", fontsize=9)
    axes[1].imshow(photo, extent=extent)
    veil = np.zeros((*grid, 4))
    veil[~kept] = (0.55, 0.55, 0.55, 0.88)
    axes[1].imshow(veil, extent=extent, interpolation="nearest")
    axes[1].set_title(f"kept {int(kept.sum())} of {kept.size}", fontsize=9)
    mean_N = maps_QN[: len(shown)].mean(axis=0) if shown else np.zeros(kept.size)
    heat(axes[2], mean_N, "mean attention", max(float(mean_N.max()), 1e-9))
    top = max(float(maps_QN[: len(shown)].max()), 1e-9) if shown else 1.0
    for ax, label, map_N in zip(axes[3:], shown, maps_QN, strict=False):
        heat(ax, map_N, label.strip() or label, top)
    figure.savefig(path, dpi=100)
