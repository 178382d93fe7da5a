"""The weight average: its formula, its bias correction, and that borrowing it leaves nothing behind."""

import pytest
import torch
from torch import nn

from prune_tell.training.ema import WeightAverage


def test_the_formula_step_by_step():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, decay=0.3)
    expected = 1.0
    for step, value in enumerate([3.0, 5.0, -2.0, 8.0], start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
        decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13 = 0.307..., so 0.3 from here on
        expected = decay * expected + (1 - decay) * value
        assert float(average.average["weight"]) == pytest.approx(expected, abs=1e-5)
    assert model.weight.item() == 8.0


def test_applied_lends_the_average_and_gives_the_weights_back_to_the_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    before, averaged = model.weight.clone(), average.average["weight"].clone()
    address = model.weight.data_ptr()
    with average.applied():
        assert torch.equal(model.weight, averaged)
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)
    assert torch.equal(average.average["weight"], averaged)
    assert model.weight.data_ptr() == address, "the optimizer holds this tensor"


def test_applied_gives_back_after_an_error():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(7.0)
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        raise RuntimeError("inside")
    assert torch.equal(model.weight, torch.full((2, 2), 7.0))


def test_frozen_parameters_are_not_copied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert set(WeightAverage(model, decay=0.9).average) == {"1.weight", "1.bias"}


def test_tied_weights_are_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model["a"].weight.fill_(1.0)
    average.update()
    expected = average.average["a.weight"].clone()
    with average.applied():
        assert torch.equal(model["a"].weight, expected)
        assert torch.equal(model["b"].weight, expected)
    assert torch.equal(model["a"].weight, torch.ones(2, 2))


def test_no_graph_is_kept():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    average.update()
    assert not any(tensor.requires_grad for tensor in average.average.values())


def test_state_goes_around():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    first = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.weight.mul_(2.0)
    first.update()
    second = WeightAverage(model, decay=0.9)
    second.load_state_dict({"steps": 1, "average": {k: v.clone() for k, v in first.average.items()}})
    for average in (first, second):
        average.update()
    assert first.steps == second.steps == 2
    assert all(torch.equal(first.average[name], second.average[name]) for name in first.average)
