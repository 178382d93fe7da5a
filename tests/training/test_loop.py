"""The training loop: what a step is, what a run leaves, and that neither memory nor an interruption changes it."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prune_tell.data.tokenizer import PAD
from prune_tell.errors import UserError
from prune_tell.training import loop
from prune_tell.training.checkpoint import load_state
from prune_tell.training.loop import autocast_for
from prune_tell.training.tracking import Tracker
from small_runs import CONVNEXT, VIT, SmallRun, read_json, same_weights, script_scores

NO_VALIDATION = "data.val_scenes=0"
NO_DROPOUT = "decoder.dropout=0.0"
CPU = torch.device("cpu")

# fmt: off
GOLDEN = [
    4.4066955, 4.4476152, 4.3865916, 4.3904396, 4.2847573, 4.262442, 4.1498806, 4.1565936, 4.0784993, 4.1262846,
    4.0883806, 4.0822914, 4.0137083, 3.9832298, 4.037863, 4.0185517, 4.0182292, 3.9321727, 3.9795819, 3.9335693,
]
# fmt: on
"""Losses of 20 steps (`test_golden_losses`): a change here is a change of what training computes."""


# What a step is


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_micro_batches_equal_one_big_batch(parts, tmp_path, monkeypatch):
    """Plain SGD, because Adam would blow rounding noise up to full steps where a gradient is zero."""

    def sgd(model, settings, *, backbone_lr=None):
        return torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.1, "peak_lr": 0.1}], momentum=0.9)

    monkeypatch.setattr(loop, "build_optimizer", sgd)
    common = (NO_VALIDATION, NO_DROPOUT, "trainer.epochs=2", "trainer.warmup=0")
    runs = [SmallRun(tmp_path / str(n), *common, f"trainer.accumulate={n}") for n in (1, parts)]
    assert len(set(runs[0].train_items.lengths)) > 3, "captions of one length would prove nothing"
    start = runs[0].weights()
    steps = [run.fit().step for run in runs]
    assert steps == [6, 6], "the counter counts optimizer steps"
    whole, cut = (run.weights() for run in runs)
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 0.02
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6, msg=name)
    for one, other in zip(runs[0].lines("train"), runs[1].lines("train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert (one["step"], one["token_accuracy"], one["lr"]) == (
            other["step"],
            other["token_accuracy"],
            other["lr"],
        )


def test_the_loss_of_a_step_is_per_word_of_the_batch(tmp_path):
    """The first line holds the loss of the untrained weights on the first batch: computed anew, PAD left out."""
    run = SmallRun(tmp_path, NO_VALIDATION, NO_DROPOUT, "trainer.max_steps=1", "trainer.accumulate=3")
    before = run.weights()
    run.fit()
    batch = next(iter(loop.train_loader(run.train_items, batch_size=8, seed=0)))
    run.captioner.load_state_dict(before)
    logits = run.captioner(batch.visual, batch.captions).logits_BQV.detach()
    real = batch.captions.targets_BQ != PAD
    assert not real.all()
    expected = torch.nn.functional.cross_entropy(logits[real], batch.captions.targets_BQ[real])
    correct = (logits.argmax(-1) == batch.captions.targets_BQ)[real].float().mean()
    (line,) = run.lines("train")
    assert line["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert line["token_accuracy"] == pytest.approx(float(correct), rel=1e-5)


def test_golden_losses(tmp_path):
    """A refactoring that changes one of these changes training."""
    # Everything that matters is given here, so that other defaults don't disturb it.
    overrides = (NO_VALIDATION, NO_DROPOUT, "data.train_scenes=48", "trainer.epochs=4", "trainer.max_steps=20")
    overrides += ("backbone.interpolation=bilinear", "backbone.fit=squash", "decoder.norm=pre", "prune_ratio=0.3")
    overrides += ("pruning.score=norm",)
    overrides += ("trainer.lr=0.001", "trainer.weight_decay=0.01", "trainer.betas=[0.9,0.98]", "trainer.clip=1.0")
    overrides += ("trainer.warmup=0.05", "trainer.schedule=cosine", "trainer.final_lr=0.01")
    runs = [SmallRun(tmp_path / name, *overrides) for name in ("one", "two")]
    for run in runs:
        run.fit()
    losses = [[line["loss"] for line in run.lines("train")] for run in runs]
    assert losses[0] == losses[1]
    assert same_weights(runs[0].weights(), runs[1].weights())
    assert losses[0] == pytest.approx(GOLDEN, rel=1e-4)


def test_another_seed_is_another_run(tmp_path):
    runs = [SmallRun(tmp_path / str(s), NO_VALIDATION, f"seed={s}", "trainer.max_steps=2") for s in (0, 1)]
    for run in runs:
        run.fit()
    assert runs[0].lines("train")[1]["loss"] != runs[1].lines("train")[1]["loss"]


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_clipping_limits_the_gradient_and_the_log_tells_its_size_before(clip, tmp_path):
    """After one step Adam's first moment is 0.1 times the gradient it was given."""
    run = SmallRun(tmp_path, NO_VALIDATION, "trainer.max_steps=1", f"trainer.clip={clip}")
    run.fit()
    moments = load_state(tmp_path / "checkpoints" / "last")["optimizer"]["state"].values()
    given = math.sqrt(sum(float(moment["exp_avg"].square().sum()) for moment in moments)) / 0.1
    (line,) = run.lines("train")
    assert line["grad_norm"] > 0.5
    assert given == pytest.approx(clip or line["grad_norm"], rel=1e-3)


