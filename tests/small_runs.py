"""Runs that take seconds: what the tests of training and of the verbs share."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from prune_tell import build
from prune_tell.config import arguments, compose, plain
from prune_tell.data.loader import CaptionItems
from prune_tell.data.tokenizer import Tokenizer
from prune_tell.evaluation.captioning import Generation
from prune_tell.evaluation.scorers import Scores
from prune_tell.models.captioner import Captioner
from prune_tell.train import train
from prune_tell.training.loop import Progress, fit
from prune_tell.training.settings import TrainSettings
from prune_tell.training.tracking import read_metrics

SMALL = (
    "data.train_scenes=24",
    "data.val_scenes=6",
    "data.test_scenes=4",
    "data.image_size=48",
    "backbone.image_size=48",
    "decoder.d_model=32",
    "decoder.layers=1",
    "decoder.heads=2",
    "decoder.ff_dim=64",
    "trainer.epochs=1",
    "trainer.batch_size=8",
    "trainer.validate_metrics=[CIDEr]",
    "trainer.log_every=1",
    "trainer.precision=fp32",
    "generation.beams=1",
    "generation.max_length=12",
    "device=cpu",
)
"""Overrides that keep a run with any backbone small; later ones win."""

VIT = ("backbone=vit", "backbone.model_args={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}")
"""9 tokens of width 32."""

CONVNEXT = ("backbone=convnext", "backbone.model_args={depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}")
"""Up to 36 tokens of width 32."""


def small_config(*overrides: str, backbone: Sequence[str] = VIT) -> DictConfig:
    """Compose a `train` config of a small run."""
    return compose("train", [*backbone, *SMALL, *overrides])


class SmallRun:
    """What `train` prepares for `fit`, without the verb around it: fresh weights from the config's seed."""

    captioner: Captioner
    tokenizer: Tokenizer

    def __init__(self, out: Path, *overrides: str, backbone: Sequence[str] = VIT) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.overrides = overrides
        self.out, self.cfg = out, small_config(*overrides, backbone=backbone)
        self.settings = TrainSettings(**arguments(TrainSettings, plain(self.cfg.trainer), key="trainer"))
        self.data = build.data_settings(self.cfg)
        torch.manual_seed(self.cfg.seed)
        self.dataset, self.problems = build.build_dataset(self.cfg)
        records = build.training_records(self.dataset, self.data)
        self.tokenizer = build.train_tokenizer(records, self.data)
        self.captioner = build.build_captioner(
            self.cfg, vocab_size=len(self.tokenizer), max_length=self.data.max_length
        )
        self.recipe = build.preprocessing_for(self.captioner.backbone, plain(self.cfg.backbone))
        self.train_items = self.items(records, training=True)
        self.val_items = self.items(self.dataset.records("val"), training=False)

    def items(self, records: Any, *, training: bool) -> CaptionItems:
        return build.make_items(
            records,
            self.dataset,
            self.tokenizer,
            self.recipe,
            self.data,
            seed=self.cfg.seed,
            training=training,
            cache=None,
        )

    def fit(self, *, resume: bool = False, **options: Any) -> Progress:
        given: dict[str, Any] = {
            "train_items": self.train_items,
            "val_items": self.val_items,
            "tokenizer": self.tokenizer,
            "settings": self.settings,
            "generation": Generation(**plain(self.cfg.generation)),
            "out": self.out,
            "files": {"config.yaml": "{}", "tokenizer.json": "{}", "preprocessing.json": "{}"},
            "problems": self.problems,
            "device": torch.device("cpu"),
            "seed": self.cfg.seed,
        }
        return fit(self.captioner, resume=resume, **(given | options))

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of all weights."""
        return {name: tensor.clone() for name, tensor in self.captioner.state_dict().items()}

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind in `metrics.jsonl`."""
        return [line for line in read_metrics(self.out / "metrics.jsonl") if line["kind"] == kind]


class ScriptedScorer:
    """Stands for `CaptionScorer` where a test decides the scores (and Java would cost a second)."""

    script: Sequence[float] = ()
    calls = 0

    def __init__(self, references: Any) -> None:
        pass

    def score(self, predictions: Any, metrics: Any = ()) -> Scores:
        cls = type(self)
        value = cls.script[min(cls.calls, len(cls.script) - 1)]
        cls.calls += 1
        return Scores({"CIDEr": value}, {}, {})


def script_scores(patch: pytest.MonkeyPatch, *values: float) -> type[ScriptedScorer]:
    """Let the validations of `fit` score these CIDErs, one after the other; the last one repeats."""
    scorer = type("Scripted", (ScriptedScorer,), {"script": values, "calls": 0})
    patch.setattr("prune_tell.training.loop.CaptionScorer", scorer)
    return scorer


def quick_meteor(captions: Sequence[str], references: Any, *, timeout: float) -> tuple[float, list[float]]:
    """Stands for METEOR, whose Java takes seconds to load, where a test is not about scores."""
    return 0.5, [0.5] * len(captions)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of one small run by the `train` verb, 120 steps; made once for all tests, not to be changed."""
    return _trained_run(factory.getbasetemp())


@cache
def _trained_run(folder: Path) -> Path:
    out = folder / "small_run"
    cfg = small_config(
        f"run_dir={out}",
        "prune_ratio=0.3",
        "decoder.tie_embeddings=true",
        "data.max_length=16",
        "trainer.epochs=40",
        "trainer.lr=0.004",
        "trainer.validate_every=60",
        "trainer.log_every=20",
    )
    train(cfg)
    return out


def cli(
    *arguments: str, cwd: Path, code: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m prune_tell.<verb> key=value ...` as a user would, or `code` with those arguments."""
    command = [sys.executable, *(["-c", code, *arguments[1:]] if code else ["-m", f"prune_tell.{arguments[0]}"])]
    command += [] if code else arguments[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | (env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def read_json(path: Path) -> Any:
    """Parse strict JSON: Python alone would also take `NaN` and `Infinity`, which no other program reads."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{path} holds {constant}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
