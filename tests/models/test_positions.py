import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_tell.errors import UserError
from prune_tell.models.positions import GridPositions, WordPositions, sinusoid

CPU = torch.device("cpu")


def test_sinusoid_follows_the_formula():
    table = sinusoid(torch.arange(7), 6)
    for t in range(7):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_word_positions_look_up_any_shape(kind):
    positions = WordPositions(kind=kind, d_model=8, max_length=5)
    index = torch.tensor([[0, 4, 1], [2, 2, 3]])
    out = positions(index)
    assert out.shape == (2, 3, 8)
    assert torch.equal(out[1, 0], out[1, 1])
    assert torch.equal(out[0, 1], positions(torch.tensor(4)))
    assert out.requires_grad == (kind == "learned")
    assert len(positions.state_dict()) == (kind == "learned")  # a fixed table is not worth saving
    with pytest.raises(IndexError):
        positions(torch.tensor([5]))


@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_grid_positions_run_row_by_row(rows, columns):
    place = GridPositions(kind="sinusoidal", d_model=16)((rows, columns), CPU)
    assert place.shape == (rows * columns, 16)
    grid = place.view(rows, columns, 16)
    assert torch.equal(grid[:, :, :8], grid[:, :1, :8].expand(-1, columns, -1))  # the first half tells the row
    assert torch.equal(grid[:, :, 8:], grid[:1, :, 8:].expand(rows, -1, -1))  # the second the column
    assert len(torch.unique(place, dim=0)) == rows * columns
    r, c = rows - 1, columns - 1
    expected = sinusoid(torch.tensor([(r + 0.5) * 100 / rows, (c + 0.5) * 100 / columns]), 8).flatten()
    torch.testing.assert_close(grid[r, c], expected)


def test_grids_of_different_sizes_share_their_centre():
    positions = GridPositions(kind="sinusoidal", d_model=16)
    small, large = positions((3, 3), CPU)[4], positions((7, 5), CPU)[17]
    torch.testing.assert_close(small, large)


def test_kinds_of_grid_positions():
    assert GridPositions(kind="none", d_model=16)((2, 2), CPU) is None
    learned = GridPositions(kind="learned", d_model=16)
    fixed = GridPositions(kind="sinusoidal", d_model=16)((2, 3), CPU)
    torch.testing.assert_close(learned((2, 3), CPU), learned.map(fixed))
    learned((2, 3), CPU).sum().backward()
    assert learned.map.weight.grad is not None


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("d_model", [6, 10, 15])
def test_a_width_that_cannot_hold_a_place_is_refused(kind, d_model):
    with pytest.raises(UserError) as caught:
        GridPositions(kind=kind, d_model=d_model)
    assert str(caught.value) == (
        f"decoder.d_model={d_model} is not divisible by 4, which decoder.grid_positions={kind} needs"
    )
    assert GridPositions(kind="none", d_model=d_model)((1, 1), CPU) is None


def test_an_odd_width_is_refused_for_words():
    with pytest.raises(UserError) as caught:
        WordPositions(kind="sinusoidal", d_model=7, max_length=4)
    assert str(caught.value) == "decoder.d_model=7 is odd, but decoder.positions=sinusoidal needs an even width"
    assert WordPositions(kind="learned", d_model=7, max_length=4)(torch.tensor([0])).shape == (1, 7)
