"""Prediction and reference files: both formats of each, and every way to get them wrong."""

import json

import pytest

from prune_tell.errors import UserError
from prune_tell.evaluation.files import read_predictions, read_references


@pytest.fixture
def write(tmp_path):
    def write(content) -> str:
        path = tmp_path / "file.json"
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_predictions_in_both_formats(write):
    entries = [{"image_id": 7, "caption": "a café", "score": 1.5}, {"image_id": "b.jpg", "caption": ""}]
    assert read_predictions(write(entries)) == {7: "a café", "b.jpg": ""}
    assert list(read_predictions(write({"9": "a dog", "7": "a café"})).items()) == [
        ("9", "a dog"),
        ("7", "a café"),
    ]
    assert read_predictions(write("\ufeff" + json.dumps({"7": "a"}))) == {"7": "a"}  # as Windows editors save it


def test_references_in_both_formats(write):
    annotations = [{"image_id": 7, "id": n, "caption": c} for n, c in enumerate("abc")]
    coco = {"info": {}, "images": [{"id": 7}, {"id": 8}], "annotations": annotations}
    assert read_references(write(coco)) == {7: ["a", "b", "c"]}
    assert read_references(write({"7": ["a", "b"], "x": ["c"]})) == {"7": ["a", "b"], "x": ["c"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "has image 1 twice"),
        ('{"1": "a", "1": "b"}', "has '1' twice in one object"),
        ([{"image_id": 1}], r"has the entry \{'image_id': 1\} without image_id and caption"),
        ([{"image_id": 1, "caption": None}], "has the entry .* without image_id and caption"),
        (["a dog"], "has the entry a dog without"),
        ({"1": ["a"]}, r"is neither COCO results .* or `\{\"1\": \"...\"\}`"),
        ("3", "is neither COCO results"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_predictions(write, content, message):
    path = write(content)
    with pytest.raises(UserError, match=rf"^predictions={path} {message}"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"1": "a dog"}, "is neither COCO annotations"),
        ({"images": [{"id": 1}]}, "is neither COCO annotations"),
        ([{"image_id": 1, "caption": "a"}], "is neither COCO annotations"),
        ({"1": ["a", None]}, "is neither COCO annotations"),
        ({"annotations": [{"id": 1, "caption": "a"}]}, "has the entry .* without image_id and caption"),
        ({"annotations": []}, "holds no caption"),
        ({}, "holds no caption"),
        ('{"1": ["a"], "1": ["b"]}', "has '1' twice in one object"),
    ],
)
def test_wrong_references(write, content, message):
    path = write(content)
    with pytest.raises(UserError, match=f"^references={path} {message}"):
        read_references(path)


@pytest.mark.parametrize("read", [read_predictions, read_references])
def test_files_that_cannot_be_read(read, tmp_path):
    with pytest.raises(UserError, match=r"=/nonexistent\.json can't be read \(No such file or directory\)"):
        read("/nonexistent.json")
    (tmp_path / "x.json").write_bytes(b'{"1": "caf\xe9"}')
    with pytest.raises(UserError, match=r"x\.json is not JSON \('utf-8' codec"):
        read(tmp_path / "x.json")
