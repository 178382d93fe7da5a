"""The `train` verb: what a run leaves, kill -9 and `resume=auto`, grids, and what it refuses to overwrite."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from prune_tell.config import compose
from prune_tell.errors import UserError
from prune_tell.train import MEASURED, report, train, wants_resume
from prune_tell.training.checkpoint import load_state
from prune_tell.training.memory import peak_memory, reset_peak_memory
from prune_tell.training.tracking import read_metrics
from small_runs import SMALL, VIT, cli, quick_meteor, read_json, same_weights, small_config, trained_run

SUMMARY = {
    "split",
    "token_accuracy",
    "loss",
    "scores",
    "kept_tokens",
    "total_tokens",
    "images_per_second",
    "captions_per_second",
    "peak_memory_bytes",
    "seconds",
    "seed",
    "versions",
    "train_token_accuracy",
    "best",
    "best_step",
    "steps",
    "tracked",
    "parameters",
    "device",
    "threads",
}
SCORES = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"}
CHECKPOINT = {"model.safetensors", "meta.json", "config.yaml", "tokenizer.json", "preprocessing.json"}

KILL = """
import os, signal, sys
from prune_tell.train import main
from prune_tell.training.tracking import Tracker

log, step = Tracker.log, int(os.environ["KILL_AT"])

def log_and_die(self, kind, at, epoch, values):
    log(self, kind, at, epoch, values)
    if at == step:
        os.kill(os.getpid(), signal.SIGKILL)

Tracker.log = log_and_die
main()
"""
"""The `train` verb that is shot in mid-epoch: after a step's line, before its checkpoint."""


QUICK = """
from small_runs import quick_meteor
from prune_tell.evaluation import scorers
from prune_tell.train import main

scorers.meteor = quick_meteor
main()
"""
"""The `train` verb without waiting for METEOR."""


@pytest.fixture
def without_meteor(monkeypatch):
    monkeypatch.setattr("prune_tell.evaluation.scorers.meteor", quick_meteor)


def assert_complete(run: Path) -> dict:
    """Hold a run's folder against the contract; return its summary."""
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "captions.json",
        "summary.json",
        "curves.png",
        "data_problems.json",
    }
    assert list((run / "tensorboard").glob("events.out.tfevents*"))
    assert {path.name for path in (run / "checkpoints" / "best").iterdir()} == CHECKPOINT
    assert {path.name for path in (run / "checkpoints" / "last").iterdir()} == CHECKPOINT | {"state.pt"}
    summary = read_json(run / "summary.json")
    assert set(summary) >= SUMMARY
    assert set(summary["scores"]) == SCORES
    captions = read_json(run / "captions.json")
    assert [set(row) for row in captions] == [{"image_id", "caption"}] * summary["images"]
    with Image.open(run / "curves.png") as picture:
        assert picture.size[0] > 600
    return summary


