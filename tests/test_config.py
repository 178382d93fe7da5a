"""From the command line to checked arguments: a mistake is one sentence with the key, the value, what is allowed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from pydantic import PositiveInt

from prune_tell import config
from prune_tell.config import arguments, compose, config_dir, convert, plain, run_dir
from prune_tell.errors import UserError
from prune_tell.train import train
from small_runs import SMALL, VIT, cli, small_config

# Converting one value


@pytest.mark.parametrize(
    ("hint", "value", "result"),
    [
        (int, 3, 3),
        (int, "3", 3),
        (int, 3.0, 3),
        (float, 1, 1.0),
        (float, "1e-3", 0.001),
        (bool, "true", True),
        (int | None, None, None),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (Literal["frozen", "full"] | int, 2, 2),
        (Literal["frozen", "full"] | int, "full", "full"),
        (Path, "a/b", Path("a/b")),
        (dict[str, Any], {"a": True}, {"a": True}),
        (Sequence[int] | int | None, [2, 3], [2, 3]),
        (bool | None, True, True),
    ],
)
def test_convert(hint, value, result):
    converted = convert(hint, value, "key")
    assert converted == result
    assert type(converted) is type(result)


@pytest.mark.parametrize(
    ("hint", "value", "told"),
    [
        (int, "two", "key=two is not valid: a valid integer is expected"),
        (int, 1.5, "key=1.5 is not valid: a valid integer is expected"),
        (int, None, "key=null is not valid: a valid integer is expected"),
        (int | None, "x", "key=x is not valid: a valid integer or null is expected"),
        (float, "abc", "key=abc is not valid: a valid number is expected"),
        (float, True, "key=true is not valid: a number is expected"),
        (int | None, False, "key=false is not valid: a number is expected"),
        (Literal["frozen", "full"] | int, True, "key=true is not valid: a number is expected"),
        (bool, "maybe", "key=maybe is not valid: a valid boolean is expected"),
        (Literal["a", "b", "c"], "d", "key=d is not valid: 'a', 'b' or 'c' is expected"),
        (
            Literal["frozen", "full"] | int,
            "half",
            "key=half is not valid: 'frozen' or 'full' or a valid integer is expected",
        ),
        (str, 3, "key=3 is not valid: a valid string is expected"),
        (tuple[float, float], [1, 2, 3], "key=[1, 2, 3] is not valid: at most 2 items is expected"),
        (list[str], "x", "key=x is not valid: a valid list is expected"),
        (PositiveInt, 0, "key=0 is not valid: greater than 0 is expected"),
    ],
)
def test_what_cannot_be_converted_is_told(hint, value, told):
    with pytest.raises(UserError) as caught:
        convert(hint, value, "key")
    assert str(caught.value) == told


# A node against a signature


def builder(*, problems: object, width: int, rate: float = 0.1, kind: Literal["a", "b"] = "a") -> None:
    """A builder."""


def test_arguments_convert_and_leave_defaults_to_the_signature():
    checked = arguments(builder, {"width": "3", "kind": "b"}, key="part", given=("problems",))
    assert checked == {"width": 3, "kind": "b"}


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (
            {"width": 3, "rat": 1},
            "part.rat is an unknown key (allowed: kind, rate, width); did you mean 'rate'?",
        ),
        ({"width": 3, "problems": 1}, "part.problems is an unknown key (allowed: kind, rate, width)"),
        ({"rate": 1}, "part.width is not set: give it as part.width=..."),
        ({"width": None}, "part.width is not set: give it as part.width=..."),
        ({"width": "???"}, "part.width is not set: give it as part.width=..."),
        ({"width": 3, "kind": "c"}, "part.kind=c is not valid: 'a' or 'b' is expected"),
    ],
)
def test_arguments_tell_the_key_with_its_place(node, told):
    with pytest.raises(UserError) as caught:
        arguments(builder, node, key="part", given=("problems",))
    assert str(caught.value) == told


def test_plain_resolves():
    node = OmegaConf.create({"a": 2, "b": {"c": "${a}", "d": [1, "${a}"]}})
    assert plain(node) == {"a": 2, "b": {"c": 2, "d": [1, 2]}}
    assert plain([1]) == [1]


# Where the files are


def test_the_configs_of_an_installed_package_come_first(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "prune_tell"
    beside = tmp_path / "configs"
    monkeypatch.setattr(config, "PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="configs folder is missing"):
        config_dir()
    for folder in (beside, package / "configs"):
        folder.mkdir(parents=True)
        (folder / "train.yaml").write_text("")
        assert config_dir() == folder


def test_a_checkout_uses_the_folder_at_the_top():
    assert config_dir() == Path(__file__).resolve().parent.parent / "configs"


# Composing


def test_the_command_of_the_readme_composes():
    cfg = compose("train", ["backbone=vit", "prune_ratio=0.3"])
    assert cfg.backbone.label == "vit"
    assert cfg.pruning.prune_ratio == cfg.prune_ratio == 0.3


def test_experiments_and_debug_files_win_over_the_defaults_of_train_yaml():
    """Values at the top of train.yaml (prune_ratio, generation) are defaults, too."""
    assert compose("train", ["debug=tiny"]).generation.beams == 2
    cfg = compose("train", ["experiment=prune_and_tell_vit"])
    assert cfg.pruning.prune_ratio == 0.3
    assert cfg.final_split == "test"
    assert compose("train", ["experiment=flickr8k"]).generation.max_length == 24


def test_the_command_line_wins_over_experiments():
    cfg = compose("train", ["experiment=prune_and_tell_vit", "prune_ratio=0.5", "trainer.epochs=2"])
    assert (cfg.pruning.prune_ratio, cfg.trainer.epochs) == (0.5, 2)


def test_run_dir_outside_of_hydra_is_the_config_s(tmp_path):
    assert run_dir(compose("train", [f"run_dir={tmp_path}"])) == tmp_path


def test_run_dirs_name_what_is_run():
    cfg = compose("train", ["backbone=convnext", "prune_ratio=0.3"])
    assert str(run_dir(cfg)).endswith("_shapes_convnext_topk_0.3")


# Mistakes, told by `train` before any work


def told(out: Path, *overrides: str, backbone: Sequence[str] = VIT) -> str:
    """What `train` says to a mistake; nothing may have been trained."""
    with pytest.raises(UserError) as caught:
        train(small_config(f"run_dir={out}", *overrides, backbone=backbone))
    message = str(caught.value)
    assert "\n" not in message
    assert not (out / "checkpoints").exists()
    assert not (out / "metrics.jsonl").exists()
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune_ration=0.3", "prune_ration is an unknown key; did you mean 'prune_ratio'? (all keys: add --cfg job)"),
        (
            "trainer.epoch=3",
            "trainer.epoch is an unknown key; did you mean 'trainer.epochs'? (all keys: add --cfg job)",
        ),
        ("decoder.head=2", "decoder.head is an unknown key; did you mean 'decoder.heads'? (all keys: add --cfg job)"),
        (
            "data.val_scene=2",
            "data.val_scene is an unknown key; did you mean 'data.val_scenes'? (all keys: add --cfg job)",
        ),
        ("prune_ratio=abc", "prune_ratio=abc is not valid: a valid number is expected"),
        ("prune_ratio=true", "prune_ratio=true is not valid: a number is expected"),
        ("prune_ratio=1", "prune_ratio=1.0 is out of range: 0 (keep all tokens) up to, not including, 1"),
        ("prune_ratio=-0.1", "prune_ratio=-0.1 is out of range: 0 (keep all tokens) up to, not including, 1"),
        ("kept_tokens=0", "kept_tokens=0 is out of range: at least 1 token must stay"),
        ("trainer.epochs=two", "trainer.epochs=two is not valid: a valid integer is expected"),
        ("trainer.epochs=1.5", "trainer.epochs=1.5 is not valid: a valid integer is expected"),
        ("trainer.epochs=0", "trainer.epochs=0 is out of range: 1 or more"),
        ("trainer.betas=[0.9]", "trainer.betas=[0.9] is not valid: one more item is expected"),
        ("trainer.clip=-1", "trainer.clip=-1.0 is out of range: 0.0 to inf"),
        (
            "trainer.schedule=cos",
            "trainer.schedule=cos is not valid: 'cosine', 'linear' or 'constant' is expected",
        ),
        ("trainer.precision=fp16", "trainer.precision=fp16 needs a CUDA device: use bf16 or fp32 on the CPU"),
        (
            "trainer.track=Bleu_4",
            "trainer.track=Bleu_4 is not among trainer.validate_metrics=['CIDEr']",
        ),
        ("decoder.heads=3", "decoder.heads=3 does not divide decoder.d_model=32 (allowed: [1, 2, 4, 8, 16, 32])"),
        ("decoder.heads=0", "decoder.heads=0 is out of range: 1 or more"),
        ("decoder.layers=0", "decoder.layers=0 is out of range: 1 or more"),
        ("decoder.d_model=0", "decoder.d_model=0 is out of range: 1 or more"),
        ("decoder.dropout=1", "decoder.dropout=1.0 is out of range: 0 up to, not including, 1"),
        ("decoder.attention_dropout=-1", "decoder.attention_dropout=-1.0 is out of range: 0 up to, not including, 1"),
        ("decoder.token_dropout=1", "decoder.token_dropout=1.0 is out of range: 0 up to, not including, 1"),
        (
            "decoder.norm=middle",
            "decoder.norm=middle is not valid: 'pre' or 'post' is expected",
        ),
        ("generation.beams=0", "generation.beams=0 is out of range: 1 (greedy) or more"),
        ("generation.max_length=1", "generation.max_length=1 is out of range: 2 (BOS and EOS) or more"),
        ("data.max_length=2", "data.max_length=2 is out of range: 3 or more"),
        ("data.num_workers=-1", "data.num_workers=-1 is out of range: 0 or more"),
        ("data.train_scenes=-1", "data.train_scenes=-1 is out of range (0 to 1000000)"),
        ("data.train_scenes=0", "data: the training split has no images (see data_problems.json)"),
        (
            "data.val_scenes=1",
            "the val split has 1 image to score, but scores need 2 or more (or none at all)",
        ),
        (
            "trainer.validate_images=1",
            "the val split has 1 image to score, but scores need 2 or more (or none at all)",
        ),
        ("final_split=dev", "final_split=dev is not valid: 'train', 'val' or 'test' is expected"),
        ("resume=maybe", "resume=maybe is not valid: auto (go on from run_dir's last checkpoint) or never"),
        ("device=gpu", "device=gpu is unknown (auto, cpu, cuda or cuda:N)"),
        ("seed=x", "seed=x is not valid: a valid integer is expected"),
        ("backbone.name=vit_tiny", "backbone.name=vit_tiny is no timm model ..."),
        (
            "backbone.trainable=half",
            "backbone.trainable=half is not valid: 'frozen' or 'full' or a valid integer is expected",
        ),
        ("backbone.trainable=true", "backbone.trainable=true is not valid: a number is expected"),
        ("backbone.lr=fast", "backbone.lr=fast is not valid: a valid number or null is expected"),
        ("backbone.weights=/nowhere.pth", "backbone.weights=/nowhere.pth is not a file ..."),
        ("backbone.fit=stretch", "backbone.fit=stretch is not valid: 'crop' or 'squash' is expected"),
        ("backbone.interpolation=cubic", "backbone.interpolation=cubic is unknown (bilinear, bicubic or nearest)"),
        (
            "pruning.score=best",
            "pruning.score=best is not valid: 'norm', 'cls_attention', 'learned' or 'random' is expected",
        ),
        ("data.cache_features=true", "data.cache_features=true needs backbone.trainable=frozen, not full"),
        (
            "data.format=coco2",
            "data=coco2 is unknown (one of: coco, flickr, karpathy, shapes, table); did you mean 'coco'?",
        ),
    ],
)
def test_a_mistake_is_one_sentence(override, message, tmp_path):
    sentence = told(tmp_path / "run", override)
    if message.endswith(" ..."):
        assert sentence.startswith(message.removesuffix("..."))
    else:
        assert sentence == message


@pytest.mark.parametrize(("d_model", "needs"), [(33, "odd|divisible"), (34, "divisible by 4")])
def test_an_odd_width_is_told(d_model, needs, tmp_path):
    sentence = told(tmp_path, f"decoder.d_model={d_model}", "decoder.heads=1")
    assert sentence.startswith(f"decoder.d_model={d_model} is ")
    assert any(word in sentence for word in needs.split("|"))


def test_an_unknown_backbone_lists_the_choices(tmp_path):
    sentence = told(tmp_path, backbone=["backbone=vitt"])
    assert sentence.startswith("backbone=vitt is unknown (one of: convnext, convnext_tiny, ")
    assert "; did you mean 'vit'?" in sentence
    assert sentence.endswith("for any other timm model: backbone=timm backbone.name=NAME")


def test_a_timm_backbone_needs_a_name(tmp_path):
    sentence = told(tmp_path, backbone=["backbone=timm"])
    assert sentence == "backbone.name is not set: give it as backbone.name=..."


def test_an_empty_test_split_is_told_before_training(tmp_path):
    sentence = told(tmp_path, "final_split=test", "data.test_scenes=0")
    assert sentence == "final_split=test has no images in this data set (with images: train, val)"


def test_suggestions_are_the_verb_s_own_keys():
    with pytest.raises(UserError, match=r"^checkpont is an unknown key; did you mean 'checkpoint'\?"):
        compose("caption", ["checkpont=x"])


def test_a_broken_override_is_told():
    with pytest.raises(UserError, match=r"^prune_ratio=\[0\.3 can't be read: ") as caught:
        compose("train", ["prune_ratio=[0.3"])
    assert "\n" not in str(caught.value)


# The real command line


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prune_ration=0.3", "prune_ration is an unknown key; did you mean 'prune_ratio'? (all keys: add --cfg job)"),
        ("prune_ratio=1", "prune_ratio=1.0 is out of range: 0 (keep all tokens) up to, not including, 1"),
    ],
)
def test_the_command_says_one_sentence_and_fails(override, sentence, tmp_path):
    done = cli("train", *SMALL, override, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == f"prune_tell: {sentence}\n"
    assert not list(tmp_path.rglob("checkpoints"))
