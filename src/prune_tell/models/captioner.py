"""The whole captioner: backbone, reduction, projection, decoder.

Shape letters: B images, P prefix tokens, N grid tokens, K kept tokens, Q packed words, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from prune_tell.data.features import Features
from prune_tell.data.packing import PackedCaptions
from prune_tell.models.backbone import Backbone
from prune_tell.models.decoder import Decoder, Memory
from prune_tell.models.dropout import Dropout
from prune_tell.models.positions import GridPositions
from prune_tell.pruning.reduction import Reduction, mean_by_assignment
from prune_tell.pruning.token_dropout import TokenDropout


class Sight(NamedTuple):
    """An image as the decoder sees it.

    Attributes:
        memory: cross-attention keys and values of prefix and kept tokens.
        reduction: which grid positions the kept tokens stand for.
        prefix: how many memory tokens come before the kept ones.
        grid: rows and columns of the unreduced grid.
    """

    memory: Memory
    reduction: Reduction
    prefix: int
    grid: tuple[int, int]


class CaptionerOutput(NamedTuple):
    """Next-word logits `(B, Q, V)`, the image they came from, and cross-attention weights per layer (or None)."""

    logits_BQV: Tensor
    sight: Sight
    attention: list[Tensor | None]


class Projection(nn.Module):
    """Brings visual tokens to the decoder's width: LayerNorm, Linear, dropout.

    The norm is there because backbones end differently: a ViT normalises its tokens, a ConvNet does not.
    """

    def __init__(self, *, width: int, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, tokens_BKD: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.linear(self.norm(tokens_BKD)))
        return y


class Captioner(nn.Module):
    """Images (or cached features) and captions in, next-word logits out.

    Args:
        backbone: images to features.
        reducer: grid tokens to fewer, before the projection, so that dropped tokens cost nothing after it.
        projection: visual width to decoder width.
        grid_positions: where a token stands in the picture.
        decoder: writes the words.
        token_dropout: share of the kept tokens that a training step hides at random.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        reducer: nn.Module,
        projection: Projection,
        grid_positions: GridPositions,
        decoder: Decoder,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reducer = reducer
        self.projection = projection
        self.grid_positions = grid_positions
        self.decoder = decoder
        self.token_dropout = TokenDropout(token_dropout)

    def encode(self, images: Tensor) -> Features:
        """Run the backbone; without a graph when it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone.frozen):
            features: Features = self.backbone(images)
        return features

    def look(self, visual: Tensor | Features) -> Sight:
        """Reduce and project an image's tokens, and prepare the decoder's memory: once per image."""
        features = visual if isinstance(visual, Features) else self.encode(visual)
        reduction: Reduction = self.reducer(features.tokens_BND, features.attention_BN)
        kept_BKD = self.projection(reduction.tokens_BKD)
        place_ND = self.grid_positions(features.grid, kept_BKD.device)
        if place_ND is not None:
            B, K, _ = kept_BKD.shape
            kept_BKD = kept_BKD + mean_by_assignment(place_ND.expand(B, -1, -1), reduction.assignment_BN, K)
        kept_BKD = self.token_dropout(kept_BKD)
        prefix = features.prefix_BPD.shape[1]
        tokens_BKD = torch.cat([self.projection(features.prefix_BPD), kept_BKD], dim=1) if prefix else kept_BKD
        return Sight(self.decoder.remember(tokens_BKD), reduction, prefix, features.grid)

    def forward(self, visual: Tensor | Features, captions: PackedCaptions, *, weights: bool = False) -> CaptionerOutput:
        """Predict every next word of every caption of every image.

        Args:
            visual: normalised images `(B, 3, rows, columns)`, or features computed before.
            captions: all captions of each image, packed.
            weights: also return cross-attention weights.
        """
        sight = self.look(visual)
        logits_BQV, attention = self.decoder(
            captions.words_BQ, captions.positions_BQ, captions.mask(), sight.memory, weights=weights
        )
        return CaptionerOutput(logits_BQV, sight, attention)
