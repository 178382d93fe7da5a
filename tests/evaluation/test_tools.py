"""The tokenizer and METEOR against pycocoevalcap's own, captions that break line protocols, and SPICE."""

import gzip
import importlib.util
import json
import os

import pytest

from prune_tell.evaluation import meteor as meteor_module
from prune_tell.evaluation import spice as spice_module
from prune_tell.evaluation.java import TOOLS, find_java
from prune_tell.evaluation.meteor import meteor
from prune_tell.evaluation.ptb import tokenize
from prune_tell.evaluation.spice import spice, why_not

CAPTIONS = [
    "A man's dog -- running, jumping (and barking); it isn't tired!",
    'A sign reads: "TITLE CITY" ... at 5 p.m.',
    "Two cats in the U.S.",
    "Un café à l'Île, 5 1/2 €",
    "",
    "a dog || a ||| cat [x] {y}",
    "  spaces   and\ttabs  ",
    ".",
    "A black-and-white photo of the I.D. of Mr. I",
]


@pytest.fixture
def original(tmp_path, monkeypatch):
    """Imports a module of pycocoevalcap from a copy that may be written to, with `java` on the PATH."""

    def load(folder: str, module: str):
        (tmp_path / folder).mkdir()
        for source in (TOOLS / folder).iterdir():
            (tmp_path / folder / source.name).symlink_to(source)
        copy = tmp_path / folder / f"{module}.py"
        copy.unlink()
        copy.write_text((TOOLS / folder / f"{module}.py").read_text())
        spec = importlib.util.spec_from_file_location(module, copy)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    monkeypatch.setenv("PATH", os.path.dirname(find_java()), prepend=os.pathsep)
    return load


def test_tokens_equal_those_of_pycocoevalcap(original):
    theirs = original("tokenizer", "ptbtokenizer").PTBTokenizer()
    expected = theirs.tokenize({n: [{"caption": caption}] for n, caption in enumerate(CAPTIONS)})
    assert [[tokens] for tokens in tokenize(CAPTIONS, timeout=60)] == list(expected.values())


def test_known_tokens():
    assert tokenize(CAPTIONS, timeout=60)[:2] == [
        "a man 's dog running jumping -lrb- and barking -rrb- it is n't tired",
        "a sign reads title city at 5 p.m.",
    ]
    assert tokenize([], timeout=60) == []


def test_no_character_of_unicode_shifts_a_caption():
    # Every code unit of the basic plane, lone surrogates included, with a marker that tells the caption.
    characters = [chr(code) for code in range(0x10000)] + ["🐕", "👩‍🚀", "\r\n", "\n\n"]
    captions = [f"{c} x{n}x a{c}b {c}" for n, c in enumerate(characters)]
    tokens = tokenize(captions, timeout=120)
    assert [n for n, line in enumerate(tokens) if f"x{n}x" not in line.split()] == []


def test_meteor_equals_pycocoevalcap_whatever_the_language_of_the_machine(original, monkeypatch, tmp_path):
    # Few paraphrases load fast; both programs use them. A Turkish machine reads upper-case I differently.
    paraphrases = tmp_path / "paraphrase-en.gz"
    paraphrases.write_bytes(gzip.compress(b"0.5\na dog\nthe hound\n"))
    monkeypatch.setattr(meteor_module, "PARAPHRASES", paraphrases)
    candidates = ["a dog runs", "the hound IN A CITY", "", "x", "title in city"]
    references = [
        ["the hound runs", "a cat"],
        ["a dog in a city"],
        ["a dog", "b"],
        ["x"],
        ["TITLE IN CITY", "a"],
    ]

    theirs = original("meteor", "meteor")
    (tmp_path / "meteor" / "data").unlink()
    (tmp_path / "meteor" / "data").mkdir()
    (tmp_path / "meteor" / "data" / "paraphrase-en.gz").symlink_to(paraphrases)
    # Java follows the link of the jar to site-packages, and would load the large file there.
    (tmp_path / "meteor" / "meteor-1.5.jar").unlink()
    (tmp_path / "meteor" / "meteor-1.5.jar").write_bytes((TOOLS / "meteor" / "meteor-1.5.jar").read_bytes())
    scorer = theirs.Meteor()
    gts, res = dict(enumerate(references)), {n: [caption] for n, caption in enumerate(candidates)}
    expected = scorer.compute_score(gts, res)
    for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
        pipe.close()

    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=tr -Duser.country=TR -Dfile.encoding=ISO-8859-9")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    corpus, per_image = meteor(candidates, references, timeout=60)
    assert (corpus, per_image) == expected
    assert per_image[2] == 0
    assert per_image[3] == per_image[4] == 1
    assert 0 < per_image[0] < 1

    # What would end a line or a field of the protocol leaves every other image where it was.
    hostile = ["a\ndog\r runs", "the hound ||| IN A CITY", "\n", "x\r\n", "title in\ncity\n"]
    broken_references = [["the hound\nruns", "a ||| cat"], *references[1:]]
    assert meteor(hostile, broken_references, timeout=60) == (corpus, per_image)


def test_spice_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(spice_module, "MODELS", (tmp_path / "a.jar", tmp_path / "b.jar"))
    assert why_not(timeout=60) == f"SPICE needs a.jar and b.jar in {tmp_path} (docs/metrics.md says where from)."
    (tmp_path / "a.jar").touch()
    (tmp_path / "b.jar").touch()
    reason = why_not(timeout=60)
    assert reason.startswith("SPICE needs Java 8 to 14, and ")
    assert reason.endswith("set PRUNE_TELL_JAVA to an older one.")


def test_spice_scores_where_models_and_java_fit(monkeypatch, tmp_path):
    """A script stands for Java 8: it checks the input and answers in SPICE's format, in another order."""
    for name in ("a.jar", "b.jar"):
        (tmp_path / name).touch()
    monkeypatch.setattr(spice_module, "MODELS", (tmp_path / "a.jar", tmp_path / "b.jar"))
    answer = [{"image_id": n, "scores": {"All": {"f": f, "pr": 0, "re": 0}}} for n, f in [(1, 0.25), (0, 0.75)]]
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    script = tmp_path / "java"
    script.write_text(f"""#!/bin/sh
if [ "$1" = -version ]; then echo 'openjdk version "1.8.0_312"' >&2; exit 0; fi
while [ "$1" != -jar ]; do shift; done
cp "$3" {tmp_path}/input.json; cp {tmp_path}/answer.json "$5"; echo "$2 $4 $6 $7" > {tmp_path}/arguments
""")
    script.chmod(0o755)
    monkeypatch.setenv("PRUNE_TELL_JAVA", str(script))
    assert why_not(timeout=60) is None
    assert spice(["a dog", "é"], [["a cat", "b"], ["c"]], timeout=60) == (0.5, [0.75, 0.25])
    assert json.loads((tmp_path / "input.json").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": ["a cat", "b"]},
        {"image_id": 1, "test": "é", "refs": ["c"]},
    ]
    assert (tmp_path / "arguments").read_text() == f"{TOOLS}/spice/spice-1.0.jar -out -subset -silent\n"
