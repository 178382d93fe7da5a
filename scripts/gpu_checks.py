"""AMP training of both backbones, compile, throughput and memory on the CUDA device; one JSON file under `benchmarks/`.

python scripts/gpu_checks.py --out benchmarks            (scripts/gpu_checks.sh runs it after the GPU tests)
python scripts/gpu_checks.py --out /tmp/x --rehearse     (any machine: tiny models, to see that the script works)
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from prune_tell.build import build_captioner
from prune_tell.config import compose
from prune_tell.data.packing import pack_captions
from prune_tell.evaluation.captioning import clock
from prune_tell.models.captioner import Captioner
from prune_tell.train import train, versions
from prune_tell.training.losses import word_loss

VOCABULARY, WORDS = 2033, 12


def training(device: torch.device, rehearse: bool) -> list[dict[str, Any]]:
    """Train both small backbones from the real entry point, in every precision, with and without compile."""
    rows = []
    precisions = ["fp32", "bf16"] if device.type == "cpu" else ["fp32", "bf16", "fp16"]
    plans = [(b, p, False) for b in ("vit", "convnext") for p in precisions]
    if not rehearse:
        plans.append(("vit", "bf16", True))
    for backbone, precision, compiled in plans:
        with tempfile.TemporaryDirectory() as folder:
            size = ["debug=tiny"] if rehearse else ["trainer.epochs=3", "trainer.validate_every=100000"]
            overrides = [f"backbone={backbone}", "prune_ratio=0.3", f"device={device}", f"run_dir={folder}", *size]
            overrides += [f"trainer.precision={precision}", f"trainer.compile={str(compiled).lower()}"]
            start = time.perf_counter()
            train(compose("train", overrides))
            summary = json.loads((Path(folder) / "summary.json").read_text())
        rows.append(
            {"backbone": backbone, "precision": precision, "compile": compiled, "overrides": overrides[:2] + size}
            | {"seconds": round(time.perf_counter() - start, 1), "CIDEr": summary["scores"]["CIDEr"]}
            | {key: summary[key] for key in ("loss", "token_accuracy", "peak_memory_bytes", "captions_per_second")}
        )
    return rows


def step_time(
    captioner: Captioner, batch: int, size: int, device: torch.device, *, backward: bool, repeats: int
) -> float:
    """Median seconds of a bf16 step (forward, or forward and backward) on random images, one caption each."""
    images = torch.randn(batch, 3, size, size, device=device)
    captions = pack_captions([[[1, *range(4, 4 + WORDS), 2]]] * batch).to(device)
    times = []
    for _ in range(repeats + 2):
        start = clock(device)
        with torch.autocast(device.type, dtype=torch.bfloat16), torch.set_grad_enabled(backward):
            output = captioner(images, captions)
            loss = word_loss(output.logits_BQV, captions.targets_BQ)
        if backward:
            loss.loss.backward()
            captioner.zero_grad(set_to_none=True)
        times.append(clock(device) - start)
    return statistics.median(times[2:])


def throughput(device: torch.device, rehearse: bool) -> list[dict[str, Any]]:
    """Images/s and peak memory of ViT-B/16 and ConvNeXt-T, unpruned and pruned, in one run side by side."""
    rows: list[dict[str, Any]] = []
    for backbone in ("vit", "convnext") if rehearse else ("vit_base", "convnext_tiny"):
        for ratio in (0.0, 0.3, 0.5):
            overrides = [f"backbone={backbone}", "backbone.pretrained=false", "decoder=paper", f"prune_ratio={ratio}"]
            captioner = build_captioner(compose("train", overrides), vocab_size=VOCABULARY, max_length=30).to(device)
            size, batch = captioner.backbone.image_size[0], 4 if rehearse else 64
            row: dict[str, Any] = {"backbone": backbone, "prune_ratio": ratio, "batch": batch, "overrides": overrides}
            for name, backward in (("infer", False), ("train", True)):
                captioner.train(backward)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                seconds = step_time(captioner, batch, size, device, backward=backward, repeats=2 if rehearse else 15)
                row[f"{name}_images_per_second"] = round(batch / seconds, 1)
                if device.type == "cuda":
                    row[f"{name}_peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
            rows.append(row)
            del captioner
    return rows


def main() -> None:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--rehearse", action="store_true", help="tiny models, any device")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.rehearse:
        parser.error("this machine has no CUDA device (--rehearse tries the script without one)")
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    result = {
        "device": name,
        "rehearsal": options.rehearse,
        "date": date.today().isoformat(),
        "command": "scripts/gpu_checks.sh",
        "versions": versions(),
        "training": training(device, options.rehearse),
        "throughput_bf16": throughput(device, options.rehearse),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_checks_{name.lower().replace(' ', '_')}_{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1))
    print(path)


if __name__ == "__main__":
    main()
