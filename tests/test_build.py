"""From a config to the parts of a run."""

import json
import shutil
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from prune_tell import build
from prune_tell.config import compose
from prune_tell.data.features import Features
from prune_tell.data.records import Problems, Record
from prune_tell.data.shapes import Shapes
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation
from small_runs import CONVNEXT, SmallRun, same_weights, small_config, trained_run

CPU = torch.device("cpu")


def captioner_of(*overrides: str, **options: Any):
    return build.build_captioner(small_config(*overrides), vocab_size=20, max_length=12, **options)


# Data


@pytest.mark.parametrize(
    ("name", "value", "low"),
    [("max_images", 0, 1), ("max_captions", 0, 1), ("captions_per_image", -1, 1), ("min_count", 0, 1)],
)
def test_data_settings_have_a_range(name, value, low):
    with pytest.raises(UserError) as caught:
        build.data_settings(small_config(f"data.{name}={value}"))
    assert str(caught.value) == f"data.{name}={value} is out of range: {low} or more"


def test_a_data_set_gets_its_own_options_and_the_report():
    dataset, problems = build.build_dataset(small_config("data.train_scenes=5", "data.seed=3"))
    assert isinstance(dataset, Shapes)
    assert (len(dataset.records("train")), dataset.seed) == (5, 3)
    assert problems == Problems("skip", [])


