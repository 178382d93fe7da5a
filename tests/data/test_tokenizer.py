import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_tell.data.tokenizer import BOS, EOS, PAD, SPECIALS, UNK, Kind, Tokenizer
from prune_tell.errors import UserError

CAPTIONS = [
    "A black dog is running after a white dog in the snow .",
    "Two dogs play together in the snow .",
    "A child 's well-known red ball , isn’t it ?",
    "Ein Hund läuft über die Straße.",
]
WORD = Tokenizer.train(CAPTIONS)
BPE = Tokenizer.train(CAPTIONS, kind="bpe", vocab_size=300)
KINDS: tuple[Kind, ...] = ("word", "bpe")
# Mixes arbitrary unicode with the characters that the word rules treat specially.
TEXT = st.one_of(
    st.text(),
    st.text(alphabet="aAsnt '’-.<>uk\n\t"),
    st.lists(st.sampled_from(["dog", "'s", "n't", "<unk>", "İ", "ﬁ", "’", "🐶", "-", "snow", "\n"])).map(" ".join),
    st.lists(st.sampled_from(["dog", "'s", "n't", "<unk>", "'", "é", "e\u0301", " "])).map("".join),
)


@given(TEXT)
@settings(deadline=None, max_examples=400)
def test_bpe_gives_every_caption_back(caption: str) -> None:
    ids = BPE.encode(caption)
    assert BPE.decode(ids) == caption
    assert not set(ids[1:-1]) & {PAD, BOS, EOS, UNK}


@given(TEXT)
@settings(deadline=None, max_examples=400)
def test_the_word_tokenizer_is_idempotent(caption: str) -> None:
    tokenizer = Tokenizer.train([*CAPTIONS, caption])
    for one in (tokenizer, WORD):
        ids = one.encode(caption)
        assert one.encode(one.decode(ids)) == ids
    assert not set(ids[1:-1]) & {PAD, BOS, EOS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "caption", ["", " ", "a\nb\r\nc", "dog 🐶👩‍👩‍👧", "Ünïcode, naïve? (yes!)", " ".join(["snow dog"] * 100)]
)
def test_awkward_captions_round_trip(kind: Kind, caption: str) -> None:
    tokenizer = Tokenizer.train([*CAPTIONS, caption], kind=kind)
    ids = tokenizer.encode(caption)
    assert ids[0] == BOS
    assert ids[-1] == EOS
    text = tokenizer.decode(ids)
    if kind == "bpe":
        assert text == caption
    else:
        words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
        assert text.split(" ") == (words or [""])


def test_words_are_lower_case_without_punctuation_and_with_inner_apostrophes() -> None:
    assert WORD.decode(WORD.encode(CAPTIONS[2])) == "a child's well known red ball isn't it"
    assert WORD.decode(WORD.encode("DOG, (“snow”) -- ZEBRA!")) == "dog snow <unk>"


def test_special_ids_are_fixed() -> None:
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    for tokenizer in (WORD, BPE):
        assert tokenizer.tokens([0, 1, 2, 3]) == list(SPECIALS)


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_special_tokens_in_a_caption_are_ordinary_text(tokenizer: Tokenizer) -> None:
    inner = tokenizer.encode("a <eos> b </s> <pad> <bos>")[1:-1]
    assert not set(inner) & {PAD, BOS, EOS}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_training_captions_keep_the_ids(kind: Kind) -> None:
    tokenizer = Tokenizer.train(["<eos> <unk> <UNK> <pad> dog"] * 50, kind=kind)
    assert tokenizer.tokens(range(4)) == list(SPECIALS)
    assert len(set(tokenizer.tokens(range(len(tokenizer))))) > 4
    assert not set(tokenizer.encode("<eos><pad>")[1:-1]) & {PAD, BOS, EOS}


