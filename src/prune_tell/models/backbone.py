"""One adapter for every timm model: images in, grid tokens out.

Shape letters: B batch, C channels, P prefix tokens (CLS, registers), N grid tokens, S = P + N, D width, H heads,
E head width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import group_parameters, load_state_dict
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from prune_tell.data.features import Features
from prune_tell.errors import UserError
from prune_tell.registry import nearest


class Backbone(nn.Module):
    """Wraps a timm model, untouched, behind `images -> Features`.

    Args:
        model: any timm model built with `num_classes=0`.
        image_size: rows and columns of pixels it will be given.
        cls_attention: also measure the CLS token's attention in the last block.

    Raises:
        UserError: if the model's output is no token sequence or feature map, or has no CLS attention to measure.
    """

    def __init__(self, model: nn.Module, *, image_size: tuple[int, int], cls_attention: bool = False) -> None:
        super().__init__()
        # Convolutions run up to twice as fast on channels-last tensors; values are the same.
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.image_size = image_size
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.frozen = False
        self._qkv: Tensor | None = None
        self.cls_attention = cls_attention
        if cls_attention:
            self._watch_last_block()
        with torch.no_grad():
            probe = self.eval()(torch.zeros(1, 3, *image_size))
        self.grid = probe.grid
        self.width = probe.tokens_BND.shape[-1]

    def _watch_last_block(self) -> None:
        """Keep what the last block's qkv projection computes anyway: its CLS row is all the score needs."""
        blocks = getattr(self.model, "blocks", None)
        attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None
        has_cls = getattr(self.model, "cls_token", None) is not None
        # Nothing but the plain attention: others rotate, bias or combine what the projection gives.
        if not has_cls or attention is None or type(attention) is not Attention:
            raise UserError(
                f"pruning.score=cls_attention needs a backbone with a CLS token and self-attention (a ViT), which "
                f"{type(self.model).__name__} is not; use pruning.score=norm or learned"
            )
        self._last_attention: list[Any] = [attention]  # in a list: not a second owner of the parameters
        # A bound method, so that a deep copy of the backbone keeps in itself what its own block computes.
        attention.qkv.register_forward_hook(self._keep_qkv)

    def _keep_qkv(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # Detached: nothing learns through it, and what checkpointing computes again must not hold a graph.
        self._qkv = output.detach()

    def _attention_of_cls(self) -> Tensor:
        """Softmax of the CLS query against all keys, mean over heads, grid part: `(B, N)`."""
        attention, qkv_BSX = self._last_attention[0], self._qkv
        assert qkv_BSX is not None
        self._qkv = None
        q_BHSE, k_BHSE, _ = qkv_BSX.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BH1E = attention.q_norm(q_BHSE[:, :, :1])
        scores_BHS = (q_BH1E * attention.scale @ attention.k_norm(k_BHSE).transpose(-2, -1)).squeeze(2)
        weights_BN: Tensor = scores_BHS.float().softmax(dim=-1).mean(dim=1)[:, self.prefix :]
        return weights_BN

    def forward(self, images_BCHW: Tensor) -> Features:
        """Encode normalised images `(B, 3, rows, columns)`."""
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        output = self.model.forward_features(images_BCHW)  # type: ignore[operator]
        if output.ndim == 4:
            if self.channels_last:
                output = output.permute(0, 3, 1, 2)
            grid = (output.shape[2], output.shape[3])
            tokens_BSD = output.flatten(2).transpose(1, 2)
        elif output.ndim == 3:
            tokens_BSD = output
            grid = self._sequence_grid(output.shape[1] - self.prefix, images_BCHW.shape[-2:])
        else:
            raise UserError(f"backbone.name={type(self.model).__name__} gives no tokens (output {tuple(output.shape)})")
        attention_BN = self._attention_of_cls() if self.cls_attention else None
        return Features(tokens_BSD[:, self.prefix :], tokens_BSD[:, : self.prefix], grid, attention_BN)

    def _sequence_grid(self, N: int, image_size: torch.Size) -> tuple[int, int]:
        embed = getattr(self.model, "patch_embed", None)
        grid = embed.grid_size if embed is not None and getattr(embed, "grid_size", None) else None
        if grid is not None and grid[0] * grid[1] == N:
            return (int(grid[0]), int(grid[1]))
        # Hierarchical models that return a sequence: the grid keeps the picture's shape.
        rows = round((N * image_size[0] / image_size[1]) ** 0.5)
        if rows and rows * (N // rows) == N:
            return (rows, N // rows)
        raise UserError(
            f"backbone.name={type(self.model).__name__}: {N} tokens form no grid for {tuple(image_size)} pixels"
        )

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen backbones stay in eval mode: no dropout, and BatchNorm keeps its statistics; so do frozen blocks."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if getattr(module, "track_running_stats", False):
                own = list(module.parameters(recurse=False))
                module.training &= not own or any(parameter.requires_grad for parameter in own)
        return self

    def extra_repr(self) -> str:
        """What the wrapped model does not tell; a feature cache's key depends on it."""
        return f"image_size={self.image_size}, cls_attention={self.cls_attention}"

    def freeze(self, trainable: Literal["frozen", "full"] | int) -> None:
        """Choose what trains: nothing, everything, or the last `trainable` blocks (as timm groups them).

        What the tokens don't depend on (a classifier's norm) trains in no case, and is no block.
        """
        if trainable == "frozen":
            self.frozen = True
            self.requires_grad_(False)
            self.eval()
            return
        chosen = self._used_parameters()
        if trainable != "full":
            matcher = getattr(self.model, "group_matcher", None)
            if matcher is None:
                raise UserError(
                    f"backbone.trainable={trainable} is not possible with {type(self.model).__name__}, whose blocks "
                    "timm does not tell apart: use frozen or full"
                )
            groups = group_parameters(self.model, matcher(coarse=False))
            blocks = [used for group in sorted(groups) if (used := chosen.intersection(groups[group]))]
            if not 0 < trainable <= len(blocks):
                allowed = f"frozen, full, or 1..{len(blocks)} blocks"
                raise UserError(f"backbone.trainable={trainable} is out of range: {allowed}")
            chosen = set().union(*blocks[-trainable:])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)

    def _used_parameters(self) -> set[str]:
        """Names of the model's parameters that its tokens depend on."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        with torch.enable_grad():
            features = self.eval()(torch.zeros(1, 3, *self.image_size))
            total = features.tokens_BND.sum() + features.prefix_BPD.sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def build_backbone(
    *,
    name: str,
    pretrained: bool = False,
    weights: Path | None = None,
    trainable: Literal["frozen", "full"] | int = "full",
    image_size: int | Sequence[int] | None = None,
    gradient_checkpointing: bool = False,
    model_args: dict[str, Any] | None = None,
    cls_attention: bool = False,
) -> Backbone:
    """Build a timm backbone.

    Args:
        name: any name `timm.list_models()` knows.
        pretrained: fetch timm's weights for it (needs a network once).
        weights: a local `.safetensors`/`.pth` file in timm's layout instead.
        trainable: `full`, `frozen`, or a number of last blocks.
        image_size: pixels, a number or (rows, columns); the model's own where None.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        model_args: further arguments of timm's model builder.
        cls_attention: also return the CLS token's attention.

    Raises:
        UserError: for an unknown name, wrong model arguments, missing or foreign weights, or no network.
    """
    check_backbone(name, weights)
    arguments = dict(model_args or {})
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or ())
    accepts_size = name.startswith(("vit", "deit", "swin", "beit", "eva", "flexivit", "test_vit"))
    if size and accepts_size:
        arguments["img_size"] = size
    model = _create(name, pretrained, arguments)
    if weights is not None:
        load_weights(model, Path(weights))
    if not size:
        size = tuple(model.pretrained_cfg["input_size"][1:])
    if gradient_checkpointing:
        model.set_grad_checkpointing(True)
    try:
        backbone = Backbone(model, image_size=(size[0], size[1]), cls_attention=cls_attention)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"backbone.image_size={(size[0], size[1])} does not fit {name}: {error}") from error
    backbone.freeze(trainable)
    return backbone


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    """Build the timm model, its failures told in a sentence."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        # An OSError is the network's, even where it is a ValueError as well (as some of the hub's are).
        arguments_wrong = (TypeError, AttributeError, AssertionError, IndexError, KeyError, ValueError)
        if isinstance(error, arguments_wrong) and not (pretrained and isinstance(error, OSError)):
            raise UserError(f"backbone.model_args={arguments} don't fit {name}: {error}") from error
        if not pretrained:
            raise
        if isinstance(error, RuntimeError):  # how timm and torch say that weights are missing or don't fit
            raise UserError(
                f"backbone.pretrained=true: {name} has no weights for backbone.model_args={arguments} ({first_line}); "
                "leave model_args out or train from scratch with backbone.pretrained=false"
            ) from error
        raise UserError(
            f"backbone.pretrained=true: the weights of {name} could not be fetched ({type(error).__name__}); connect "
            "to the network once, give a local file with backbone.weights=FILE, or train from scratch with "
            "backbone.pretrained=false"
        ) from error


def check_backbone(name: str, weights: Path | None) -> None:
    """Refuse a model that timm does not know and a weight file that is not there.

    Raises:
        UserError: naming the nearest model.
    """
    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        raise UserError(f"backbone.name={name} is no timm model (see timm.list_models()){near}")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"backbone.weights={weights} is not a file (a .safetensors or .pth in timm's layout)")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a local file of timm weights; a classifier head in it is left out, anything else must fit."""
    try:
        state = load_state_dict(str(path), use_ema=False, device="cpu", weights_only=True)
    except Exception as error:
        why = next(iter(str(error).splitlines()), "empty")
        raise UserError(f"backbone.weights={path} can't be read as weights ({type(error).__name__}: {why})") from error
    own = model.state_dict()
    state = {
        key: value for key, value in state.items() if key in own or not key.startswith(("head", "fc", "classifier"))
    }
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"backbone.weights={path} does not fit the model: {len(wrong)} parameters differ, first {wrong[0]}"
        )
    model.load_state_dict(state)
