"""The caption decoder: words attend to earlier words, then to the visual tokens that were kept.

Shape letters: B images, Q query positions of an image (all words of all its captions, packed), W beams, T words of
one caption, K visual tokens, H heads, E head width, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from prune_tell.errors import UserError
from prune_tell.models.attention import Attention
from prune_tell.models.dropout import Dropout
from prune_tell.models.feedforward import FeedForward
from prune_tell.models.positions import WordPositions


class Memory(NamedTuple):
    """What the decoder sees of an image: computed once, shared by all its captions and beams.

    Attributes:
        keys_values: per layer the cross-attention keys and values, each `(B, H, K, E)`.
        bias_B11K: added to every cross-attention score (log token sizes after merging), or None.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    bias_B11K: Tensor | None = None


class WordCache:
    """Self-attention keys and values of the words so far: one preallocated block per layer.

    Args:
        rows: B * W captions being written.
        max_length: most words a caption may get.
    """

    def __init__(self, *, layers: int, rows: int, heads: int, max_length: int, head_width: int, like: Tensor) -> None:
        shape = (layers, 2, rows, heads, max_length, head_width)
        self.block = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, layer: int, k_RH1E: Tensor, v_RH1E: Tensor) -> tuple[Tensor, Tensor]:
        """Store one word's keys and values; return those of all words including it."""
        end = self.length + 1
        keys, values = self.block[layer]
        keys[:, :, self.length : end] = k_RH1E
        values[:, :, self.length : end] = v_RH1E
        return keys[:, :, :end], values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row `rows[i]` has written (beams swap places)."""
        written = self.block[:, :, :, :, : self.length]
        self.block[:, :, :, :, : self.length] = written.index_select(2, rows)


class DecoderLayer(nn.Module):
    """Masked self-attention, cross-attention to visual tokens, feed-forward; pre- or post-norm."""

    def __init__(
        self,
        *,
        d_model: int,
        heads: int,
        ff_dim: int,
        dropout: float,
        attention_dropout: float,
        norm: Literal["pre", "post"],
        activation: Literal["relu", "gelu"],
    ) -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.self_attention = Attention(d_model=d_model, heads=heads, dropout=attention_dropout)
        self.cross_attention = Attention(d_model=d_model, heads=heads, dropout=attention_dropout)
        self.feed_forward = FeedForward(d_model=d_model, hidden=ff_dim, activation=activation, dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.dropout = Dropout(dropout)

    def residual(self, which: int, x_BQD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add `branch` to the stream, normalising before it (pre) or after the sum (post)."""
        norm = self.norms[which]
        if self.pre_norm:
            return x_BQD + self.dropout(branch(norm(x_BQD)))
        y_BQD: Tensor = norm(x_BQD + self.dropout(branch(x_BQD)))
        return y_BQD

    def forward(
        self,
        x_BQD: Tensor,
        attend_to_words: Callable[[Attention, Tensor], Tensor],
        keys_values: tuple[Tensor, Tensor],
        bias_B11K: Tensor | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        maps: list[Tensor | None] = []

        def look(h_BQD: Tensor) -> Tensor:
            y_BQD, weights_BHQK = self.cross_attention(h_BQD, *keys_values, bias_B11K, weights=weights)
            maps.append(weights_BHQK)
            return y_BQD

        x_BQD = self.residual(0, x_BQD, lambda h: attend_to_words(self.self_attention, h))
        x_BQD = self.residual(1, x_BQD, look)
        x_BQD = self.residual(2, x_BQD, self.feed_forward)
        return x_BQD, maps[0]


class Decoder(nn.Module):
    """Writes captions from visual tokens.

    Args:
        vocab_size: V.
        d_model, layers, heads, ff_dim: the size of the Transformer.
        dropout: on embeddings, activations and residual branches.
        attention_dropout: on attention weights; None takes `dropout`.
        norm: `pre` (with a final LayerNorm) or `post` (as in the original Transformer, without).
        activation: `relu` or `gelu`.
        positions: of words, `sinusoidal` or `learned`.
        max_length: longest caption in tokens, BOS included.
        tie_embeddings: use the word embedding as output weights, too.

    Raises:
        UserError: if a size or rate is out of range.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int = 512,
        layers: int = 2,
        heads: int = 4,
        ff_dim: int = 2048,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        norm: Literal["pre", "post"] = "pre",
        activation: Literal["relu", "gelu"] = "gelu",
        positions: Literal["sinusoidal", "learned"] = "sinusoidal",
        max_length: int = 40,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"decoder.layers={layers} is out of range: 1 or more")
        for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if rate is not None and not 0.0 <= rate < 1.0:
                raise UserError(f"decoder.{name}={rate} is out of range: 0 up to, not including, 1")
        self.embedding = nn.Embedding(vocab_size, d_model)
        # Scaled to unit size on the way in (below), so that tied output logits start small.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.positions = WordPositions(kind=positions, d_model=d_model, max_length=max_length)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(
                d_model=d_model,
                heads=heads,
                ff_dim=ff_dim,
                dropout=dropout,
                attention_dropout=dropout if attention_dropout is None else attention_dropout,
                norm=norm,
                activation=activation,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model) if norm == "pre" else nn.Identity()
        self.output = nn.Linear(d_model, vocab_size, bias=not tie_embeddings)
        if tie_embeddings:
            self.output.weight = self.embedding.weight
        self.d_model = d_model
        self.heads = heads
        self.max_length = max_length

    def remember(self, tokens_BKD: Tensor, bias_B11K: Tensor | None = None) -> Memory:
        """Project the visual tokens to every layer's cross-attention keys and values."""
        layers = cast(list[DecoderLayer], list(self.layers))
        return Memory([layer.cross_attention.keys_values(tokens_BKD) for layer in layers], bias_B11K)

    def embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """Embed word ids at their positions in the caption, any shape, D appended."""
        x: Tensor = self.dropout(self.embedding(words) * self.d_model**0.5 + self.positions(positions))
        return x

    def forward(
        self,
        words_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        memory: Memory,
        *,
        weights: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Predict the next word at every position (teacher forcing).

        Args:
            words_BQ: the given words of all captions of an image, one after the other.
            positions_BQ: each word's position in its own caption.
            mask_BQQ: True where a query word may look at a key word (see `PackedCaptions.mask`).
            memory: the image, from `remember`.
            weights: also return each layer's cross-attention weights.

        Returns:
            Logits `(B, Q, V)` and per layer the weights `(B, H, Q, K)` or None.
        """
        mask_B1QQ = mask_BQQ.unsqueeze(1)

        def attend_to_words(attention: Attention, h_BQD: Tensor) -> Tensor:
            return attention(h_BQD, *attention.keys_values(h_BQD), mask_B1QQ)[0]

        x_BQD, maps = self.embed(words_BQ, positions_BQ), []
        for layer, keys_values in zip(self.layers, memory.keys_values, strict=True):
            x_BQD, layer_map = layer(x_BQD, attend_to_words, keys_values, memory.bias_B11K, weights)
            maps.append(layer_map)
        return self.output(self.norm(x_BQD)), maps

    def new_cache(self, rows: int, like: Tensor) -> WordCache:
        """An empty cache for `rows` captions, of `like`'s device and dtype."""
        return WordCache(
            layers=len(self.layers),
            rows=rows,
            heads=self.heads,
            max_length=self.max_length,
            head_width=self.d_model // self.heads,
            like=like,
        )

    def step(
        self, words_BW: Tensor, memory: Memory, cache: WordCache, *, weights: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Predict the word after `words_BW`, the newest word of each of W captions per image.

        The beams are query positions of one image: they share its keys and values, which are never repeated.

        Returns:
            Logits `(B, W, V)` and per layer the cross-attention weights `(B, H, W, K)` or None.
        """
        B, W = words_BW.shape
        positions_BW = torch.full_like(words_BW, cache.length)
        x_BWD, maps = self.embed(words_BW, positions_BW), []
        for index, (layer, keys_values) in enumerate(zip(self.layers, memory.keys_values, strict=True)):

            def attend_to_words(attention: Attention, h_BWD: Tensor, index: int = index) -> Tensor:
                h_R1D = h_BWD.reshape(B * W, 1, -1)
                k_RHTE, v_RHTE = cache.append(index, *attention.keys_values(h_R1D))
                return attention(h_R1D, k_RHTE, v_RHTE)[0].view(B, W, -1)

            x_BWD, layer_map = layer(x_BWD, attend_to_words, keys_values, memory.bias_B11K, weights)
            maps.append(layer_map)
        cache.length += 1
        return self.output(self.norm(x_BWD)), maps
