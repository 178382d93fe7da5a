"""Splits captions into words as the COCO evaluation does: PTB tokens in lower case without punctuation."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from prune_tell.evaluation.java import TOOLS, java, one_line

JAR = TOOLS / "tokenizer" / "stanford-corenlp-3.4.1.jar"
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""The tokens that the COCO evaluation removes. Its brackets are in upper case and so match none of the
lower-cased tokens: `-lrb-` stays a word. That is how published scores were made, so it is kept."""


def tokenize(captions: Sequence[str], *, timeout: float) -> list[str]:
    """Tokenize captions in one run of Java.

    The tokenizer looks across line ends (`5 p.m.` gets a full stop of its own before a capital letter),
    so the order of the captions is part of the input.

    Args:
        captions: any text; line breaks inside one count as spaces.
        timeout: seconds the run may take.

    Returns:
        One string per caption, in order: its tokens, lower case, separated by single spaces.

    Raises:
        UserError: if Java fails or is too slow.
    """
    if not captions:
        return []
    with tempfile.TemporaryDirectory(prefix="prune-tell-") as folder:
        source = Path(folder) / "captions.txt"
        source.write_bytes("\n".join(map(one_line, captions)).encode(errors="replace"))
        arguments = ["-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        with java("the PTB tokenizer", [*arguments, str(source)], heap="512m", timeout=timeout) as process:
            assert process.stdout
            output = process.stdout.read()
    lines = output.decode().split("\n")
    if len(lines) != len(captions):
        raise RuntimeError(f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions")
    return [_without_punctuation(line) for line in lines]


def _without_punctuation(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
