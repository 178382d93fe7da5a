"""Five true sentences about a scene: they agree in content and differ in wording, as people's captions do.

Every sentence starts from the main object (the large one, else the first in reading order), so that
what a caption mentions can be told from the picture; only the wording is left to chance.
"""

import numpy as np

from prune_tell.data.shapes_scene import Scene, Thing, pick

NUMBERS = ("no", "one", "two", "three", "four")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
NOUNS = {
    "striped": "stripes",
    "checked": "checks",
    "dotted": "dots",
    "noisy": "noise",
    "zigzag": "zigzags",
    "rippled": "ripples",
}
LARGE = ("large", "large", "big")
CAPTIONS = 5


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _several(count: int, look: str) -> str:
    """`two red crosses`."""
    return f"{NUMBERS[count]} {look}{'es' if look.endswith('cross') else 's'}"


def _join(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


class _Words:
    """Phrases for one scene; every call may choose other words for the same thing."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.rng = rng
        self.scene = scene
        self.groups = scene.groups()

    def group(self, index: int, sized: bool = True) -> str:
        """`a large red circle`, `two small blue stars`."""
        things = self.groups[index]
        size = (pick(self.rng, LARGE) if things[0].large else "small") + " " if sized else ""
        look = f"{size}{things[0].colour} {things[0].shape}"
        if len(things) == 1:
            return _article(look)
        return _several(len(things), look)

    def all(self) -> str:
        """Every group; only the main one with its size, and no more than three of them."""
        named = 3 if len(self.groups) <= 3 else 2
        parts = [self.group(index, sized=index == 0 and named < 3) for index in range(min(named, len(self.groups)))]
        rest = sum(len(group) for group in self.groups[named:])
        return _join([*parts, f"{NUMBERS[rest]} other shapes"] if rest else parts)

    def others(self) -> str:
        """Everything but the main group, short."""
        count = sum(len(group) for group in self.groups[1:])
        if len(self.groups) == 2:
            return self.group(1, sized=False)
        return f"{NUMBERS[count]} other shapes"

    def background(self, toned: bool = True) -> str:
        """`a black striped background`, `a background of stripes`."""
        if toned:
            return f"a {self.scene.tone} {self.scene.texture} background"
        phrases = [f"a {self.scene.texture} background"]
        if noun := NOUNS.get(self.scene.texture):
            phrases += [f"a background of {noun}", noun]
        return pick(self.rng, phrases)

    def place(self, index: int = 0) -> str:
        """Where the first object of a group is."""
        thing = self.groups[index][0]
        return PLACES[thing.row][thing.column]


def relation(one: Thing, other: Thing) -> str:
    """Return how `one` lies to `other`, by the axis on which they are further apart (else the horizontal)."""
    right, down = one.column - other.column, one.row - other.row
    if abs(right) >= abs(down):
        return "to the right of" if right > 0 else "to the left of"
    return "below" if down > 0 else "above"


def _of_one(words: _Words) -> list[str]:
    """Sentences about a single object."""
    place = words.place()
    return [
        f"{words.group(0)} {place} on {words.background(False)}",
        f"there is {words.group(0)} {place}",
        f"{words.group(0)} {pick(words.rng, ('sits', 'is'))} {place}",
        f"{words.background()} with {words.group(0)} {place}",
        f"{words.group(0)} on {words.background()}",
        f"a picture of {words.group(0)}",
    ]


def _of_alike(words: _Words) -> list[str]:
    """Sentences about several objects that look alike."""
    count, shape = len(words.scene.things), words.scene.things[0].shape
    them = "both" if count == 2 else "all"
    return [
        f"{words.group(0)} on {words.background(False)}",
        f"there are {words.group(0)} on {words.background(False)}",
        f"{words.background()} with {words.group(0)}",
        f"{words.group(0)} that look the same",
        f"{_several(count, shape)} on {words.background()}, {them} of them {words.scene.things[0].colour}",
        f"{words.group(0)}, one of them {words.place()}",
    ]


def _of_many(words: _Words) -> list[str]:
    """Sentences about objects of different looks."""
    things, main, second = words.scene.things, words.groups[0], words.groups[1]
    verb = "is" if len(main) == 1 else "are"
    sentences = [
        f"{words.all()} on {words.background(False)}",
        f"there {verb} {words.all()}",
        f"{words.background()} with {words.all()}",
        f"{words.group(0)} and {words.others()} on {words.background(False)}",
    ]
    if len(main) == len(second) == 1:
        how = relation(main[0], second[0])
        sentences.append(f"{words.group(0)} {how} {words.group(1)}")
        sentences.append(
            f"{words.group(0, sized=False)} {how} {words.group(1, sized=False)} on {words.background(False)}"
        )
    else:
        shapes = f"{NUMBERS[len(things)]} shapes"
        sentences.append(f"{shapes} on {words.background(False)}, {words.group(0)} and {words.others()}")
    if len(main) == len(second) == 1 and len(words.groups) == 2:
        sentences.append(f"{words.group(0)} {words.place()} and {words.group(1, sized=False)} {words.place(1)}")
    elif len(main) == 1:
        sentences.append(f"{words.group(0)} {words.place()} with {words.others()}")
    return sentences


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Return `CAPTIONS` different captions of `scene`, each 5 to 16 words, written as sentences."""
    words = _Words(scene, rng)
    if len(scene.things) == 1:
        sentences = _of_one(words)
    elif len(words.groups) == 1:
        sentences = _of_alike(words)
    else:
        sentences = _of_many(words)
    chosen = rng.permutation(len(sentences))[:CAPTIONS]
    return tuple(sentences[i][0].upper() + sentences[i][1:] + "." for i in chosen)
