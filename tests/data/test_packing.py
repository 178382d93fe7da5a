import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_tell.data.packing import pack_captions
from prune_tell.data.tokenizer import BOS, EOS, PAD

captions = st.lists(st.integers(4, 9), max_size=6).map(lambda words: [BOS, *words, EOS])
batches = st.lists(st.lists(captions, max_size=4), min_size=1, max_size=4)


@given(batches)
def test_every_caption_is_there_shifted_by_one(images):
    packed = pack_captions(images)
    for row, wanted in enumerate(images):
        for number, ids in enumerate(wanted):
            place = packed.caption_BQ[row] == number
            assert packed.words_BQ[row, place].tolist() == ids[:-1]
            assert packed.targets_BQ[row, place].tolist() == ids[1:]
            assert packed.positions_BQ[row, place].tolist() == list(range(len(ids) - 1))
        padding = packed.caption_BQ[row] == -1
        assert (packed.words_BQ[row, padding] == PAD).all()
        assert (packed.targets_BQ[row, padding] == PAD).all()
        assert int((~padding).sum()) == sum(len(ids) - 1 for ids in wanted)
    assert packed.words_BQ.shape[1] == max(1, max(sum(len(ids) - 1 for ids in wanted) for wanted in images))


@given(batches)
def test_the_mask_keeps_every_word_in_its_own_past(images):
    packed = pack_captions(images)
    mask = packed.mask()
    B, Q = packed.words_BQ.shape
    assert mask.shape == (B, Q, Q)
    for b in range(B):
        for q in range(Q):
            for s in range(Q):
                same = packed.caption_BQ[b, q] == packed.caption_BQ[b, s] >= 0
                allowed = (same and s <= q) or s == q
                assert mask[b, q, s] == bool(allowed), (b, q, s)


def test_an_example_in_full():
    packed = pack_captions([[[BOS, 4, 5, EOS], [BOS, 6, EOS]], [[BOS, EOS]]])
    assert packed.words_BQ.tolist() == [[BOS, 4, 5, BOS, 6], [BOS, PAD, PAD, PAD, PAD]]
    assert packed.targets_BQ.tolist() == [[4, 5, EOS, 6, EOS], [EOS, PAD, PAD, PAD, PAD]]
    assert packed.positions_BQ.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert packed.caption_BQ.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]
    assert packed.mask()[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert torch.equal(packed.mask()[1], torch.eye(5, dtype=torch.bool) | torch.tensor([True, *[False] * 4]).diag())


def test_no_captions_at_all():
    assert pack_captions([[], []]).words_BQ.tolist() == [[PAD], [PAD]]
    assert pack_captions([]).words_BQ.shape == (0, 1)


def test_moves_as_a_whole():
    packed = pack_captions([[[BOS, EOS]]]).to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in packed)
