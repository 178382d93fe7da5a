import hashlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from pycocoevalcap.cider.cider import Cider

from prune_tell.data.records import SPLITS, Problems, Split, datasets
from prune_tell.data.shapes import MAX_SCENES, Shapes, shapes
from prune_tell.data.shapes_captions import NUMBERS, PLACES, describe, relation
from prune_tell.data.shapes_render import RGB, render
from prune_tell.data.shapes_scene import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    random_source,
    scene_at,
    split_of,
)
from prune_tell.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "data" / "shapes.yaml"
LOOK = re.compile(
    rf"\b(an?|two|three|four) (?:(large|big|small) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?\b"
)
PLACE = "|".join(sorted((place for row in PLACES for place in row), key=len, reverse=True))
ALIKE = re.compile(rf"^(\w+) ({'|'.join(SHAPES)})e?s\b.*, (both|all) of them (\w+)")
RELATION = re.compile(r"to the left of|to the right of|above|below")


def small(**options: int) -> Shapes:
    return shapes(problems=Problems(), **{"train_scenes": 40, "val_scenes": 20, "test_scenes": 20, **options})


def words_of(caption: str) -> str:
    return " ".join(caption.lower().replace(".", "").replace(",", "").split())


def test_is_registered_under_its_name() -> None:
    dataset = datasets["shapes"](problems=Problems(), train_scenes=3)
    assert dataset.name == "shapes"
    assert len(dataset.records("train")) == 3


def test_layouts_are_disjoint_between_splits_even_across_seeds() -> None:
    layouts: dict[Split, set[frozenset[Thing]]] = {
        split: {frozenset(scene_at(seed, split, i).things) for seed in range(2) for i in range(400)} for split in SPLITS
    }
    assert not layouts["train"] & layouts["val"]
    assert not layouts["train"] & layouts["test"]
    assert not layouts["val"] & layouts["test"]
    assert all(len(found) > 600 for found in layouts.values())


def test_split_ignores_the_background_and_the_order_of_the_things() -> None:
    scene = next(s for s in (scene_at(0, "val", i) for i in range(50)) if len(s.things) > 1)
    assert split_of(Scene(scene.things[::-1], "noisy", "navy")) == split_of(scene) == "val"


def test_counts_change_no_scene() -> None:
    few, many = small(), small(train_scenes=90, val_scenes=50)
    for split in SPLITS:
        for one, other in zip(few.records(split), many.records(split), strict=False):
            assert one == other
            assert few.open(one).tobytes() == many.open(other).tobytes()
    assert small(seed=1).records("val") != few.records("val")


def test_ids_are_unique_and_locate_the_scene() -> None:
    data = small()
    records = [record for split in SPLITS for record in data.records(split)]
    assert len({record.image_id for record in records}) == len(records) == 80
    assert [r.location for r in data.records("val")][:2] == [MAX_SCENES, MAX_SCENES + 1]


def test_pixels_and_captions_are_the_same_on_every_machine() -> None:
    data = small()
    pixels, texts = hashlib.sha256(), hashlib.sha256()
    for record in data.records("val"):
        pixels.update(data.open(record).tobytes())
        texts.update(repr(record).encode())
    assert pixels.hexdigest()[:16] == "5f5ffa1073fead63"
    assert texts.hexdigest()[:16] == "eeef379b7c2a7db3"


def test_opened_pictures_are_independent_copies() -> None:
    data = small()
    record = data.records("train")[0]
    before = data.open(record)
    data.open(record).paste((0, 0, 0), (0, 0, 64, 64))
    assert data.open(record).tobytes() == before.tobytes()
    assert (before.mode, before.size) == ("RGB", (64, 64))


