"""Every YAML file composes, builds, and opens with the command that runs it."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from prune_tell.build import build_captioner, build_dataset, data_settings, preprocessing_for
from prune_tell.config import arguments, compose, config_dir, plain
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation
from prune_tell.models.backbone import Backbone
from prune_tell.train import train
from prune_tell.training.settings import TrainSettings

CONFIGS = config_dir()
FILES = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.rglob("*.yaml"))}
COUNTS = {
    ".": 3,
    "backbone": 10,
    "data": 6,
    "debug": 2,
    "decoder": 3,
    "experiment": 5,
    "hydra": 2,
    "pruning": 1,
    "trainer": 1,
}
"""A new file is tested by lying there; this number makes sure that it is found at all."""

FORMATS_WITH_FILES = ("coco", "flickr", "karpathy", "table")
NOWHERE = {"data.root": "/nowhere", "data.file": "/nowhere.csv"}


def group_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else "."


def names(*groups: str) -> list[str]:
    return [name for name in FILES if group_of(name) in groups]


def check(cfg: DictConfig) -> TrainSettings:
    """Hold every node of a `train` config against the builder it is meant for, and build what can be built here."""
    settings = TrainSettings(**arguments(TrainSettings, plain(cfg.trainer), key="trainer"))
    Generation(**arguments(Generation, plain(cfg.generation), key="generation"))
    data = data_settings(cfg)
    if cfg.data.format in FORMATS_WITH_FILES:
        with pytest.raises(UserError, match=r"^data\.(root|file)=/nowhere\S* is not "):
            build_dataset(cfg)
    else:
        assert build_dataset(cfg)[0].records("train")
    with torch.device("meta"):  # shapes without numbers
        captioner = build_captioner(cfg, vocab_size=50, max_length=data.max_length, fetch=False)
    assert isinstance(captioner.backbone, Backbone)
    recipe = preprocessing_for(captioner.backbone, plain(cfg.backbone))
    assert recipe.image_size == captioner.backbone.image_size
    return settings


def composed(*overrides: str) -> DictConfig:
    """A `train` config whose data are nowhere and whose generated scenes are few."""
    cfg = compose("train", list(overrides))
    if cfg.data.format in FORMATS_WITH_FILES:
        for key, value in NOWHERE.items():
            if key.split(".")[1] in cfg.data:
                OmegaConf.update(cfg, key, value)
    if cfg.backbone.get("name") == "???" or OmegaConf.is_missing(cfg.backbone, "name"):
        cfg.backbone.name = "resnet10t"
    return cfg


def test_no_file_is_forgotten():
    assert Counter(map(group_of, FILES)) == COUNTS


@pytest.mark.parametrize("name", names("backbone", "data", "debug", "decoder", "experiment", "pruning", "trainer"))
def test_composes_and_builds(name):
    group, _, choice = name.partition("/")
    check(composed(f"{group}={choice}"))


def test_what_train_refuses_of_each_data_set_without_files(tmp_path):
    """As typed, without a root: the first thing a newcomer sees."""
    for name in names("data"):
        cfg = compose("train", [f"data={name.split('/')[1]}", f"run_dir={tmp_path / 'run'}"])
        if cfg.data.format in FORMATS_WITH_FILES:
            with pytest.raises(UserError, match=r"^data\.(root|file) is not set: ") as caught:
                train(cfg)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", names("experiment"))
def test_an_experiment_without_its_data_says_which_folder_is_missing(name, tmp_path):
    overrides = [f"experiment={name.split('/')[1]}", "data.root=/nowhere/at/all", f"run_dir={tmp_path / 'run'}"]
    overrides += ["backbone.weights=null", "backbone.pretrained=false", "device=cpu"]
    with pytest.raises(UserError, match=r"^data\.root=/nowhere/at/all is not ") as caught:
        train(compose("train", overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", names("backbone"))
def test_a_backbone_has_every_key(name):
    keys = set(OmegaConf.load(CONFIGS / "backbone" / "vit.yaml"))
    assert set(OmegaConf.load(FILES[name])) == keys
    assert OmegaConf.load(FILES[name]).label == Path(name).name


@pytest.mark.parametrize("name", names("data"))
def test_a_data_set_has_every_common_key(name):
    from prune_tell.build import DataSettings

    node = OmegaConf.load(FILES[name])
    assert set(DataSettings.__dataclass_fields__) - set(node) == set()


@pytest.mark.parametrize("name", names("decoder"))
def test_a_decoder_has_every_key(name):
    assert set(OmegaConf.load(FILES[name])) == set(OmegaConf.load(CONFIGS / "decoder" / "small.yaml"))


def opening(path: Path) -> list[str]:
    """The comment lines at the top, without `# @package`."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    return lines[: next(number for number, line in enumerate([*lines, ""]) if not line.startswith("# "))]


@pytest.mark.parametrize("name", FILES)
def test_opens_with_the_command_that_runs_it(name):
    comment = opening(FILES[name])
    assert comment, "no comment at the top"
    if group_of(name) == "hydra":  # not run by themselves
        return
    match = re.fullmatch(r"# python -m prune_tell\.(\w+) ?(.*)", comment[0])
    assert match, comment[0]
    verb, overrides = match[1], shlex.split(match[2])
    assert (CONFIGS / f"{verb}.yaml").exists()
    compose(verb, overrides)
    if "/" in name:
        assert f"{group_of(name)}={Path(name).name}" in overrides, "the command runs another file"


def test_commands_further_down_the_comments_compose_too():
    lines = [line for path in FILES.values() for line in opening(path)[1:]]
    found = [m for line in lines if (m := re.fullmatch(r"# python -m prune_tell\.(\w+) (.*)", line))]
    assert found, "no such line: this test would check nothing"
    for match in found:
        assert compose(match[1], shlex.split(match[2]))


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_the_small_backbones_have_64_tokens(backbone):
    """So that one prune ratio is one budget for both."""
    with torch.device("meta"):
        captioner = build_captioner(compose("train", [f"backbone={backbone}"]), vocab_size=9, max_length=8)
    assert captioner.backbone.grid == (8, 8)


def test_the_paper_s_table_to_the_letter():
    """Batch 128, 100 epochs, width 768, vocabulary 2,033, d_model 512, 2 layers, 4 heads, 2,048, 0.1, 1e-3, 0.3."""
    for name in ("prune_and_tell_vit", "prune_and_tell_convnext", "pairs_vit", "pairs_convnext"):
        cfg = composed(f"experiment={name}")
        settings = check(cfg)
        assert (settings.batch_size, settings.epochs, settings.lr) == (128, 100, 1e-3)
        assert (cfg.decoder.d_model, cfg.decoder.layers, cfg.decoder.heads) == (512, 2, 4)
        assert (cfg.decoder.ff_dim, cfg.decoder.dropout) == (2048, 0.1)
        assert (cfg.data.vocab_size, cfg.pruning.method, cfg.pruning.prune_ratio) == (2033, "topk", 0.3)
        with torch.device("meta"):
            captioner = build_captioner(cfg, vocab_size=2033, max_length=30, fetch=False)
        assert captioner.backbone.width == 768
