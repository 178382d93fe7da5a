"""Saving and loading: safetensors weights, plain-data state, and nothing that could run code.

A run's folder `checkpoints/` holds `last/` (to go on from), `best/` (to use) and, for a frozen backbone, its weights
once in `backbone.safetensors`. Each of the two holds `model.safetensors`, `meta.json`, `config.yaml`, `tokenizer.json`
and `preprocessing.json`; `last/` also `state.pt` (optimizer, averages, random generators), readable with
`weights_only=True`.
"""

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prune_tell.errors import UserError

BACKBONE = "backbone."
Which = Literal["best", "last"]


def unique_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, each once: tied weights under their first name."""
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        weights[name] = tensor.detach().cpu().contiguous()
    return weights


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    files: dict[str, str],
    meta: dict[str, Any],
    state: dict[str, Any] | None = None,
    frozen_backbone: bool = False,
) -> None:
    """Write a checkpoint under a temporary name and rename it: what stands under the real name is always whole.

    Args:
        folder: `RUN/checkpoints/last` or `best`.
        model: the captioner.
        files: further text files by name (config, tokenizer, preprocessing).
        meta: plain JSON values (step, epoch, scores).
        state: what `resume` needs; left out of `best`.
        frozen_backbone: keep the backbone's weights apart, written once.
    """
    temporary = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = unique_weights(model)
    if frozen_backbone:
        shared = folder.parent / "backbone.safetensors"
        backbone = {name: weights.pop(name) for name in list(weights) if name.startswith(BACKBONE)}
        if not shared.exists():
            partial = shared.with_suffix(".writing")
            save_file(backbone, partial)
            partial.replace(shared)
    save_file(weights, temporary / "model.safetensors")
    if state is not None:
        torch.save(state, temporary / "state.pt")
    for name, text in files.items():
        (temporary / name).write_text(text, encoding="utf-8")
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in temporary.iterdir():  # on disk before it gets its name
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # A folder can't be replaced in one go: the old one steps aside, and `find` knows where to look.
    aside = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def find_checkpoint(run: Path, which: str | None = None) -> Path:
    """Return the folder of a run's checkpoint.

    Args:
        run: a run, its `checkpoints` folder, or a checkpoint itself.
        which: `best` or `last`; None takes `best` if it is there, else `last`.

    Raises:
        UserError: if there is none.
    """
    for root in (run, run / "checkpoints"):
        if which is None and (root / "model.safetensors").exists():
            return root
        for name in [which] if which else ["best", "last"]:
            for folder in (root / name, root / f"{name}.old"):
                if (folder / "meta.json").exists():
                    return folder
    raise UserError(
        f"checkpoint={run} holds no checkpoint (a run's folder with checkpoints/best or checkpoints/last is expected)"
    )


def load_checkpoint(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Raises:
        UserError: if the file is damaged or doesn't fit.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        shared = folder.parent / "backbone.safetensors"
        if not any(name.startswith(BACKBONE) for name in weights) and shared.exists():
            weights |= load_file(shared)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"checkpoint={folder} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    wrong = [name for name in missing if name in unique_weights(model)] + unexpected
    if wrong:
        raise UserError(f"checkpoint={folder} does not fit the model: {len(wrong)} tensors differ, first {wrong[0]}")


def load_state(folder: Path) -> dict[str, Any]:
    """Load what `resume` needs; plain tensors and numbers only, code can't hide in it.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder / 'state.pt'} can't be loaded: {why}") from error
    return state
