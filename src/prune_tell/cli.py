"""The console script: `prune-tell <verb> key=value ...` is `python -m prune_tell.<verb> key=value ...`."""

import importlib
import sys

from prune_tell.registry import nearest

VERBS = {
    "train": "train a captioner, score it and draw its curves",
    "evaluate": "caption and score a split, or score a file of captions",
    "caption": "caption image files or folders",
}


def main() -> None:
    """Hand the rest of the command line to the verb's module."""
    usage = "usage: prune-tell <verb> key=value ...\n\n" + "\n".join(f"  {v:<10}{text}" for v, text in VERBS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        return
    verb = sys.argv.pop(1)
    if verb not in VERBS:
        sys.exit(f"prune_tell: {verb} is an unknown verb (one of: {', '.join(VERBS)}){nearest(verb, list(VERBS))}")
    importlib.import_module(f"prune_tell.{verb}").main()
