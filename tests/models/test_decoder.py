import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_tell.data.packing import PackedCaptions, pack_captions
from prune_tell.data.tokenizer import BOS, EOS, PAD
from prune_tell.errors import UserError
from prune_tell.models.decoder import Decoder, Memory

V, D = 11, 16


def random_captions(seed: int, images: int, captions: int, longest: int = 7) -> list[list[list[int]]]:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    return [
        [[BOS, *(number(4, V) for _ in range(number(0, longest))), EOS] for _ in range(captions)] for _ in range(images)
    ]


def run(decoder: Decoder, packed: PackedCaptions, memory: Memory) -> torch.Tensor:
    return decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), memory)[0]


def torch_decoder(ours: Decoder, *, norm: str, activation: str, heads: int, ff_dim: int) -> nn.TransformerDecoder:
    """torch's own decoder with our weights."""
    layer = nn.TransformerDecoderLayer(
        D, heads, ff_dim, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre"
    )
    theirs = nn.TransformerDecoder(layer, len(ours.layers), norm=nn.LayerNorm(D) if norm == "pre" else None)

    def copy(target: nn.Module, source: nn.Module) -> None:
        target.load_state_dict(source.state_dict())

    for mine, yours in zip(ours.layers, theirs.layers, strict=True):
        for a, b in ((mine.self_attention, yours.self_attn), (mine.cross_attention, yours.multihead_attn)):
            with torch.no_grad():
                b.in_proj_weight.copy_(torch.cat([a.query.weight, a.key_value.weight]))
                b.in_proj_bias.copy_(torch.cat([a.query.bias, a.key_value.bias]))
            copy(b.out_proj, a.out)
        copy(yours.linear1, mine.feed_forward.expand)
        copy(yours.linear2, mine.feed_forward.contract)
        for a, b in zip(mine.norms, (yours.norm1, yours.norm2, yours.norm3), strict=True):
            copy(b, a)
    if norm == "pre":
        copy(theirs.norm, ours.norm)
    return theirs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torchs_transformer_decoder(make_decoder, norm, activation, training):
    ours = make_decoder(norm=norm, activation=activation, heads=4, layers=3)
    with torch.no_grad():  # fresh norms are all ones and zeros, which would hide a swap
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    theirs = torch_decoder(ours, norm=norm, activation=activation, heads=4, ff_dim=32)
    ours.train(training)
    theirs.train(training)
    packed = pack_captions(random_captions(1, images=4, captions=1))
    tokens = torch.randn(4, 9, D)
    Q = packed.words_BQ.shape[1]
    x = ours.embedding(packed.words_BQ) * math.sqrt(D) + ours.positions(torch.arange(Q))
    pad = packed.words_BQ == PAD
    causal = torch.ones(Q, Q, dtype=torch.bool).triu(1)
    y = theirs(x, tokens, tgt_mask=causal, tgt_key_padding_mask=pad)
    logits = run(ours, packed, ours.remember(tokens))
    torch.testing.assert_close(logits[~pad], ours.output(y)[~pad], atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10_000), captions=st.integers(1, 3), data=st.data())
def test_padding_later_words_and_other_captions_change_nothing(make_decoder, seed, captions, data):
    decoder = make_decoder(seed=seed % 5)
    packed = pack_captions(random_captions(seed, images=2, captions=captions))
    memory = decoder.remember(torch.randn(2, 6, D))
    logits = run(decoder, packed, memory)
    assert logits.isfinite().all()
    image = data.draw(st.integers(0, 1))
    place = data.draw(st.integers(0, packed.words_BQ.shape[1] - 1))
    words = packed.words_BQ.clone()
    words[image, place] = (words[image, place] - 4 + data.draw(st.integers(1, V - 5))) % (V - 4) + 4
    # The mask stays the old one: also a PAD row whose content is anything must not be seen.
    changed = decoder(words, packed.positions_BQ, packed.mask(), memory)[0]
    own = packed.caption_BQ[image] == packed.caption_BQ[image, place]
    later = packed.positions_BQ[image] >= packed.positions_BQ[image, place]
    padding = packed.caption_BQ[image, place] < 0
    touched = torch.zeros_like(packed.words_BQ, dtype=torch.bool)
    if padding:
        touched[image, place] = True
    else:
        touched[image] = own & later
    torch.testing.assert_close(changed[~touched], logits[~touched], atol=1e-6, rtol=0)
    assert not torch.allclose(changed[image, place], logits[image, place])


