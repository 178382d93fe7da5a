import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_tell.errors import UserError
from prune_tell.pruning.reduction import (
    gather_tokens,
    keep_all,
    kept_count,
    mean_by_assignment,
    scatter_to_grid,
)


@pytest.mark.parametrize(
    ("total", "ratio", "kept"),
    [
        (196, 0.0, 196),
        (196, 0.3, 138),
        (196, 0.5, 98),
        (196, 0.999, 1),
        (49, 0.3, 35),
        (49, 0.5, 25),
        (49, 0.9, 5),
        (10, 0.7, 3),  # 10 * (1 - 0.7) is 3.0000000000000004 in floating point
        (10, 0.9, 1),
        (1, 0.9, 1),
        (1, 0.0, 1),
        (3, 0.5, 2),
    ],
)
def test_kept_count(total, ratio, kept):
    assert kept_count(total, ratio) == kept


@given(total=st.integers(1, 5000), percent=st.integers(0, 99))
def test_kept_count_is_the_exact_ceiling(total, percent):
    exact = math.ceil(total * (1 - Fraction(percent, 100)))
    assert kept_count(total, percent / 100) == max(1, exact)


@given(total=st.integers(1, 500), kept=st.integers(1, 600), ratio=st.floats(0, 0.99))
def test_an_absolute_budget_overrides_the_ratio(total, kept, ratio):
    assert kept_count(total, ratio, kept) == min(kept, total)


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(UserError) as caught:
        kept_count(49, ratio)
    assert str(caught.value) == f"prune_ratio={ratio} is out of range: 0 (keep all tokens) up to, not including, 1"


@pytest.mark.parametrize("kept", [0, -3])
def test_an_impossible_budget_is_refused(kept):
    with pytest.raises(UserError) as caught:
        kept_count(49, 0.3, kept)
    assert str(caught.value) == f"kept_tokens={kept} is out of range: at least 1 token must stay"


def test_keep_all_gives_the_very_same_tokens():
    tokens = torch.randn(2, 5, 3)
    reduction = keep_all(tokens)
    assert reduction.tokens_BKD is tokens
    assert reduction.assignment_BN.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert reduction.size_BK.tolist() == [[1.0] * 5] * 2


@st.composite
def choices(draw):
    """Tokens, and for every row K kept positions in grid order."""
    B, N, seed = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(0, 1000))
    K = draw(st.integers(1, N))
    torch.manual_seed(seed)
    kept = torch.stack([torch.randperm(N)[:K].sort().values for _ in range(B)])
    return torch.randn(B, N, 3), kept


@given(choices())
def test_gathered_tokens_and_their_assignment(choice):
    tokens, kept = choice
    (B, N, _), K = tokens.shape, kept.shape[1]
    reduction = gather_tokens(tokens, kept)
    assert reduction.size_BK.tolist() == [[1.0] * K] * B
    for row in range(B):
        assert torch.equal(reduction.tokens_BKD[row], tokens[row, kept[row]])
        stands_for = {int(k): i for i, k in enumerate(kept[row])}
        assert reduction.assignment_BN[row].tolist() == [stands_for.get(n, -1) for n in range(N)]


@given(choices(), st.floats(-5, 5))
def test_painting_back_and_averaging_are_a_round_trip(choice, fill):
    tokens, kept = choice
    K = kept.shape[1]
    reduction = gather_tokens(tokens, kept)
    torch.testing.assert_close(mean_by_assignment(tokens, reduction.assignment_BN, K), reduction.tokens_BKD)
    values = torch.randn(len(kept), K)
    painted = scatter_to_grid(values, reduction.assignment_BN, fill)
    torch.testing.assert_close(painted.gather(1, kept), values)
    assert torch.equal(
        painted[reduction.assignment_BN < 0], torch.full_like(painted, fill)[reduction.assignment_BN < 0]
    )
    again = mean_by_assignment(painted.unsqueeze(-1), reduction.assignment_BN, K).squeeze(-1)
    torch.testing.assert_close(again, values)


@given(st.integers(1, 10), st.integers(1, 5), st.integers(0, 1000))
def test_averages_over_merged_positions(N, K, seed):
    torch.manual_seed(seed)
    assignment, values = torch.randint(-1, K, (2, N)), torch.randn(2, N, 3)
    means = mean_by_assignment(values, assignment, K)
    for row in range(2):
        for k in range(K):
            members = values[row, assignment[row] == k]
            expected = members.mean(0) if len(members) else torch.zeros(3)
            torch.testing.assert_close(means[row, k], expected, atol=1e-6, rtol=1e-5)


def test_dropped_positions_get_no_gradient_from_averages():
    values = torch.randn(1, 4, 2, requires_grad=True)
    mean_by_assignment(values, torch.tensor([[0, -1, 0, 1]]), 2).sum().backward()
    assert values.grad[0, :, 0].tolist() == [0.5, 0.0, 0.5, 1.0]
