"""Interruptions and broken images: neither changes what a run computes from what it can read."""

from pathlib import Path

import pytest
import torch

from prune_tell.errors import UserError
from prune_tell.training.checkpoint import load_state
from prune_tell.training.tracking import Tracker
from small_runs import SmallRun, same_weights, script_scores

NO_VALIDATION = "data.val_scenes=0"


class CrashError(Exception):
    """The interruption of a test."""


def crash_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run end in mid-epoch, after this step's line and before its checkpoint."""
    log = Tracker.log

    def log_or_crash(self: Tracker, kind: str, at: int, epoch: float, values: dict) -> None:
        log(self, kind, at, epoch, values)
        if at == step:
            raise CrashError

    patch.setattr(Tracker, "log", log_or_crash)


# Interruptions


def interrupted(tmp_path: Path, *overrides: str, step: int, again: tuple[int, ...] = (), **options) -> list[SmallRun]:
    """An uninterrupted run, and one that crashes at `step` (and at `again`) and is resumed each time."""
    whole = SmallRun(tmp_path / "whole", *overrides, **options)
    whole.fit()
    for number, at in enumerate((step, *again)):
        cut = SmallRun(tmp_path / "cut", *overrides, **options)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, at)
            with pytest.raises(CrashError):
                cut.fit(resume=number > 0)
    resumed = SmallRun(tmp_path / "cut", *overrides, **options)
    resumed.fit(resume=True)
    return [whole, resumed]


@pytest.mark.parametrize(
    "overrides",
    [
        ("decoder.dropout=0.3", "data.captions_per_image=2", "trainer.ema=0.9"),
        ("decoder.dropout=0.1", "trainer.accumulate=2", "trainer.log_every=4", "data.augment=true"),
        ("prune_ratio=0.5", "pruning.score=random", "backbone.trainable=frozen", "trainer.schedule=linear"),
    ],
    ids=["drawn captions and averages", "accumulated and augmented", "chance and a frozen backbone"],
)
def test_an_interruption_changes_nothing(overrides, tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.3, 0.5, 0.4)
    every = ("trainer.epochs=3", "trainer.checkpoint_every=2", "trainer.validate_every=4")
    whole, resumed = interrupted(tmp_path, *overrides, *every, step=8, again=(8,))
    assert same_weights(whole.weights(), resumed.weights())
    for kind in ("train", "epoch"):
        one, other = ([{**line, "time": 0, "seconds": 0} for line in run.lines(kind)] for run in (whole, resumed))
        assert one == other
    steps = [(line["kind"], line["step"]) for kind in ("train", "epoch", "val") for line in resumed.lines(kind)]
    assert len(steps) == len(set(steps))
    states = [load_state(run.out / "checkpoints" / "last") for run in (whole, resumed)]
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    if states[0]["average"]:
        assert same_weights(*(state["average"]["average"] for state in states))


def test_a_crash_before_the_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(CrashError):
            SmallRun(tmp_path, NO_VALIDATION).fit()
    run = SmallRun(tmp_path, NO_VALIDATION)
    run.fit()
    assert [line["step"] for line in run.lines("train")] == [1, 2, 3]


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5)
    first = SmallRun(tmp_path)
    first.fit()
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = SmallRun(tmp_path)
    assert again.fit(resume=True).step == 3
    assert same_weights(first.weights(), again.weights())
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_seconds_go_on_counting(tmp_path, monkeypatch):
    first = SmallRun(tmp_path, NO_VALIDATION)
    spent = first.fit().seconds
    state = load_state(tmp_path / "checkpoints" / "last")
    assert 0 < state["progress"]["seconds"] <= spent
    assert SmallRun(tmp_path, NO_VALIDATION).fit(resume=True).seconds >= state["progress"]["seconds"]


# Bad images


def broken(run: SmallRun, *rows: int) -> None:
    """Let some training images be unreadable."""
    bad = {run.train_items.records[row].image_id for row in rows}
    opened = run.dataset.open

    def open_or_fail(record):
        if record.image_id in bad:
            raise OSError(f"{record.image_id}.jpg is cut off")
        return opened(record)

    run.train_items.open_image = open_or_fail


def test_unreadable_images_are_told_once_and_the_rest_trains(tmp_path):
    run = SmallRun(tmp_path, NO_VALIDATION, "trainer.epochs=3")
    broken(run, 2, 5)
    assert run.fit().step == 9
    assert run.problems.counts() == {"unreadable image": 2}
    assert {item["where"] for item in run.problems.items} == {"2", "5"}
    assert all("is cut off" in item["detail"] for item in run.problems.items)


def test_batches_without_a_readable_image_are_passed_over_also_by_a_resume(tmp_path, monkeypatch):
    overrides = (
        NO_VALIDATION,
        "trainer.batch_size=1",
        "trainer.epochs=2",
        "trainer.max_steps=30",
        "trainer.checkpoint_every=5",
    )
    whole, cut, resumed = (SmallRun(tmp_path / name, *overrides) for name in ("whole", "cut", "cut"))
    for run in (whole, cut, resumed):
        broken(run, *range(8))
    assert whole.fit().step == 30
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 23)
        with pytest.raises(CrashError):
            cut.fit()
    resumed.fit(resume=True)
    assert same_weights(whole.weights(), resumed.weights())


def test_no_readable_image_at_all_ends_in_a_sentence(tmp_path):
    """An endless stream of nothing would never end."""
    run = SmallRun(tmp_path, NO_VALIDATION)
    broken(run, *range(24))
    with pytest.raises(UserError, match=r"^data: no training image can be read \(e\.g\. \d+: \d+\.jpg is cut off\)$"):
        run.fit()
    assert not (tmp_path / "checkpoints").exists()