def test_the_learning_rate_follows_the_schedule_over_all_steps(tmp_path):
    settings = ("trainer.epochs=4", "trainer.lr=0.002", "trainer.warmup=0.25", "trainer.schedule=linear")
    run = SmallRun(tmp_path, NO_VALIDATION, *settings, "trainer.final_lr=0.1", "trainer.accumulate=2")
    run.fit()
    rates = [line["lr"] for line in run.lines("train")]
    rising, falling = [0.002 * (s + 1) / 4 for s in range(3)], [0.002 * (0.1 + 0.9 * (1 - s / 9)) for s in range(9)]
    assert rates == pytest.approx(rising + falling)


def test_a_backbone_of_rate_zero_stays_and_the_rest_moves(tmp_path):
    run = SmallRun(tmp_path, NO_VALIDATION, "trainer.max_steps=2")
    before = run.weights()
    run.fit(backbone_lr=0.0)
    after = run.weights()
    assert not torch.equal(before["projection.linear.weight"], after["projection.linear.weight"])
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))


# What a run does


def test_overfits_eight_images(tmp_path):
    """Learns eight captions by heart, and writes them."""
    run = SmallRun(
        tmp_path,
        NO_VALIDATION,
        NO_DROPOUT,
        "data.max_images=8",
        "data.max_captions=1",
        "trainer.epochs=120",
        "trainer.lr=0.004",
        "trainer.log_every=120",
        "decoder.d_model=64",
        "generation.max_length=24",
    )
    run.fit()
    batches = loop.eval_loader(run.train_items, batch_size=8)
    generation = loop.Generation(beams=1, max_length=24)
    result = loop.caption_split(
        run.captioner, batches, run.tokenizer, generation, device=CPU, autocast=autocast_for(CPU, "fp32")
    )
    assert result.token_accuracy >= 0.99
    written = {record.image_id: run.tokenizer.encode(record.captions[0]) for record in run.train_items.records}
    assert len({tuple(ids) for ids in written.values()}) == 8
    assert result.captions == {image_id: run.tokenizer.decode(ids) for image_id, ids in written.items()}


def test_max_steps_ends_in_mid_epoch(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5)
    run = SmallRun(tmp_path, "trainer.epochs=9", "trainer.max_steps=4")
    assert run.fit().step == 4
    assert [line["step"] for line in run.lines("train")] == [1, 2, 3, 4]
    assert [line["step"] for line in run.lines("epoch")] == [3, 4]
    assert [line["step"] for line in run.lines("val")] == [3, 4]


