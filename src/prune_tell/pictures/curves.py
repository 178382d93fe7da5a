"""A run's curves: loss, accuracy and scores over time, from `metrics.jsonl`."""

from pathlib import Path

from prune_tell.training.tracking import read_metrics

BLUE, RED, GREEN = "#1f5fa8", "#c8442c", "#5a8f3c"


def draw_curves(run: Path) -> Path:
    """Draw `curves.png` for a run.

    Args:
        run: the folder with `metrics.jsonl`.

    Returns:
        The picture's path.
    """
    # Without pyplot: its global figures would pile up in a sweep.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(run / "metrics.jsonl")
    val = [line for line in lines if line["kind"] == "val"]
    train = [line for line in lines if line["kind"] == "epoch"]
    if len(train) < 2:  # a run of one epoch still has a curve
        train = [line for line in lines if line["kind"] == "train"]
    scored = any("CIDEr" in line for line in val)
    figure = Figure(figsize=(12 if scored else 8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if scored else 2)
    panels = [
        ("loss (nats per word)", 1, [(train, "loss", "train", BLUE), (val, "loss", "val", RED)]),
        (
            "token accuracy (%)",
            100,
            [(train, "token_accuracy", "train", BLUE), (val, "token_accuracy", "val", RED)],
        ),
        (
            "val scores (x100)",
            100,
            [(val, key, key, colour) for key, colour in (("CIDEr", RED), ("Bleu_4", BLUE), ("ROUGE_L", GREEN))],
        ),
    ]
    for ax, (title, scale, curves) in zip(axes, panels, strict=False):
        for lines_of, key, label, colour in curves:
            rows = [row for row in lines_of if key in row]
            if rows:
                marker = "o" if len(rows) < 30 else None
                epochs, values = [row["epoch"] for row in rows], [scale * row[key] for row in rows]
                ax.plot(epochs, values, color=colour, label=label, marker=marker, markersize=3)
        ax.set_title(title)
        ax.legend(frameon=False)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    path = run / "curves.png"
    figure.savefig(path, dpi=110)
    return path
