"""Where the numbers go: one line each, strict JSON, and no event lost or doubled by a resume."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prune_tell.pictures.curves import draw_curves
from prune_tell.training.tracking import Tracker, read_metrics
from small_runs import read_json


def board_steps(folder, tag: str) -> list[int]:
    """The steps that TensorBoard shows for a curve."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_a_line_holds_kind_step_epoch_and_values(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log("train", 3, 0.123456, {"loss": 1.5, "lr": 0.001})
    tracker.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("time") >= 0
    assert line == {"kind": "train", "step": 3, "epoch": 0.1235, "loss": 1.5, "lr": 0.001}
    assert board_steps(tmp_path, "train/loss") == [3]


def test_lines_are_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log("train", 1, 0.1, {"loss": 2.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    tracker.close()


def log_steps(tracker: Tracker, *steps: int) -> None:
    for step in steps:
        tracker.log("train", step, step / 10, {"loss": 1.0 / step})
    tracker.close()


def test_a_resume_cuts_what_is_done_again_and_keeps_the_rest(tmp_path):
    log_steps(Tracker(tmp_path), 1, 2, 3, 4, 5)
    log_steps(Tracker(tmp_path, resume_step=3), 4, 5, 6)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert board_steps(tmp_path, "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_new_start_in_the_same_folder_forgets_the_old_one(tmp_path):
    log_steps(Tracker(tmp_path), 1, 2, 3)
    log_steps(Tracker(tmp_path), 1, 2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert board_steps(tmp_path, "train/loss") == [1, 2]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "epoch": 0.1}\n{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(path)] == [1]
    log_steps(Tracker(tmp_path, resume_step=1), 2)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]


def test_no_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def run_with(tmp_path, *lines: tuple[str, int, dict[str, float]]):
    tracker = Tracker(tmp_path)
    for kind, step, values in lines:
        tracker.log(kind, step, step / 2, {"loss": 1.0, "token_accuracy": 0.5} | values)
    tracker.close()
    return draw_curves(tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        [("train", 1, {}), ("train", 2, {}), ("epoch", 2, {})],
        [("epoch", 2, {}), ("val", 2, {"CIDEr": 0.3}), ("epoch", 4, {}), ("val", 4, {"CIDEr": 0.4, "Bleu_4": 0.1})],
        [("epoch", 2, {"loss": float("nan")}), ("val", 2, {})],
    ],
    ids=["one epoch", "with scores", "diverged"],
)
@pytest.mark.filterwarnings("error")
def test_curves_are_drawn_from_whatever_there_is(tmp_path, lines):
    from PIL import Image

    path = run_with(tmp_path, *lines)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as picture:
        assert picture.size[0] == (1320 if any("CIDEr" in values for _, _, values in lines) else 880)
        assert len(set(picture.convert("L").tobytes())) > 10


def test_small_helper_refuses_what_is_not_json(tmp_path):
    (tmp_path / "x.json").write_text('{"best": -Infinity}')
    with pytest.raises(ValueError, match="not JSON"):
        read_json(tmp_path / "x.json")
