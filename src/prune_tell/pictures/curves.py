"""A run's curves: loss, accuracy and scores over time, from `metrics.jsonl`."""

from pathlib import Path

from prune_tell.training.tracking import read_metrics

BLUE, RED = "#1f5fa8", "#c8442c"


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
    panels = (
        (axes[0], "loss", "loss (nats per word)", 1),
        (axes[1], "token_accuracy", "token accuracy (%)", 100),
    )
    for ax, key, title, scale in panels:
        for rows, label, colour in ((train, "train", BLUE), (val, "val", RED)):
            if rows:
                epochs, values = [row["epoch"] for row in rows], [scale * row[key] for row in rows]
                ax.plot(
                    epochs,
                    values,
                    color=colour,
                    label=label,
                    marker="o" if len(rows) < 30 else None,
                    markersize=3,
                )
        ax.set_title(title)
        ax.legend(frameon=False)
    if scored:
        for key, colour in (("CIDEr", RED), ("Bleu_4", BLUE), ("ROUGE_L", "#5a8f3c")):
            rows = [row for row in val if key in row]
            if rows:
                epochs, values = [row["epoch"] for row in rows], [100 * row[key] for row in rows]
                axes[2].plot(
                    epochs,
                    values,
                    color=colour,
                    label=key,
                    marker="o" if len(rows) < 30 else None,
                    markersize=3,
                )
        axes[2].set_title("val scores (x100)")
        axes[2].legend(frameon=False)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    path = run / "curves.png"
    figure.savefig(path, dpi=110)
    return path