def test_an_epoch_line_is_the_mean_per_word_of_its_steps(tmp_path):
    run = SmallRun(tmp_path, NO_VALIDATION, "trainer.epochs=2")
    run.fit()
    words = []
    for number, batch in enumerate(loop.train_loader(run.train_items, batch_size=8, seed=0)):
        if number == 6:
            break
        words.append(int((batch.captions.targets_BQ != PAD).sum()))
    losses = [line["loss"] for line in run.lines("train")]
    for epoch, line in enumerate(run.lines("epoch")):
        own = slice(3 * epoch, 3 * epoch + 3)
        mean = sum(w * x for w, x in zip(words[own], losses[own], strict=True)) / sum(words[own])
        assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_lines_that_are_logged_seldom_are_means_too(tmp_path):
    often = SmallRun(tmp_path / "often", NO_VALIDATION, "trainer.log_every=1", "data.captions_per_image=1")
    seldom = SmallRun(tmp_path / "seldom", NO_VALIDATION, "trainer.log_every=2", "data.captions_per_image=1")
    for run in (often, seldom):
        run.fit()
    assert [line["step"] for line in seldom.lines("train")] == [2, 3]
    single = [line["loss"] for line in often.lines("train")]
    first = seldom.lines("train")[0]["loss"]
    assert min(single[:2]) <= first <= max(single[:2])
    assert seldom.lines("train")[1]["loss"] == single[2]


def test_best_is_the_best_and_patience_ends_the_run(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.2, 0.5, 0.4, 0.3, 0.9)
    run = SmallRun(tmp_path, "trainer.epochs=9", "trainer.validate_every=2", "trainer.patience=2")
    progress = run.fit()
    assert (progress.step, progress.best, progress.best_step) == (8, 0.5, 4)
    assert [line["CIDEr"] for line in run.lines("val")] == [0.2, 0.5, 0.4, 0.3]
    metas = {name: read_json(tmp_path / "checkpoints" / name / "meta.json") for name in ("best", "last")}
    assert (metas["best"]["step"], metas["best"]["best"]) == (4, 0.5)
    assert (metas["last"]["step"], metas["last"]["best"]) == (8, 0.5)
    assert metas["last"]["epoch"] == pytest.approx(8 / 3)


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5, 0.4, 0.3, 0.9)
    overrides = ("trainer.epochs=9", "trainer.validate_every=1", "trainer.patience=2")
    first = SmallRun(tmp_path, *overrides)
    first.fit()
    again = SmallRun(tmp_path, *overrides)
    assert again.fit(resume=True).step == 3
    assert same_weights(first.weights(), again.weights())


def test_track_loss_keeps_the_lowest(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.9, 0.1)
    run = SmallRun(tmp_path, "trainer.epochs=3", "trainer.track=loss", "trainer.lr=0.003")
    progress = run.fit()
    losses = {line["step"]: line["loss"] for line in run.lines("val")}
    assert progress.best_step == min(losses, key=losses.__getitem__)
    assert progress.best == pytest.approx(-min(losses.values()))
    assert len(set(losses.values())) == 3


def test_without_validation_images_the_last_weights_are_the_best(tmp_path):
    run = SmallRun(tmp_path, NO_VALIDATION, "trainer.ema=0.9")
    run.fit()
    weights = load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")
    average = load_state(tmp_path / "checkpoints" / "last")["average"]["average"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in average.items())
    assert read_json(tmp_path / "checkpoints" / "best" / "meta.json")["best"] is None


def test_the_average_is_what_is_validated_and_kept(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5)
    run = SmallRun(tmp_path, "trainer.ema=0.9", "trainer.epochs=2")
    seen = []
    run.fit(on_validation=lambda tracker, step, result: seen.append((step, run.weights(), result.loss)))
    best = load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")
    last = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    validated = seen[0][1]
    assert [step for step, _, _ in seen] == [3, 6]
    assert all(torch.equal(best[name], validated[name]) for name in best)
    assert all(torch.equal(last[name], tensor) for name, tensor in run.weights().items() if name in last)
    assert not torch.equal(last["decoder.embedding.weight"], seen[1][1]["decoder.embedding.weight"])


