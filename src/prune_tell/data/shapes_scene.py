"""What is in a generated scene: objects on a 3 x 3 layout over a textured background.

A scene is symbolic and independent of the picture's size; `shapes_render` paints it and
`shapes_captions` describes it. Its split follows from a hash of its layout, so no layout is
ever shared by two splits, whatever the number of scenes and whatever the seed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from prune_tell.data.records import SPLITS, Split

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "turquoise")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
TEXTURES = ("striped", "checked", "dotted", "noisy", "shaded", "zigzag", "rippled")
TONES = ("black", "brown", "navy")

OBJECT_COUNTS = (0.35, 0.35, 0.2, 0.1)  # probability of 1, 2, 3 and 4 objects
REPEAT_KIND = 0.25  # probability that a further object looks like one that is already there
MAIN_IS_LARGE = 0.5
SPLIT_BUCKETS: dict[Split, range] = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}

Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it looks like and in which cell of the 3 x 3 layout it lies."""

    colour: str
    shape: str
    large: bool
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Scene:
    """The objects, the main one first, and the background.

    Attributes:
        things: large objects first, then in reading order (top to bottom, left to right).
        texture: one of `TEXTURES`.
        tone: one of `TONES`.
    """

    things: tuple[Thing, ...]
    texture: str
    tone: str

    def groups(self) -> list[tuple[Thing, ...]]:
        """Return the objects grouped by look (colour and shape), the main group first."""
        looks: dict[tuple[str, str], list[Thing]] = {}
        for thing in self.things:
            looks.setdefault((thing.colour, thing.shape), []).append(thing)
        return [tuple(group) for group in looks.values()]


def random_source(seed: int, split: Split, index: int, purpose: int) -> np.random.Generator:
    """Return the generator of one purpose of one scene, so that scenes don't depend on each other."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index, purpose])))


def pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    """Return one of `choices` (uniformly)."""
    return choices[int(rng.integers(len(choices)))]


def split_of(scene: Scene) -> Split:
    """Return the one split that may hold the layout of `scene`.

    The background is left out: the same objects in the same places on another background
    belong to the same split, so that a layout can't be learned by heart.
    """
    layout = sorted((t.row, t.column, t.colour, t.shape, t.large) for t in scene.things)
    bucket = hashlib.sha256(repr(layout).encode()).digest()[0] % 10
    return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of any split.

    At most one look is large, so that "the large one" is never ambiguous, and objects that look
    alike have the same size. Every object has a cell of its own, so objects never overlap.
    """
    count = 1 + int(np.searchsorted(np.cumsum(OBJECT_COUNTS), rng.random(), side="right").clip(max=3))
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        if looks and rng.random() < REPEAT_KIND:
            looks.append(pick(rng, looks))
        elif (look := (pick(rng, COLOURS), pick(rng, SHAPES))) not in looks:
            looks.append(look)
    large = looks[0] if rng.random() < MAIN_IS_LARGE else None
    cells = rng.permutation(9)[:count].tolist()
    things = [Thing(*look, look == large, *divmod(cell, 3)) for look, cell in zip(looks, cells, strict=True)]
    things.sort(key=lambda thing: (not thing.large, thing.row, thing.column))
    return Scene(tuple(things), pick(rng, TEXTURES), pick(rng, TONES))


def scene_at(seed: int, split: Split, index: int) -> Scene:
    """Return scene number `index` of `split`: drawn again until its layout belongs to the split."""
    rng = random_source(seed, split, index, purpose=0)
    while split_of(scene := draw_scene(rng)) != split:
        pass
    return scene
