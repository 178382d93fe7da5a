"""METEOR 1.5 (Denkowski and Lavie, 2014) through the line protocol of its own Java program."""

from collections.abc import Sequence

from prune_tell.evaluation.java import TOOLS, java, one_line, read_line, write_line

JAR = TOOLS / "meteor" / "meteor-1.5.jar"
PARAPHRASES = TOOLS / "meteor" / "data" / "paraphrase-en.gz"


def meteor(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, timeout: float
) -> tuple[float, list[float]]:
    """Score tokenized captions.

    Args:
        candidates: one tokenized caption per image.
        references: the tokenized references of each image, in the same order.
        timeout: seconds the run may take, 6 of which the program needs to load its paraphrases.

    Returns:
        The score of the corpus (from summed statistics, not the mean) and one score per image, in 0..1.

    Raises:
        UserError: if Java fails or is too slow.
    """
    # Left to itself the program looks for its paraphrases beside the jar, and misses them when that
    # path has a space in it: so name them.
    arguments = ["-jar", str(JAR), "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(PARAPHRASES)]
    with java("METEOR", arguments, heap="768m", timeout=timeout) as process:
        statistics = []
        # A line out, a line in: neither side ever fills a pipe that the other isn't reading.
        for candidate, of_image in zip(candidates, references, strict=True):
            write_line(process, " ||| ".join(["SCORE", *map(_field, of_image), _field(candidate)]))
            statistics.append(read_line(process))
        write_line(process, " ||| ".join(["EVAL", *statistics]))
        per_image = [float(read_line(process)) for _ in statistics]
        return float(read_line(process)), per_image


def _field(text: str) -> str:
    """Return `text` without what ends a field or a line of the protocol."""
    return one_line(text.replace("|||", " "))
