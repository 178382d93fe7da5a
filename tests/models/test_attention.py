import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_tell.errors import UserError
from prune_tell.models.attention import Attention


def twins(d_model: int, heads: int, seed: int) -> tuple[Attention, nn.MultiheadAttention]:
    """Our attention and torch's with the same weights."""
    torch.manual_seed(seed)
    ours, theirs = Attention(d_model=d_model, heads=heads), nn.MultiheadAttention(d_model, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    return ours.eval(), theirs.eval()


@given(
    seed=st.integers(0, 10_000),
    heads=st.sampled_from([1, 2, 4]),
    B=st.integers(1, 3),
    Q=st.integers(1, 5),
    S=st.integers(1, 6),
    kind=st.sampled_from(["none", "bool", "float"]),
    training=st.booleans(),
)
def test_equals_torchs_multi_head_attention(seed, heads, B, Q, S, kind, training):
    ours, theirs = twins(8, heads, seed)
    ours.train(training)
    x, memory = torch.randn(B, Q, 8), torch.randn(B, S, 8)
    look = torch.rand(Q, S) > 0.4
    look[:, 0] = True
    bias = torch.randn(Q, S)
    mask = {"none": None, "bool": look, "float": bias}[kind]
    their_mask = {"none": None, "bool": ~look, "float": bias}[kind]
    expected, expected_weights = theirs(x, memory, memory, attn_mask=their_mask, average_attn_weights=False)
    keys_values = ours.keys_values(memory)
    y, no_weights = ours(x, *keys_values, mask)
    slow, weights = ours(x, *keys_values, mask, weights=True)
    assert no_weights is None
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slow, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_masked_key_changes_nothing(training):
    attention, _ = twins(8, 2, 0)
    attention.train(training)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, False, True, False]])
    other = torch.where(mask[0, :, None], memory, 100.0)
    before, after = (attention(x, *attention.keys_values(m), mask)[0] for m in (memory, other))
    assert torch.equal(before, after)


def test_the_weights_told_are_those_before_dropout():
    attention = Attention(d_model=8, heads=2, dropout=0.5).train()
    x = torch.randn(1, 3, 8)
    _, weights = attention(x, *attention.keys_values(x), weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 3))
    assert (weights > 0).all()


def test_dropout_falls_on_weights_only_while_training():
    attention = Attention(d_model=8, heads=2, dropout=0.5)
    x = torch.randn(4, 6, 8)

    def run():
        return attention(x, *attention.keys_values(x))[0]

    attention.train()
    assert not torch.equal(run(), run())
    attention.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize(("training", "weights"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_bf16_autocast_stays_close_and_finite(training, weights, kind):
    attention, _ = twins(32, 4, 1)
    attention.train(training)
    x = torch.randn(2, 5, 32)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = causal if kind == "bool" else torch.zeros(5, 5).masked_fill(~causal, -torch.inf)
    expected, _ = attention(x, *attention.keys_values(x), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, maps = attention(x, *attention.keys_values(x), mask, weights=weights)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=3e-2, rtol=3e-2)
    if maps is not None:
        assert maps.dtype == torch.float32  # a half-precision softmax would not sum to 1
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize(("heads", "d_model"), [(3, 8), (0, 8), (-1, 8), (16, 8)])
def test_heads_that_dont_divide_the_width_are_refused(heads, d_model):
    with pytest.raises(UserError) as caught:
        Attention(d_model=d_model, heads=heads)
    assert str(caught.value) == (
        f"decoder.heads={heads} does not divide decoder.d_model={d_model} (allowed: [1, 2, 4, 8])"
    )
