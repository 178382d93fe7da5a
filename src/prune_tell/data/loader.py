"""Batches: which images come when, their captions packed, and a stream that can be taken up anywhere.

Everything random about an item is drawn from a generator seeded by (seed, epoch, item), so neither the number of
worker processes nor an interruption changes what the model sees.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from prune_tell.data.features import FeatureCache, Features, stack_features
from prune_tell.data.packing import PackedCaptions, pack_captions
from prune_tell.data.records import Record


class Failure(NamedTuple):
    """An item that could not be read, and why."""

    image_id: int | str
    reason: str


class Item(NamedTuple):
    """One image and the captions drawn for it."""

    record: Record
    visual: Tensor | Features
    captions: list[list[int]]


@dataclass
class Batch:
    """Images (or cached features) with their captions.

    Attributes:
        records: where the rows come from.
        visual: `(B, 3, rows, columns)` images, or features.
        captions: packed token ids, one row per image.
        failures: items that are missing from the batch because they could not be read.
    """

    records: list[Record]
    visual: Tensor | Features
    captions: PackedCaptions
    failures: list[Failure] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors to `device`."""
        visual = (
            self.visual.to(device) if isinstance(self.visual, Features) else self.visual.to(device, non_blocking=True)
        )
        return Batch(self.records, visual, self.captions.to(device), self.failures)

    def pin_memory(self) -> "Batch":
        """Page-lock the tensors (the loader calls this), so that copies to a GPU overlap with its work."""
        visual: Any = self.visual
        pinned = Features(*map(_pinned, visual)) if isinstance(visual, Features) else visual.pin_memory()
        return Batch(self.records, pinned, PackedCaptions(*map(_pinned, self.captions)), self.failures)

    def split(self, parts: int) -> list["Batch"]:
        """Cut into micro-batches of consecutive images (fewer than `parts` where there are too few images)."""
        size = -(-len(self.records) // parts)
        rows = [slice(start, start + size) for start in range(0, len(self.records), size)]
        return [Batch(self.records[r], self._visual(r), PackedCaptions(*(t[r] for t in self.captions))) for r in rows]

    def _visual(self, rows: slice) -> Tensor | Features:
        return self.visual.rows(rows) if isinstance(self.visual, Features) else self.visual[rows]


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else value


class CaptionItems(TorchDataset[Item | Failure]):
    """The items of a split, addressed by (epoch, index).

    Args:
        records: the split.
        open_image: opens a record's picture; unused with a cache.
        transform: picture to tensor.
        encode: caption text to token ids.
        captions_per_image: how many to draw per image and epoch; all of them where None.
        seed: of the draws.
        cache: features computed before, row i for record i.
        views: the same of augmented versions of the images; an item draws one of all.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        open_image: Callable[[Record], Image.Image],
        transform: Callable[[Image.Image], Tensor],
        encode: Callable[[str], list[int]],
        captions_per_image: int | None = None,
        seed: int = 0,
        cache: FeatureCache | None = None,
        views: Sequence[FeatureCache] = (),
    ) -> None:
        self.records = records
        self.open_image = open_image
        self.transform = transform
        self.captions = [[encode(caption) for caption in record.captions] for record in records]
        self.lengths = [sum(map(len, captions)) for captions in self.captions]
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.cache = cache
        self.views = views

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Item | Failure:
        epoch, index = key
        record, captions = self.records[index], self.captions[index]
        draw = random.Random(f"{self.seed}/{epoch}/{index}")
        if self.captions_per_image is not None and len(captions) > self.captions_per_image:
            captions = draw.sample(captions, self.captions_per_image)
        if self.cache is not None:
            if self.cache.state_R[index] != FeatureCache.THERE:
                return Failure(record.image_id, f"{record.location} could not be read when the features were cached")
            return Item(record, draw.choice((self.cache, *self.views)).row(index), captions)
        try:
            image = self.open_image(record)
        except OSError as error:
            return Failure(record.image_id, str(error))
        # Augmentation draws from torch's global generator: lend it a seed of its own and put things back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.getrandbits(62))
            return Item(record, self.transform(image), captions)


def collate(items: Sequence[Item | Failure]) -> Batch | list[Failure]:
    """Make a batch of the items that could be read; only the failures where none could."""
    failures = [item for item in items if isinstance(item, Failure)]
    good = [item for item in items if isinstance(item, Item)]
    if not good:
        return failures
    visuals: list[Any] = [item.visual for item in good]
    visual = stack_features(visuals) if isinstance(visuals[0], Features) else torch.stack(visuals)
    return Batch([item.record for item in good], visual, pack_captions([item.captions for item in good]), failures)


class EpochBatches:
    """Endless shuffled batches of (epoch, index), starting at any batch: the sampler's whole state is a number.

    Images whose captions are about equally long come together, so that rows need little padding: the shuffled items are
    sorted by length within windows of 16 batches, and the batches then shuffled.

    Args:
        lengths: words to expect per item.
        batch_size: items in a batch; an epoch's last one may be smaller.
        seed: of the shuffles.
        start: batches to pass over (what was done before an interruption).
    """

    WINDOW = 16

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, start: int = 0) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.per_epoch = -(-len(lengths) // batch_size)

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """All batches of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = self.WINDOW * self.batch_size
        batches: list[list[tuple[int, int]]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda index: self.lengths[index])
            batches += [
                [(epoch, i) for i in near[b : b + self.batch_size]] for b in range(0, len(near), self.batch_size)
            ]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start, self.per_epoch)
        while True:
            yield from self.epoch(epoch)[first:]
            epoch, first = epoch + 1, 0


def train_loader(
    items: CaptionItems,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Endless training batches, from batch number `start` on."""
    batches = EpochBatches(items.lengths, batch_size=batch_size, seed=seed, start=start)
    return DataLoader(
        items,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else iterators draw from the global one, and resuming would differ
    )


def eval_loader(items: CaptionItems, *, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Every item once, in order, with all its captions."""
    keys = [(0, index) for index in range(len(items))]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return DataLoader(
        items,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def limit_records(records: Sequence[Record], *, max_images: int | None, max_captions: int | None) -> list[Record]:
    """Take the first `max_images` records, and of each the first `max_captions` captions."""
    return [Record(r.image_id, r.location, r.captions[:max_captions]) for r in records[:max_images]]