def test_unknown_words_are_shown_and_stay_unknown() -> None:
    assert WORD.encode("a zebra") == [BOS, WORD.encode("a")[1], UNK, EOS]
    assert WORD.decode(WORD.encode("a zebra")) == "a <unk>"
    assert WORD.encode("a <unk>") == WORD.encode("a zebra")


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_long_captions_are_cut_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    full = tokenizer.encode(CAPTIONS[0])
    assert tokenizer.encode(CAPTIONS[0], max_length=6) == [*full[:5], EOS]
    assert tokenizer.encode(CAPTIONS[0], max_length=len(full)) == full
    assert tokenizer.encode(CAPTIONS[0], max_length=2) == [BOS, EOS]
    with pytest.raises(UserError, match=r"^data\.max_length=1 leaves no room for BOS and EOS \(at least 2\)$"):
        tokenizer.encode("a", max_length=1)


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_decode_stops_at_the_first_eos_and_drops_padding(tokenizer: Tokenizer) -> None:
    dog, snow = tokenizer.encode("dog")[1:-1], tokenizer.encode("snow")[1:-1]
    assert tokenizer.decode([BOS, PAD, *dog, EOS, *snow, EOS, PAD]) == "dog"
    assert tokenizer.decode([PAD, PAD]) == ""
    assert tokenizer.decode(dog) == "dog"


def test_tokens_give_one_readable_string_per_id() -> None:
    ids = WORD.encode("a dog in the snow")
    assert WORD.tokens(ids) == ["<bos>", "a", "dog", "in", "the", "snow", "<eos>"]
    ids = BPE.encode("dog läuft 🐶")
    assert len(BPE.tokens(ids)) == len(ids)
    assert BPE.tokens(BPE.encode("the dog"))[-2] == " dog"
    with pytest.raises(IndexError, match=f"id {len(WORD)} is outside the vocabulary of {len(WORD)} ids"):
        WORD.tokens([len(WORD)])


def test_vocabulary_is_by_count_then_alphabet_whatever_the_order() -> None:
    captions = ["b b a a c", "e d c c"]
    for seed in range(5):
        random.Random(seed).shuffle(captions)
        tokenizer = Tokenizer.train(captions)
        assert tokenizer.tokens(range(4, len(tokenizer))) == ["c", "a", "b", "d", "e"]
    assert Tokenizer.train(captions, vocab_size=6).tokens([4, 5]) == ["c", "a"]
    assert len(Tokenizer.train(captions, vocab_size=6)) == 6
    assert len(Tokenizer.train(captions, min_count=2)) == 4 + 3
    assert len(Tokenizer.train(captions, min_count=3)) == 4 + 1


def test_bpe_keeps_to_its_vocabulary_size() -> None:
    assert len(BPE) == 300
    assert len(Tokenizer.train([], kind="bpe")) == 260


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_byte_stable_and_load_the_same(kind: Kind, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.json", "again.json", "reloaded.json")]
    for path in files[:2]:
        Tokenizer.train(CAPTIONS * 20, kind=kind).save(path)
    loaded = Tokenizer.load(files[0])
    loaded.save(files[2])
    assert len({path.read_bytes() for path in files}) == 1
    assert loaded.kind == kind
    original = Tokenizer.train(CAPTIONS * 20, kind=kind)
    for caption in [*CAPTIONS, "a <eos> zebra 🦓"]:
        assert loaded.encode(caption) == original.encode(caption)
        assert loaded.decode(loaded.encode(caption)) == original.decode(original.encode(caption))


def test_half_an_emoji_does_not_crash() -> None:
    assert BPE.decode(BPE.encode("dog \ud83d")) == "dog ?"
    assert len(Tokenizer.train(["dog \ud83d"])) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "char"}, "data.tokenizer=char is unknown (one of: word, bpe)"),
        ({"vocab_size": 4}, "data.vocab_size=4 is too small for data.tokenizer=word (at least 5)"),
        (
            {"vocab_size": 259, "kind": "bpe"},
            "data.vocab_size=259 is too small for data.tokenizer=bpe (at least 260)",
        ),
        ({"min_count": 0}, "data.min_count=0 is out of range (1 or more)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        Tokenizer.train(CAPTIONS, **options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_broken_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer can't be read \(No such file"):
        Tokenizer.load(path)
    for content in (b'{"kind": "wo', b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file, its JSON is broken"):
            Tokenizer.load(path)
    for foreign in ("[1, 2]", '{"version": "1.0", "model": {}}'):
        path.write_text(foreign)
        with pytest.raises(UserError, match=r"not a tokenizer of this project \(expected .* 'prune-tell tokenizer 1'"):
            Tokenizer.load(path)
    WORD.save(path)
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"tokenizer": {"model": 3}}))
    with pytest.raises(UserError, match="the tokenizer inside is damaged"):
        Tokenizer.load(path)
    state["tokenizer"]["model"]["vocab"] = {"dog": 0, "<unk>": 1}
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="ids 0 to 3 of the tokenizer must be <pad>, <bos>, <eos>, <unk>"):
        Tokenizer.load(path)
