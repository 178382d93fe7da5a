"""Which parameters decay, which rate they get, and how the rate moves."""

import math

import pytest
import torch
from torch import nn

from prune_tell.training.optimizer import build_optimizer, lr_factor, set_lr
from prune_tell.training.settings import TrainSettings
from small_runs import CONVNEXT, SmallRun


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return SmallRun(
        tmp_path_factory.mktemp("vit"), "decoder.positions=learned", "decoder.tie_embeddings=true"
    ).captioner


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return SmallRun(tmp_path_factory.mktemp("convnext"), backbone=CONVNEXT).captioner


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], set[str]]:
    """(peak rate, decay) -> names of the parameters that have them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {(g["peak_lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}


def spared(model: nn.Module) -> set[str]:
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.1))
    groups = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups for p in group["params"]}


def test_biases_norms_and_embeddings_do_not_decay(vit):
    left_alone = spared(vit)
    for name, parameter in vit.named_parameters():
        if parameter.ndim < 2:
            assert name in left_alone, name
    assert left_alone >= {
        "decoder.embedding.weight",
        "decoder.positions.table_TD",
        "backbone.model.pos_embed",
        "backbone.model.cls_token",
    }


def test_matrices_and_filters_decay(vit, convnext):
    assert not spared(vit) & {
        "backbone.model.patch_embed.proj.weight",
        "backbone.model.blocks.0.attn.qkv.weight",
        "projection.linear.weight",
        "decoder.layers.0.cross_attention.key_value.weight",
    }
    assert {name for name, p in convnext.named_parameters() if p.ndim >= 2} - spared(convnext) >= {
        "backbone.model.stem.0.weight",
        "decoder.output.weight",
    }


def test_every_trainable_parameter_is_in_exactly_one_group(vit):
    """Tied embeddings are one parameter; torch would refuse (or step twice) if it came twice."""
    assert vit.decoder.output.weight is vit.decoder.embedding.weight
    optimizer = build_optimizer(vit, TrainSettings())
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in vit.parameters() if p.requires_grad}


def test_frozen_parameters_are_left_out(tmp_path):
    model = SmallRun(tmp_path, "backbone.trainable=frozen").captioner
    listed = {id(p) for group in build_optimizer(model, TrainSettings()).param_groups for p in group["params"]}
    assert listed == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}


def test_the_backbone_has_its_own_rate(vit):
    groups = names_of(vit, build_optimizer(vit, TrainSettings(lr=1e-3, weight_decay=0.1), backbone_lr=1e-5))
    assert set(groups) == {(1e-3, 0.1), (1e-3, 0.0), (1e-5, 0.1), (1e-5, 0.0)}
    for (peak, _), names in groups.items():
        assert {name.startswith("backbone.") for name in names} == {peak == 1e-5}


def test_a_backbone_rate_of_zero_is_not_forgotten(vit):
    groups = names_of(vit, build_optimizer(vit, TrainSettings(lr=1e-3), backbone_lr=0.0))
    assert {peak for peak, _ in groups} == {1e-3, 0.0}


def test_without_its_own_rate_the_backbone_has_the_common_one(vit):
    assert {peak for peak, _ in names_of(vit, build_optimizer(vit, TrainSettings(lr=2e-4)))} == {2e-4}


def test_set_lr_moves_every_group_in_proportion(vit):
    optimizer = build_optimizer(vit, TrainSettings(lr=1e-3), backbone_lr=1e-5)
    set_lr(optimizer, 0.5)
    assert {(g["peak_lr"], g["lr"]) for g in optimizer.param_groups} == {(1e-3, 5e-4), (1e-5, 5e-6)}
    set_lr(optimizer, 1.0)
    assert all(g["lr"] == g["peak_lr"] for g in optimizer.param_groups)


def test_warm_up_rises_linearly_to_the_peak():
    settings = TrainSettings(warmup=0.1, schedule="constant")
    assert [lr_factor(step, 100, settings) for step in range(10)] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert lr_factor(10, 100, settings) == 1.0


def test_no_warm_up_starts_at_the_peak():
    assert lr_factor(0, 100, TrainSettings(warmup=0.0)) == 1.0


def test_cosine_falls_to_the_final_rate():
    settings = TrainSettings(warmup=0.2, schedule="cosine", final_lr=0.1)
    assert lr_factor(20, 100, settings) == pytest.approx(1.0)
    assert lr_factor(60, 100, settings) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(40, 100, settings) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_factor(99, 100, settings) == pytest.approx(0.1, abs=1e-3)
    values = [lr_factor(step, 100, settings) for step in range(20, 100)]
    assert values == sorted(values, reverse=True)


def test_linear_falls_in_a_line():
    settings = TrainSettings(warmup=0.0, schedule="linear", final_lr=0.2)
    assert [lr_factor(step, 10, settings) for step in (0, 5, 9)] == pytest.approx([1.0, 0.6, 0.28])


def test_constant_stays():
    settings = TrainSettings(warmup=0.0, schedule="constant", final_lr=0.01)
    assert {lr_factor(step, 7, settings) for step in range(7)} == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("total", [1, 2, 13])
def test_the_factor_never_leaves_its_range(schedule, warmup, total):
    settings = TrainSettings(warmup=warmup, schedule=schedule, final_lr=0.01)
    assert all(0.01 <= lr_factor(step, total, settings) <= 1.0 for step in range(total))
