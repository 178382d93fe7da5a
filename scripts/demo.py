"""What `make demo` runs: train on the embedded data set, evaluate, caption, draw, and say whether it learnt anything.

python scripts/demo.py runs/demo
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from prune_tell.build import build_dataset
from prune_tell.config import compose
from prune_tell.evaluation.scorers import CaptionScorer

PHOTOS = 8


def run(*command: str) -> None:
    """Show a command as a person would type it, and run it."""
    print(f"\n$ python -m {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def main(out: Path) -> None:
    """Leave a trained captioner, its scores, captions and pictures in `out`."""
    begun = time.time()
    train = [f"run_dir={out}", "resume=auto", "backbone=vit", "prune_ratio=0.3"]
    run("prune_tell.train", *train)
    run("prune_tell.evaluate", f"checkpoint={out}", "split=test")

    # Held-out scenes as picture files: captioning starts from files, as with your own photographs.
    dataset, _ = build_dataset(compose("train", train))
    test = dataset.records("test")
    photos = out / "photos"
    photos.mkdir(exist_ok=True)
    for record in test[:PHOTOS]:
        dataset.open(record).save(photos / f"scene_{record.image_id}.png")
    run("prune_tell.caption", f"checkpoint={out}", f"images={photos}", f"out={out / 'captioned'}", "attention=true")

    # A captioner that ignores the picture: the most frequent training caption for everything.
    counts = Counter(caption for record in dataset.records("train") for caption in record.captions)
    constant = counts.most_common(1)[0][0]
    references = {record.image_id: list(record.captions) for record in test}
    blind = CaptionScorer(references).score(dict.fromkeys(references, constant), ["CIDEr"]).scores["CIDEr"] or 0.0
    ours = json.loads((out / "evaluate_test" / "scores.json").read_text())["CIDEr"]
    print(f"\nCIDEr on {len(test)} held-out scenes (x100): {100 * ours:.1f} for this captioner,")
    print(f"{100 * blind:.1f} for the constant caption '{constant}'")
    print(f"look at: {out / 'curves.png'}, {out / 'captioned'} (captions.json and attention pictures)")
    print(f"{time.time() - begun:.0f} seconds")
    if ours < 2 * blind:
        sys.exit("demo: the captioner is not well above the constant caption")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
