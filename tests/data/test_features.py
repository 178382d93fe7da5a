import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_tell.data.features import FeatureCache, Features, cache_key, fill_cache, stack_features
from prune_tell.data.records import Record
from prune_tell.models.backbone import build_backbone

N, P, D = 6, 2, 4
RECORDS = [Record(i, i, ("a",)) for i in range(10)]


def features_of(rows: Sequence[int], *, attention: bool = True) -> Features:
    """Features that tell which row they belong to."""
    base = torch.tensor(list(rows), dtype=torch.float32).view(-1, 1, 1)
    tokens = base + torch.arange(N * D).view(1, N, D) / 64
    return Features(tokens, -base - torch.arange(P * D).view(1, P, D) / 64, (2, 3), base[:, :, 0] + torch.arange(N) / 8)


class Encoder:
    """Stands in for a backbone: remembers what it was asked, and stops where it is told to."""

    def __init__(self, unreadable: Sequence[int] = (), stop_at: int | None = None) -> None:
        self.unreadable, self.stop_at, self.asked = set(unreadable), stop_at, []

    def __call__(self, rows: Sequence[int]) -> tuple[list[int], Features | None]:
        if self.stop_at is not None and self.stop_at in rows:
            raise KeyboardInterrupt
        self.asked.append(list(rows))
        good = [row for row in rows if row not in self.unreadable]
        return good, features_of(good) if good else None


def fill(folder: Path, encoder: Encoder, batch_size: int = 3) -> FeatureCache:
    return fill_cache(folder, RECORDS, encoder, batch_size=batch_size, progress=iter)


