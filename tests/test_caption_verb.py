"""The `caption` verb: one line per readable picture on stdout, everything else elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prune_tell.build import build_dataset, load_run, pick_device
from prune_tell.caption import caption, find_images, picture_paths
from prune_tell.config import compose
from prune_tell.errors import UserError
from small_runs import cli, read_json, trained_run


def shape_pictures(run: Path) -> list[Image.Image]:
    """The val pictures of the run's own data set."""
    dataset, _ = build_dataset(load_run(run, device=pick_device("cpu")).cfg)
    return [dataset.open(record) for record in dataset.records("val")]


@pytest.fixture
def folder(tmp_path_factory, tmp_path):
    """Good and bad pictures, one in a folder below, and a file that is none."""
    pictures = shape_pictures(trained_run(tmp_path_factory))
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    pictures[0].save(folder / "a.png")
    pictures[1].convert("RGBA").save(folder / "alpha.png")
    pictures[2].convert("L").save(folder / "grey.PNG")
    pictures[3].convert("CMYK").save(folder / "below" / "a.jpg")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(folder / "deep.tif")
    (folder / "text.jpg").write_text("I am no picture")
    pictures[4].save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-300])
    (folder / "notes.txt").write_text("left alone")
    return folder


READABLE = ["a.png", "alpha.png", "below/a.jpg", "deep.tif", "grey.PNG", "whole.jpg"]


def run(*overrides: str) -> list[dict[str, str]]:
    return caption(compose("caption", [*overrides, "device=cpu"]))


def test_one_line_per_readable_picture(folder, tmp_path_factory, tmp_path, capsys):
    rows = run(f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder}", f"out={tmp_path}", "batch_size=2")
    told = capsys.readouterr()
    lines = [line.split("\t") for line in told.out.splitlines()]
    assert [Path(file) for file, _ in lines] == [folder / name for name in READABLE]
    assert all(text for _, text in lines)
    assert rows == [{"image_id": file, "caption": text} for file, text in lines]
    assert read_json(tmp_path / "captions.json") == rows
    for name in ("text.jpg", "cut.jpg"):
        assert f"unreadable, left out: {folder / name}" in told.err
    assert "notes.txt" not in told.out + told.err


def test_captions_are_those_of_the_run(tmp_path_factory, tmp_path):
    """A picture from a file gets the caption that the run gave it: same preprocessing, same weights."""
    trained = trained_run(tmp_path_factory)
    for number, picture in enumerate(shape_pictures(trained)):
        picture.save(tmp_path / f"{number}.png")
    rows = run(f"checkpoint={trained}", f"images={tmp_path}", f"out={tmp_path}", "precision=fp32")
    own = [row["caption"] for row in read_json(trained / "captions.json")]
    assert [row["caption"] for row in rows] == own
    assert len(set(own)) > 1, "one caption for all pictures would prove nothing"


def test_batches_change_nothing(folder, tmp_path_factory, tmp_path):
    common = (f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder}", f"out={tmp_path}")
    assert run(*common, "batch_size=1") == run(*common, "batch_size=16")


def test_files_in_a_list(folder, tmp_path_factory, tmp_path, capsys):
    images = f"[{folder / 'whole.jpg'},{folder / 'a.png'}]"
    rows = run(f"checkpoint={trained_run(tmp_path_factory)}", f"images={images}", f"out={tmp_path}")
    assert [Path(row["image_id"]).name for row in rows] == ["whole.jpg", "a.png"]


def test_generation_can_be_changed(folder, tmp_path_factory, tmp_path):
    common = (f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder}", f"out={tmp_path}")
    short = run(*common, "generation.max_length=3", "generation.beams=2")
    assert all(len(row["caption"].split()) <= 2 for row in short)


