import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_tell.errors import UserError
from prune_tell.pruning.reduction import reducers
from prune_tell.pruning.scores import scorers
from prune_tell.pruning.topk import TopK, topk


@st.composite
def problems(draw):
    B, N, seed = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(0, 1000))
    K = draw(st.integers(1, N))
    torch.manual_seed(seed)
    scores = torch.stack([torch.randperm(N).float() for _ in range(B)])  # no ties
    return torch.randn(B, N, 3), scores, K


@given(problems())
def test_keeps_the_best_in_grid_order(problem):
    tokens, scores, K = problem
    reduction = topk(tokens, scores, K)
    for row in range(len(tokens)):
        best = sorted(range(tokens.shape[1]), key=lambda n: -scores[row, n])[:K]
        kept = (reduction.assignment_BN[row] >= 0).nonzero().flatten().tolist()
        assert kept == sorted(best)
        assert torch.equal(reduction.tokens_BKD[row], tokens[row, sorted(best)])
        # One kept token for one position, in order: a bijection.
        assert reduction.assignment_BN[row, kept].tolist() == list(range(K))


@given(problems())
def test_the_choice_moves_with_the_tokens(problem):
    tokens, scores, K = problem
    order = torch.randperm(tokens.shape[1])
    kept = topk(tokens, scores, K).assignment_BN >= 0
    moved = topk(tokens[:, order], scores[:, order], K)
    assert torch.equal(moved.assignment_BN >= 0, kept[:, order])


@given(problems())
def test_images_of_a_batch_are_independent(problem):
    tokens, scores, K = problem
    together = topk(tokens, scores, K)
    for row in range(len(tokens)):
        alone = topk(tokens[row : row + 1], scores[row : row + 1], K)
        assert torch.equal(alone.tokens_BKD[0], together.tokens_BKD[row])
        assert torch.equal(alone.assignment_BN[0], together.assignment_BN[row])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("score", ["norm", "cls_attention", "learned", "random"])
def test_dropped_tokens_leave_the_graph(score, ratio):
    reducer = TopK(width=8, prune_ratio=ratio, score=score)
    tokens = torch.randn(3, 10, 8, requires_grad=True)
    reduction = reducer(tokens, torch.rand(3, 10))
    K = {0.3: 7, 0.5: 5, 0.9: 1}[ratio]
    assert reduction.tokens_BKD.shape == (3, K, 8)
    reduction.tokens_BKD.square().sum().backward()
    dropped = reduction.assignment_BN < 0
    assert (dropped.sum(1) == 10 - K).all()
    assert (tokens.grad[dropped] == 0).all()
    assert (tokens.grad[~dropped] != 0).any(-1).all()


def test_gradient_reaches_every_part_of_the_learned_score():
    reducer = TopK(width=8, prune_ratio=0.5, score="learned")
    reducer(torch.randn(3, 10, 8)).tokens_BKD.square().sum().backward()
    for name, parameter in reducer.named_parameters():
        assert (parameter.grad != 0).any(), name


@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_the_learned_score_gates_the_tokens_it_chose(seed, ratio):
    torch.manual_seed(seed)
    reducer, tokens = TopK(width=8, prune_ratio=ratio, score="learned").eval(), torch.randn(2, 10, 8)
    reduction = reducer(tokens)
    scores = reducer.scorer(tokens, None)
    for row in range(2):
        kept = scores[row].topk(reduction.tokens_BKD.shape[1]).indices.sort().values
        expected = tokens[row, kept] * 2 * scores[row, kept, None].sigmoid()
        torch.testing.assert_close(reduction.tokens_BKD[row], expected)


def test_a_learned_score_draws_its_tokens_in_training_and_keeps_the_best_later():
    """A token that is never tried can never prove itself; Gumbel noise draws one with probability softmax(score)."""
    reducer, tokens = TopK(width=8, kept_tokens=1, score="learned"), 3 * torch.randn(1, 5, 8)
    with torch.no_grad():
        reducer.scorer.head[-1].weight *= 5
        share = reducer.scorer(tokens, None)[0].softmax(dim=0)
        many = reducer(tokens.expand(4000, 5, 8)).assignment_BN.ge(0).float()
    assert share.max() > 1.5 * share.min(), "equal scores would prove nothing"
    # 4000 draws: a share of 0.5 has a standard deviation of 0.008.
    torch.testing.assert_close(many.mean(dim=0), share, rtol=0, atol=0.04)
    best = reducer.eval()(tokens.expand(20, 5, 8)).assignment_BN.ge(0).int().argmax(dim=1)
    assert best.eq(share.argmax()).all()


@pytest.mark.parametrize("score", ["norm", "cls_attention", "learned", "random"])
@pytest.mark.parametrize("options", [{"prune_ratio": 0.0}, {"kept_tokens": 10}, {"kept_tokens": 99}])
def test_nothing_to_prune_gives_the_very_same_tensor(score, options):
    tokens = torch.randn(2, 10, 8)
    assert TopK(width=8, score=score, **options)(tokens).tokens_BKD is tokens


def test_scores():
    tokens = torch.randn(2, 6, 8)
    torch.testing.assert_close(scorers["norm"](width=8)(tokens, None), tokens.square().sum(-1).sqrt())
    attention = torch.rand(2, 6)
    assert scorers["cls_attention"](width=8)(tokens, attention) is attention
    torch.manual_seed(1)
    first = scorers["random"](width=8)(tokens, None)
    second = scorers["random"](width=8)(tokens, None)
    torch.manual_seed(1)
    assert torch.equal(scorers["random"](width=8)(tokens, None), first)
    assert not torch.equal(first, second)
    with pytest.raises(UserError) as caught:
        scorers["cls_attention"](width=8)(tokens, None)
    assert str(caught.value) == (
        "pruning.score=cls_attention needs a backbone with a CLS token and self-attention (a ViT); "
        "use norm or learned with this one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 1.0}, "prune_ratio=1.0 is out of range: 0 (keep all tokens) up to, not including, 1"),
        ({"kept_tokens": 0}, "kept_tokens=0 is out of range: at least 1 token must stay"),
        (
            {"score": "nrom"},
            "pruning.score=nrom is unknown (one of: cls_attention, learned, norm, random); did you mean 'norm'?",
        ),
    ],
)
def test_mistakes_end_before_any_work(options, message):
    with pytest.raises(UserError) as caught:
        reducers["topk"](width=8, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("score", ["norm", "cls_attention", "learned"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_compiles_without_a_graph_break(score, ratio):
    reducer, tokens, attention = TopK(width=8, prune_ratio=ratio, score=score), torch.randn(2, 10, 8), torch.rand(2, 10)
    torch._dynamo.reset()
    torch.manual_seed(1)  # the learned score draws its tokens in training
    compiled = torch.compile(reducer, fullgraph=True, backend="eager")(tokens, attention)
    torch.manual_seed(1)
    for ours, expected in zip(compiled, reducer(tokens, attention), strict=True):
        torch.testing.assert_close(ours, expected)
