from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_tell.data.packing import pack_captions
from prune_tell.data.tokenizer import BOS, EOS, PAD, UNK
from prune_tell.decoding.generate import beam_search, generate, greedy, length_penalty, next_log_probs
from prune_tell.errors import UserError
from prune_tell.models.captioner import Sight
from prune_tell.models.decoder import Decoder
from prune_tell.pruning.reduction import keep_all

D = 16


def sight_of(decoder: Decoder, tokens_BKD: torch.Tensor) -> Sight:
    return Sight(decoder.remember(tokens_BKD), keep_all(tokens_BKD), 0, (1, tokens_BKD.shape[1]))


def one(tokens_BKD: torch.Tensor, image: int) -> torch.Tensor:
    return tokens_BKD[image : image + 1]


@torch.inference_mode()
def full_log_probs(decoder: Decoder, tokens_1KD: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Log-probabilities `(T, V)` of the word after each of `words`, from one forward pass without a cache."""
    packed = pack_captions([[[*words, EOS]]])
    logits = decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), decoder.remember(tokens_1KD))[0][0]
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[[PAD, BOS, UNK]] = False
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def total_of(decoder: Decoder, tokens_1KD: torch.Tensor, words: list[int]) -> float:
    log_probs = full_log_probs(decoder, tokens_1KD, words[:-1])
    return float(log_probs[torch.arange(len(words) - 1), torch.tensor(words[1:])].sum())


def slow_greedy(decoder: Decoder, tokens_1KD: torch.Tensor, steps: int) -> list[int]:
    words = [BOS]
    while len(words) <= steps and words[-1] != EOS:
        words.append(int(full_log_probs(decoder, tokens_1KD, words)[-1].argmax()))
    return words


def slow_beam(decoder: Decoder, tokens_1KD: torch.Tensor, W: int, steps: int, alpha: float) -> tuple[list[int], float]:
    """Beam search as one would write it down: lists, no cache, no early end."""
    live, finished = [([BOS], 0.0)], []
    for _ in range(steps):
        candidates = []
        for words, total in live:
            row = full_log_probs(decoder, tokens_1KD, words)[-1].tolist()
            candidates += [([*words, v], total + p) for v, p in enumerate(row) if p > -torch.inf]
        candidates.sort(key=lambda c: -c[1])
        finished += [c for c in candidates[:W] if c[0][-1] == EOS]
        live = [c for c in candidates if c[0][-1] != EOS][:W]
    return max(finished + live, key=lambda c: c[1] / ((5 + len(c[0]) - 1) / 6) ** alpha)


decoders = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 500),
        "sharpness": st.sampled_from([2.0, 8.0, 20.0]),
        "norm": st.sampled_from(["pre", "post"]),
        "positions": st.sampled_from(["sinusoidal", "learned"]),
        "eos": st.sampled_from([0.0, -3.0, -10.0]),
    }
)


@given(options=decoders, B=st.integers(1, 4), max_length=st.integers(2, 14))
@settings(max_examples=20)
def test_greedy_equals_greedy_without_a_cache(make_decoder, options, B, max_length):
    decoder, tokens = make_decoder(**options), 2 * torch.randn(B, 5, D)
    out = greedy(decoder, sight_of(decoder, tokens), max_length=max_length)
    steps = min(max_length - 1, decoder.max_length)
    for image in range(B):
        assert out.words[image] == slow_greedy(decoder, one(tokens, image), steps)
        total = total_of(decoder, one(tokens, image), out.words[image])
        assert out.log_probability_B[image].item() == pytest.approx(total, abs=1e-4)


@given(options=decoders, B=st.integers(1, 4), max_length=st.integers(2, 14))
@settings(max_examples=20)
def test_one_beam_is_greedy(make_decoder, options, B, max_length):
    decoder = make_decoder(**options)
    sight = sight_of(decoder, 2 * torch.randn(B, 5, D))
    narrow = beam_search(decoder, sight, beams=1, max_length=max_length)
    plain = greedy(decoder, sight, max_length=max_length)
    assert narrow.words == plain.words
    torch.testing.assert_close(narrow.log_probability_B, plain.log_probability_B)


@given(
    options=decoders,
    B=st.integers(1, 3),
    W=st.integers(2, 5),
    max_length=st.integers(2, 9),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
)
@settings(max_examples=25)
def test_beam_search_equals_the_one_written_down(make_decoder, options, B, W, max_length, alpha):
    decoder, tokens = make_decoder(vocab_size=8, **options), 2 * torch.randn(B, 5, D)
    out = beam_search(decoder, sight_of(decoder, tokens), beams=W, max_length=max_length, alpha=alpha)
    for image in range(B):
        words, total = slow_beam(decoder, one(tokens, image), W, max_length - 1, alpha)
        assert out.words[image] == words
        assert out.log_probability_B[image].item() == pytest.approx(total, abs=1e-4)
        assert total == pytest.approx(total_of(decoder, one(tokens, image), words), abs=1e-4)


@given(options=decoders, alpha=st.sampled_from([0.0, 0.7, 1.5]))
@settings(max_examples=10)
def test_a_wide_beam_finds_the_best_of_all_captions(make_decoder, options, alpha):
    decoder, tokens, steps = make_decoder(vocab_size=7, **options), 2 * torch.randn(1, 4, D), 3
    captions = [
        [BOS, *words, *end]
        for length in range(steps + 1)
        for words in product((4, 5, 6), repeat=length)
        for end in ([EOS], [])
        if (len(words) + len(end) <= steps and end) or (len(words) == steps and not end)
    ]
    assert len(captions) == 1 + 3 + 9 + 27
    best = max(captions, key=lambda c: total_of(decoder, tokens, c) / length_penalty(len(c) - 1, alpha))
    out = beam_search(decoder, sight_of(decoder, tokens), beams=40, max_length=steps + 1, alpha=alpha)
    assert out.words == [best]


def test_beams_that_swap_places_keep_their_own_words(make_decoder):
    swaps = 0
    for seed in range(8):
        decoder, tokens = make_decoder(seed=seed, vocab_size=8, sharpness=2.0, eos=-3.0), 2 * torch.randn(1, 5, D)
        out = beam_search(decoder, sight_of(decoder, tokens), beams=4, max_length=9)
        words, total = slow_beam(decoder, tokens, 4, 8, 0.0)
        assert out.words[0] == words
        assert out.log_probability_B.item() == pytest.approx(total, abs=1e-4)
        swaps += words != slow_greedy(decoder, tokens, 8)
    assert swaps > 2  # the search did go other ways than the greedy one


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_its_images_one_by_one(make_decoder, beams):
    decoder, tokens = make_decoder(sharpness=12.0), 2 * torch.randn(6, 5, D)
    together = generate(decoder, sight_of(decoder, tokens), beams=beams, max_length=12)
    assert len({tuple(words) for words in together.words}) > 1
    for image in range(6):
        alone = generate(decoder, sight_of(decoder, one(tokens, image)), beams=beams, max_length=12)
        assert alone.words[0] == together.words[image]
        assert alone.log_probability_B.item() == pytest.approx(together.log_probability_B[image].item(), abs=1e-4)


class Script(torch.nn.Module):
    """Stands in for a decoder: the next word's probabilities depend on the words so far, as a table says."""

    def __init__(self, table: dict[tuple[int, ...], dict[int, float]], max_length: int = 10) -> None:
        super().__init__()
        self.table, self.max_length = table, max_length

    def new_cache(self, rows: int, like: torch.Tensor) -> "Script.Words":
        return self.Words(rows)

    class Words:
        def __init__(self, rows: int) -> None:
            self.rows: list[tuple[int, ...]] = [()] * rows

        def reorder(self, rows: torch.Tensor) -> None:
            self.rows = [self.rows[i] for i in rows.tolist()]

    def step(self, words_BW, memory, cache):
        cache.rows = [(*row, word) for row, word in zip(cache.rows, words_BW.flatten().tolist(), strict=True)]
        logits = torch.full((len(cache.rows), 8), -30.0)
        for row, words in enumerate(cache.rows):
            for word, probability in self.table.get(words[1:], {EOS: 1.0}).items():
                logits[row, word] = torch.tensor(probability).log()
        return logits.view(*words_BW.shape, 8), []


A, B_, C = 4, 5, 6
NOTHING = Sight(Decoder(vocab_size=8, d_model=4, heads=1, layers=1).remember(torch.zeros(1, 1, 4)), None, 0, (1, 1))


def test_a_finished_caption_is_never_lost():
    # "A" ends at once with 0.5 * 0.9; later beams crowd it out of the search, but nothing beats it.
    table = {(): {A: 0.5, B_: 0.5}, (A,): {EOS: 0.9, C: 0.1}, (B_,): {A: 0.5, B_: 0.5}}
    table |= {(B_, x): {A: 0.5, B_: 0.5} for x in (A, B_)}
    out = beam_search(Script(table), NOTHING, beams=2, max_length=8)
    assert out.words == [[BOS, A, EOS]]
    assert out.log_probability_B.exp().item() == pytest.approx(0.45, abs=1e-3)


def test_an_early_end_waits_for_the_kindest_penalty():
    # After "EOS" (0.5), the other way goes through two doubtful words; only their full length repays it.
    table = {(): {EOS: 0.5, A: 0.5}, (A,): {B_: 0.6, C: 0.4}}
    table |= {(A, B_): {A: 1.0}, (A, B_, A): {A: 1.0}, (A, B_, A, A): {A: 1.0}}
    out = beam_search(Script(table), NOTHING, beams=2, max_length=7, alpha=1.0)
    assert out.words == [[BOS, A, B_, A, A, A, EOS]]  # ln 0.3 / (11/6) = -0.66 beats ln 0.5 = -0.69


def test_beams_see_past_the_greedy_choice():
    table = {(): {A: 0.6, B_: 0.4}, (A,): {C: 0.4, A: 0.3, EOS: 0.3}, (B_,): {EOS: 1.0}}
    assert greedy(Script(table), NOTHING, max_length=8).words == [[BOS, A, C, EOS]]
    assert beam_search(Script(table), NOTHING, beams=2, max_length=8).words == [[BOS, B_, EOS]]


def test_the_length_penalty_favours_longer_captions():
    table = {(): {EOS: 0.3, A: 0.7}, (A,): {B_: 0.6, EOS: 0.4}, (A, B_): {C: 0.6, EOS: 0.4}}
    lengths = []
    for alpha in (-3.0, 0.0, 3.0):
        out = beam_search(Script(table), NOTHING, beams=3, max_length=8, alpha=alpha)
        lengths.append(len(out.words[0]))
    assert lengths == [2, 2, 5]
    assert length_penalty(1, 0.7) == 1.0
    assert length_penalty(7, 1.0) == 2.0
    assert length_penalty(7, 2.0) == 4.0
    assert length_penalty(9, 0.0) == 1.0


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("likeliest", [PAD, BOS, UNK])
def test_bookkeeping_words_are_never_written(make_decoder, beams, likeliest):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.output.bias[likeliest] += 50.0
    out = generate(decoder, sight_of(decoder, torch.randn(3, 4, D)), beams=beams, max_length=10)
    for words in out.words:
        assert words[0] == BOS
        assert not {PAD, BOS, UNK} & set(words[1:])
        assert EOS not in words[1:-1]
    assert out.log_probability_B.isfinite().all()


def test_log_probabilities_are_normalised_over_real_words_and_leave_the_logits_alone():
    logits = torch.randn(2, 3, 9)
    before = logits.clone()
    log_probs = next_log_probs(logits)
    assert torch.equal(logits, before)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))
    assert (log_probs[..., [PAD, BOS, UNK]] == -torch.inf).all()
    assert next_log_probs(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("max_length", [2, 3, 5, 6, 7, 100])
def test_no_caption_outgrows_its_limits(make_decoder, beams, max_length):
    decoder = make_decoder(max_length=5)
    with torch.no_grad():
        decoder.output.bias[EOS] -= 50.0  # never ends by itself
    out = generate(decoder, sight_of(decoder, torch.randn(2, 4, D)), beams=beams, max_length=max_length)
    # BOS and what five positions predict; or the limit that was asked for.
    assert [len(words) for words in out.words] == [min(max_length, 6)] * 2
    assert all(EOS not in words for words in out.words)
    for image, words in enumerate(out.words):
        assert out.log_probability_B[image].isfinite(), words


@pytest.mark.parametrize("beams", [1, 3])
def test_ends_as_soon_as_every_caption_has_ended(make_decoder, beams):
    decoder, steps = make_decoder(), []
    with torch.no_grad():
        decoder.output.bias[EOS] += 50.0
    original = decoder.step
    decoder.step = lambda *a, **k: steps.append(1) or original(*a, **k)
    out = generate(decoder, sight_of(decoder, torch.randn(2, 4, D)), beams=beams, max_length=12)
    assert out.words == [[BOS, EOS]] * 2
    assert len(steps) == 1


def test_a_vocabulary_of_one_word_and_more_beams_than_captions(make_decoder):
    decoder = make_decoder(vocab_size=5, max_length=3)
    out = beam_search(decoder, sight_of(decoder, torch.randn(2, 4, D)), beams=6, max_length=4)
    for words in out.words:
        assert words in ([BOS, EOS], [BOS, 4, EOS], [BOS, 4, 4, EOS], [BOS, 4, 4, 4])
    assert out.log_probability_B.isfinite().all()


@pytest.mark.parametrize("beams", [1, 3])
def test_memory_is_never_repeated(make_decoder, beams):
    decoder, tokens, seen = make_decoder(), torch.randn(2, 4, D), []
    sight = sight_of(decoder, tokens)
    attention = decoder.layers[0].cross_attention
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, inputs[1].data_ptr())))
    generate(decoder, sight, beams=beams, max_length=6)
    assert {shape for shape, _ in seen} == {(2, beams, D)}
    assert {pointer for _, pointer in seen} == {sight.memory.keys_values[0][0].data_ptr()}


@pytest.mark.parametrize("beams", [1, 3])
def test_bf16_autocast(make_decoder, beams):
    decoder, tokens = make_decoder(), torch.randn(2, 4, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(decoder, sight_of(decoder, tokens), beams=beams, max_length=8)
    assert out.log_probability_B.dtype == torch.float32
    assert out.log_probability_B.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "generation.beams=0 is out of range: 1 (greedy) or more"),
        ({"max_length": 1}, "generation.max_length=1 is out of range: 2 (BOS and EOS) or more"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        generate(Script({}), NOTHING, **options)
    assert str(caught.value) == message
