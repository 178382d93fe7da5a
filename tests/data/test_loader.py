import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prune_tell.data.features import FeatureCache, Features
from prune_tell.data.loader import (
    Batch,
    CaptionItems,
    EpochBatches,
    Failure,
    Item,
    collate,
    eval_loader,
    limit_records,
    train_loader,
)
from prune_tell.data.packing import PackedCaptions
from prune_tell.data.records import Record
from prune_tell.data.tokenizer import BOS, EOS
from prune_tell.data.transforms import Preprocessing, build_transform

RECIPE = Preprocessing((6, 6), mean=(0.0,) * 3, std=(1.0,) * 3)


def records(n: int) -> list[Record]:
    return [Record(f"image{i}", i, tuple("x" * (1 + (i + c) % 5) for c in range(1 + i % 4))) for i in range(n)]


def encode(caption: str) -> list[int]:
    return [BOS, *(4 + len(caption) for _ in caption), EOS]


def open_image(record: Record) -> Image.Image:
    """A picture of its own per record; every seventh can't be read."""
    if int(record.location) % 7 == 3:
        raise OSError(f"{record.image_id} is broken")
    pixels = np.random.default_rng(int(record.location)).integers(0, 255, (9, 9, 3), np.uint8)
    return Image.fromarray(pixels)


def items(n: int = 12, *, augment: bool = True, **options) -> CaptionItems:
    transform = build_transform(RECIPE, augment=augment)
    return CaptionItems(records(n), open_image=open_image, transform=transform, encode=encode, **options)


@st.composite
def streams(draw):
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=60))
    return {"lengths": lengths, "batch_size": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 2**31))}