def test_a_run_leaves_everything(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    summary = assert_complete(run)
    assert (summary["split"], summary["images"], summary["seed"], summary["steps"]) == ("val", 6, 0, 120)
    assert (summary["kept_tokens"], summary["total_tokens"]) == (7, 9)
    assert 0 < summary["token_accuracy"] < 1
    assert summary["loss"] > 0
    for name, score in summary["scores"].items():
        if score is None:
            assert summary["score_reasons"][name]
        else:
            assert 0 <= score <= (10 if name == "CIDEr" else 1)
    assert summary["images_per_second"] > 0
    assert summary["captions_per_second"] > 0
    assert summary["peak_memory_bytes"] > 50 * 2**20
    assert set(summary["versions"]) >= {"python", "torch", "timm", "prune-tell"}
    assert summary["threads"] == torch.get_num_threads()
    assert summary["parameters"] == sum(
        tensor.numel() for tensor in load_file(run / "checkpoints/best/model.safetensors").values()
    )


def test_metrics_have_each_step_once_and_each_validation(tmp_path_factory):
    lines = read_metrics(trained_run(tmp_path_factory) / "metrics.jsonl")
    steps = {kind: [line["step"] for line in lines if line["kind"] == kind] for kind in ("train", "epoch", "val")}
    assert steps == {"train": list(range(20, 121, 20)), "epoch": list(range(3, 121, 3)), "val": [60, 120]}
    for line in lines:
        assert line.keys() >= {"loss", "token_accuracy", "step", "epoch", "time"}
        assert (line["kind"] == "val") == ("CIDEr" in line)


def test_the_best_weights_are_those_of_the_tracked_metric(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    summary, lines = read_json(run / "summary.json"), read_metrics(run / "metrics.jsonl")
    scores = {line["step"]: line["CIDEr"] for line in lines if line["kind"] == "val"}
    assert summary["best"] == max(scores.values()) == scores[summary["best_step"]]
    assert summary["scores"]["CIDEr"] == pytest.approx(summary["best"])
    assert read_json(run / "checkpoints/best/meta.json")["step"] == summary["best_step"]


def test_the_config_beside_the_weights_is_resolved(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    cfg = OmegaConf.load(run / "config.yaml")
    assert "${" not in (run / "config.yaml").read_text()
    assert cfg.pruning.prune_ratio == 0.3
    assert (run / "checkpoints/best/config.yaml").read_text() == (run / "config.yaml").read_text()


def test_tensorboard_has_curves_and_captioned_pictures(tmp_path_factory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run(tmp_path_factory) / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= {"train/loss", "train/lr", "epoch/token_accuracy", "val/CIDEr", "val/loss"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(20, 121, 20))
    assert {"val/0", "val/3"} <= set(tags["images"])
    assert any(tag.startswith("val/0/caption") for tag in tags["tensors"])


# Interruptions


@pytest.mark.parametrize("kills", [(7,), pytest.param((4, 8), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_kill_9_and_the_same_command_with_resume_auto(kills, tmp_path, without_meteor):
    """The real command, shot by the system: bit for bit the weights, and line for line the log, of a quiet run."""
    overrides = (*VIT, *SMALL, "trainer.epochs=3", "trainer.checkpoint_every=2", "trainer.validate_every=5")
    overrides += ("decoder.dropout=0.3", "data.captions_per_image=2", "trainer.ema=0.9", "prune_ratio=0.3")
    train(compose("train", [*overrides, f"run_dir={tmp_path / 'quiet'}", "resume=auto"]))
    command = ("train", *overrides, "run_dir=shot", "resume=auto")
    for step in kills:
        shot = cli(*command, cwd=tmp_path, code=KILL, env={"KILL_AT": str(step)})
        assert shot.returncode == -9, shot.stderr
        assert read_metrics(tmp_path / "shot" / "metrics.jsonl")[-1]["step"] == step
    assert not (tmp_path / "shot" / "summary.json").exists()
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    for name in ("last", "best"):
        files = [tmp_path / run / "checkpoints" / name / "model.safetensors" for run in ("quiet", "shot")]
        assert same_weights(*map(load_file, files))
    states = [load_state(tmp_path / run / "checkpoints" / "last") for run in ("quiet", "shot")]
    assert same_weights(*(state["average"]["average"] for state in states))
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    quiet, again = (told(tmp_path / run) for run in ("quiet", "shot"))
    assert quiet == again
    summaries = [read_json(tmp_path / run / "summary.json") for run in ("quiet", "shot")]
    for key in ("token_accuracy", "loss", "best", "best_step", "steps"):
        assert summaries[0][key] == summaries[1][key]
    assert read_json(tmp_path / "quiet" / "captions.json") == read_json(tmp_path / "shot" / "captions.json")


def told(run: Path) -> list[dict]:
    """All lines of a run, without the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    lines = [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in lines]
    assert len({(line["kind"], line["step"]) for line in lines}) == len(lines)
    return lines


def test_resume_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert not wants_resume(small_config("resume=auto"), tmp_path)
    assert not wants_resume(small_config("resume=never"), tmp_path)


def test_a_run_is_never_overwritten(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    cfg = OmegaConf.load(run / "config.yaml")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as caught:
        train(cfg, run)
    assert str(caught.value) == (
        f"run_dir={run} already holds a run: resume=auto goes on with it, another run_dir starts a new one"
    )
    assert (run / "metrics.jsonl").read_text() == before


def test_another_config_does_not_resume(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.resume = "auto"
    assert wants_resume(cfg, run)
    cfg.trainer.lr = 0.5
    cfg.seed = 3
    with pytest.raises(UserError, match=r"another config \(changed: .*\): take another run_dir$") as caught:
        wants_resume(cfg, run)
    assert "seed" in str(caught.value)
    assert "trainer" in str(caught.value)


def test_a_finished_run_that_is_resumed_only_scores_again(tmp_path_factory, tmp_path, without_meteor):
    run = tmp_path / "run"
    shutil.copytree(trained_run(tmp_path_factory), run)
    (run / "summary.json").unlink()
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.resume = "auto"
    lines = (run / "metrics.jsonl").read_text()
    best = train(cfg, run)
    assert (run / "metrics.jsonl").read_text() == lines
    assert assert_complete(run)["best"] == best


# Variants


def test_without_a_val_split_the_summary_has_every_key(tmp_path):
    value = train(small_config(f"run_dir={tmp_path}", "data.val_scenes=0", "trainer.max_steps=1"))
    assert value == -math.inf
    summary = read_json(tmp_path / "summary.json")
    assert set(summary) >= SUMMARY
    assert all(summary[key] is None for key in (*MEASURED, "best"))
    assert not (tmp_path / "captions.json").exists()
    assert (tmp_path / "curves.png").exists()
    assert "checkpoints/best" in report(summary, tmp_path)


def test_the_test_split_and_a_part_of_val(tmp_path, without_meteor):
    """Validates on 2 images, scores all 4 of test, and measures the training captions."""
    overrides = ("final_split=test", "trainer.validate_images=2", "trainer.track=loss", "trainer.max_steps=2")
    value = train(small_config(f"run_dir={tmp_path}", *overrides, "trainer.measure_train_accuracy=true"))
    summary = assert_complete(tmp_path)
    assert (summary["split"], summary["images"], summary["tracked"]) == ("test", 4, "loss")
    assert [row["image_id"] for row in read_json(tmp_path / "captions.json")] == [2_000_000 + n for n in range(4)]
    assert value == summary["best"] < 0
    assert 0 <= summary["train_token_accuracy"] <= 1
    assert summary["train_loss"] > 0
    (val,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "val"]
    assert val["loss"] == -value


def test_peak_memory_is_this_run_s(tmp_path):
    """One job's peak is not carried over to the next job of a grid in the same process."""
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    hog = torch.ones(300 * 2**20 // 4)
    assert peak_memory(device) > before + 250 * 2**20
    del hog
    reset_peak_memory(device)
    assert peak_memory(device) < before + 100 * 2**20


@pytest.mark.slow
def test_debug_overfit_learns_by_heart(tmp_path):
    train(compose("train", ["debug=overfit", f"run_dir={tmp_path}", "device=cpu"]))
    assert assert_complete(tmp_path)["train_token_accuracy"] >= 0.99


# Grids


def test_a_grid_makes_a_complete_folder_for_each_job_and_tells_the_one_that_cannot_be(tmp_path):
    grid = (*VIT, *SMALL, "trainer.max_steps=1", "prune_ratio=1,0,0.3", "hydra.sweep.dir=grid")
    done = cli("train", "-m", *grid, cwd=tmp_path, code=QUICK, env={"PYTHONPATH": str(Path(__file__).parent)})
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    sentence = "prune_tell: prune_ratio=1.0 is out of range: 0 (keep all tokens) up to, not including, 1"
    assert sentence in done.stderr.splitlines()
    runs = sorted(run.parent for run in (tmp_path / "grid").glob("*/summary.json"))
    assert [run.name for run in runs] == ["1_shapes_vit_topk_0_seed0", "2_shapes_vit_topk_0.3_seed0"]
    assert [assert_complete(run)["kept_tokens"] for run in runs] == [9, 7]


@pytest.mark.slow
def test_backbones_by_ratios(tmp_path):
    """As typed in the README: four runs."""
    done = cli(
        "train", "-m", "backbone=vit,convnext", "prune_ratio=0,0.3", "debug=tiny", "hydra.sweep.dir=grid", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(run for run in (tmp_path / "grid").iterdir() if run.is_dir())
    assert [run.name.split("_seed")[0] for run in runs] == [
        "0_shapes_vit_topk_0",
        "1_shapes_vit_topk_0.3",
        "2_shapes_convnext_topk_0",
        "3_shapes_convnext_topk_0.3",
    ]
    assert [assert_complete(run)["kept_tokens"] for run in runs] == [64, 45, 64, 45]
    assert json.loads((runs[3] / "summary.json").read_text())["total_tokens"] == 64