def test_attention_is_drawn_for_each_readable_picture(folder, tmp_path_factory, tmp_path):
    """Files of the same name in different folders don't overwrite each other's picture."""
    overrides = ("attention=true", "generation.max_length=4", f"out={tmp_path / 'out'}")
    run(f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder}", *overrides)
    drawn = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert drawn == sorted(f"{s}_attention.png" for s in ("a", "alpha", "a_2", "deep", "grey", "whole"))
    numbers = np.load(tmp_path / "out" / "a_attention.npz")
    assert numbers["kept_N"].sum() == 7
    assert numbers["attention_QN"].shape[1] == 9


def test_picture_names_are_unique():
    files = [Path(name) for name in ("x/1.jpg", "y/1.jpg", "y/1.png", "x/1_2.jpg")]
    paths = picture_paths(files, Path("out"))
    assert list(paths) == files
    assert len(set(paths.values())) == 4
    assert paths[files[0]] == Path("out/1_attention.png")


def test_folders_are_read_in_the_order_of_names(tmp_path):
    for name in ("b.jpg", "a.png", "c/d.webp", "e.JPEG", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / "f.txt"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "b.jpg", "c/d.webp", "e.JPEG", "f.txt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("images=x",), "checkpoint is not set: caption needs checkpoint=RUN images=FILE_OR_DIR"),
        (("checkpoint=@RUN",), "images is not set: caption needs checkpoint=RUN images=FILE_OR_DIR"),
        (("checkpoint=@RUN", "images=/nowhere"), "images=/nowhere does not exist (a picture, a folder of pictures, "),
        (("checkpoint=@RUN", "images=@EMPTY"), "images=@EMPTY holds no picture (.bmp, .gif, .jpeg, "),
        (("checkpoint=/nowhere", "images=@PICTURE"), "checkpoint=/nowhere holds no checkpoint ("),
        (("checkpoint=@RUN", "images=@PICTURE", "precision=half"), "precision=half is not valid: 'auto', "),
        (("checkpoint=@RUN", "images=@PICTURE", "attention=some"), "attention=some is not valid: a valid boolean is "),
        (("checkpoint=@RUN", "images=@PICTURE", "batch_size=0"), "batch_size=0 is not valid: greater than 0 is exp"),
        (("checkpoint=@RUN", "images=@PICTURE", "which=new"), "which=new is not valid: 'best' or 'last' or null is "),
        (("checkpoint=@RUN", "images=@PICTURE", "generation.beams=x"), "generation.beams=x is not valid: a valid int"),
        (("checkpoint=@RUN", "images=@PICTURE", "device=tpu9"), "device=tpu9 is unknown (auto, cpu, cuda or cuda:N)"),
    ],
)
def test_a_mistake_is_one_sentence(overrides, message, tmp_path_factory, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "picture.png")
    places = {"@RUN": trained_run(tmp_path_factory), "@EMPTY": tmp_path / "empty", "@PICTURE": tmp_path / "picture.png"}

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    with pytest.raises(UserError) as caught:
        caption(compose("caption", [f"out={tmp_path / 'out'}", *map(fill, overrides)]))
    assert str(caught.value).startswith(fill(message))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_nothing_readable_fails(folder, tmp_path_factory, tmp_path, capsys):
    with pytest.raises(UserError, match=r"^images=\S+text\.jpg: none of the 1 files could be read$"):
        run(f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder / 'text.jpg'}", f"out={tmp_path}")
    assert capsys.readouterr().out == ""


def test_the_command_keeps_stdout_for_captions(folder, tmp_path_factory, tmp_path):
    """As typed in a shell, from another place: warnings, bars and failures go to stderr, and the exit code is 0."""
    (tmp_path / "here").mkdir()
    done = cli("caption", f"checkpoint={trained_run(tmp_path_factory)}", f"images={folder}", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert [Path(line.split("\t")[0]) for line in done.stdout.splitlines()] == [folder / name for name in READABLE]
    assert all(len(line.split("\t")) == 2 for line in done.stdout.splitlines())
    assert f"unreadable, left out: {folder / 'cut.jpg'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["captions.json"]
