"""Random hiding of tokens: how many, which, and only while training."""

import pytest
import torch

from prune_tell.errors import UserError
from prune_tell.pruning.token_dropout import TokenDropout


def tokens(B: int = 3, K: int = 10) -> torch.Tensor:
    return torch.arange(B * K, dtype=torch.float32).view(B, K, 1).requires_grad_()


def test_training_shows_the_right_number_of_different_real_tokens() -> None:
    hide = TokenDropout(0.3).train()
    shown = hide(tokens())
    assert shown.shape == (3, 7, 1)
    for row, own in zip(shown.squeeze(-1).tolist(), tokens().squeeze(-1).tolist(), strict=True):
        assert len(set(row)) == 7
        assert set(row) <= set(own)


def test_every_image_and_every_step_draws_anew() -> None:
    hide = TokenDropout(0.5).train()
    x = torch.arange(40.0).expand(8, 40).unsqueeze(-1)
    first, second = hide(x).squeeze(-1), hide(x).squeeze(-1)
    assert not torch.equal(first.sort(dim=1).values, second.sort(dim=1).values)
    assert len({tuple(sorted(row)) for row in first.tolist()}) > 1


def test_every_token_is_shown_about_equally_often() -> None:
    hide = TokenDropout(0.5).train()
    x = torch.arange(10.0).expand(2000, 10).unsqueeze(-1)
    counts = torch.bincount(hide(x).flatten().long(), minlength=10)
    # 2000 draws of 5 in 10: each count is binomial with mean 1000 and deviation 22.
    assert (counts - 1000).abs().max() < 6 * 22


def test_hidden_tokens_get_no_gradient_and_evaluation_shows_all() -> None:
    x = tokens()
    TokenDropout(0.3).train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 3 * 7
    assert TokenDropout(0.3).eval()(x) is x
    assert TokenDropout(0.0).train()(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_shares_are_refused(p: float) -> None:
    with pytest.raises(UserError, match=rf"decoder\.token_dropout={p} is out of range: 0 up to, not including, 1"):
        TokenDropout(p)
