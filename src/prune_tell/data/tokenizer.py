"""Captions to ids and back: a word-level and a byte-level BPE tokenizer, both run by `tokenizers`.

The word tokenizer follows the custom of the caption benchmarks: lower case, no punctuation, hyphens
split, apostrophes kept inside words (`man's`). It needs spaces between words; for other scripts, emoji
or exact spelling take BPE, which gives back every caption as it was, character by character.

No text can smuggle in a special id: `<eos>` written in a caption is ordinary text. Only the word
tokenizer reads `<unk>` as UNK, because that is how it writes one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from prune_tell.errors import UserError

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
BPE_BYTES = 256  # each byte is a token, so that nothing is ever unknown
BPE_VOCAB_SIZE = 8192  # when no size is given
FORMAT = "prune-tell tokenizer 1"

Kind = Literal["word", "bpe"]

_LETTER = r"[\p{L}\p{M}\p{N}]"
_WORD = rf"<unk>|{_LETTER}+(?:'{_LETTER}+)*"


def _word_rules() -> tokenizers.Tokenizer:
    """Return a tokenizer with the rules for words and no vocabulary yet."""
    words = tokenizers.Tokenizer(models.WordLevel({}, unk_token=SPECIALS[UNK]))
    words.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.NFKC(),
            normalizers.Replace(Regex("[‘’ʼ]"), "'"),
            # "a dog 's ball", as tokenized caption files write it, is "a dog's ball".
            normalizers.Replace(Regex(rf"(?<={_LETTER})\s+(?='(?:s|re|ve|ll|d|m|t)(?!{_LETTER}|'))"), ""),
        ]
    )
    words.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    return words


def _train_words(captions: Iterable[str], vocab_size: int | None, min_count: int) -> tokenizers.Tokenizer:
    words = _word_rules()
    split, normalize = words.pre_tokenizer.pre_tokenize_str, words.normalizer.normalize_str
    counts = Counter(word for caption in captions for word, _ in split(normalize(caption)))
    del counts[SPECIALS[UNK]]
    frequent = [word for word, count in counts.items() if count >= min_count]
    frequent.sort(key=lambda word: (-counts[word], word))
    vocabulary = [*SPECIALS, *frequent][:vocab_size]
    words.model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIALS[UNK])
    return words


def _train_bpe(captions: Iterable[str], vocab_size: int | None, min_count: int) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or BPE_VOCAB_SIZE,
        min_frequency=min_count,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    # Special tokens that the library knows as such would be found inside captions: keep only their ids.
    state = json.loads(bpe.to_str())
    state["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _clean(caption: str) -> str:
    """Replace lone surrogates (half an emoji in broken JSON), which no UTF-8 library takes, by `?`."""
    return caption.encode("utf-8", "replace").decode("utf-8")


class Tokenizer:
    """Turns captions into ids and back. Make one with `train` or `load`.

    Ids 0 to 3 are always PAD, BOS, EOS and UNK.
    """

    def __init__(self, kind: Kind, backend: tokenizers.Tokenizer) -> None:
        self.kind: Kind = kind
        self._backend = backend

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        *,
        kind: Kind = "word",
        vocab_size: int | None = None,
        min_count: int = 1,
    ) -> "Tokenizer":
        """Learn a vocabulary.

        Args:
            captions: the training captions.
            kind: `"word"` or `"bpe"`.
            vocab_size: largest number of ids including the four special ones; the most frequent words stay,
                ties in alphabetical order. `None`: no limit for words, `BPE_VOCAB_SIZE` for BPE.
            min_count: how often a word (for BPE: a pair to merge) must occur.

        Raises:
            UserError: for an unknown kind, or a vocabulary size or count that is too small.
        """
        if kind not in get_args(Kind):
            raise UserError(f"data.tokenizer={kind} is unknown (one of: {', '.join(get_args(Kind))})")
        smallest = len(SPECIALS) + (BPE_BYTES if kind == "bpe" else 1)
        if vocab_size is not None and vocab_size < smallest:
            raise UserError(
                f"data.vocab_size={vocab_size} is too small for data.tokenizer={kind} (at least {smallest})"
            )
        if min_count < 1:
            raise UserError(f"data.min_count={min_count} is out of range (1 or more)")
        learn = _train_words if kind == "word" else _train_bpe
        return cls(kind, learn(map(_clean, captions), vocab_size, min_count))

    def __len__(self) -> int:
        """Return the number of ids, the four special ones included."""
        return self._backend.get_vocab_size()

    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """Return `[BOS, ..., EOS]`; longer captions are cut to `max_length` ids, BOS and EOS included."""
        if max_length is not None and max_length < 2:
            raise UserError(f"data.max_length={max_length} leaves no room for BOS and EOS (at least 2)")
        ids = self._backend.encode(_clean(caption)).ids
        return [BOS, *(ids if max_length is None else ids[: max_length - 2]), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the caption up to the first EOS.

        PAD and BOS are left out, an unknown word reads `<unk>`. Words are joined by spaces; for BPE
        `decode(encode(caption)) == caption` holds exactly.
        """
        until = [int(i) for i in ids]
        until = until[: until.index(EOS)] if EOS in until else until
        shown = [i for i in until if i not in (PAD, BOS)]
        return " ".join(map(self._token, shown)) if self.kind == "word" else self._backend.decode(shown)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return one readable string per id, special ones included, e.g. to label a picture per word.

        A BPE token that starts a word keeps its space; one that holds part of a character reads `�`.
        """
        return [self._token(int(i)) for i in ids]

    def _token(self, i: int) -> str:
        token = self._backend.id_to_token(i)
        if token is None:
            raise IndexError(f"id {i} is outside the vocabulary of {len(self)} ids")
        return token if self.kind == "word" or i < len(SPECIALS) else self._backend.decode([i])

    def to_text(self) -> str:
        """Return everything as JSON; the same tokenizer always gives the same text."""
        state = {"format": FORMAT, "kind": self.kind, "tokenizer": json.loads(self._backend.to_str())}
        return json.dumps(state, ensure_ascii=False)

    def save(self, path: Path) -> None:
        """Write `to_text` to a file."""
        path.write_text(self.to_text(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            UserError: when the file is missing, broken or something else.
        """
        try:
            state: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: the tokenizer can't be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{path}: not a tokenizer file, its JSON is broken ({error})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("kind") not in get_args(Kind):
            raise UserError(f"{path}: not a tokenizer of this project (expected a JSON object with format '{FORMAT}')")
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(state.get("tokenizer")))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: the tokenizer inside is damaged ({error})") from error
        if [backend.id_to_token(i) for i in range(len(SPECIALS))] != list(SPECIALS):
            raise UserError(f"{path}: ids 0 to 3 of the tokenizer must be {', '.join(SPECIALS)}")
        return cls(state["kind"], backend)
