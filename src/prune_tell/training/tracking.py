"""Where numbers go while training: `metrics.jsonl` for programs, TensorBoard for people."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes scalars, captions and pictures of a run.

    Args:
        folder: the run.
        resume_step: of a resumed run; lines after it, written by work that is done again now, are cut off.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self.start = time.time()
        before = read_metrics(self.path) if resume_step is not None else []
        kept = [line for line in before if line["step"] <= (resume_step or 0)]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        # TensorBoard forgets the events of an interrupted run from this step on; those of `resume_step` itself stay.
        self.board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=0 if resume_step is None else resume_step + 1
        )

    def log(self, kind: str, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Append one line `{kind, step, epoch, time, **values}`; numbers also go to TensorBoard as `kind/name`."""
        line = {
            "kind": kind,
            "step": step,
            "epoch": round(epoch, 4),
            "time": round(time.time() - self.start, 2),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line | values) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.board.flush()

    def show(self, step: int, images: list[tuple[Tensor, str]]) -> None:
        """Put images `(3, rows, columns)` in 0..1 with their captions on the board."""
        for index, (image, text) in enumerate(images):
            self.board.add_image(f"val/{index}", image, step)
            self.board.add_text(f"val/{index}/caption", text, step)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a last line cut off by a crash is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