def test_other_images_change_nothing(make_decoder):
    decoder = make_decoder()
    packed, tokens = pack_captions(random_captions(3, images=3, captions=2)), torch.randn(3, 6, D)
    together = run(decoder, packed, decoder.remember(tokens))
    tokens[1] += 1
    changed = run(decoder, packed, decoder.remember(tokens))
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]], atol=1e-6, rtol=0)
    assert not torch.allclose(changed[1], together[1], atol=1e-3)


@given(
    seed=st.integers(0, 10_000),
    norm=st.sampled_from(["pre", "post"]),
    positions=st.sampled_from(["sinusoidal", "learned"]),
    tie=st.booleans(),
    B=st.integers(1, 3),
    W=st.integers(1, 3),
    T=st.integers(1, 12),
)
@settings(max_examples=15)
@torch.inference_mode()
def test_steps_with_a_cache_equal_one_forward_pass(make_decoder, seed, norm, positions, tie, B, W, T):
    decoder = make_decoder(seed=seed, norm=norm, positions=positions, tie_embeddings=tie)
    tokens, words = torch.randn(B, 5, D), torch.randint(4, V, (B, W, T))
    memory = decoder.remember(tokens)
    cache = decoder.new_cache(B * W, like=tokens)
    stepped = [decoder.step(words[:, :, t], memory, cache)[0] for t in range(T)]
    # Without sharing: every beam is an image of its own, its memory repeated.
    repeated = decoder.remember(tokens.repeat_interleave(W, 0))
    positions_RT = torch.arange(T).expand(B * W, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B * W, T, T)
    full = decoder(words.flatten(0, 1), positions_RT, causal, repeated)[0]
    torch.testing.assert_close(torch.stack(stepped, 2).flatten(0, 1), full, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_reordered_beams_carry_on_what_they_were_given(make_decoder):
    decoder, B, W = make_decoder(), 2, 3
    tokens, words = torch.randn(B, 5, D), torch.randint(4, V, (B, W, 4))
    memory = decoder.remember(tokens)
    cache = decoder.new_cache(B * W, like=tokens)
    for t in range(3):
        decoder.step(words[:, :, t], memory, cache)
    order = torch.tensor([2, 2, 0, 3, 5, 3])
    cache.reorder(order)
    logits = decoder.step(words[:, :, 3], memory, cache)[0]
    history = words.flatten(0, 1)[order].view(B, W, 4).clone()
    history[:, :, 3] = words[:, :, 3]
    again = decoder.new_cache(B * W, like=tokens)
    for t in range(4):
        expected = decoder.step(history[:, :, t], memory, again)[0]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_a_cache_never_grows_and_ends_at_the_longest_caption(make_decoder):
    decoder = make_decoder(max_length=4)
    tokens = torch.randn(1, 3, D)
    memory, cache = decoder.remember(tokens), decoder.new_cache(1, like=tokens)
    block = cache.block.data_ptr()
    for _ in range(4):
        decoder.step(torch.tensor([[5]]), memory, cache)
    assert cache.length == 4
    assert cache.block.data_ptr() == block
    assert cache.block.shape == (2, 2, 1, 2, 4, 8)
    with pytest.raises(IndexError):
        decoder.step(torch.tensor([[5]]), memory, cache)


@torch.inference_mode()
def test_cross_attention_weights_are_told_and_change_nothing(make_decoder):
    decoder = make_decoder()
    packed, tokens = pack_captions(random_captions(5, images=2, captions=2)), torch.randn(2, 6, D)
    memory = decoder.remember(tokens)
    plain, nothing = decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), memory)
    logits, maps = decoder(packed.words_BQ, packed.positions_BQ, packed.mask(), memory, weights=True)
    assert nothing == [None, None]
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    assert [m.shape for m in maps] == [(2, 2, packed.words_BQ.shape[1], 6)] * 2
    for layer_map in maps:
        torch.testing.assert_close(layer_map.sum(-1), torch.ones(layer_map.shape[:-1]))
    cache = decoder.new_cache(2, like=tokens)
    _, step_maps = decoder.step(packed.words_BQ[:, :1], memory, cache, weights=True)
    torch.testing.assert_close(step_maps[1], maps[1][:, :, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_token_of_size_three_counts_as_three_tokens(make_decoder, training):
    decoder = make_decoder().train(training)
    packed, tokens = pack_captions(random_captions(6, images=2, captions=2)), torch.randn(2, 4, D)
    size = torch.tensor([1.0, 3.0, 1.0, 2.0])
    merged = decoder.remember(tokens, size.log().expand(2, 1, 1, 4))
    spread = decoder.remember(tokens.repeat_interleave(size.long(), dim=1))
    torch.testing.assert_close(run(decoder, packed, merged), run(decoder, packed, spread), atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_one_parameter(make_decoder):
    decoder = make_decoder(tie_embeddings=True)
    assert decoder.output.weight is decoder.embedding.weight
    assert decoder.output.bias is None
    assert (
        sum(p.numel() for p in make_decoder().parameters()) - sum(p.numel() for p in decoder.parameters()) == V * D + V
    )
    packed = pack_captions([[[BOS, 5, EOS]]])
    run(decoder, packed, decoder.remember(torch.randn(1, 3, D))).square().sum().backward()
    assert (decoder.embedding.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bf16_autocast_trains_and_steps_without_nan(make_decoder, norm):
    decoder = make_decoder(norm=norm, dropout=0.1, attention_dropout=0.2).train()
    captions = [*random_captions(7, images=2, captions=2), []]  # an image without captions is all padding
    packed, tokens = pack_captions(captions), torch.randn(3, 6, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run(decoder, packed, decoder.remember(tokens))
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    assert tokens.grad.isfinite().all()
    decoder.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory = decoder.remember(tokens)
        cache = decoder.new_cache(3, like=memory.keys_values[0][0])
        for _ in range(3):
            assert decoder.step(torch.full((3, 1), 5), memory, cache)[0].isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(make_decoder, training):
    decoder = make_decoder().train(training)
    packed, tokens = pack_captions(random_captions(8, images=2, captions=2)), torch.randn(2, 5, D)

    def whole(words, positions, mask, tokens):
        return decoder(words, positions, mask, decoder.remember(tokens))[0]

    arguments = (packed.words_BQ, packed.positions_BQ, packed.mask(), tokens)
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(compiled, whole(*arguments))


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_an_impossible_dropout_is_refused(name, rate):
    with pytest.raises(UserError) as caught:
        Decoder(vocab_size=V, d_model=D, **{name: rate})
    assert str(caught.value) == f"decoder.{name}={rate} is out of range: 0 up to, not including, 1"


def test_a_decoder_without_layers_is_refused():
    with pytest.raises(UserError) as caught:
        Decoder(vocab_size=V, d_model=D, layers=0)
    assert str(caught.value) == "decoder.layers=0 is out of range: 1 or more"


def test_attention_dropout_follows_dropout_unless_given():
    follows, own = (Decoder(vocab_size=V, d_model=D, dropout=0.3, attention_dropout=a) for a in (None, 0.1))
    assert follows.layers[0].cross_attention.dropout.p == follows.layers[0].self_attention.dropout.p == 0.3
    assert own.layers[0].cross_attention.dropout.p == own.layers[0].self_attention.dropout.p == 0.1
    assert own.layers[0].dropout.p == own.layers[0].feed_forward.dropout.p == own.dropout.p == 0.3
