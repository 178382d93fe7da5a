"""The loss of words, held against sums by hand and against torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from prune_tell.data.tokenizer import PAD
from prune_tell.training.losses import word_loss


def test_loss_and_accuracy_by_hand():
    """Three real words of two images; the two PAD places predict something absurd and count nowhere."""
    assert PAD == 0
    probabilities = torch.tensor(
        [
            [[0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.1, 0.7], [0.97, 0.01, 0.01, 0.01]],
            [[0.1, 0.5, 0.2, 0.2], [0.01, 0.97, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]],
        ]
    )
    targets = torch.tensor([[2, 1, PAD], [1, PAD, PAD]])
    result = word_loss(probabilities.log(), targets)
    assert float(result.loss) == pytest.approx(-(math.log(0.6) + math.log(0.1) + math.log(0.5)), rel=1e-6)
    assert (int(result.correct), int(result.words)) == (2, 3)


def test_padding_adds_nothing_not_even_a_right_prediction_of_it():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 7), torch.randint(1, 7, (2, 4))
    padded = torch.cat([logits, torch.randn(2, 3, 7)], dim=1)
    padded[:, 4:, PAD] = 50.0
    plain = word_loss(logits, targets)
    wide = word_loss(padded, F.pad(targets, (0, 3), value=PAD))
    assert [float(x) for x in plain] == pytest.approx([float(x) for x in wide], rel=1e-6)


def test_padding_gets_no_gradient():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    word_loss(logits, torch.tensor([[3, PAD, PAD]])).loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() > 0
    assert logits.grad[0, 1:].abs().sum() == 0


def test_micro_batches_add_up():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    whole, parts = word_loss(logits, targets), [word_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert float(whole.loss) == pytest.approx(sum(float(part.loss) for part in parts), rel=1e-6)
    assert int(whole.correct) == sum(int(part.correct) for part in parts)
    assert int(whole.words) == sum(int(part.words) for part in parts) == int((targets != PAD).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torch_s(smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 8), torch.randint(0, 8, (3, 5))
    criterion = torch.nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=smoothing)
    result = word_loss(logits, targets, label_smoothing=smoothing)
    expected = criterion(logits.view(-1, 8), targets.view(-1))
    assert float(result.loss / result.words) == pytest.approx(float(expected), rel=1e-6)


def test_label_smoothing_by_hand():
    """Over V = 4 words, 0.2 smoothing: 0.85 on the right one, 0.05 on each of the others."""
    probabilities = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    result = word_loss(probabilities.log(), torch.tensor([[3]]), label_smoothing=0.2)
    by_hand = -(0.85 * math.log(0.4) + 0.05 * (math.log(0.1) + math.log(0.2) + math.log(0.3)))
    assert float(result.loss) == pytest.approx(by_hand, rel=1e-6)


def test_half_precision_logits_are_summed_in_full():
    """1,000 words of loss 8 would be rounded to multiples of 64 in bf16."""
    logits = torch.zeros(1, 1000, 3001, dtype=torch.bfloat16)
    result = word_loss(logits, torch.ones(1, 1000, dtype=torch.long))
    assert result.loss.dtype == torch.float32
    assert float(result.loss) == pytest.approx(1000 * math.log(3001), rel=1e-5)


def test_only_padding_is_zero_not_nan():
    result = word_loss(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))
    assert [float(x) for x in result] == [0.0, 0.0, 0.0]
