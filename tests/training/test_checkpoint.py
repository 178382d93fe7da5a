"""Checkpoints: whole or not there, each tensor once, no code inside, the same captions anywhere."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prune_tell.build import load_run
from prune_tell.data.transforms import build_transform
from prune_tell.decoding.generate import generate
from prune_tell.errors import UserError
from prune_tell.training import checkpoint
from prune_tell.training.checkpoint import find_checkpoint, load_checkpoint, load_state, save_checkpoint
from small_runs import SmallRun, same_weights, trained_run

CPU = torch.device("cpu")
FILES = {"config.yaml": "a: 1\n", "tokenizer.json": "{}"}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return SmallRun(tmp_path_factory.mktemp("tied"), "decoder.tie_embeddings=true")


def save(folder: Path, model: nn.Module, step: int = 0, **options) -> None:
    save_checkpoint(folder, model, files=FILES, meta={"step": step}, **options)


def scrambled(run: SmallRun) -> nn.Module:
    """The same model with other weights."""
    other = SmallRun(run.out / "other", *run.overrides)
    with torch.no_grad():
        for parameter in other.captioner.parameters():
            parameter.add_(1.0)
    return other.captioner


def step_of(folder: Path) -> int:
    return json.loads((folder / "meta.json").read_text())["step"]


# Round trips


def test_tied_embeddings_are_stored_once_and_come_back_tied(tied, tmp_path):
    save(tmp_path / "last", tied.captioner)
    stored = load_file(tmp_path / "last" / "model.safetensors")
    assert "decoder.embedding.weight" in stored
    assert "decoder.output.weight" not in stored
    other = scrambled(tied)
    load_checkpoint(tmp_path / "last", other)
    assert same_weights(other.state_dict(), tied.captioner.state_dict())
    assert other.decoder.output.weight is other.decoder.embedding.weight


def test_a_frozen_backbone_is_stored_once_for_both_checkpoints(tmp_path):
    run = SmallRun(tmp_path / "run", "backbone.trainable=frozen")
    for name in ("last", "best"):
        save(tmp_path / name, run.captioner, frozen_backbone=True)
    shared = tmp_path / "backbone.safetensors"
    written = shared.stat().st_mtime_ns
    save(tmp_path / "last", run.captioner, frozen_backbone=True)
    assert shared.stat().st_mtime_ns == written
    assert all(name.startswith("backbone.") for name in load_file(shared))
    for name in ("last", "best"):
        assert not any(key.startswith("backbone.") for key in load_file(tmp_path / name / "model.safetensors"))
        other = scrambled(run)
        load_checkpoint(tmp_path / name, other)
        assert same_weights(other.state_dict(), run.captioner.state_dict())


def test_state_goes_around_and_best_has_none(tied, tmp_path):
    state = {"rng": torch.get_rng_state(), "progress": {"step": 3, "best": 0.5, "sums": [1.0, 2.0]}}
    save(tmp_path / "last", tied.captioner, state=state)
    save(tmp_path / "best", tied.captioner)
    back = load_state(tmp_path / "last")
    assert torch.equal(back["rng"], state["rng"])
    assert back["progress"] == state["progress"]
    assert not (tmp_path / "best" / "state.pt").exists()


def test_text_files_are_kept_as_they_are(tied, tmp_path):
    save_checkpoint(tmp_path / "last", tied.captioner, files={"words.json": "café 🐕\n"}, meta={})
    assert (tmp_path / "last" / "words.json").read_text(encoding="utf-8") == "café 🐕\n"


# What a crash leaves


class PowerCutError(Exception):
    """The crash of a test."""


def cut(*_: object, **__: object) -> None:
    raise PowerCutError


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "first rename", "second rename", "last rmtree"])
def test_a_crash_at_any_point_of_a_save_leaves_a_whole_checkpoint(where, tied, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "last"
    save(folder, tied.captioner, step=1, state={"n": 1})
    with pytest.MonkeyPatch.context() as patch:
        if where == "save_file":
            patch.setattr(checkpoint, "save_file", cut)
        elif where == "os.fsync":
            patch.setattr(os, "fsync", cut)
        elif where == "last rmtree":
            calls, rmtree = [], shutil.rmtree

            def rmtree_or_cut(path, **options):
                calls.append(path)
                if len(calls) == 3:
                    cut()
                rmtree(path, **options)

            patch.setattr(shutil, "rmtree", rmtree_or_cut)
        else:
            renames, rename = [], Path.rename

            def rename_or_cut(self, target):
                renames.append(target)
                if len(renames) == (1 if where == "first rename" else 2):
                    cut()
                return rename(self, target)

            patch.setattr(Path, "rename", rename_or_cut)
        with pytest.raises(PowerCutError):
            save(folder, tied.captioner, step=2, state={"n": 2})
    found = find_checkpoint(tmp_path, "last")
    assert step_of(found) == (2 if where == "last rmtree" else 1)
    assert load_state(found)["n"] == step_of(found)
    load_checkpoint(found, scrambled(tied))
    save(folder, tied.captioner, step=3, state={"n": 3})
    assert find_checkpoint(tmp_path, "last") == folder
    assert step_of(folder) == 3
    assert {path.name for path in folder.parent.iterdir()} == {"last"}, "leftovers are cleared away"


def test_an_unfinished_folder_alone_is_no_checkpoint(tied, tmp_path):
    (tmp_path / "checkpoints" / "last.writing").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.writing" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, "last")


def test_a_leftover_half_written_folder_is_in_nobodys_way(tied, tmp_path):
    folder = tmp_path / "last"
    folder.with_name("last.writing").mkdir()
    (folder.with_name("last.writing") / "junk").write_text("x")
    save(folder, tied.captioner, step=1)
    assert not (folder / "junk").exists()


@pytest.mark.parametrize("leftover", ["last.writing", "last.old"])
def test_a_run_goes_on_from_what_a_crash_in_a_save_left(leftover, tmp_path, monkeypatch):
    overrides = ("data.val_scenes=0", "trainer.checkpoint_every=1", "trainer.epochs=2")
    whole, first = SmallRun(tmp_path / "whole", *overrides), SmallRun(tmp_path / "cut", *overrides)
    whole.fit()
    saves, rename = [], Path.rename

    def rename_or_cut(self, target):
        if Path(target).name == "last":
            saves.append(target)
            if len(saves) == 4:
                cut()
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_cut)
        with pytest.raises(PowerCutError):
            first.fit()
    folder = tmp_path / "cut" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.writing", "last.old"}
    if leftover == "last.writing":
        (folder / "last.old").rename(folder / "last")
        (folder / "last.writing" / "model.safetensors").write_bytes(b"half")
    else:
        shutil.rmtree(folder / "last.writing")
    resumed = SmallRun(tmp_path / "cut", *overrides)
    assert resumed.fit(resume=True).step == 6
    assert same_weights(whole.weights(), resumed.weights())
    assert [line["step"] for line in resumed.lines("train")] == [1, 2, 3, 4, 5, 6]


# Finding


def test_a_run_its_folder_and_a_checkpoint_are_all_understood(tied, tmp_path):
    for name in ("last", "best"):
        save(tmp_path / "checkpoints" / name, tied.captioner)
    best, last = tmp_path / "checkpoints" / "best", tmp_path / "checkpoints" / "last"
    for place in (tmp_path, tmp_path / "checkpoints"):
        assert find_checkpoint(place) == best
        assert find_checkpoint(place, "last") == last
    assert find_checkpoint(last) == last
    shutil.rmtree(best)
    assert find_checkpoint(tmp_path) == last


def test_no_checkpoint_is_told_with_what_is_expected(tmp_path):
    with pytest.raises(UserError) as caught:
        find_checkpoint(tmp_path / "nowhere")
    assert str(caught.value) == (
        f"checkpoint={tmp_path / 'nowhere'} holds no checkpoint "
        "(a run's folder with checkpoints/best or checkpoints/last is expected)"
    )


# Damage


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing"])
def test_damaged_weights_are_told(damage, tied, tmp_path):
    save(tmp_path / "last", tied.captioner)
    file = tmp_path / "last" / "model.safetensors"
    content = {"truncated": file.read_bytes()[:1000], "empty": b"", "text": b"not a model"}
    file.unlink() if damage == "missing" else file.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"^checkpoint=.*last can't be loaded: .+") as caught:
        load_checkpoint(tmp_path / "last", tied.captioner)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing"])
def test_a_damaged_state_is_told(damage, tied, tmp_path):
    save(tmp_path / "last", tied.captioner, state={"rng": torch.get_rng_state()})
    file = tmp_path / "last" / "state.pt"
    content = {"truncated": file.read_bytes()[:1000], "empty": b"", "text": b"not a state"}
    file.unlink() if damage == "missing" else file.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"state\.pt can't be loaded: .+") as caught:
        load_state(tmp_path / "last")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("decoder.ff_dim=32",), "can't be loaded"),
        (("decoder.layers=2",), "does not fit the model"),
        (("pruning.score=norm",), "does not fit the model"),
    ],
)
def test_another_model_is_told(overrides, text, tied, tmp_path):
    save(tmp_path / "last", tied.captioner)
    with pytest.raises(UserError, match=text):
        load_checkpoint(tmp_path / "last", SmallRun(tmp_path / "run", *tied.overrides, *overrides).captioner)


# No code inside


def test_nothing_in_a_run_can_run_code(tmp_path_factory):
    """Weights are safetensors; the one pickle is read with `weights_only=True`, which refuses everything but data."""
    run = trained_run(tmp_path_factory)
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".pt", "", *{p.suffix for p in events(run)}}
    pickles = [path for path in run.rglob("*") if path.is_file() and zipfile.is_zipfile(path)]
    assert [path.name for path in pickles] == ["state.pt"]
    torch.load(pickles[0], weights_only=True)


def events(run: Path) -> list[Path]:
    return list(run.rglob("events.out.tfevents*"))


def test_a_state_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "owned"),))

    torch.save({"rng": Evil()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt can't be loaded"):
        load_state(tmp_path)
    assert not (tmp_path / "owned").exists()


# Loading a run


def test_a_loaded_run_captions_as_before_in_another_place(tmp_path_factory, tmp_path, monkeypatch):
    """Moved, and read from another working directory: the same captions as the run wrote itself."""
    run = trained_run(tmp_path_factory)
    moved = tmp_path / "elsewhere"
    shutil.copytree(run, moved)
    monkeypatch.chdir(tmp_path)
    loaded = load_run(Path("elsewhere"), device=CPU)
    assert not loaded.captioner.training
    from prune_tell.build import build_dataset

    dataset, _ = build_dataset(loaded.cfg)
    records = dataset.records("val")
    transform = build_transform(loaded.recipe)
    images = torch.stack([transform(dataset.open(record)) for record in records])
    with torch.inference_mode():
        written = generate(loaded.captioner.decoder, loaded.captioner.look(images), beams=1, max_length=12)
    texts = map(loaded.tokenizer.decode, written.words)
    captions = {record.image_id: text for record, text in zip(records, texts, strict=True)}
    assert captions == {row["image_id"]: row["caption"] for row in json.loads((run / "captions.json").read_text())}


def test_last_and_best_can_be_chosen(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    last = load_run(run, device=CPU, which="last")
    assert last.meta["step"] == 120
    assert load_run(run, device=CPU).meta["step"] == step_of(run / "checkpoints" / "best")
