"""What a backbone makes of an image, and a disk cache of it for backbones that don't train.

Shape letters: B batch, R rows (images) of a cache, P prefix tokens, N grid tokens, S = P + N, D width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prune_tell.data.records import Record

FORMAT = 1  # raise when the files' meaning changes: older caches are then built anew


class Features(NamedTuple):
    """What a backbone makes of a batch of images.

    Attributes:
        tokens_BND: grid tokens, row by row.
        prefix_BPD: tokens without a place (CLS, registers); P may be 0.
        grid: rows and columns, N = rows * columns.
        attention_BN: the CLS token's attention to each grid token in the last block (mean over heads), if asked for.
    """

    tokens_BND: Tensor
    prefix_BPD: Tensor
    grid: tuple[int, int]
    attention_BN: Tensor | None = None

    def to(self, device: torch.device) -> "Features":
        """Move all tensors to `device`, in float32."""
        attention = self.attention_BN
        return Features(
            self.tokens_BND.to(device, torch.float32, non_blocking=True),
            self.prefix_BPD.to(device, torch.float32, non_blocking=True),
            self.grid,
            None if attention is None else attention.to(device, torch.float32, non_blocking=True),
        )

    def rows(self, rows: slice) -> "Features":
        """Take some images of the batch."""
        attention = None if self.attention_BN is None else self.attention_BN[rows]
        return Features(self.tokens_BND[rows], self.prefix_BPD[rows], self.grid, attention)


def stack_features(rows: Sequence[Features]) -> Features:
    """Batch features of single images (as `FeatureCache.row` returns them)."""
    attention = [row.attention_BN for row in rows if row.attention_BN is not None]
    return Features(
        torch.cat([row.tokens_BND for row in rows]),
        torch.cat([row.prefix_BPD for row in rows]),
        rows[0].grid,
        torch.cat(attention) if attention else None,
    )


def cache_key(backbone: nn.Module, recipe: dict[str, Any], records: Sequence[Record]) -> str:
    """Fingerprint everything the features depend on: weights, architecture, preprocessing and images.

    Args:
        backbone: its `repr` and every tensor count.
        recipe: preprocessing and data set options, plain values.
        records: photographs count by path, size and time of change; generated scenes by their index.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, repr(backbone), recipe], default=str).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for record in records:
        place: tuple[Any, ...] = (record.image_id, str(record.location))
        if isinstance(record.location, Path) and record.location.exists():
            stat = record.location.stat()
            place += (stat.st_size, stat.st_mtime_ns)
        digest.update(repr(place).encode())
    return digest.hexdigest()[:20]


class FeatureCache:
    """Features of a split, memory-mapped in half precision: an epoch then costs only the decoder.

    The folder holds `tokens.npy` (R, S, D), `attention.npy` (R, N) where asked for, `state.npy` (R,)
    with 0 = missing, 1 = there, 2 = unreadable image, and `meta.json`. Building it again after an interruption goes on
    where it stopped.

    Args:
        folder: where the cache lies; made by `create`.
    """

    MISSING, THERE, UNREADABLE = 0, 1, 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.grid = (int(meta["grid"][0]), int(meta["grid"][1]))
        self.prefix = int(meta["prefix"])
        self.tokens_RSD = np.load(folder / "tokens.npy", mmap_mode="r+")
        self.state_R = np.load(folder / "state.npy", mmap_mode="r+")
        attention = folder / "attention.npy"
        self.attention_RN = np.load(attention, mmap_mode="r+") if attention.exists() else None

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[Path]]:
        """Worker processes open the files themselves; pickled, the memory maps would be copied whole."""
        return FeatureCache, (self.folder,)

    @classmethod
    def create(cls, folder: Path, rows: int, example: Features) -> "FeatureCache":
        """Open the cache in `folder`, laying out its files if they are not there yet.

        Args:
            folder: one folder per `cache_key`.
            rows: number of images R.
            example: features of any one image, for the shapes.
        """
        if not (folder / "meta.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            _, N, D = example.tokens_BND.shape
            prefix = example.prefix_BPD.shape[1]

            def lay_out(name: str, shape: tuple[int, ...], dtype: type) -> None:
                np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape).flush()

            lay_out("tokens.npy", (rows, prefix + N, D), np.float16)
            if example.attention_BN is not None:
                lay_out("attention.npy", (rows, N), np.float16)
            lay_out("state.npy", (rows,), np.uint8)
            # Written last: a folder without it is laid out again.
            meta = {"grid": example.grid, "prefix": prefix, "rows": rows, "format": FORMAT}
            (folder / "meta.json").write_text(json.dumps(meta))
        return cls(folder)

    def write(self, rows: Sequence[int], features: Features) -> None:
        """Store the features of the images `rows`; they are on disk before they are marked as there."""
        # Half precision ends at 65,504; the few backbones with larger outliers saturate instead of becoming inf.
        limit = float(np.finfo(np.float16).max)
        tokens_BSD = torch.cat([features.prefix_BPD, features.tokens_BND], dim=1).float().clamp(-limit, limit)
        self.tokens_RSD[rows] = tokens_BSD.cpu().numpy().astype(np.float16)
        if self.attention_RN is not None and features.attention_BN is not None:
            self.attention_RN[rows] = features.attention_BN.float().cpu().numpy().astype(np.float16)
        self.state_R[rows] = self.THERE

    def row(self, index: int) -> Features:
        """Return the features of one image as a batch of one (float16)."""
        tokens_1SD = torch.from_numpy(self.tokens_RSD[index : index + 1].copy())
        attention_1N = (
            None if self.attention_RN is None else torch.from_numpy(self.attention_RN[index : index + 1].copy())
        )
        return Features(tokens_1SD[:, self.prefix :], tokens_1SD[:, : self.prefix], self.grid, attention_1N)

    def flush(self) -> None:
        """Force everything written so far to disk."""
        for array in (self.tokens_RSD, self.attention_RN, self.state_R):
            if array is not None:
                array.flush()


def fill_cache(
    folder: Path,
    records: Sequence[Record],
    encode: Callable[[Sequence[int]], tuple[list[int], Features | None]],
    *,
    batch_size: int,
    progress: Callable[[Sequence[Sequence[int]]], Iterator[Sequence[int]]],
) -> FeatureCache:
    """Compute what is missing of a cache.

    Args:
        folder: where it lies.
        records: the images, one row each.
        encode: given row numbers, returns those that could be read and their features.
        batch_size: images per call of `encode`.
        progress: wraps the list of batches in a progress bar.
    """
    cache = FeatureCache(folder) if (folder / "meta.json").exists() else None
    missing = range(len(records)) if cache is None else np.flatnonzero(cache.state_R == FeatureCache.MISSING).tolist()
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    unreadable: list[int] = []
    for number, batch in enumerate(progress(batches)):
        readable, features = encode(batch)
        if features is not None:
            cache = cache or FeatureCache.create(folder, len(records), features)
            cache.write(readable, features)
        unreadable += [row for row in batch if row not in readable]
        if cache is not None:
            cache.state_R[unreadable] = FeatureCache.UNREADABLE
            if number % 20 == 19:
                cache.flush()
    if cache is None:
        raise OSError(f"{folder}: no image could be read")
    cache.flush()
    return cache