@given(streams())
def test_an_epoch_holds_every_image_once(stream):
    batches = EpochBatches(**stream)
    n, size = len(stream["lengths"]), stream["batch_size"]
    for epoch, drawn in enumerate((batches.epoch(0), batches.epoch(1))):
        assert len(drawn) == batches.per_epoch == -(-n // size)
        assert sorted(i for batch in drawn for _, i in batch) == list(range(n))
        assert {e for batch in drawn for e, _ in batch} == {epoch}
        assert sum(len(batch) < size for batch in drawn) == (n % size > 0)


@given(streams(), st.integers(0, 40))
def test_starting_anywhere_gives_the_tail_of_the_stream(stream, start):
    whole = list(islice(EpochBatches(**stream), start + 12))
    assert list(islice(EpochBatches(**stream, start=start), 12)) == whole[start:]


def test_epochs_and_seeds_differ_and_repeat():
    first, second = (EpochBatches([1] * 40, batch_size=4, seed=s) for s in (0, 1))
    assert first.epoch(0) == EpochBatches([1] * 40, batch_size=4, seed=0).epoch(0)
    order = [[i for batch in drawn for _, i in batch] for drawn in (first.epoch(0), first.epoch(1), second.epoch(0))]
    assert order[0] != order[1] != order[2] != order[0]


def test_captions_of_similar_length_come_together():
    lengths = torch.randint(1, 100, (64,)).tolist()
    batches = EpochBatches(lengths, batch_size=4, seed=0).epoch(0)  # one window of 16 batches
    spread = [max(lengths[i] for _, i in b) - min(lengths[i] for _, i in b) for b in batches]
    assert sum(spread) <= max(lengths) - min(lengths)
    firsts = [lengths[batch[0][1]] for batch in batches]
    assert firsts != sorted(firsts)  # the batches themselves are shuffled


def same(a: Batch, b: Batch) -> bool:
    return (
        a.records == b.records
        and a.failures == b.failures
        and torch.equal(a.visual, b.visual)
        and all(torch.equal(x, y) for x, y in zip(a.captions, b.captions, strict=True))
    )


def test_worker_processes_change_nothing():
    def batches(num_workers: int) -> list[Batch]:
        loader = train_loader(
            items(captions_per_image=2, seed=5), batch_size=4, seed=5, start=2, num_workers=num_workers
        )
        return list(islice(loader, 5))

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert same(alone, helped)


def test_a_stream_can_be_taken_up_anywhere():
    def batches(start: int) -> list[Batch]:
        return list(islice(train_loader(items(captions_per_image=1), batch_size=4, seed=1, start=start), 7 - start))

    torch.manual_seed(11)
    whole = batches(0)
    torch.manual_seed(99)  # nothing may come from the global generator
    assert all(same(a, b) for a, b in zip(whole[4:], batches(4), strict=True))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(4)
    state = torch.get_rng_state()
    list(islice(train_loader(items(), batch_size=4, seed=0), 4))
    list(eval_loader(items(), batch_size=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_differs_between_epochs_and_repeats():
    data = items()
    first, again, other = data[0, 1], data[0, 1], data[1, 1]
    assert torch.equal(first.visual, again.visual)
    assert not torch.equal(first.visual, other.visual)
    reseeded = items(seed=1)[0, 1]
    assert not torch.equal(first.visual, reseeded.visual)


@given(epoch=st.integers(0, 50), index=st.integers(0, 11), wanted=st.integers(1, 4))
def test_drawn_captions_are_different_ones_of_the_image(epoch, index, wanted):
    drawn = items(captions_per_image=wanted)
    captions = [encode(caption) for caption in drawn.records[index].captions]
    item = drawn[epoch, index]
    if isinstance(item, Failure):
        return
    assert len(item.captions) == min(wanted, len(captions))
    left = list(captions)
    for caption in item.captions:
        left.remove(caption)  # drawn without putting back


def test_every_caption_is_drawn_in_time_and_none_is_left_out_without_a_limit():
    few, every = items(captions_per_image=1), items()
    assert every[0, 11].captions == [encode(c) for c in every.records[11].captions]
    drawn = {tuple(few[epoch, 11].captions[0]) for epoch in range(40)}
    assert drawn == {tuple(encode(c)) for c in few.records[11].captions}


def test_unreadable_images_are_reported_and_the_rest_goes_on():
    data = items(augment=False)
    assert data[0, 3] == Failure("image3", "image3 is broken")
    first, second, third = eval_loader(data, batch_size=4)
    assert first.failures == [Failure("image3", "image3 is broken")]
    assert [record.image_id for record in first.records] == ["image0", "image1", "image2"]
    assert first.visual.shape == (3, 3, 6, 6)
    assert first.captions.words_BQ.shape[0] == 3
    assert (second.failures, len(second.records)) == ([], 4)
    assert (third.failures, len(third.records)) == ([Failure("image10", "image10 is broken")], 3)


def test_a_batch_of_failures_only():
    failures = [Failure("a", "gone"), Failure("b", "broken")]
    assert collate(failures) == failures


def test_evaluation_sees_every_item_once_in_order_with_all_captions():
    data = items(augment=False, captions_per_image=None)
    batches = list(eval_loader(data, batch_size=5))
    seen = [record.image_id for batch in batches for record in batch.records]
    assert seen == [f"image{i}" for i in range(12) if i % 7 != 3]
    for batch in batches:
        for row, record in enumerate(batch.records):
            assert int(batch.captions.caption_BQ[row].max()) + 1 == len(record.captions)


def cached(folder: Path, rows: int) -> FeatureCache:
    features = Features(torch.randn(rows, 6, 4), torch.randn(rows, 1, 4), (2, 3), torch.rand(rows, 6))
    cache = FeatureCache.create(folder, rows, features)
    cache.write(range(rows), features)
    return cache


def test_an_item_draws_one_of_all_cached_views(tmp_path):
    plain, other = cached(tmp_path / "plain", 12), cached(tmp_path / "other", 12)
    data = items(cache=plain, views=[other])
    drawn = [data[epoch, 3].visual.tokens_BND for epoch in range(30)]
    choices = [plain.row(3).tokens_BND, other.row(3).tokens_BND]
    counts = [sum(torch.equal(tokens, choice) for tokens in drawn) for choice in choices]
    assert sum(counts) == 30
    assert min(counts) >= 5, "both are drawn, about equally often"
    assert torch.equal(data[7, 3].visual.tokens_BND, drawn[7]), "an epoch's draw is fixed"


def test_cached_features_take_the_place_of_images(tmp_path):
    cache = cached(tmp_path, 12)
    cache.state_R[5] = FeatureCache.UNREADABLE
    cache.state_R[6] = FeatureCache.MISSING
    data = items(cache=cache)
    batch = next(iter(eval_loader(data, batch_size=8)))
    assert isinstance(batch.visual, Features)
    assert batch.visual.tokens_BND.shape == (6, 6, 4)
    assert batch.visual.prefix_BPD.shape == (6, 1, 4)
    assert batch.visual.attention_BN.shape == (6, 6)
    assert batch.visual.grid == (2, 3)
    assert torch.equal(batch.visual.tokens_BND[1], cache.row(1).tokens_BND[0])
    assert batch.failures == [
        Failure("image5", "5 could not be read when the features were cached"),
        Failure("image6", "6 could not be read when the features were cached"),
    ]
    moved = batch.to(torch.device("cpu"))
    assert moved.visual.tokens_BND.dtype == moved.visual.attention_BN.dtype == torch.float32


@given(n=st.integers(1, 9), parts=st.integers(1, 12), features=st.booleans())
def test_micro_batches_are_the_batch_cut_up(n, parts, features):
    visual = (
        Features(torch.randn(n, 6, 4), torch.randn(n, 1, 4), (2, 3), torch.rand(n, 6))
        if features
        else torch.randn(n, 3, 2, 2)
    )
    good = [
        Item(record, visual.rows(slice(i, i + 1)) if features else visual[i], [[BOS, 4, EOS]] * (i + 1))
        for i, record in enumerate(records(n))
    ]
    batch = collate(good)
    pieces = batch.split(parts)
    assert len(pieces) <= min(parts, n)
    assert [record for piece in pieces for record in piece.records] == batch.records
    joined = PackedCaptions(*(torch.cat(tensors) for tensors in zip(*(p.captions for p in pieces), strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(joined, batch.captions, strict=True))
    if features:
        assert torch.equal(torch.cat([p.visual.tokens_BND for p in pieces]), visual.tokens_BND)
        assert torch.equal(torch.cat([p.visual.attention_BN for p in pieces]), visual.attention_BN)
        assert torch.equal(torch.cat([p.visual.prefix_BPD for p in pieces]), visual.prefix_BPD)
    else:
        assert torch.equal(torch.cat([p.visual for p in pieces]), visual)


@pytest.mark.parametrize("features", [False, True])
def test_pinning_reaches_every_tensor(features, monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory  # what the loader calls

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: self + 1)  # a mark instead of page-locking
    visual = Features(torch.zeros(1, 6, 4), torch.zeros(1, 1, 4), (2, 3), torch.zeros(1, 6))
    batch = collate(
        [Failure("a", "gone"), Item(records(1)[0], visual if features else torch.zeros(3, 2, 2), [[BOS, EOS]])]
    )
    pinned = pin_memory(batch)
    assert (pinned.records, pinned.failures) == (batch.records, batch.failures)
    assert all(torch.equal(a, b + 1) for a, b in zip(pinned.captions, batch.captions, strict=True))
    if not features:
        assert (pinned.visual == 1).all()
        return
    assert pinned.visual.grid == (2, 3)
    for tensor in (pinned.visual.tokens_BND, pinned.visual.prefix_BPD, pinned.visual.attention_BN):
        assert (tensor == 1).all()
    assert (
        pin_memory(collate([Item(records(1)[0], visual._replace(attention_BN=None), [])])).visual.attention_BN is None
    )


@pytest.mark.gpu
def test_batches_arrive_pinned():
    batch = next(iter(train_loader(items(), batch_size=4, seed=0, pin_memory=True)))
    assert batch.visual.is_pinned()
    assert all(tensor.is_pinned() for tensor in batch.captions)


def test_items_with_a_cache_can_be_sent_to_a_worker(tmp_path):
    data = items(cache=cached(tmp_path, 12), augment=False)
    sent = pickle.dumps(data)
    again = pickle.loads(sent)
    assert torch.equal(again[0, 4].visual.tokens_BND, data[0, 4].visual.tokens_BND)
    assert again[0, 4].captions == data[0, 4].captions


def test_limits():
    taken = limit_records(records(8), max_images=5, max_captions=2)
    assert [r.image_id for r in taken] == [f"image{i}" for i in range(5)]
    assert max(len(r.captions) for r in taken) == 2
    assert limit_records(records(8), max_images=None, max_captions=None) == records(8)
