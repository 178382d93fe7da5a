"""Greedy and beam search over one key/value cache.

Shape letters: B images, W beams, R = B * W rows of the cache, T words, V vocabulary, C = 2 W candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prune_tell.data.tokenizer import BOS, EOS, PAD, UNK
from prune_tell.errors import UserError
from prune_tell.models.captioner import Sight
from prune_tell.models.decoder import Decoder

NEVER = (PAD, BOS, UNK)  # a caption consists of words; these are bookkeeping


class Generated(NamedTuple):
    """Captions of a batch.

    Attributes:
        words: per image the token ids `[BOS, ..., EOS]` of its best caption (EOS missing where the length ran out).
        log_probability_B: summed log-probability of its words, EOS included.
    """

    words: list[list[int]]
    log_probability_B: Tensor


def next_log_probs(logits_BWV: Tensor) -> Tensor:
    """Log-probabilities of the next word, the bookkeeping tokens ruled out."""
    logits_BWV = logits_BWV.to(torch.float32, copy=True)
    for word in NEVER:  # one by one: a list of indices would have to be copied to the GPU at every step
        logits_BWV[..., word] = -torch.inf
    return logits_BWV.log_softmax(dim=-1)


@torch.inference_mode()
def greedy(decoder: Decoder, sight: Sight, *, max_length: int) -> Generated:
    """Always take the likeliest next word.

    Args:
        decoder: in eval mode.
        sight: the images.
        max_length: most tokens of a caption, BOS and EOS included.
    """
    keys = sight.memory.keys_values[0][0]
    B, device = keys.shape[0], keys.device
    cache = decoder.new_cache(B, like=keys)
    words_BT = torch.full((B, 1), BOS, device=device)
    total_B = torch.zeros(B, device=device)
    done_B = torch.zeros(B, dtype=torch.bool, device=device)
    for _ in range(min(max_length, decoder.max_length + 1) - 1):
        logits_B1V, _ = decoder.step(words_BT[:, -1:], sight.memory, cache)
        best_B, word_B = next_log_probs(logits_B1V)[:, 0].max(dim=-1)
        word_B = torch.where(done_B, PAD, word_B)
        total_B += torch.where(done_B, 0.0, best_B)
        words_BT = torch.cat([words_BT, word_B[:, None]], dim=1)
        done_B |= word_B == EOS
        if bool(done_B.all()):
            break
    return Generated([[w for w in row if w != PAD] for row in words_BT.tolist()], total_B)


def length_penalty(length: int, alpha: float) -> float:
    """`((5 + length) / 6) ** alpha` of GNMT (Wu et al. 2016, equation 14); `alpha` 0 leaves scores alone."""
    return float(((5 + length) / 6) ** alpha)


@torch.inference_mode()
def beam_search(decoder: Decoder, sight: Sight, *, beams: int, max_length: int, alpha: float = 0.0) -> Generated:
    """Keep the `beams` likeliest unfinished captions at every step; return the best finished one.

    A caption is finished when EOS is among the W best continuations of the image. An image is done when no
    unfinished beam can still beat its best finished caption: scores only fall as words are added, and the bound uses
    the most favourable length penalty a longer caption could get. A beam that runs out of length counts as finished.

    Args:
        decoder: in eval mode.
        sight: the images.
        beams: W; every beam is a query position of its image, so keys and values are never repeated.
        max_length: most tokens of a caption, BOS and EOS included.
        alpha: exponent of the GNMT length penalty that finished captions are divided by.
    """
    keys = sight.memory.keys_values[0][0]
    B, device, W = keys.shape[0], keys.device, beams
    steps = min(max_length, decoder.max_length + 1) - 1
    cache = decoder.new_cache(B * W, like=keys)
    words_BWT = torch.full((B, W, 1), BOS, device=device)
    # All beams start equal: only the first may branch, or the search would hold W copies of one caption.
    total_BW = torch.full((B, W), -torch.inf, device=device)
    total_BW[:, 0] = 0.0
    best: list[tuple[float, float, list[int]]] = [(-torch.inf, -torch.inf, [BOS, EOS])] * B
    first_row_B1 = torch.arange(B, device=device)[:, None] * W

    def finish(image: int, words: list[int], total: float) -> None:
        score = total / length_penalty(len(words) - 1, alpha)
        if score > best[image][0]:
            best[image] = (score, total, words)

    done = [False] * B
    for step in range(1, steps + 1):
        logits_BWV, _ = decoder.step(words_BWT[:, :, -1], sight.memory, cache)
        candidates_BWV = total_BW.unsqueeze(-1) + next_log_probs(logits_BWV)
        V = candidates_BWV.shape[-1]
        # Each beam has one EOS, so the 2W best continuations hold at least W unfinished ones (or all there are).
        total_BC, flat_BC = candidates_BWV.flatten(1).topk(min(2 * W, W * V), dim=-1)
        beam_BC, word_BC = flat_BC // V, flat_BC % V
        ends_BC = word_BC == EOS
        for image, rank in (ends_BC[:, :W] & total_BC[:, :W].isfinite()).nonzero().tolist():
            if not done[image]:
                words = words_BWT[image, beam_BC[image, rank]].tolist()
                finish(image, [*words, EOS], total_BC[image, rank].item())
        order_BW = ends_BC.to(torch.int8).sort(dim=-1, stable=True).indices[:, :W]
        total_BW = total_BC.masked_fill(ends_BC, -torch.inf).gather(1, order_BW)
        beam_BW, word_BW = beam_BC.gather(1, order_BW), word_BC.gather(1, order_BW)
        words_BWT = words_BWT.gather(1, beam_BW.unsqueeze(-1).expand(-1, -1, step))
        words_BWT = torch.cat([words_BWT, word_BW.unsqueeze(-1)], dim=-1)
        # The penalty divides a negative number, so the longest caption has the kindest bound.
        kindest = length_penalty(steps if alpha > 0 else step, alpha)
        for image, leader in enumerate(total_BW.amax(dim=1).tolist()):
            done[image] = done[image] or leader / kindest <= best[image][0]
        if all(done):
            break
        cache.reorder((first_row_B1 + beam_BW).flatten())
    for image in range(B):
        if not done[image]:
            for words, total in zip(words_BWT[image].tolist(), total_BW[image].tolist(), strict=True):
                finish(image, words, total)
    return Generated([words for _, _, words in best], torch.tensor([total for _, total, _ in best]))


def generate(decoder: Decoder, sight: Sight, *, beams: int = 1, max_length: int = 40, alpha: float = 0.0) -> Generated:
    """Write a caption per image: greedy for one beam, beam search for more.

    Raises:
        UserError: if `beams` or `max_length` is out of range.
    """
    if beams < 1:
        raise UserError(f"generation.beams={beams} is out of range: 1 (greedy) or more")
    if max_length < 2:
        raise UserError(f"generation.max_length={max_length} is out of range: 2 (BOS and EOS) or more")
    if beams == 1:
        return greedy(decoder, sight, max_length=max_length)
    return beam_search(decoder, sight, beams=beams, max_length=max_length, alpha=alpha)