def test_rows_come_back_in_half_precision(tmp_path):
    cache = fill(tmp_path / "c", Encoder())
    for index in range(10):
        row, wanted = cache.row(index), features_of([index])
        assert row.tokens_BND.dtype == row.prefix_BPD.dtype == row.attention_BN.dtype == torch.float16
        torch.testing.assert_close(row.tokens_BND.float(), wanted.tokens_BND, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(row.prefix_BPD.float(), wanted.prefix_BPD, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(row.attention_BN.float(), wanted.attention_BN, atol=1e-2, rtol=1e-3)
        assert row.grid == (2, 3)
    stacked = stack_features([cache.row(3), cache.row(8)])
    assert torch.equal(stacked.tokens_BND[1], cache.row(8).tokens_BND[0])
    assert torch.equal(stacked.attention_BN[0], cache.row(3).attention_BN[0])


@given(st.lists(st.floats(-1e3, 1e3, width=16), min_size=N * D, max_size=N * D))
def test_half_precision_values_survive_exactly(tmp_path_factory, values):
    tokens = torch.tensor(values).view(1, N, D)
    features = Features(tokens, torch.zeros(1, 0, D), (2, 3))
    cache = FeatureCache.create(tmp_path_factory.mktemp("c"), 1, features)
    cache.write([0], features)
    assert torch.equal(cache.row(0).tokens_BND.float(), tokens)


def test_a_row_is_a_copy(tmp_path):
    cache = fill(tmp_path / "c", Encoder())
    cache.row(2).tokens_BND.zero_()
    assert cache.row(2).tokens_BND.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_saturate_instead_of_becoming_infinite(tmp_path, dtype):
    tokens = torch.full((1, N, D), 1e6, dtype=dtype)
    tokens[0, 0] = -1e6
    features = Features(tokens, torch.zeros(1, 0, D, dtype=dtype), (2, 3))
    cache = FeatureCache.create(tmp_path, 1, features)
    cache.write([0], features)
    assert cache.row(0).tokens_BND[0, 0, 0] == -65504
    assert cache.row(0).tokens_BND[0, 1:].eq(65504).all()


def test_only_what_is_missing_is_computed_again(tmp_path):
    folder, first = tmp_path / "c", Encoder(stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, first)
    assert first.asked == [[0, 1, 2], [3, 4, 5]]
    second, third = Encoder(), Encoder()
    cache = fill(folder, second)
    assert second.asked == [[6, 7, 8], [9]]
    assert torch.equal(cache.row(1).tokens_BND.float(), features_of([1]).tokens_BND.half().float())
    fill(folder, third)
    assert third.asked == []


def test_an_interruption_before_anything_was_written(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        fill(folder, Encoder(stop_at=0))
    # ... or in the middle of laying out the files: without meta.json they are laid out again.
    folder.mkdir()
    (folder / "tokens.npy").write_bytes(b"half a header")
    encoder = Encoder()
    assert fill(folder, encoder).state_R.tolist() == [FeatureCache.THERE] * 10
    assert len(encoder.asked) == 4


@pytest.mark.parametrize("unreadable", [[4, 5], [0], [0, 1, 2], [9], [0, 1, 2, 3, 4, 5]])
def test_unreadable_images_are_marked_and_not_tried_again(tmp_path, unreadable):
    folder = tmp_path / "c"
    cache = fill(folder, Encoder(unreadable))
    expected = [FeatureCache.UNREADABLE if i in unreadable else FeatureCache.THERE for i in range(10)]
    assert cache.state_R.tolist() == expected
    again = Encoder(unreadable)
    fill(folder, again)
    assert again.asked == []


def test_no_readable_image_at_all(tmp_path):
    with pytest.raises(OSError, match="no image could be read"):
        fill(tmp_path / "c", Encoder(range(10)))


def test_what_was_written_is_on_disk(tmp_path):
    fill(tmp_path / "c", Encoder())
    again = FeatureCache(tmp_path / "c")
    assert (again.prefix, again.grid) == (P, (2, 3))
    assert again.tokens_RSD.shape == (10, P + N, D)
    assert torch.equal(again.row(4).prefix_BPD.float(), features_of([4]).prefix_BPD.half().float())
    np.testing.assert_array_equal(np.load(tmp_path / "c" / "state.npy"), [1] * 10)


def test_without_attention(tmp_path):
    plain = features_of([0])._replace(attention_BN=None)
    cache = FeatureCache.create(tmp_path, 1, plain)
    cache.write([0], plain)
    assert cache.row(0).attention_BN is None
    assert stack_features([cache.row(0)] * 2).attention_BN is None
    assert not (tmp_path / "attention.npy").exists()


def test_a_cache_is_sent_to_a_worker_as_its_place_not_its_content(tmp_path):
    tokens = torch.randn(1, 400, 50)
    features = Features(tokens, tokens[:, :0], (20, 20))
    cache = FeatureCache.create(tmp_path, 1, features)
    cache.write([0], features)
    sent = pickle.dumps(cache)
    assert len(sent) < 2_000
    assert torch.equal(pickle.loads(sent).row(0).tokens_BND, cache.row(0).tokens_BND)


def test_features_move_to_single_precision_and_can_be_cut():
    half = Features(*(t.half() for t in features_of([1, 2])[:2]), (2, 3), features_of([1, 2]).attention_BN.half())
    moved = half.to(torch.device("cpu"))
    assert {t.dtype for t in (moved.tokens_BND, moved.prefix_BPD, moved.attention_BN)} == {torch.float32}
    assert torch.equal(moved.rows(slice(1, 2)).attention_BN, features_of([2]).attention_BN)
    assert half._replace(attention_BN=None).to(torch.device("cpu")).attention_BN is None


# The key


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def photos(folder: Path) -> list[Record]:
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"pixels")
    return [Record(name, folder / name, ("x",)) for name in ("a.jpg", "b.jpg")]


def test_the_key_repeats(tmp_path):
    records = photos(tmp_path)
    assert cache_key(net(), {"size": 3}, records) == cache_key(net(), {"size": 3}, records)
    assert len(cache_key(net(), {}, [])) == 20


def test_the_key_changes_with_all_that_features_depend_on(tmp_path):
    records, keys = photos(tmp_path), []

    def add(backbone: nn.Module | None = None, recipe: dict | None = None, which: Sequence[Record] = records) -> None:
        keys.append(cache_key(backbone or net(), recipe or {"size": 3}, which))

    add()
    add(recipe={"size": 4})
    add(recipe={"size": 3, "mean": (0.5, 0.5, 0.5)})
    add(which=records[:1])
    add(which=records[::-1])
    add(which=[Record("c.jpg", records[0].location, ("x",)), records[1]])
    nudged, counted, other, half = net(), net(), net(), net().to(torch.bfloat16)
    with torch.no_grad():
        nudged[0].weight[0, 0, 0, 0] += 1e-6
    counted[1].num_batches_tracked += 1
    other[0].stride = (2, 2)
    for backbone in (nudged, counted, other, half):
        add(backbone)
    generated = [Record(0, 0, ("x",)), Record(1, 1, ("x",))]
    add(which=generated)
    add(which=[generated[0], Record(1, 2, ("x",))])
    os.utime(tmp_path / "b.jpg", ns=(0, 12345))
    add()
    (tmp_path / "b.jpg").write_bytes(b"more pixels")
    os.utime(tmp_path / "b.jpg", ns=(0, 12345))
    add()
    (tmp_path / "b.jpg").unlink()
    add()
    assert len(set(keys)) == len(keys)


def test_captions_dont_change_the_key(tmp_path):
    records = photos(tmp_path)
    other = [Record(r.image_id, r.location, ("something else",)) for r in records]
    assert cache_key(net(), {}, records) == cache_key(net(), {}, other)


def test_features_with_and_without_attention_have_keys_of_their_own():
    def key(cls_attention: bool) -> str:
        torch.manual_seed(0)
        backbone = build_backbone(
            name="vit_tiny_patch16_224",
            image_size=16,
            model_args={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
            cls_attention=cls_attention,
        )
        return cache_key(backbone, {}, [])

    assert key(False) == key(False)
    assert key(False) != key(True)
