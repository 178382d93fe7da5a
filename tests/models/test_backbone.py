from pathlib import Path

import pytest
import timm
import timm.models._builder
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from prune_tell.errors import UserError
from prune_tell.models.backbone import Backbone, build_backbone

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "backbone").glob("*.yaml"))
SMALL_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
# timm's miniatures of every family that gives grid tokens.
MINIATURES = timm.list_models("test_*")
OWN_SIZE = ("test_coatnet", "test_maxvit")  # 160 pixels and nothing else


def small_vit(**options) -> Backbone:
    return build_backbone(
        **({"name": "vit_tiny_patch16_224", "image_size": (24, 40), "model_args": SMALL_VIT} | options)
    )


def a_spot_moves_its_own_token(backbone: Backbone, reach: int = 1) -> None:
    """A bright grid cell must change its own token most, or one `reach` away, and more than the other corners'."""
    rows, columns = backbone.grid
    height, width = backbone.image_size[0] // rows, backbone.image_size[1] // columns
    images = 0.5 * torch.randn(4, 3, *backbone.image_size)
    corners = [(r, c) for r in sorted({0, rows - 1}) for c in sorted({0, columns - 1})]
    with torch.no_grad():
        calm = backbone(images).tokens_BND
        for row, column in corners:
            bright = images.clone()
            bright[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1.0
            change = (backbone(bright).tokens_BND - calm).norm(dim=-1).mean(0)
            at = int(change.argmax())
            assert max(abs(at // columns - row), abs(at % columns - column)) <= reach, (row, column, change)
            assert max(corners, key=lambda c: change[c[0] * columns + c[1]]) == (row, column), change


@pytest.mark.parametrize("name", MINIATURES)
def test_timms_miniatures_give_grid_tokens_row_by_row(name):
    torch.manual_seed(1)
    image_size = (160, 160) if name in OWN_SIZE else (128, 192)
    backbone = build_backbone(name=name, image_size=None if name in OWN_SIZE else image_size).eval()
    assert backbone.image_size == image_size
    rows, columns = backbone.grid
    assert rows / columns == pytest.approx(image_size[0] / image_size[1])
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, *image_size))
    assert features.tokens_BND.shape == (2, rows * columns, backbone.width)
    assert features.prefix_BPD.shape == (2, backbone.prefix, backbone.width)
    assert features.grid == backbone.grid
    assert features.attention_BN is None
    a_spot_moves_its_own_token(backbone)


SIZES = {"vit": (64, (8, 8), 1, 128), "convnext": (64, (8, 8), 0, 128)}
SIZES |= {"vit_base": ((32, 64), (2, 4), 1, 768), "swin": ((128, 192), (4, 6), 0, 768)}
SIZES |= dict.fromkeys(("convnext_tiny", "convnextv2"), ((128, 192), (4, 6), 0, 768))
SIZES |= {"metaformer": ((128, 192), (4, 6), 0, 512), "resnet": ((128, 192), (4, 6), 0, 2048)}
SIZES |= {"mobilenet": ((128, 192), (4, 6), 0, 1280)}


def test_every_preset_is_checked_here():
    assert {path.stem for path in CONFIGS} == set(SIZES) | {"timm"}


@pytest.mark.parametrize("preset", SIZES)
def test_presets(preset):
    node = yaml.safe_load(next(path for path in CONFIGS if path.stem == preset).read_text())
    size, grid, prefix, width = SIZES[preset]
    arguments = dict(node["model_args"])
    if preset in ("vit_base", "convnext_tiny", "convnextv2", "swin"):  # the same blocks, fewer of them
        arguments |= {"depth": 1} if preset == "vit_base" else {"depths": (1, 1, 1, 1)}
    backbone = build_backbone(name=node["name"], model_args=arguments, image_size=size).eval()
    assert (backbone.grid, backbone.prefix, backbone.width) == (grid, prefix, width)
    a_spot_moves_its_own_token(backbone)


def test_sizes_of_the_paper():
    vit = build_backbone(name="vit_base_patch16_224", model_args={"depth": 1})
    assert (vit.image_size, vit.grid, vit.width, vit.prefix) == ((224, 224), (14, 14), 768, 1)
    convnext = build_backbone(name="convnext_tiny", model_args={"depths": (1, 1, 1, 1)})
    assert (convnext.image_size, convnext.grid, convnext.width, convnext.prefix) == ((224, 224), (7, 7), 768, 0)


@pytest.mark.parametrize(
    ("extra", "prefix"),
    [
        ({}, 1),
        ({"reg_tokens": 4}, 5),
        ({"reg_tokens": 4, "no_embed_class": True}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, 2),
    ],
)
def test_prefix_tokens(extra, prefix):
    backbone = small_vit(model_args=SMALL_VIT | extra).eval()
    assert (backbone.prefix, backbone.grid) == (prefix, (3, 5))
    a_spot_moves_its_own_token(backbone, reach=0)


def test_a_name_with_a_weights_tag():
    backbone = build_backbone(name="vit_tiny_patch16_224.augreg_in21k", model_args={"depth": 1}, image_size=32)
    assert backbone.grid == (2, 2)


# CLS attention


@pytest.mark.parametrize(
    "extra",
    [{}, {"reg_tokens": 2}, {"qk_norm": True}, {"num_heads": 4}, {"qkv_bias": False}, {"init_values": 1e-2}],
    ids=str,
)
def test_cls_attention_is_the_attention_timm_computes(extra):
    backbone = small_vit(model_args=SMALL_VIT | extra, cls_attention=True).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    images, seen = torch.randn(3, 3, 24, 40), []
    attention = backbone.model.blocks[-1].attn
    fused = backbone(images)
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    slow = backbone(images)
    expected = seen[-1].mean(dim=1)[:, 0, backbone.prefix :]
    for features in (fused, slow):
        torch.testing.assert_close(features.attention_BN, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3
    torch.testing.assert_close(fused.tokens_BND, slow.tokens_BND, atol=1e-4, rtol=1e-4)


def test_measuring_attention_changes_nothing_and_keeps_nothing():
    plain, watched = small_vit(), small_vit(cls_attention=True)
    watched.load_state_dict(plain.state_dict())  # no second owner of the parameters, no other names
    images = torch.randn(2, 3, 24, 40)
    assert torch.equal(plain.eval()(images).tokens_BND, watched.eval()(images).tokens_BND)
    assert watched._qkv is None
    assert not watched(images).attention_BN.requires_grad  # it chooses; nothing learns through it


@pytest.mark.parametrize(
    ("name", "model", "arguments"),
    [
        ("test_convnext", "ConvNeXt", {}),
        ("test_resnet", "ResNet", {}),
        ("vit_tiny_patch16_224", "VisionTransformer", SMALL_VIT | {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", "VisionTransformer", SMALL_VIT | {"attn_layer": "diff"}),
        ("eva02_tiny_patch14_224", "Eva", {"depth": 1}),  # rotates its keys: the plain product would be wrong
        ("beit_base_patch16_224", "Beit", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_attention_that_cannot_be_measured_is_refused(name, model, arguments):
    with pytest.raises(UserError) as caught:
        build_backbone(name=name, model_args=arguments, image_size=56, cls_attention=True)
    assert str(caught.value) == (
        f"pruning.score=cls_attention needs a backbone with a CLS token and self-attention (a ViT), which {model} "
        "is not; use pruning.score=norm or learned"
    )


# Freezing


def statistics(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in backbone.named_buffers()}


def test_frozen_means_frozen():
    backbone = build_backbone(name="test_resnet", trainable="frozen", image_size=64)
    before = statistics(backbone)
    nn.ModuleList([backbone]).train()
    assert not any(module.training for module in backbone.modules())
    output = backbone(torch.randn(4, 3, 64, 64))
    assert not output.tokens_BND.requires_grad
    assert not any(p.requires_grad for p in backbone.parameters())
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_full_means_everything_trains():
    backbone = build_backbone(name="test_resnet", trainable="full", image_size=64)
    before = statistics(backbone)
    backbone.train()
    backbone(torch.randn(4, 3, 64, 64)).tokens_BND.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert any(not torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("vit", ("model.blocks.1", "model.blocks.2", "model.norm")),
        ("test_convnext", ("model.stages.3", "model.norm_pre")),
        ("test_resnet", ("model.layer3.", "model.layer4.")),
        ("test_efficientnet", ("model.blocks.", "model.conv_head", "model.bn2")),
    ],
)
def test_the_last_two_blocks_train(name, last):
    backbone = small_vit(trainable=2) if name == "vit" else build_backbone(name=name, trainable=2, image_size=64)
    backbone.train()
    before = statistics(backbone)
    trains = {key for key, p in backbone.named_parameters() if p.requires_grad}
    assert trains
    assert all(key.startswith(last) for key in trains)
    images = torch.randn(4, 3, *backbone.image_size)
    backbone(images).tokens_BND.square().sum().backward()
    assert {key for key, p in backbone.named_parameters() if p.grad is not None} == trains
    for key, buffer in backbone.named_buffers():
        owner = key.rsplit(".", 1)[0]
        frozen = not any(t.startswith(owner + ".") for t in trains)
        assert torch.equal(buffer, before[key]) == frozen, key


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_vit"])
def test_one_block_more_trains_more(name):
    counts = []
    for blocks in (1, 2, 3):
        backbone = build_backbone(name=name, trainable=blocks, image_size=64).train()
        backbone(torch.randn(2, 3, 64, 64)).tokens_BND.square().sum().backward()
        counts.append(sum(p.grad is not None for p in backbone.parameters()))
    assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("trainable", [0, -1, 99])
def test_a_number_of_blocks_out_of_range(trainable):
    with pytest.raises(UserError) as caught:
        small_vit(trainable=trainable)
    assert str(caught.value) == f"backbone.trainable={trainable} is out of range: frozen, full, or 1..4 blocks"


def test_a_model_whose_blocks_timm_does_not_tell_apart():
    with pytest.raises(UserError) as caught:
        build_backbone(name="poolformerv2_s12", image_size=64, trainable=2)
    assert str(caught.value) == (
        "backbone.trainable=2 is not possible with MetaFormer, whose blocks timm does not tell apart: "
        "use frozen or full"
    )


@pytest.mark.parametrize("name", MINIATURES)
def test_everything_that_trains_gets_a_gradient(name):
    """Else training over several processes waits for gradients that never come."""
    backbone = build_backbone(name=name, image_size=None if name in OWN_SIZE else 64).train()
    features = backbone(torch.randn(2, 3, *backbone.image_size))
    (features.tokens_BND.sum() + features.prefix_BPD.sum()).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key


@pytest.mark.parametrize("trainable", ["full", 1])
@pytest.mark.parametrize("name", ["vit", "test_convnext", "test_resnet"])
def test_gradient_checkpointing_gives_the_same_gradients(name, trainable):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        options = {"gradient_checkpointing": checkpointing, "trainable": trainable}
        if name == "vit":
            backbone = small_vit(cls_attention=True, **options)
        else:
            backbone = build_backbone(name=name, image_size=64, **options)
        backbone.train()
        torch.manual_seed(1)
        features = backbone(torch.randn(2, 3, *backbone.image_size))
        features.tokens_BND.square().sum().backward()
        return {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(saved[key], gradient, atol=1e-5, rtol=1e-4, msg=key)


# Weights and mistakes


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("head", [True, False])
def test_local_weights(tmp_path, suffix, head):
    torch.manual_seed(5)
    source = timm.create_model("test_resnet", num_classes=7 if head else 0)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    backbone = build_backbone(name="test_resnet", weights=path, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = source.eval().forward_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone(images).tokens_BND, expected)


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), path)
    with pytest.raises(UserError, match=r"backbone\.weights=\S+w\.safetensors does not fit the model: \d+ parameters"):
        build_backbone(name="test_resnet", weights=path)


def test_weights_of_another_size(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(small_vit().model.state_dict(), path)
    with pytest.raises(UserError) as caught:
        small_vit(weights=path, model_args=SMALL_VIT | {"mlp_ratio": 2})
    assert str(caught.value) == (
        f"backbone.weights={path} does not fit the model: 9 parameters differ, first blocks.0.mlp.fc1.weight"
    )


def test_weights_that_are_not_there():
    with pytest.raises(UserError) as caught:
        small_vit(weights=Path("nowhere.pth"))
    assert str(caught.value) == ("backbone.weights=nowhere.pth is not a file (a .safetensors or .pth in timm's layout)")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02garbage" * 9])
def test_a_damaged_weights_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^backbone\.weights=\S+w\.\w+ can't be read as weights \(\w+: .*\)") as caught:
        small_vit(weights=path)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "w.pth"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(UserError, match="can't be read as weights"):
        small_vit(weights=path)
    assert not (tmp_path / "owned").exists()


def test_an_unknown_name():
    with pytest.raises(UserError) as caught:
        build_backbone(name="convnext_tinny")
    assert str(caught.value).startswith("backbone.name=convnext_tinny is no timm model (see timm.list_models())")
    assert "; did you mean 'convnext_tiny" in str(caught.value)


def test_wrong_model_arguments():
    with pytest.raises(UserError) as caught:
        build_backbone(name="vit_tiny_patch16_224", model_args={"depht": 3})
    assert str(caught.value).startswith("backbone.model_args={'depht': 3} don't fit vit_tiny_patch16_224: ")
    assert "depht" in str(caught.value)


def fails_with(monkeypatch, error: Exception) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fail)


class NotInTheHubError(FileNotFoundError, ValueError):
    """As some versions of the hub's library tell that they are offline."""


@pytest.mark.parametrize("error", [OSError("unreachable"), ConnectionError(), TimeoutError(), NotInTheHubError("x")])
def test_pretrained_without_a_network(monkeypatch, error):
    fails_with(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        build_backbone(name="test_resnet", pretrained=True)
    assert str(caught.value) == (
        f"backbone.pretrained=true: the weights of test_resnet could not be fetched ({type(error).__name__}); connect "
        "to the network once, give a local file with backbone.weights=FILE, or train from scratch with "
        "backbone.pretrained=false"
    )


def test_pretrained_weights_that_dont_fit(monkeypatch):
    fails_with(monkeypatch, RuntimeError("Error(s) in loading state_dict:\n\tUnexpected key(s): blocks.3"))
    with pytest.raises(UserError) as caught:
        build_backbone(name="test_resnet", pretrained=True, model_args={"layers": (1, 1, 1, 1)})
    assert str(caught.value) == (
        "backbone.pretrained=true: test_resnet has no weights for backbone.model_args={'layers': (1, 1, 1, 1)} "
        "(Error(s) in loading state_dict:); leave model_args out or train from scratch with backbone.pretrained=false"
    )


def test_a_model_without_tokens():
    class Pooled(nn.Module):
        def forward_features(self, images):
            return images.mean((2, 3))

    with pytest.raises(UserError) as caught:
        Backbone(Pooled(), image_size=(8, 8))
    assert str(caught.value) == "backbone.name=Pooled gives no tokens (output (1, 3))"


def test_tokens_that_form_no_grid():
    class Odd(nn.Module):
        def forward_features(self, images):
            return images.new_zeros(1, 7, 4)

    with pytest.raises(UserError) as caught:
        Backbone(Odd(), image_size=(8, 8))
    assert str(caught.value) == "backbone.name=Odd: 7 tokens form no grid for (8, 8) pixels"


@pytest.mark.parametrize("name", OWN_SIZE)
def test_a_size_the_model_cannot_take(name):
    with pytest.raises(UserError, match=rf"^backbone\.image_size=\(48, 48\) does not fit {name}: \w+"):
        build_backbone(name=name, image_size=48)
