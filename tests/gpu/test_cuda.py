"""What only a CUDA device can show; run by `scripts/gpu_checks.sh`."""

import json
from pathlib import Path

import pytest
import torch

from prune_tell.build import build_captioner, load_run
from prune_tell.config import compose
from prune_tell.data.packing import pack_captions
from prune_tell.decoding.generate import generate
from prune_tell.models.captioner import Captioner
from prune_tell.train import train
from prune_tell.training.losses import word_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")


def small_captioner(backbone: str, ratio: float = 0.3) -> Captioner:
    torch.manual_seed(0)
    cfg = compose("train", [f"backbone={backbone}", f"prune_ratio={ratio}", "decoder.dropout=0"])
    return build_captioner(cfg, vocab_size=60, max_length=20)


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_cuda_gives_what_the_cpu_gives(backbone: str) -> None:
    captioner = small_captioner(backbone, ratio=0.0).eval()
    images = torch.randn(4, 3, 64, 64)
    captions = pack_captions([[[1, 5, 6, 2], [1, 7, 2]]] * 4)
    with torch.no_grad():
        on_cpu = captioner(images, captions).logits_BQV
        on_cuda = captioner.to(CUDA)(images.to(CUDA), captions.to(CUDA)).logits_BQV.cpu()
    torch.testing.assert_close(on_cuda, on_cpu, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_training_in_every_precision_learns_and_can_be_loaded(backbone: str, precision: str, tmp_path: Path) -> None:
    overrides = [f"backbone={backbone}", "prune_ratio=0.3", f"trainer.precision={precision}", "debug=tiny"]
    train(compose("train", [*overrides, "trainer.epochs=4", f"run_dir={tmp_path}", "device=cuda"]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert losses[-1] < 0.9 * losses[0]
    run = load_run(tmp_path, device=CUDA)
    with torch.inference_mode():
        sight = run.captioner.look(torch.randn(3, 3, 64, 64, device=CUDA))
    assert len(generate(run.captioner.decoder, sight, beams=3, max_length=12).words) == 3


def test_pruned_training_step_needs_less_memory() -> None:
    peaks = {}
    for ratio in (0.0, 0.9):
        captioner = small_captioner("convnext", ratio).to(CUDA).train()
        features = captioner.encode(torch.randn(64, 3, 64, 64, device=CUDA))
        features = features._replace(tokens_BND=features.tokens_BND.detach(), prefix_BPD=features.prefix_BPD.detach())
        captions = pack_captions([[[1, *range(4, 16), 2]]] * 64).to(CUDA)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        word_loss(captioner(features, captions).logits_BQV, captions.targets_BQ).loss.backward()
        peaks[ratio] = torch.cuda.max_memory_allocated() - before
    assert peaks[0.9] < peaks[0.0]


def test_compiled_step_equals_the_eager_one() -> None:
    captioner = small_captioner("vit").to(CUDA).eval()
    images = torch.randn(4, 3, 64, 64, device=CUDA)
    captions = pack_captions([[[1, 5, 6, 2], [1, 7, 2]]] * 4).to(CUDA)
    with torch.no_grad():
        eager = captioner(images, captions).logits_BQV
        compiled = torch.compile(captioner)(images, captions).logits_BQV
    torch.testing.assert_close(compiled, eager, atol=5e-3, rtol=5e-3)
