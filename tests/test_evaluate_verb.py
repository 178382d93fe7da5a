"""The `evaluate` verb, on checkpoints and on files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prune_tell.config import compose
from prune_tell.errors import UserError
from prune_tell.evaluate import evaluate
from prune_tell.evaluation.scorers import CaptionScorer, Scores
from small_runs import cli, read_json, trained_run

REFERENCES = {"1": ["a dog runs on grass", "the dog is running"], "2": ["two men ride horses"], "3": ["a red bus"]}
PREDICTIONS = {"1": "a dog runs", "2": "two men on horses", "3": "a red bus"}


def run(*overrides: str) -> Scores:
    return evaluate(compose("evaluate", [*overrides, "device=cpu"]))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PREDICTIONS))
    (tmp_path / "r.json").write_text(json.dumps(REFERENCES))
    return f"predictions={tmp_path / 'p.json'}", f"references={tmp_path / 'r.json'}"


def test_a_checkpoint_scores_as_at_the_end_of_training(tmp_path_factory, tmp_path, capsys):
    trained = trained_run(tmp_path_factory)
    scores = run(f"checkpoint={trained}", "split=val", f"out={tmp_path}", "metrics=[Bleu,CIDEr]", "precision=fp32")
    summary = read_json(trained / "summary.json")
    for name in ("Bleu_1", "Bleu_4", "CIDEr"):
        assert scores.scores[name] == pytest.approx(summary["scores"][name])
    own = read_json(tmp_path / "summary.json")
    for key in ("loss", "token_accuracy", "kept_tokens", "total_tokens"):
        assert own[key] == pytest.approx(summary[key], rel=1e-5)
    assert read_json(tmp_path / "captions.json") == read_json(trained / "captions.json")
    stored = read_json(tmp_path / "scores.json")
    assert stored["CIDEr"] == scores.scores["CIDEr"]
    assert set(stored["per_image"]) == {str(row["image_id"]) for row in read_json(tmp_path / "captions.json")}
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"]
    assert float(told[0].split()[1]) == pytest.approx(100 * scores.scores["Bleu_1"], abs=0.05)


def test_results_lie_in_the_run_unless_told_otherwise(tmp_path_factory, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained_run(tmp_path_factory), copy)
    run(f"checkpoint={copy}", "split=test", "metrics=[CIDEr]", "which=last", "batch_size=3")
    assert len(read_json(copy / "evaluate_test" / "captions.json")) == 4
    assert set(read_json(copy / "evaluate_test" / "scores.json")) == {"CIDEr", "reasons", "per_image"}


def test_other_generation_and_other_data(tmp_path_factory, tmp_path):
    trained = trained_run(tmp_path_factory)
    run(
        f"checkpoint={trained}",
        f"out={tmp_path}",
        "metrics=[CIDEr]",
        "generation.max_length=4",
        "generation.beams=2",
        "+data.val_scenes=3",
        "max_images=2",
    )
    captions = read_json(tmp_path / "captions.json")
    assert len(captions) == 2
    assert all(len(row["caption"].split()) <= 3 for row in captions)


def test_files_alone(files, tmp_path, capsys):
    scores = run(*files, f"out={tmp_path / 'out'}", "metrics=[Bleu,CIDEr]")
    assert scores.scores == CaptionScorer(REFERENCES).score(PREDICTIONS, ["Bleu", "CIDEr"]).scores
    stored = read_json(tmp_path / "out" / "scores.json")
    assert set(stored) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", "reasons", "per_image"}
    assert not (tmp_path / "out" / "captions.json").exists()
    assert "CIDEr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [(), ("checkpoint=X", "predictions=P"), ("checkpoint=X", "predictions=P", "references=R"), ("references=R",)],
)
def test_a_checkpoint_or_files(overrides):
    with pytest.raises(UserError) as caught:
        run(*overrides)
    assert str(caught.value) == (
        "evaluate needs either checkpoint=RUN, or predictions=FILE together with references=FILE"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split=dev", "split=dev is unknown (one of: train, val, test)"),
        ("metrics=[BLEU]", "metrics=BLEU is unknown (one or more of: Bleu, METEOR, ROUGE_L, CIDEr, SPICE)"),
        ("metrics=CIDEr", "metrics=CIDEr is not valid: a valid list is expected"),
        ("which=first", "which=first is not valid: 'best' or 'last' or null is expected"),
        ("precision=fp8", "precision=fp8 is not valid: 'auto', 'fp32', 'bf16' or 'fp16' is expected"),
        ("batch_size=0", "batch_size=0 is not valid: greater than 0 is expected"),
        ("max_images=-2", "max_images=-2 is not valid: greater than 0 or null is expected"),
        ("generation.beams=two", "generation.beams=two is not valid: a valid integer is expected"),
        ("generation.beams=0", "generation.beams=0 is out of range: 1 (greedy) or more"),
        ("+data.val_scene=3", "data.val_scene is an unknown key (allowed: "),
    ],
)
def test_a_mistake_is_one_sentence(override, message, tmp_path_factory, tmp_path):
    given: dict[str, Any] = {"checkpoint": trained_run(tmp_path_factory), "out": tmp_path / "out"}
    with pytest.raises(UserError) as caught:
        run(*(f"{key}={value}" for key, value in given.items()), override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint=\S+nowhere holds no checkpoint \(a run's folder"):
        run(f"checkpoint={tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_split_names_the_full_ones(tmp_path_factory, tmp_path):
    with pytest.raises(UserError, match=r"^split=test has no images in this data set \(with images: train, val\)$"):
        run(f"checkpoint={trained_run(tmp_path_factory)}", "split=test", "+data.test_scenes=0", f"out={tmp_path}")


def test_the_command_on_files(files, tmp_path):
    """stdout holds the scores alone; the files lie where the command was typed."""
    (tmp_path / "here").mkdir()
    done = cli("evaluate", *files, "metrics=[CIDEr]", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["CIDEr"]
    assert [path.name for path in Path(tmp_path / "here").iterdir()] == ["scores.json"]
