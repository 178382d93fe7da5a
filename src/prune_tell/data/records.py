"""What a data set is, whatever file format it came from: records, and a way to open their pixels."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from prune_tell.errors import UserError
from prune_tell.registry import Registry

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
OnError = Literal["skip", "refuse"]


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its human captions.

    Attributes:
        image_id: the data set's own id; COCO's integer id, else the file's name. Unique over all splits.
        location: where the pixels are: a file for photographs, an index for generated scenes.
        captions: the captions as written by people (whitespace collapsed, never empty strings).
    """

    image_id: int | str
    location: Path | int
    captions: tuple[str, ...]


class Dataset(Protocol):
    """A captioned image collection with train, val and test splits (a split may be empty)."""

    name: str

    def records(self, split: Split) -> Sequence[Record]:
        """Return the records of `split` in a fixed order."""
        ...

    def open(self, record: Record) -> Image.Image:
        """Return the picture of `record` as an RGB image; raise `OSError` if it can't be read."""
        ...


@dataclass
class Problems:
    """Counts and names everything wrong with a data set, so that nothing is lost silently.

    With `on_error="refuse"` the first problem raises; with `"skip"` it is recorded and the item left out.
    """

    on_error: OnError = "skip"
    items: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, where: str, detail: str) -> None:
        """Record one problem.

        Args:
            kind: a short fixed label, e.g. `"unreadable image"`, `"duplicate id"`.
            where: the file, line or id concerned.
            detail: one sentence for a person.

        Raises:
            UserError: when `on_error` is `"refuse"`.
        """
        if self.on_error == "refuse":
            raise UserError(f"{kind}: {where}: {detail} (data.on_error=refuse; use skip to leave such items out)")
        self.items.append({"kind": kind, "where": where, "detail": detail})

    def counts(self) -> dict[str, int]:
        """Return how often each kind of problem occurred."""
        return dict(Counter(item["kind"] for item in self.items))

    def write(self, path: Path) -> None:
        """Write the report: `{"counts": {kind: n}, "items": [{kind, where, detail}]}`."""
        path.write_text(
            json.dumps({"counts": self.counts(), "items": self.items}, indent=1, ensure_ascii=False), encoding="utf-8"
        )


datasets: Registry[Dataset] = Registry("data")
"""Builders `(*, problems: Problems, **options) -> Dataset`; `configs/data/*.yaml` name them in `format:`."""
