"""Each annotation format gives the records its files describe, and names what is wrong in them."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import prune_tell.data.coco
import prune_tell.data.flickr  # noqa: F401  (importing a format registers it)
from prune_tell.data.records import SPLITS, Dataset, Problems, datasets
from prune_tell.data.table import hashed_split
from prune_tell.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FLICKR8K = REPOSITORY.parent / "shared" / "data" / "flickr8k"
CONFIGS = ("coco", "coco_karpathy", "flickr8k", "flickr30k", "table")
LOADER_OPTIONS = {
    "on_error": "skip",
    "verify": "quick",
    "max_images": None,
    "max_captions": None,
    "captions_per_image": 5,
    "tokenizer": "word",
    "vocab_size": None,
    "min_count": 5,
    "max_length": 40,
    "num_workers": 0,
    "cache_features": False,
    "cache_dir": "cache",
    "cached_views": 1,
    "augment": False,
    "mirror": False,
}


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "teal").save(folder / name, "JPEG")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read(format: str, **options: Any) -> tuple[dict[str, dict[Any, Sequence[str]]], Problems]:
    """Return `{split: {image id: captions}}` and the problems."""
    problems = Problems()
    data: Dataset = datasets[format](problems=problems, **options)
    content = {split: {r.image_id: r.captions for r in data.records(split)} for split in SPLITS}
    for split in SPLITS:
        for record in data.records(split):
            assert data.open(record).mode == "RGB"
    return content, problems


def kinds_at(problems: Problems) -> list[tuple[str, str]]:
    return [(item["kind"], Path(item["where"]).name) for item in problems.items]


# COCO, official


def official(images: list[tuple[Any, str]], captions: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images],
        "annotations": [{"id": i, "image_id": k, "caption": text} for i, (k, text) in enumerate(captions)],
    }


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    pictures(tmp_path / "train2017", "1.jpg", "2.jpg")
    pictures(tmp_path / "val2017", "3.jpg", "4.jpg", "5.jpg")
    train = official([(1, "1.jpg"), (2, "2.jpg")], [(1, "one"), (2, "two\n"), (1, "uno")])
    val = official([(3, "3.jpg"), (4, "4.jpg"), (5, "5.jpg")], [(3, "three"), (4, "four"), (5, "five")])
    write_json(tmp_path / "annotations/captions_train2017.json", train)
    write_json(tmp_path / "annotations/captions_val2017.json", val)
    return tmp_path


def test_coco_official(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, problems = read("coco", root=str(coco_root))
    assert content == {
        "train": {1: ("one", "uno"), 2: ("two",)},
        "val": {3: ("three",), 4: ("four",), 5: ("five",)},
        "test": {},
    }
    assert problems.items == []
    assert capsys.readouterr().out == ""  # pycocotools prints; what a verb prints is its result


def test_coco_sets_the_end_of_val_aside_for_test(coco_root: Path) -> None:
    content, _ = read("coco", root=str(coco_root), test_images=2)
    assert (list(content["val"]), list(content["test"])) == ([3], [4, 5])
    with pytest.raises(UserError, match=r"^data\.test_images=4 is more than the 3 images of .*val2017\.json$"):
        read("coco", root=str(coco_root), test_images=4)


def test_coco_2014_below_an_images_folder(coco_root: Path) -> None:
    for part in ("train", "val"):
        (coco_root / "images").mkdir(exist_ok=True)
        (coco_root / f"{part}2017").rename(coco_root / f"images/{part}2014")
        annotations = coco_root / "annotations"
        (annotations / f"captions_{part}2017.json").rename(annotations / f"captions_{part}2014.json")
    content, _ = read("coco", root=str(coco_root), year=2014)
    assert (len(content["train"]), len(content["val"])) == (2, 3)


def test_coco_problems(coco_root: Path) -> None:
    train = official(
        [(1, "1.jpg"), (2, "2.jpg"), (1, "2.jpg"), (8, "8.jpg"), (3, "1.jpg")],
        [(1, "one"), (2, " "), (77, "who?"), (8, "gone"), (3, "a val image")],
    )
    write_json(coco_root / "annotations/captions_train2017.json", train)
    content, problems = read("coco", root=str(coco_root))
    assert list(content["train"]) == [1, 3]
    assert list(content["val"]) == [4, 5]
    assert problems.counts() == {
        "caption without image": 1,
        "duplicate id": 2,
        "empty caption": 1,
        "image without caption": 1,
        "missing image": 1,
    }
    assert "image_id 77" in problems.items[0]["where"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a COCO caption file"),
        ('{"annotations": []}', "is not a COCO caption file .KeyError: 'images'"),
        ('{"images": [{"id": 1}]}', "is not a COCO caption file .KeyError: 'file_name'"),
        ('{"images": [{"id": 1, "file_name": 2}]}', "is not a COCO caption file .TypeError"),
        ('{"images": [], "annotations": [{"image_id": [1]}]}', "is not a COCO caption file .TypeError"),
    ],
)
def test_coco_with_another_file_is_told_so(coco_root: Path, text: str, message: str) -> None:
    (coco_root / "annotations/captions_train2017.json").write_text(text)
    with pytest.raises(UserError, match=rf"captions_train2017\.json {message}"):
        read("coco", root=str(coco_root))


def test_coco_says_what_is_missing_and_how_to_get_it(coco_root: Path) -> None:
    (coco_root / "val2017").rename(coco_root / "elsewhere")
    with pytest.raises(UserError, match=r"^data\.root=.* has no val2017: .*scripts/download_coco\.py --root"):
        read("coco", root=str(coco_root))
    with pytest.raises(UserError, match=r"^data\.root is not set: .*scripts/download_coco\.py"):
        read("coco")
    with pytest.raises(UserError, match=r"^data\.root=/nowhere is not a folder"):
        read("coco", root="/nowhere")
    with pytest.raises(UserError, match=r"^data\.year=2015 is unknown \(one of: 2014, 2017\)$"):
        read("coco", root=str(coco_root), year=2015)


# Karpathy's JSON


def entry(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions], **more}


def test_karpathy_coco_folds_restval_into_train(tmp_path: Path) -> None:
    pictures(tmp_path / "train2014", "a.jpg")
    pictures(tmp_path / "val2014", "b.jpg", "c.jpg", "d.jpg")
    entries = [
        entry("a.jpg", "train", "A dog.", "Dog", filepath="train2014", cocoid=11, imgid=0),
        entry("b.jpg", "restval", "B", filepath="val2014", cocoid=12, imgid=1),
        entry("c.jpg", "val", "C", filepath="val2014", cocoid=13, imgid=2),
        entry("d.jpg", "test", "D", filepath="val2014", cocoid=14, imgid=3),
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    content, problems = read("karpathy", root=str(tmp_path))
    assert content == {"train": {11: ("A dog.", "Dog"), 12: ("B",)}, "val": {13: ("C",)}, "test": {14: ("D",)}}
    assert problems.items == []


def test_karpathy_flickr_and_its_problems(tmp_path: Path) -> None:
    pictures(tmp_path / "flickr30k-images", "a.jpg")
    entries: list[Any] = [
        entry("a.jpg", "train", "A", imgid=0),
        entry("b.jpg", "extra", "B"),
        entry("c.jpg", "train", "C", cocoid=None),
        {"filename": "d.jpg", "split": "train"},
        {"split": "train", "sentences": []},
        7,
    ]
    write_json(tmp_path / "dataset_flickr30k.json", {"images": entries})
    content, problems = read("karpathy", root=str(tmp_path), annotations="dataset_flickr30k.json")
    assert content["train"] == {"a.jpg": ("A",)}
    assert problems.counts() == {"malformed entry": 5}
    assert [item["where"].partition(": ")[2] for item in problems.items] == [f"images[{i}]" for i in range(1, 6)]


def test_karpathy_with_another_file_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.annotations=dataset_coco\.json is not a file under .*: put"):
        read("karpathy", root=str(tmp_path))
    with pytest.raises(UserError, match=r"^data\.root is not set: .*download_coco\.py .* --year 2014 fetches"):
        read("karpathy")
    write_json(tmp_path / "dataset_coco.json", {"annotations": []})
    with pytest.raises(UserError, match=r"dataset_coco\.json is not one of Karpathy's JSON files"):
        read("karpathy", root=str(tmp_path))
    write_json(tmp_path / "dataset_coco.json", {"images": []})
    with pytest.raises(UserError, match=r"^data\.images=photos is not a folder under "):
        read("karpathy", root=str(tmp_path), images="photos")


# Flickr's text files


@pytest.fixture
def flickr_root(tmp_path: Path) -> Path:
    pictures(tmp_path / "Flicker8k_Dataset", "a.jpg", "b.jpg", "c.jpg")
    lines = ["a.jpg#0\tA dog .", "a.jpg#1\tThe  dog .", "b.jpg#0\tB", "gone.jpg.1#0\tnot there", "c.jpg#0\tC"]
    (tmp_path / "Flickr8k.token.txt").write_text("\r\n".join(lines) + "\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("b.jpg\na.jpg\n\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("c.jpg")
    return tmp_path


def test_flickr_keeps_the_order_of_the_lists(flickr_root: Path) -> None:
    content, problems = read("flickr", root=str(flickr_root))
    assert content == {
        "train": {"b.jpg": ("B",), "a.jpg": ("A dog .", "The dog .")},
        "val": {"c.jpg": ("C",)},
        "test": {},
    }
    assert list(content["train"]) == ["b.jpg", "a.jpg"]
    assert problems.items == []  # captions of images in no list are nobody's mistake
    assert read("flickr", root=str(flickr_root), val_list=None)[0]["val"] == {}


def test_flickr_problems_are_named_by_line(flickr_root: Path) -> None:
    token = flickr_root / "Flickr8k.token.txt"
    token.write_bytes(
        b"a.jpg#0\tfine \xc3\xa9t\xc3\xa9 \xe2\x80\xa8 \x0b here\nno tab here\na.jpg#1\tcaf\xe9\n#2\tnobody's\n"
        b"unlisted.jpg#0\tcaf\xe9\nno hash\tcaption\nd.jpg#0\tno file\na.jpg#3\t\n"
    )
    (flickr_root / "Flickr_8k.trainImages.txt").write_text("a.jpg\nb.jpg\nd.jpg\na.jpg\n")
    (flickr_root / "Flickr_8k.devImages.txt").write_text("a.jpg\n")
    content, problems = read("flickr", root=str(flickr_root))
    assert content["train"] == {"a.jpg": ("fine été here",)}  # a Unicode line separator ends no line
    assert kinds_at(problems) == [
        ("malformed line", "Flickr8k.token.txt:2"),
        ("undecodable text", "Flickr8k.token.txt:3"),
        ("caption without image", "Flickr8k.token.txt:4"),
        ("malformed line", "Flickr8k.token.txt:6"),
        ("empty caption", "a.jpg"),
        ("image without caption", "b.jpg"),
        ("duplicate id", "a.jpg"),
        ("duplicate id", "a.jpg"),
        ("missing image", "d.jpg"),
    ]


def test_flickr_needs_captions_and_a_training_list(flickr_root: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.captions=results\.token is not a file under "):
        read("flickr", root=str(flickr_root), captions="results.token")
    (flickr_root / "Flickr_8k.trainImages.txt").unlink()
    with pytest.raises(UserError, match=r"^data\.train_list=Flickr_8k\.trainImages\.txt is not a file under "):
        read("flickr", root=str(flickr_root))
    with pytest.raises(UserError, match=r"^data\.root is not set: .*Flickr8k\.token\.txt.*data\.root=/data/flickr$"):
        read("flickr")


@pytest.mark.real_data
@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k photographs are not in ../shared/data")
def test_the_real_flickr8k_has_no_problems() -> None:
    problems = Problems()
    data = datasets["flickr"](problems=problems, root=str(FLICKR8K), verify="quick")
    assert [len(data.records(split)) for split in SPLITS] == [6000, 1000, 0]
    assert problems.items == []
    assert all(len(record.captions) == 5 for split in SPLITS for record in data.records(split))


# Tables


def table(folder: Path, text: str | bytes, name: str = "captions.csv", **options: Any):  # type: ignore[no-untyped-def]
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read("table", file=str(path), **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    return tmp_path


ROWS = {
    "captions.csv": 'split,image,caption,by\ntrain,a.jpg,"A dog, and\na cat",me\nval,b.jpg,B,me\n'
    "train,./a.jpg,A2,you\n",
    "captions.tsv": "\ufeffImage\tCaption\tSplit\na.jpg\tA dog, and a cat\ttrain\nb.jpg\tB\tdev\na.jpg\tA2\t\n",
    "captions.jsonl": '{"image": "a.jpg", "captions": ["A dog, and a cat", "A2"], "split": "restval"}\n\n'
    '{"image": "b.jpg", "caption": "B", "split": "Validation"}\n',
}


@pytest.mark.parametrize("name", ROWS)
def test_table_with_splits(photos: Path, name: str) -> None:
    content, problems = table(photos, ROWS[name], name)
    assert content == {"train": {"a.jpg": ("A dog, and a cat", "A2")}, "val": {"b.jpg": ("B",)}, "test": {}}
    assert problems.items == []


@pytest.mark.parametrize("header", ["", "image,caption\n", "image, caption\r\n"])
def test_captions_txt_with_and_without_header(photos: Path, header: str) -> None:
    text = header + 'a.jpg,A dog .\na.jpg,"A dog , ""Rex"" , runs ."\nb.jpg,not quoted , but fine .\n'
    content, problems = table(photos, text, "captions.txt", val_share=0.0, test_share=0.0)
    assert content["train"] == {
        "a.jpg": ("A dog .", 'A dog , "Rex" , runs .'),
        "b.jpg": ("not quoted , but fine .",),
    }
    assert problems.items == []


def test_table_finds_images_under_root_or_by_absolute_path(photos: Path) -> None:
    (photos / "tables").mkdir()
    absolute = photos / "c.jpg"
    text = f"image,caption\na.jpg,A\n{absolute},C\n"
    content, problems = table(photos / "tables", text, root=str(photos), val_share=0, test_share=0)
    assert content["train"] == {"a.jpg": ("A",), str(absolute): ("C",)}
    assert problems.items == []


def test_csv_problems_are_named_by_line(photos: Path) -> None:
    text = (
        b"image,caption,split\na.jpg,A,train\nb.jpg,caf\xe9,train\n,whose?,train\nb.jpg,B,somewhere\n"
        b'b.jpg,B\na.jpg,again,val\na.jpg,,train\nc.jpg,"C" c,train\ngone.jpg,gone,train\n'
    )
    content, problems = table(photos, text)
    assert content["train"] == {"a.jpg": ("A",)}
    assert kinds_at(problems) == [
        ("undecodable text", "captions.csv:3"),
        ("caption without image", "captions.csv:4"),
        ("malformed line", "captions.csv:5"),
        ("malformed line", "captions.csv:6"),
        ("duplicate id", "captions.csv:7"),
        ("malformed line", "captions.csv:9"),
        ("empty caption", "a.jpg"),
        ("missing image", "gone.jpg"),
    ]
    assert "split 'somewhere' is unknown (one of: train, restval, val," in problems.items[2]["detail"]


def test_a_stray_quote_does_not_swallow_rows_silently(photos: Path) -> None:
    text = 'image,caption\na.jpg,"A dog\nb.jpg,B\nc.jpg,"C is here\nb.jpg,B2\n'
    content, problems = table(photos, text, val_share=0, test_share=0)
    assert content["train"] == {"b.jpg": ("B2",)}
    assert kinds_at(problems) == [("malformed line", "captions.csv:2")]
    assert problems.items[0]["detail"].startswith("lines 2 to 4 can't be read")


def test_json_lines_problems_are_named_by_line(photos: Path) -> None:
    lines = ['{"image": "a.jpg", "caption": "A"}', "{", "[]", '{"image": 3, "caption": "x"}', '{"image": "b.jpg"}']
    lines += ['{"image": "c.jpg", "captions": "C"}', '{"image": "a.jpg", "caption": null}']
    content, problems = table(photos, "\n".join(lines), "captions.jsonl", val_share=0, test_share=0)
    assert content["train"] == {"a.jpg": ("A",)}
    assert [kind for kind, _ in kinds_at(problems)] == [
        *["malformed line"] * 4,
        "empty caption",
        "image without caption",
    ]
    assert [where for _, where in kinds_at(problems)][:4] == [f"captions.jsonl:{i}" for i in (2, 3, 4, 6)]


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("captions.csv", "name,text\na.jpg,A\n", {}, r"should begin with a header .* its first line is: name, text$"),
        ("captions.xlsx", "", {}, r"has an unknown ending \(one of: \.csv, \.txt, \.tsv, \.jsonl, \.ndjson\)$"),
        ("captions.csv", "", {}, r"none of the 0 images it lists can be used$"),
        ("captions.csv", "", {"val_share": 0.6, "test_share": 0.4}, r"^data\.val_share=0\.6, data\.test_share=0\.4: "),
        ("captions.csv", "", {"val_share": -0.1}, r"^data\.val_share=-0\.1, .*at least 0 each and together below 1$"),
        ("captions.csv", "", {"root": "/nowhere"}, r"^data\.root=/nowhere is not a folder"),
    ],
)
def test_table_mistakes(photos: Path, name: str, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(photos, text, name, **options)


def test_table_needs_a_file() -> None:
    with pytest.raises(UserError, match=r"^data\.file is not set: .*data\.file=captions\.csv$"):
        read("table")
    with pytest.raises(UserError, match=r"^data\.file=/nowhere\.csv is not a file$"):
        read("table", file="/nowhere.csv")


def test_hashed_splits_follow_the_shares_and_stay_when_rows_are_added(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(300)]
    splits = [hashed_split(name, 0.1, 0.2) for name in names]
    assert 15 <= splits.count("val") <= 45
    assert 40 <= splits.count("test") <= 80
    pictures(tmp_path, *names)
    rows = [f"{name},caption of {name}\n" for name in names]
    shares = {"val_share": 0.1, "test_share": 0.2}
    few, _ = table(tmp_path, "image,caption\n" + "".join(rows[:150]), **shares)
    many, _ = table(tmp_path, "image,caption\n" + "".join(reversed(rows)), **shares)
    assert all(few[split].keys() <= many[split].keys() for split in SPLITS)
    assert {name: split for split in SPLITS for name in many[split]} == dict(zip(names, splits, strict=True))


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.49), st.floats(0, 0.01))
def test_a_larger_share_only_adds(name: str, val_share: float, test_share: float, more: float) -> None:
    if hashed_split(name, val_share, test_share) == "val":
        assert hashed_split(name, val_share + more, test_share) == "val"
    if hashed_split(name, val_share, test_share) == "train":
        assert hashed_split(name, val_share, max(0, test_share - more)) == "train"


# Configs


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_opens_with_its_command_and_fits_its_builder(name: str) -> None:
    path = REPOSITORY / "configs" / "data" / f"{name}.yaml"
    assert path.read_text().startswith(f"# python -m prune_tell.train data={name} data.")
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    assert {key: config.pop(key, "absent") for key in LOADER_OPTIONS} == LOADER_OPTIONS
    builder = datasets[config.pop("format")]
    parameters = inspect.signature(builder).parameters
    assert set(config) | {"problems", "verify"} == set(parameters)
    if name != "table":
        with pytest.raises(UserError, match=rf"^data\.root is not set: .*data\.root=/data/{name.partition('_')[0]}"):
            builder(problems=Problems(), **config)