def test_options_that_builder_and_settings_share_reach_both(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\nx.jpg,a dog\n")
    cfg = compose("train", ["data=table", f"data.file={tmp_path / 't.csv'}", "data.name=mine"])
    cfg.data.on_error = "refuse"
    with pytest.raises(UserError, match=r"^missing image: .*data\.on_error=refuse"):
        build.build_dataset(cfg)
    cfg.data.on_error, cfg.data.verify = "skip", "none"
    dataset, problems = build.build_dataset(cfg)
    assert dataset.name == "mine" == build.data_settings(cfg).name
    assert problems.on_error == "skip"


def test_an_unknown_data_key_is_told():
    cfg = small_config("+data.scenes=3")
    with pytest.raises(UserError, match=r"^data\.scenes is an unknown key \(allowed: .*test_scenes, train_scenes"):
        build.build_dataset(cfg)


def test_training_can_be_limited_and_leaves_the_other_splits_alone():
    cfg = small_config("data.max_images=3", "data.max_captions=2")
    dataset, _ = build.build_dataset(cfg)
    records = build.training_records(dataset, build.data_settings(cfg))
    assert [len(record.captions) for record in records] == [2, 2, 2]
    assert [record.image_id for record in records] == [0, 1, 2]
    assert len(dataset.records("val")) == 6


def test_the_vocabulary_is_the_training_captions_alone():
    records = [Record(1, 1, ("a red dog", "a dog")), Record(2, 2, ("a red cat",))]
    cfg = small_config("data.min_count=2")
    tokenizer = build.train_tokenizer(records, build.data_settings(cfg))
    assert tokenizer.decode(tokenizer.encode("a red dog")) == "a red dog"
    assert "<unk>" in tokenizer.decode(tokenizer.encode("cat"))


def test_training_draws_captions_and_evaluation_has_them_all(tmp_path):
    run = SmallRun(tmp_path, "data.captions_per_image=2", "data.augment=true")
    drawn = {tuple(map(tuple, run.train_items[epoch, 0].captions)) for epoch in range(8)}
    assert all(len(captions) == 2 for captions in drawn)
    assert len(drawn) > 2
    assert not torch.equal(run.train_items[0, 0].visual, run.train_items[1, 0].visual)
    assert len(run.val_items[0, 0].captions) == 5
    assert torch.equal(run.val_items[0, 0].visual, run.val_items[1, 0].visual)


def test_an_empty_split_names_the_full_ones():
    dataset, _ = build.build_dataset(small_config("data.test_scenes=0"))
    with pytest.raises(UserError, match=r"^split=test has no images in this data set \(with images: train, val\)$"):
        build.split_records(dataset, "test")
    assert len(build.split_records(dataset, "val")) == 6


# Model


def test_the_parts_fit_together():
    model = captioner_of("prune_ratio=0.3", "pruning.score=learned", "decoder.grid_positions=learned")
    sight = model.look(torch.randn(2, 3, 48, 48))
    assert sight.reduction.tokens_BKD.shape == (2, 7, 32)
    assert sight.grid == (3, 3)
    assert model.decoder.max_length == 12


def test_a_seed_gives_the_same_weights():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(captioner_of().state_dict())
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


def test_local_weights_are_loaded_and_left_out_where_a_checkpoint_follows(tmp_path):
    source = captioner_of().backbone.model
    with torch.no_grad():
        source.pos_embed.fill_(0.25)
    save_file({name: tensor.contiguous() for name, tensor in source.state_dict().items()}, tmp_path / "w.safetensors")
    override = f"backbone.weights={tmp_path / 'w.safetensors'}"
    assert bool((captioner_of(override).backbone.model.pos_embed == 0.25).all())
    (tmp_path / "w.safetensors").unlink()
    assert captioner_of(override, fetch=False).backbone.grid == (3, 3)
    with pytest.raises(UserError, match=r"^backbone\.weights=\S+ is not a file"):
        captioner_of(override)


def test_cls_attention_needs_a_cls_token():
    with pytest.raises(UserError, match=r"^pruning\.score=cls_attention needs a backbone with a CLS token"):
        build.build_captioner(
            small_config("pruning.score=cls_attention", backbone=CONVNEXT), vocab_size=9, max_length=9
        )
    assert captioner_of("pruning.score=cls_attention", "prune_ratio=0.5").backbone.cls_attention


def test_preprocessing_comes_from_the_weights_unless_the_config_says_otherwise():
    backbone = captioner_of().backbone
    nothing = dict.fromkeys(build.PREPROCESSING_KEYS)
    own = build.preprocessing_for(backbone, nothing)
    assert own.image_size == (48, 48)
    assert (own.mean, own.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "as ViT-Ti/16 was trained"
    assert (own.interpolation, own.fit) == ("bicubic", "crop")
    given = {"mean": [0.1, 0.2, 0.3], "fit": "squash", "crop_ratio": 1, "interpolation": "bilinear"}
    other = build.preprocessing_for(backbone, nothing | given)
    assert other.mean == (0.1, 0.2, 0.3)
    assert (other.fit, other.interpolation, other.crop_ratio, other.std) == ("squash", "bilinear", 1.0, own.std)


@pytest.mark.parametrize(("key", "value"), [("fit", "stretch"), ("mean", [0.5]), ("crop_ratio", "x")])
def test_impossible_preprocessing_is_told(key, value):
    backbone = captioner_of().backbone
    with pytest.raises(UserError, match=rf"^backbone\.{key}="):
        build.preprocessing_for(backbone, dict.fromkeys(build.PREPROCESSING_KEYS) | {key: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "device=gpu is unknown (auto, cpu, cuda or cuda:N)"), ("cuda:99", "device=cuda:99 is not there: ")],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UserError) as caught:
        build.pick_device(name)
    assert str(caught.value).startswith(message)


def test_devices():
    assert build.pick_device("cpu") == CPU
    assert build.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# Cached features


def cache_of(run: SmallRun, what: str = "val"):
    return build.cached_features(
        run.captioner, run.recipe, run.dataset.records("val"), run.dataset, run.cfg, device=CPU, what=what
    )


def cached_run(tmp_path, *overrides: str) -> SmallRun:
    return SmallRun(
        tmp_path,
        "data.cache_features=true",
        "backbone.trainable=frozen",
        f"data.cache_dir={tmp_path / 'cache'}",
        *overrides,
    )


def test_no_cache_unless_asked_for(tmp_path):
    assert cache_of(SmallRun(tmp_path)) is None


def test_cached_features_are_the_backbone_s_and_are_found_again(tmp_path, monkeypatch):
    run = cached_run(tmp_path)
    cache = cache_of(run)
    images = torch.stack([run.val_items[0, index].visual for index in range(6)])
    tokens = run.captioner.encode(images).tokens_BND
    for index in range(6):
        row = cache.row(index)
        assert isinstance(row, Features)
        torch.testing.assert_close(row.tokens_BND[0].float(), tokens[index], rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(type(run.dataset), "open", lambda *_: pytest.fail("computed again"))
    assert torch.equal(cache_of(run).row(3).tokens_BND, cache.row(3).tokens_BND)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_backbone_has_another_cache(tmp_path):
    for seed in (0, 1):
        cache_of(cached_run(tmp_path, f"seed={seed}"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.trainable=full", "data.cache_features=true needs backbone.trainable=frozen, not full"),
        ("backbone.trainable=1", "data.cache_features=true needs backbone.trainable=frozen, not 1"),
        ("data.augment=true", "data.cache_features=true and data.augment=true exclude each other"),
    ],
)
def test_features_that_change_are_not_cached(override, message, tmp_path):
    with pytest.raises(UserError) as caught:
        cache_of(cached_run(tmp_path, override))
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "cache").exists()


def test_views_are_augmented_versions_with_caches_of_their_own(tmp_path):
    run = cached_run(tmp_path, "data.cached_views=3", "data.mirror=true")
    records = run.dataset.records("train")[:6]

    def view(number: int):
        return build.cached_features(
            run.captioner, run.recipe, records, run.dataset, run.cfg, device=CPU, what="train", view=number
        )

    rows = [view(number).row(2).tokens_BND for number in (0, 1, 2)]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    assert torch.equal(view(1).row(2).tokens_BND, rows[1])


# Loading


def test_load_run_needs_neither_weights_nor_data(tmp_path_factory, tmp_path):
    """A run that began with local weights and photographs loads where both are gone."""
    copy = tmp_path / "run"
    shutil.copytree(trained_run(tmp_path_factory), copy)
    folder = copy / "checkpoints" / "best"
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.backbone.pretrained, cfg.backbone.weights = True, "/nowhere/w.safetensors"
    cfg.data.cache_features = True
    OmegaConf.save(cfg, folder / "config.yaml")
    run = build.load_run(copy, device=CPU)
    assert run.captioner.backbone.grid == (3, 3)
    assert run.meta["step"] == json.loads((folder / "meta.json").read_text())["step"]
    assert run.recipe.image_size == (48, 48)


def test_changes_of_generation_that_are_null_change_nothing(tmp_path_factory):
    run = build.load_run(trained_run(tmp_path_factory), device=CPU)
    same = build.merged_generation(run, {"beams": None, "max_length": None, "length_penalty": None})
    assert same == Generation(beams=1, max_length=12, length_penalty=0.0)
    assert build.merged_generation(run, {"beams": 4}) == Generation(beams=4, max_length=12, length_penalty=0.0)
