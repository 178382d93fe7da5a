import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from prune_tell.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_rate_and_scale(p):
    n = 400_000
    y = Dropout(p).train()(torch.full((n,), 3.0))
    dropped = y == 0
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(dropped.float().mean().item() - p) < 5 * sigma
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 3.0 / (1 - p)))


def test_every_sixteen_bit_lane_has_the_rate():
    dropped = Dropout(0.2).train()(torch.ones(100_000, 4)) == 0
    assert ((dropped.float().mean(0) - 0.2).abs() < 5 * math.sqrt(0.16 / 100_000)).all()
    # ... and the lanes don't move together.
    assert torch.corrcoef(dropped.T.float()).fill_diagonal_(0).abs().max() < 0.02


@given(shape=array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=7), p=st.sampled_from([0.1, 0.5]))
def test_any_shape(shape, p):
    x = torch.rand(shape) + 1
    y = Dropout(p).train()(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, torch.where(y == 0, 0.0, x / (1 - p)))


def test_no_elements_and_views():
    layer = Dropout(0.5).train()
    assert layer(torch.empty(0, 3)).shape == (0, 3)
    x = torch.rand(6, 10).t()[::2] + 1
    y = layer(x)
    torch.testing.assert_close(y, torch.where(y == 0, 0.0, 2 * x))


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_identity_in_eval_mode_and_at_zero(p, training):
    x = torch.rand(3, 5)
    state = torch.get_rng_state()
    assert Dropout(p).train(training)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_draws_repeat_and_others_differ():
    layer, x = Dropout(0.5).train(), torch.ones(1000)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_gradient_is_the_scaled_mask():
    x = torch.ones(1001, requires_grad=True)
    y = Dropout(0.25).train()(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_bf16_keeps_its_type():
    y = Dropout(0.5).train()(torch.full((101,), 1.5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert set(y.tolist()) == {0.0, 3.0}


def test_other_devices_get_their_own_draws():
    # Only the CPU has the cheap draw; a mask made there would meet a tensor elsewhere.
    assert Dropout(0.5).train()(torch.ones(5, device="meta")).device.type == "meta"


def test_its_rate_shows_in_the_models_text():
    assert repr(Dropout(0.25)) == "Dropout(p=0.25)"
