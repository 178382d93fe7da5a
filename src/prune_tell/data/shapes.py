"""The embedded data set `data=shapes`: made in memory, the same on every machine, no download."""

from collections.abc import Sequence

from PIL import Image

from prune_tell.data.records import SPLITS, Problems, Record, Split, datasets
from prune_tell.data.shapes_captions import describe
from prune_tell.data.shapes_render import Pixels, render
from prune_tell.data.shapes_scene import random_source, scene_at
from prune_tell.errors import UserError

MAX_SCENES = 1_000_000  # per split, so that ids of different splits can't meet
MIN_IMAGE_SIZE = 48  # below, small objects are a few pixels and can't be told apart
CACHE_BYTES = 512 * 2**20  # rendered pictures are kept up to here, then rendered anew on each call


class Shapes:
    """Generated scenes with five captions each (see `prune_tell.data.records.Dataset`).

    A record's `image_id` and `location` are the scene's number: the position of its split in `SPLITS`
    times `MAX_SCENES`, plus its index within the split. The scene, the captions and the pixels depend on the
    seed, the split and the index alone, never on how many scenes there are.
    """

    name = "shapes"

    def __init__(self, counts: dict[Split, int], image_size: int, seed: int) -> None:
        self.counts = counts
        self.image_size = image_size
        self.seed = seed
        self._records: dict[Split, tuple[Record, ...]] = {}
        self._pixels: dict[int, Pixels] = {}

    def records(self, split: Split) -> Sequence[Record]:
        """Return the scenes of `split` in order."""
        if split not in self._records:
            self._records[split] = tuple(self._record(split, index) for index in range(self.counts[split]))
        return self._records[split]

    def _record(self, split: Split, index: int) -> Record:
        number = SPLITS.index(split) * MAX_SCENES + index
        scene = scene_at(self.seed, split, index)
        return Record(number, number, describe(scene, random_source(self.seed, split, index, purpose=1)))

    def open(self, record: Record) -> Image.Image:
        """Return the picture of `record` (RGB, `image_size` x `image_size`); rendered once, then kept."""
        number = record.location
        if not isinstance(number, int):
            raise TypeError(f"{number} is a file; a record of generated scenes has a scene's number")
        pixels = self._pixels.get(number)
        if pixels is None:
            split_number, index = divmod(number, MAX_SCENES)
            split = SPLITS[split_number]
            scene = scene_at(self.seed, split, index)
            pixels = render(scene, random_source(self.seed, split, index, purpose=2), self.image_size)
            if (len(self._pixels) + 1) * pixels.nbytes <= CACHE_BYTES:
                self._pixels[number] = pixels
        return Image.fromarray(pixels)


@datasets.register("shapes")
def shapes(
    *,
    problems: Problems,
    train_scenes: int = 3000,
    val_scenes: int = 300,
    test_scenes: int = 300,
    image_size: int = 64,
    seed: int = 0,
) -> Shapes:
    """Build the embedded data set.

    Args:
        problems: the report of broken items; generated scenes have none.
        train_scenes: number of training scenes; changing it leaves the other splits as they are.
        val_scenes: number of validation scenes.
        test_scenes: number of test scenes.
        image_size: height and width in pixels.
        seed: another seed gives other scenes, but no layout ever changes its split.

    Raises:
        UserError: for a number that is out of range.
    """
    counts: dict[Split, int] = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
    for split, count in counts.items():
        if not 0 <= count <= MAX_SCENES:
            raise UserError(f"data.{split}_scenes={count} is out of range (0 to {MAX_SCENES})")
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"data.image_size={image_size} is too small for the shapes (at least {MIN_IMAGE_SIZE} pixels)")
    if seed < 0:
        raise UserError(f"data.seed={seed} is out of range (0 or more)")
    return Shapes(counts, image_size, seed)
