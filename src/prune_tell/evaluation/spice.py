"""SPICE (Anderson et al., 2016) through its own Java program, where someone has put its models."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prune_tell.evaluation.java import JAVA_VARIABLE, TOOLS, find_java, java, java_version

JAR = TOOLS / "spice" / "spice-1.0.jar"
MODELS = (
    TOOLS / "spice" / "lib" / "stanford-corenlp-3.6.0.jar",
    TOOLS / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar",
)
LAST_JAVA = 14
"""SPICE writes its result with the JavaScript engine, which Java 15 dropped."""


def why_not(*, timeout: float) -> str | None:
    """Return one sentence that says why SPICE can't be computed here, or None if it can.

    Raises:
        UserError: if Java can't be started.
    """
    missing = [path.name for path in MODELS if not path.is_file()]
    if missing:
        return f"SPICE needs {' and '.join(missing)} in {MODELS[0].parent} (docs/metrics.md says where from)."
    version = java_version(timeout=timeout)
    if version > LAST_JAVA:
        found = f"{find_java()} is {version}"
        return f"SPICE needs Java 8 to {LAST_JAVA}, and {found}: set {JAVA_VARIABLE} to an older one."
    return None


def spice(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, timeout: float
) -> tuple[float, list[float]]:
    """Score tokenized captions by the objects, attributes and relations they mention.

    Args:
        candidates: one tokenized caption per image.
        references: the tokenized references of each image, in the same order.
        timeout: seconds the run may take (5,000 images take many minutes).

    Returns:
        The mean F-score over images, and one per image, in 0..1.

    Raises:
        UserError: if Java fails or is too slow.
    """
    items = [
        {"image_id": index, "test": candidate, "refs": list(of_image)}
        for index, (candidate, of_image) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="prune-tell-") as folder:
        source, target = Path(folder) / "captions.json", Path(folder) / "scores.json"
        source.write_text(json.dumps(items))
        # No -cache: the cache library is what fails on most machines, and it would sit in site-packages.
        arguments = ["-jar", str(JAR), str(source), "-out", str(target), "-subset", "-silent"]
        with java("SPICE", arguments, heap="8g", timeout=timeout):
            pass
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(target.read_text())}
    per_image = [float(found[index]) for index in range(len(items))]
    return float(np.mean(per_image)), per_image
