"""The knobs of training refuse what can't work, by name."""

import pytest

from prune_tell.errors import UserError
from prune_tell.training.settings import TrainSettings


def test_defaults_are_the_yaml_files(monkeypatch):
    """A default is written in two places (signature and YAML): they must not drift apart."""
    from prune_tell.config import arguments, compose, plain

    node = plain(compose("train").trainer)
    assert TrainSettings(**arguments(TrainSettings, node, key="trainer")) == TrainSettings()
    assert set(node) == set(TrainSettings.__dataclass_fields__), "a knob is missing in the YAML file"


@pytest.mark.parametrize(
    "name",
    [
        "epochs",
        "batch_size",
        "accumulate",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "patience",
        "max_steps",
        "validate_images",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_start_at_one(name, value):
    with pytest.raises(UserError, match=rf"^trainer\.{name}={value} is out of range: 1 or more$"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr", -0.001, "0.0 to 10.0"),
        ("lr", float("nan"), "0.0 to 10.0"),
        ("weight_decay", -1.0, "0.0 to 10.0"),
        ("warmup", 1.5, "0.0 to 1.0"),
        ("final_lr", -0.1, "0.0 to 1.0"),
        ("label_smoothing", 1.0, "0.0 to 0.999"),
        ("ema", 1.0, "0.0 to 0.99999"),
        ("clip", -1.0, "0.0 to inf"),
    ],
)
def test_rates_have_a_range(name, value, allowed):
    with pytest.raises(UserError) as caught:
        TrainSettings(**{name: value})
    assert str(caught.value) == f"trainer.{name}={value} is out of range: {allowed}"


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9)])
def test_betas_are_below_one(betas):
    with pytest.raises(UserError, match=r"^trainer\.betas=\[.*\] is out of range: two numbers from 0 up to"):
        TrainSettings(betas=betas)


@pytest.mark.parametrize(("track", "metrics"), [("CIDEr", ("Bleu",)), ("Bleu_4", ("CIDEr",)), ("METEOR", ())])
def test_the_tracked_metric_must_be_computed(track, metrics):
    with pytest.raises(UserError, match=rf"^trainer\.track={track} is not among trainer\.validate_metrics=\["):
        TrainSettings(track=track, validate_metrics=metrics)


@pytest.mark.parametrize(("track", "metrics"), [("Bleu_4", ("Bleu",)), ("loss", ()), ("METEOR", ("METEOR",))])
def test_a_computed_metric_can_be_tracked(track, metrics):
    assert TrainSettings(track=track, validate_metrics=metrics).track == track
