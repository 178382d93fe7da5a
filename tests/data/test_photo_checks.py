"""What is wrong with photographs is named; what can be read comes out as upright RGB."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prune_tell.data.photos import Photo, PhotoDataset, checked_records, file_fault, fold, open_photo
from prune_tell.data.records import Problems, Record
from prune_tell.errors import UserError

ORIENTATION = 0x0112


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5, columns * 4, (rows + columns) * 2], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def texture() -> Image.Image:
    """A picture that doesn't compress, so that most of a file is pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def photo(path: Path, *captions: object, split: str = "train", image_id: object = None) -> Photo:
    return Photo(image_id or path.name, split, path, captions or ("a dog",))  # type: ignore[arg-type]


def check(photos: list[Photo], verify: str = "quick", on_error: str = "skip"):  # type: ignore[no-untyped-def]
    problems = Problems(on_error)  # type: ignore[arg-type]
    splits = checked_records(photos, problems=problems, verify=verify, source=Path("list.txt"))  # type: ignore[arg-type]
    return splits, problems


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return saved(tmp_path / "good.jpg", encoded(gradient()))


# Files


JPEG, PNG, WEBP = encoded(texture()), encoded(texture(), "PNG"), encoded(texture(), "WEBP")
PROGRESSIVE = encoded(texture(), progressive=True)
BROKEN = {
    "empty": b"",
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its end mark": JPEG[:-2],
    "a JPEG whose rest was never fetched": JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2),
    "half a progressive JPEG": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "half a PNG": PNG[: len(PNG) // 2],
    "half a WebP": WEBP[: len(WEBP) // 2],
    "text": b"<html>404</html>",
    "only a JPEG signature": b"\xff\xd8\xff\xe0",
}


@pytest.mark.parametrize("verify", ["quick", "full"])
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_left_out(tmp_path: Path, good: Path, content: bytes, verify: str) -> None:
    bad = saved(tmp_path / "bad.jpg", content)
    splits, problems = check([photo(bad), photo(good)], verify)
    assert [record.image_id for record in splits["train"]] == ["good.jpg"]
    assert problems.counts() == {"unreadable image": 1}
    assert problems.items[0]["where"] == str(bad)
    assert str(bad) in problems.items[0]["detail"]


@pytest.mark.parametrize(
    "content",
    [
        JPEG,
        JPEG + bytes(700),
        JPEG + b"\xff\xff\r\n",
        JPEG + b"maker's trailer" * 99,
        PROGRESSIVE,
        PNG + b"\n",
        PNG + b"trailing" * 80,
        WEBP,
        encoded(gradient(), "BMP"),
        encoded(gradient(), "GIF"),
    ],
)
@pytest.mark.parametrize("verify", ["quick", "full"])
def test_a_whole_file_passes_with_padding_or_a_trailer(tmp_path: Path, content: bytes, verify: str) -> None:
    path = saved(tmp_path / "whole", content)
    assert file_fault(path, verify) is None  # type: ignore[arg-type]
    assert open_photo(path).size == (48, 32)


def test_quick_leaves_damage_inside_the_pixels_to_full(tmp_path: Path) -> None:
    middle = len(PNG) // 2
    path = saved(tmp_path / "a.png", PNG[:middle] + bytes(20) + PNG[middle + 20 :])
    assert file_fault(path, "quick") is None
    fault = file_fault(path, "full")
    assert fault is not None
    assert fault[0] == "unreadable image"


def test_an_end_mark_inside_an_embedded_thumbnail_is_not_the_end(tmp_path: Path) -> None:
    thumbnail = encoded(gradient(16, 16))
    segment = b"\xff\xed" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = JPEG[:2] + segment + JPEG[2:]
    assert file_fault(saved(tmp_path / "whole.jpg", whole), "quick") is None
    cut = file_fault(saved(tmp_path / "cut.jpg", whole[:-200]), "quick")
    assert cut == ("unreadable image", f"{tmp_path / 'cut.jpg'} is cut short: it has no end mark")


def test_a_missing_file_is_named_and_only_none_lets_it_pass(tmp_path: Path, good: Path) -> None:
    gone = tmp_path / "gone.jpg"
    _, problems = check([photo(gone), photo(good)])
    assert problems.items == [
        {"kind": "missing image", "where": str(gone), "detail": f"{gone} does not exist"},
    ]
    splits, problems = check([photo(gone), photo(good)], "none")
    assert (len(splits["train"]), problems.items) == (2, [])


def test_order_survives_the_threads(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.jpg", b"" if i % 7 == 0 else JPEG) for i in range(300)]
    splits, problems = check([photo(path) for path in paths])
    assert [record.location for record in splits["train"]] == [p for i, p in enumerate(paths) if i % 7]
    assert [item["where"] for item in problems.items] == [str(p) for i, p in enumerate(paths) if i % 7 == 0]


# Captions and ids


def test_captions_are_folded_and_bad_ones_named(good: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.jpg", JPEG)
    splits, problems = check([photo(good, " A dog\n runs . ", "", " \t", None, "bad \ud83d"), photo(other, "")])
    assert splits["train"] == (Record("good.jpg", good, ("A dog runs .",)),)
    assert problems.counts() == {"empty caption": 4, "undecodable text": 1, "image without caption": 1}
    problems.write(tmp_path / "problems.json")  # a lone surrogate must not break the report
    assert "other.jpg" in (tmp_path / "problems.json").read_text()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_duplicate_id_keeps_the_first(good: Path, split: str) -> None:
    splits, problems = check([photo(good, "first"), photo(good, "second", split=split)])
    assert [r.captions for records in splits.values() for r in records] == [("first",)]
    detail = f"it is in train and again in {split}; the first is kept"
    assert problems.items == [{"kind": "duplicate id", "where": "good.jpg", "detail": detail}]


def test_refuse_raises_at_the_first_problem(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing image: .*gone\.jpg.*data\.on_error=refuse"):
        check([photo(good), photo(tmp_path / "gone.jpg")], on_error="refuse")


def test_nothing_usable_and_an_unknown_check_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^list\.txt: none of the 1 images .* first problem: .*gone\.jpg does not"):
        check([photo(tmp_path / "gone.jpg")])
    with pytest.raises(UserError, match=r"^data\.verify=fast is unknown \(one of: quick, full, none\)$"):
        check([photo(good)], "fast")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_fold_changes_whitespace_alone(text: str) -> None:
    folded = fold(text)
    assert folded.split(" ") == (text.split() or [""])
    assert fold(folded) == folded


# Pixels


MODES = {
    "L": gradient().convert("L"),
    "1": gradient().convert("1"),
    "palette": gradient().convert("P"),
    "CMYK": gradient().convert("CMYK"),
    "YCbCr": gradient().convert("YCbCr"),
    "RGBA": gradient().convert("RGBA"),
    "LA": gradient().convert("LA"),
}


@pytest.mark.parametrize("image", MODES.values(), ids=MODES)
def test_every_mode_comes_out_as_rgb(tmp_path: Path, image: Image.Image) -> None:
    format = "TIFF" if image.mode in ("CMYK", "YCbCr") else "PNG"
    result = open_photo(saved(tmp_path / "image", encoded(image, format)))
    assert (result.mode, result.size) == ("RGB", image.size)
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(np.asarray(result, dtype=int) - expected).max() <= 1


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    result = open_photo(saved(tmp_path / "deep.png", encoded(Image.fromarray(values), "PNG")))
    assert np.asarray(result)[0, :, 0].tolist() == [0, 100, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    result = open_photo(saved(tmp_path / "float.tiff", encoded(floats, "TIFF")))
    assert np.asarray(result)[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    result = open_photo(saved(tmp_path / "clear.png", encoded(clear, "PNG")))
    assert (result.getpixel((0, 0)), result.getpixel((1, 0))) == ((200, 0, 0), (255, 255, 255))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    result = open_photo(saved(tmp_path / "p.png", encoded(palette, "PNG", transparency=0)))
    assert result.getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = gradient()
    path = saved(tmp_path / "turned.jpg", encoded(image, exif=exif, quality=100, subsampling=0))
    result = open_photo(path)
    assert result.size == (32, 48)
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(result, dtype=int) - turned).max() < 8


def test_damaged_exif_does_not_cost_the_picture(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image, *, in_place: bool) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.warns(UserWarning, match=r"good\.jpg: damaged EXIF data, taken as upright \(not a TIFF file\)"):
        assert open_photo(good).size == (48, 32)


@pytest.mark.parametrize(
    "content",
    [JPEG[:400], b"nothing", b"", b"\x89PNG\r\n\x1a\n" + PNG[8:30], b"GIF89a", b"BM" + bytes(60), PNG[:60]],
)
def test_open_raises_os_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path / "later.jpg", content)
    data = PhotoDataset("mine", {})
    with pytest.raises(OSError, match=r"later\.jpg"):
        data.open(Record("later", path, ("a dog",)))


@pytest.mark.parametrize("error", [SyntaxError("broken chunk"), ValueError(), struct.error("short"), EOFError("end")])
def test_any_failure_of_the_decoder_is_an_os_error(
    good: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", fail)
    with pytest.raises(OSError, match=rf"good\.jpg can't be read: {error or type(error).__name__}") as caught:
        open_photo(good)
    assert caught.value.__cause__ is error


def test_a_decompression_bomb_is_an_os_error(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"good\.jpg can't be read: .*decompression bomb"):
        open_photo(good)
    assert file_fault(good, "quick") is not None


def test_a_missing_file_opens_as_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        open_photo(tmp_path / "gone.jpg")
    assert PhotoDataset("mine", {}).records("test") == ()
