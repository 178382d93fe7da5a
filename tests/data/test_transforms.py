import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prune_tell.data.transforms import Preprocessing, build_transform, to_display
from prune_tell.errors import UserError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def stripes(width: int = 90, height: int = 30) -> Image.Image:
    """Three upright stripes: red, green, blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate((RED, GREEN, BLUE)):
        picture[:, index * width // 3 : (index + 1) * width // 3] = colour
    return Image.fromarray(picture)


def test_squash_keeps_the_whole_picture():
    image = build_transform(Preprocessing((12, 12), fit="squash", interpolation="bilinear", **PLAIN))(stripes())
    assert image.shape == (3, 12, 12)
    assert image.dtype == torch.float32
    assert image[:, 6, 1].tolist() == [1, 0, 0]
    assert image[:, 6, 6].tolist() == [0, 1, 0]
    assert image[:, 6, 10].tolist() == [0, 0, 1]


def test_crop_keeps_the_shape_and_the_centre():
    image = build_transform(Preprocessing((12, 12), fit="crop", interpolation="nearest", **PLAIN))(stripes())
    assert image.shape == (3, 12, 12)
    assert (image == torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)).all()  # only the green third is left
    square = stripes(30, 30)
    outer = build_transform(Preprocessing((12, 12), crop_ratio=1.0, interpolation="nearest", **PLAIN))(square)
    assert outer[:, 6, 0].tolist() == [1, 0, 0]
    inner = build_transform(Preprocessing((12, 12), crop_ratio=1 / 3, interpolation="nearest", **PLAIN))(square)
    assert (inner[1] == 1).all()


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (12, 8), (5, 5)])
def test_any_size_rows_first(fit, augment, size):
    transform = build_transform(Preprocessing(size, fit=fit, **PLAIN), augment=augment)
    for picture in (stripes(), stripes(30, 80), stripes(3, 3)):
        assert transform(picture).shape == (3, *size)


def test_normalised_by_mean_and_std():
    recipe = Preprocessing((4, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    image = build_transform(recipe)(Image.new("RGB", (9, 9), (255, 0, 255)))
    torch.testing.assert_close(image[:, 2, 2], torch.tensor([1.0, -1.0, 0.5]))


@given(
    pixels=st.lists(st.integers(0, 255), min_size=3, max_size=3),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.1, 1)] * 3),
)
def test_display_undoes_the_normalisation(pixels, mean, std):
    recipe = Preprocessing((4, 4), mean=mean, std=std)
    image = build_transform(recipe)(Image.new("RGB", (6, 6), tuple(pixels)))
    shown = to_display(image, recipe)
    torch.testing.assert_close(shown[:, 1, 1], torch.tensor(pixels) / 255, atol=1e-5, rtol=0)


def test_display_stays_in_range():
    recipe = Preprocessing((2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    shown = to_display(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1).expand(3, 2, 2), recipe)
    assert shown[:, 0, 0].tolist() == [0.0, 0.5, 1.0]


def test_recipe_survives_json():
    recipe = Preprocessing(
        (8, 12), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation="bilinear", fit="squash", crop_ratio=0.9
    )
    assert Preprocessing.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert isinstance(Preprocessing.from_dict(recipe.to_dict()).image_size, tuple)


def test_augmentation_varies_with_the_seed_and_never_mirrors():
    transform = build_transform(Preprocessing((12, 12), **PLAIN), augment=True)
    picture, seen = stripes(60, 60), []
    for seed in range(20):
        torch.manual_seed(seed)
        image = transform(picture)
        torch.manual_seed(seed)
        assert torch.equal(transform(picture), image)
        assert image[0, :, 0].mean() > image[2, :, 0].mean()  # red stays on the left
        seen.append(image)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", ["cubic", "lanczos", "", "box"])
def test_an_unknown_interpolation_is_refused(name):
    with pytest.raises(UserError) as caught:
        build_transform(Preprocessing((4, 4), interpolation=name, **PLAIN))
    assert str(caught.value) == f"backbone.interpolation={name} is unknown (bilinear, bicubic or nearest)"