def test_validation_changes_nothing(tmp_path, monkeypatch):
    """Validated or not: the same weights, dropout and all."""
    script_scores(monkeypatch, 0.5)
    runs = []
    for name, every in (("often", 1), ("never", 100)):
        run = SmallRun(tmp_path / name, f"trainer.validate_every={every}", "trainer.ema=0.9", "trainer.epochs=2")
        run.fit()
        assert run.captioner.training
        runs.append(run.weights())
    assert same_weights(*runs)


# Precision


def test_fp16_needs_cuda():
    with pytest.raises(UserError) as caught:
        autocast_for(CPU, "fp16")
    assert str(caught.value) == "trainer.precision=fp16 needs a CUDA device: use bf16 or fp32 on the CPU"


def test_auto_is_full_precision_on_a_cpu():
    with autocast_for(CPU, "auto")():
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("backbone", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_bf16_trains_on_a_cpu(backbone, tmp_path):
    overrides = (NO_VALIDATION, NO_DROPOUT, "trainer.epochs=10", "trainer.lr=0.003", "prune_ratio=0.3")
    runs = [SmallRun(tmp_path / p, *overrides, f"trainer.precision={p}", backbone=backbone) for p in ("bf16", "fp32")]
    for run in runs:
        run.fit()
    low, full = ([line["loss"] for line in run.lines("train")] for run in runs)
    assert low[-1] < 0.8 * low[0]
    assert low != full, "bf16 did not switch anything on"
    assert low == pytest.approx(full, rel=0.1)
    assert all(p.dtype == torch.float32 for p in runs[0].captioner.parameters())


@pytest.mark.slow
def test_compile_trains_a_step_to_the_same_weights(tmp_path):
    runs = [
        SmallRun(tmp_path / str(c), NO_VALIDATION, NO_DROPOUT, "trainer.max_steps=1", f"trainer.compile={c}")
        for c in ("true", "false")
    ]
    for run in runs:
        run.fit()
    compiled, eager = (run.lines("train")[0] for run in runs)
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-3)
    assert runs[0].weights().keys() == runs[1].weights().keys()


# Memory


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_hundred_steps_hold_memory_flat(tmp_path, monkeypatch):
    """A kept graph shows: a step's activations here are about 2 MB, 300 MB in 150 steps."""
    script_scores(monkeypatch, 0.5)
    run = SmallRun(
        tmp_path,
        "trainer.epochs=99",
        "trainer.max_steps=200",
        "trainer.validate_every=25",
        "trainer.ema=0.9",
        "trainer.accumulate=2",
        "decoder.d_model=64",
    )
    log, seen = Tracker.log, {}

    def measure(self: Tracker, kind: str, step: int, epoch: float, values: dict) -> None:
        log(self, kind, step, epoch, values)
        if kind == "train" and step in (50, 200):
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            seen[step] = (tensors, resident())

    monkeypatch.setattr(Tracker, "log", measure)
    run.fit()
    assert seen[200][0] <= seen[50][0] + 5, "tensors pile up"
    assert seen[200][1] - seen[50][1] < 60 * 2**20, "memory piles up"


# Files


def test_checkpoints_hold_the_files_they_are_given(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5)
    run = SmallRun(tmp_path)
    run.fit(files={"config.yaml": "a: 1\n", "note.txt": "x"})
    for name in ("best", "last"):
        folder = tmp_path / "checkpoints" / name
        assert (folder / "config.yaml").read_text() == "a: 1\n"
        assert (folder / "note.txt").read_text() == "x"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best", "last"}
    assert not (tmp_path / "checkpoints" / "best" / "state.pt").exists()


def test_every_line_is_strict_json(tmp_path, monkeypatch):
    script_scores(monkeypatch, 0.5)
    SmallRun(tmp_path).fit()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = {json.loads(text, parse_constant=refuse)["kind"] for text in lines}
    assert kinds == {"train", "epoch", "val"}


def test_a_loss_that_is_no_number_ends_in_a_sentence(tmp_path):
    run = SmallRun(tmp_path, NO_VALIDATION)
    with torch.no_grad():
        run.captioner.decoder.output.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"the loss is nan at step 1: training has diverged; a lower trainer\.lr"):
        run.fit()
