"""Small models for all tests; everything runs on one thread, seeded, and never under a deadline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

from prune_tell.data.tokenizer import EOS
from prune_tell.models.backbone import build_backbone
from prune_tell.models.captioner import Captioner, Projection
from prune_tell.models.decoder import Decoder
from prune_tell.models.positions import GridPositions
from prune_tell.pruning.topk import TopK

# The same examples every time: a failure is the change's, not the day's.
settings.register_profile("prune_tell", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("prune_tell")
torch.set_num_threads(1)

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    """A builder of decoders in eval mode.

    Their predictions are far from uniform and depend on all words so far, as those of fresh weights don't; `eos`
    raises the end's logit.
    """

    def build(*, seed: int = 0, sharpness: float = 6.0, eos: float = 0.0, **options: Any) -> Decoder:
        torch.manual_seed(seed)
        small = {"vocab_size": 11, "d_model": 16, "layers": 2, "heads": 2, "ff_dim": 32, "max_length": 12}
        decoder = Decoder(**(small | {"dropout": 0.0} | options))
        with torch.no_grad():
            decoder.output.weight *= sharpness
            for layer in decoder.layers:
                layer.self_attention.out.weight *= 6.0
            if eos:
                decoder.output.bias[EOS] += eos
        return decoder.eval()

    return build


@pytest.fixture(scope="session")
def make_captioner(make_decoder: Callable[..., Decoder]) -> Callable[..., Captioner]:
    """A builder of captioners: a ViT with CLS and two registers on a 3 x 5 grid (24 x 40 pixels), in eval mode."""

    def build(
        *,
        seed: int = 0,
        prune_ratio: float = 0.0,
        score: Any = "norm",
        grid_positions: Any = "sinusoidal",
        backbone: dict[str, Any] | None = None,
        **options: Any,
    ) -> Captioner:
        decoder = make_decoder(seed=seed, **options)
        arguments: dict[str, Any] = {"name": "vit_tiny_patch16_224", "image_size": (24, 40), "model_args": VIT}
        encoder = build_backbone(**(arguments | {"cls_attention": score == "cls_attention"} | (backbone or {})))
        return Captioner(
            backbone=encoder,
            reducer=TopK(width=encoder.width, prune_ratio=prune_ratio, score=score),
            projection=Projection(width=encoder.width, d_model=decoder.d_model),
            grid_positions=GridPositions(kind=grid_positions, d_model=decoder.d_model),
            decoder=decoder,
        ).eval()

    return build