@pytest.mark.parametrize("size", [48, 64, 100, 224])
def test_each_object_is_painted_in_its_own_cell_only(size: int) -> None:
    for i in range(40):
        scene = scene_at(0, "train", i)
        picture = render(scene, random_source(0, "train", i, purpose=2), size)
        assert picture.shape == (size, size, 3)
        for colour in COLOURS:
            rows, columns = np.nonzero((picture == RGB[colour]).all(axis=2))
            painted = {(int(y) * 3 // size, int(x) * 3 // size) for y, x in zip(rows, columns, strict=True)}
            assert painted == {(t.row, t.column) for t in scene.things if t.colour == colour}


def test_shapes_sizes_and_textures_all_look_different() -> None:
    def picture(shape: str, large: bool, texture: str) -> bytes:
        scene = Scene((Thing("red", shape, large, 1, 1),), texture, "brown")
        return render(scene, np.random.Generator(np.random.PCG64(0)), 64).tobytes()

    looks = [(s, large, t) for s in SHAPES for large in (True, False) for t in TEXTURES]
    assert len({picture(*look) for look in looks}) == len(looks)
    with pytest.raises(ValueError, match="no shape is called 'blob'"):
        picture("blob", True, "noisy")
    with pytest.raises(ValueError, match="no texture is called 'plain'"):
        picture("star", True, "plain")


def test_large_objects_cover_more_than_small_ones() -> None:
    for shape in SHAPES:
        areas = []
        for large in (False, True):
            scene = Scene((Thing("green", shape, large, 1, 1),), "noisy", "black")
            picture = render(scene, np.random.Generator(np.random.PCG64(0)), 64)
            areas.append(int((picture == RGB["green"]).all(axis=2).sum()))
        assert areas[1] > 2 * areas[0] > 40


def test_pixel_norm_prefers_the_background() -> None:
    """Half of the patches chosen by pixel norm must hold fewer object patches than chance would."""
    kept = []
    for i in range(100):
        scene = scene_at(0, "val", i)
        picture = render(scene, random_source(0, "val", i, purpose=2), 64) / 127.5 - 1
        norm = np.square(picture).reshape(8, 8, 8, 8, 3).sum(axis=(1, 3, 4))
        centres = [((t.row * 64 // 3 + 10) // 8, (t.column * 64 // 3 + 10) // 8) for t in scene.things]
        kept += [norm[centre] > np.median(norm) for centre in centres]
    assert np.mean(kept) < 0.4


def check_truth(caption: str, scene: Scene) -> None:
    """Check every statement of a caption against the scene, reading the text alone."""
    text = caption[0].lower() + caption[1:].rstrip(".")
    named = 0
    for number, size, colour, shape in LOOK.findall(text):
        found = [t for t in scene.things if (t.colour, t.shape) == (colour, shape)]
        assert len(found) == (1 if number in ("a", "an") else NUMBERS.index(number))
        assert not size or found[0].large == (size != "small")
        named += len(found)
    if other := re.search(r"(two|three) other shapes", text):
        assert NUMBERS.index(other[1]) + named == len(scene.things)
    if total := re.search(r"(two|three|four) shapes", text):
        assert NUMBERS.index(total[1]) == len(scene.things)
    if alike := ALIKE.search(text):
        assert NUMBERS.index(alike[1]) == len(scene.things)
        assert {(t.colour, t.shape) for t in scene.things} == {(alike[4], alike[2])}
        assert (alike[3] == "both") == (len(scene.things) == 2)
    if "look the same" in text:
        assert len(scene.groups()) == 1
    for match in re.finditer(rf"({LOOK.pattern})(?:,? one of them| sits| is)? ({PLACE})(?! of)", text):
        cells = {PLACES[t.row][t.column] for t in scene.things if (t.colour, t.shape) == match.group(4, 5)}
        assert match[6] in cells
    if how := RELATION.search(text):
        one, other = (next(t for t in scene.things if (t.colour, t.shape) == m[2:]) for m in LOOK.findall(text))
        assert {
            "to the left of": one.column < other.column,
            "to the right of": one.column > other.column,
            "above": one.row < other.row,
            "below": one.row > other.row,
        }[how[0]]
    stems = {"checks": "checked", "dots": "dotted", "noise": "noisy"}
    for word in re.findall(
        r"(\w+) background\b|\bon (?:a background of )?(stripes|checks|dots|noise|zigzags|ripples)", text
    ):
        texture = next(filter(None, word))
        assert stems.get(texture, texture)[:5] == scene.texture[:5]
    if tone := re.search(r"(black|brown|navy) \w+ background", text):
        assert tone[1] == scene.tone
    assert named or alike


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true(split: Split) -> None:
    for i in range(300):
        scene = scene_at(3, split, i)
        for caption in describe(scene, random_source(3, split, i, purpose=1)):
            check_truth(caption, scene)


def test_the_truth_check_finds_lies() -> None:
    things = (Thing("red", "star", True, 0, 0), Thing("blue", "cross", False, 2, 2))
    scene = Scene(things, "striped", "brown")
    check_truth("A large red star to the left of a small blue cross.", scene)
    for lie in (
        "A large red star to the right of a small blue cross.",
        "A small red star on stripes.",
        "Two red stars and a blue cross on a striped background.",
        "A red star on dots.",
        "A red star on a navy striped background.",
        "A red star in the middle with a blue cross.",
        "A red star and two other shapes.",
    ):
        with pytest.raises((AssertionError, StopIteration)):
            check_truth(lie, scene)


def test_relation_takes_the_longer_axis() -> None:
    one = Thing("red", "star", True, 0, 0)
    assert relation(one, Thing("blue", "ring", False, 2, 1)) == "above"
    assert relation(one, Thing("blue", "ring", False, 1, 2)) == "to the left of"
    assert relation(Thing("blue", "ring", False, 1, 1), one) == "to the right of"


def test_captions_are_five_different_sentences_of_few_words() -> None:
    data = shapes(problems=Problems(), train_scenes=1500)
    vocabulary: set[str] = set()
    for record in data.records("train"):
        assert len(set(record.captions)) == 5
        for caption in record.captions:
            assert re.fullmatch(r"[A-Z][a-z, ]+\.", caption)
            words = words_of(caption).split()
            assert 5 <= len(words) <= 16
            vocabulary.update(words)
    assert len(vocabulary) <= 120


def test_people_agree_and_a_constant_caption_scores_badly() -> None:
    records = shapes(problems=Problems(), train_scenes=0).records("val")
    refs = {r.image_id: [words_of(c) for c in r.captions] for r in records}
    human = Cider().compute_score({i: c[1:] for i, c in refs.items()}, {i: c[:1] for i, c in refs.items()})[0]
    phrase = "a large red circle and a blue square on a striped background"
    constant = Cider().compute_score(refs, {i: [phrase] for i in refs})[0]
    assert human > 2
    assert constant < human / 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_scenes": -1}, "data.val_scenes=-1 is out of range (0 to 1000000)"),
        ({"train_scenes": 1_000_001}, "data.train_scenes=1000001 is out of range (0 to 1000000)"),
        ({"image_size": 8}, "data.image_size=8 is too small for the shapes (at least 48 pixels)"),
        ({"seed": -2}, "data.seed=-2 is out of range (0 or more)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        small(**options)
    assert str(error.value) == message


def test_config_opens_with_its_command_and_holds_every_option() -> None:
    assert CONFIG.read_text().startswith("# python -m prune_tell.train data=shapes\n")
    config = OmegaConf.to_container(OmegaConf.load(CONFIG))
    assert isinstance(config, dict)
    options = {k: v.default for k, v in inspect.signature(shapes).parameters.items() if k != "problems"}
    assert {key: config[key] for key in options} == options
    assert config["format"] == "shapes"
