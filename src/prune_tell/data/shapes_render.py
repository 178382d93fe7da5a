"""Paints a scene: antialiased flat shapes over a background with a strong texture.

Only integers, comparisons and exactly rounded float operations (`+ - * /` and the square root)
are used, and no library's drawing routines, so a scene gives the same bytes on every machine.

The backgrounds have more contrast than the objects: what catches a norm or a variance is the
texture, not what the captions are about. Pruning the wrong tokens loses objects.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from prune_tell.data.shapes_scene import Scene, Thing

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RGB = {
    "red": (214, 38, 38), "green": (34, 150, 62), "blue": (44, 84, 226), "yellow": (236, 206, 44),
    "purple": (138, 54, 176), "orange": (240, 132, 30), "pink": (246, 138, 186), "turquoise": (40, 196, 190),
}  # fmt: skip
TONE_RGB = {
    "black": ((22, 22, 24), (238, 238, 240)),
    "brown": ((48, 26, 10), (236, 222, 200)),
    "navy": ((14, 20, 60), (214, 222, 240)),
}
OUTLINE = (
    118,
    118,
    118,
)  # neither dark nor light: it frees an object from its background without adding norm
SUBSAMPLES = 4  # per pixel and axis; the coverage of a pixel is a count out of SUBSAMPLES ** 2
CELLS = 3
STAR = (
    (0, -100), (25, -31), (97, -29), (40, 14), (60, 84),
    (0, 44), (-60, 84), (-40, 14), (-97, -29), (-25, -31),
)  # fmt: skip


def _inside_polygon(u: Floats, v: Floats, corners: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    """Even-odd rule; corners in hundredths."""
    inside = np.zeros(u.shape, dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (v * 100 < y0) != (v * 100 < y1)
        inside ^= crosses & (u * 100 < x0 + (v * 100 - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _inside(shape: str, u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Which points of the square [-1, 1] x [-1, 1] (v downwards) belong to `shape`."""
    if shape == "circle":
        return u * u + v * v <= 0.98
    if shape == "ring":
        return (u * u + v * v <= 0.98) & (u * u + v * v >= 0.27)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.86
    if shape == "diamond":
        return abs(u) / 0.72 + abs(v) <= 0.98
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.31) & (np.maximum(abs(u), abs(v)) <= 0.95)
    if shape == "triangle":
        return _inside_polygon(u, v, ((0, -95), (98, 80), (-98, 80)))
    if shape == "star":
        return _inside_polygon(u, v, STAR)
    if shape == "heart":
        x, y = u * 1.2, 0.12 - v * 1.2
        disc = x * x + y * y - 1
        return disc * disc * disc - x * x * y * y * y <= 0
    raise ValueError(f"no shape is called '{shape}'")


@cache
def coverage(shape: str, diameter: int) -> Ints:
    """How many of a pixel's `SUBSAMPLES ** 2` points lie inside `shape`: (diameter, diameter)."""
    steps = diameter * SUBSAMPLES
    axis = (2 * np.arange(steps) + 1 - steps) / steps
    inside = _inside(shape, axis[None, :] + 0 * axis[:, None], axis[:, None] + 0 * axis[None, :])
    counts: Ints = inside.reshape(diameter, SUBSAMPLES, diameter, SUBSAMPLES).sum(axis=(1, 3), dtype=np.int64)
    return counts


def _blend(under: Ints, colour: tuple[int, int, int], cover: Ints) -> Ints:
    """Mix `colour` into `under` (H, W, 3) by `cover` (H, W) out of `SUBSAMPLES ** 2`."""
    full = SUBSAMPLES * SUBSAMPLES
    alpha = cover[:, :, None]
    mixed: Ints = (under * (full - alpha) + np.asarray(colour, dtype=np.int64) * alpha + full // 2) // full
    return mixed


def _texture(texture: str, rng: np.random.Generator, size: int) -> Ints:
    """Return how light each pixel is, 0..255: (size, size). The phase and the direction are random."""
    unit = max(1, size // 32)  # two pixels in a 64-pixel picture
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    phase_x, phase_y = (int(p) for p in rng.integers(8 * unit, size=2))
    if texture == "striped":
        across = (x, y, x + y, x - y + size)[int(rng.integers(4))] + phase_x
        return across // (2 * unit) % 2 * 255
    if texture == "checked":
        return ((x + phase_x) // (2 * unit) + (y + phase_y) // (2 * unit)) % 2 * 255
    if texture == "dotted":
        dot = np.pad(coverage("circle", 3 * unit), (0, unit)) * 255 // SUBSAMPLES**2
        repeats = -(-size // (4 * unit)) + 2
        return np.tile(dot, (repeats, repeats))[phase_y : phase_y + size, phase_x : phase_x + size]
    if texture == "noisy":
        grains = rng.integers(256, size=(-(-size // unit),) * 2)
        return grains.repeat(unit, axis=0).repeat(unit, axis=1)[:size, :size]
    if texture == "shaded":
        ramp = (x, y, size - 1 - x, size - 1 - y)[int(rng.integers(4))]
        return ramp * 255 // (size - 1)
    if texture == "zigzag":
        teeth = abs((x + phase_x) % (8 * unit) - 4 * unit)
        return (y + phase_y + teeth) // (2 * unit) % 2 * 255
    if texture == "rippled":
        dx, dy = (axis - (4 * unit + p) * size // (16 * unit) for axis, p in ((x, phase_x), (y, phase_y)))
        return np.sqrt(dx * dx + dy * dy).astype(np.int64) // (2 * unit) % 2 * 255
    raise ValueError(f"no texture is called '{texture}'")


def _paint(picture: Ints, thing: Thing, rng: np.random.Generator) -> None:
    """Paint one object with its outline somewhere inside its cell (in place)."""
    size = len(picture)
    top, bottom = thing.row * size // CELLS, (thing.row + 1) * size // CELLS
    left, right = thing.column * size // CELLS, (thing.column + 1) * size // CELLS
    side = min(bottom - top, right - left)
    border = max(1, size // 64)
    outer = side - border if thing.large else side * 2 // 3 - border
    slack = side - outer
    y, x = (int(start + slack // 4 + rng.integers(slack - slack // 4 * 2 + 1)) for start in (top, left))
    for colour, inset in ((OUTLINE, 0), (RGB[thing.colour], border)):
        diameter = outer - 2 * inset
        place = slice(y + inset, y + inset + diameter), slice(x + inset, x + inset + diameter)
        picture[place] = _blend(picture[place], colour, coverage(thing.shape, diameter))


def render(scene: Scene, rng: np.random.Generator, size: int) -> Pixels:
    """Return the picture of `scene` as RGB bytes of shape (size, size, 3)."""
    dark, light = (np.asarray(rgb, dtype=np.int64) for rgb in TONE_RGB[scene.tone])
    lightness = _texture(scene.texture, rng, size)[:, :, None]
    picture: Ints = (dark * (255 - lightness) + light * lightness) // 255
    for thing in scene.things:
        _paint(picture, thing, rng)
    return picture.astype(np.uint8)
