from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from prune_tell.data.tokenizer import BOS, EOS, Tokenizer
from prune_tell.data.transforms import Preprocessing
from prune_tell.decoding.generate import generate
from prune_tell.models.captioner import Sight
from prune_tell.pictures.attention import draw_attention, draw_panels, word_attention
from prune_tell.pruning.reduction import Reduction, gather_tokens

GRID, PREFIX = (2, 4), 2
KEPT = [1, 3, 4, 6, 7]  # of 8 positions
RECIPE = Preprocessing((20, 40), mean=(0.0,) * 3, std=(1.0,) * 3)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["red circle left"], kind="word", vocab_size=None, min_count=1)


def focused(make_decoder, favourite: int, reduction: Reduction | None = None):
    """A captioner whose every word looks at memory token `favourite`, and at hardly anything else."""
    decoder = make_decoder(vocab_size=7)
    tokens = torch.randn(1, 8, 16)
    reduction = reduction or gather_tokens(tokens, torch.tensor([KEPT]))
    keys = torch.zeros(1, 2, PREFIX + reduction.tokens_BKD.shape[1], 8)
    keys[:, :, favourite] = 50.0
    with torch.no_grad():
        for layer in decoder.layers:
            layer.cross_attention.query.weight.zero_()
            layer.cross_attention.query.bias.fill_(1.0)
    memory = decoder.remember(torch.randn(1, keys.shape[2], 16))
    memory = memory._replace(keys_values=[(keys, values) for _, values in memory.keys_values])
    return SimpleNamespace(decoder=decoder), Sight(memory, reduction, PREFIX, GRID)


def test_attention_lands_on_the_grid_cell_of_its_token(make_decoder):
    for kept_index, position in enumerate(KEPT):
        captioner, sight = focused(make_decoder, PREFIX + kept_index)
        maps, kept = word_attention(captioner, sight, [[BOS, 4, 5, EOS]])
        assert maps.shape == (1, 3, 8)
        torch.testing.assert_close(maps[0], torch.eye(8)[position].expand(3, 8))
        assert kept[0].nonzero().flatten().tolist() == KEPT


def test_what_went_to_prefix_tokens_is_left_out(make_decoder):
    captioner, sight = focused(make_decoder, favourite=0)
    maps, _ = word_attention(captioner, sight, [[BOS, 4, EOS]])
    assert maps.abs().max() < 1e-6


def test_a_merged_tokens_share_is_divided_among_its_positions(make_decoder):
    merged = Reduction(torch.randn(1, 2, 16), torch.tensor([[0, 1, 1, -1, 1, 0, -1, 1]]), torch.tensor([[2.0, 4.0]]))
    captioner, sight = focused(make_decoder, PREFIX + 1, merged)
    maps, kept = word_attention(captioner, sight, [[BOS, 4, EOS]])
    torch.testing.assert_close(maps[0, 0], torch.tensor([0, 0.25, 0.25, 0, 0.25, 0, 0, 0.25]))
    assert kept[0].tolist() == [True, True, True, False, True, True, False, True]


@pytest.mark.parametrize("max_length", [3, 12, 13, 30])
def test_captions_of_any_length_can_be_drawn(make_captioner, max_length):
    captioner = make_captioner(prune_ratio=0.5, score="cls_attention")
    with torch.no_grad():
        captioner.decoder.output.bias[EOS] -= 50.0  # no caption ends by itself: the length runs out
    sight = captioner.look(torch.randn(2, 3, 24, 40))
    words = generate(captioner.decoder, sight, max_length=max_length).words
    maps, kept = word_attention(captioner, sight, words)
    assert maps.shape == (2, len(words[0]) - 1, 15)
    assert (maps[~kept.unsqueeze(1).expand_as(maps)] == 0).all()
    assert (maps.sum(-1) <= 1 + 1e-5).all()


def test_reading_gives_the_attention_that_writing_had(make_captioner):
    captioner = make_captioner(prune_ratio=0.5, grid_positions="learned", sharpness=3.0, eos=-1.0)
    sight = captioner.look(torch.randn(3, 3, 24, 40))
    words = generate(captioner.decoder, sight, max_length=8).words
    assert max(map(len, words)) > 3
    maps, _ = word_attention(captioner, sight, words)
    with torch.inference_mode():
        for image, ids in enumerate(words):
            row = slice(image, image + 1)
            memory = sight.memory._replace(keys_values=[(k[row], v[row]) for k, v in sight.memory.keys_values])
            cache = captioner.decoder.new_cache(1, like=maps)
            for q, word in enumerate(ids[:-1]):
                _, step = captioner.decoder.step(torch.tensor([[word]]), memory, cache, weights=True)
                mean = torch.stack(step).mean(dim=(0, 2))[0, 0, sight.prefix :]
                kept = sight.reduction.assignment_BN[image] >= 0
                torch.testing.assert_close(maps[image, q][kept], mean, atol=1e-5, rtol=1e-4)


class Painted:
    """A drawn figure: its pixels, and where the cells of each panel's grid are."""

    def __init__(self, figure: matplotlib.figure.Figure, path: Path) -> None:
        self.figure = figure
        self.pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        self.titles = [ax.get_title() for ax in figure.axes]

    def cell(self, panel: int, row: int, column: int, size: tuple[int, int]) -> np.ndarray:
        """The colour in the middle of a cell, for a photo of `size` rows and columns."""
        at = ((column + 0.5) * size[1] / GRID[1], (row + 0.5) * size[0] / GRID[0])
        x, y = self.figure.axes[panel].transData.transform(at)
        return self.pixels[self.pixels.shape[0] - 1 - int(y), int(x)]

    def grid(self, panel: int, size: tuple[int, int]) -> np.ndarray:
        cells = [[self.cell(panel, r, c, size).sum() for c in range(GRID[1])] for r in range(GRID[0])]
        return np.array(cells)


@pytest.fixture
def figures(monkeypatch) -> list[matplotlib.figure.Figure]:
    made: list[matplotlib.figure.Figure] = []

    class Watched(matplotlib.figure.Figure):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Watched)
    return made


def test_the_picture_shows_the_right_cells(make_decoder, figures, tmp_path):
    position = 6  # row 1, column 2
    captioner, sight = focused(make_decoder, PREFIX + KEPT.index(position))
    path, words = tmp_path / "a.png", [[BOS, 4, 5, EOS]]
    draw_attention(captioner, torch.zeros(1, 3, 20, 40), sight, words, tokenizer(), RECIPE, [path])
    painted = Painted(figures[0], path)
    assert painted.titles[:3] == ["photo", "kept 5 of 8", "mean attention"]
    assert len([title for title in painted.titles if title]) == 5  # and two words; EOS has no panel
    expected = np.zeros(GRID, bool)
    expected[1, 2] = True
    for panel in (2, 3, 4):
        brightness = painted.grid(panel, (20, 40))
        assert (brightness == brightness.max()).tolist() == expected.tolist(), panel
        assert brightness.max() > 300
    veiled = painted.grid(1, (20, 40)) > 200  # the photo is black, so that only the veil is grey
    assert (~veiled).flatten().nonzero()[0].tolist() == KEPT
    assert painted.grid(0, (20, 40)).max() == 0


def test_the_numbers_lie_beside_the_picture(make_decoder, tmp_path):
    captioner, sight = focused(make_decoder, PREFIX)
    draw_attention(
        captioner, torch.zeros(1, 3, 20, 40), sight, [[BOS, 4, EOS]], tokenizer(), RECIPE, [tmp_path / "a.b.png"]
    )
    with np.load(tmp_path / "a.b.npz") as numbers:
        assert numbers["attention_QN"].shape == (2, 8)
        np.testing.assert_allclose(numbers["attention_QN"][0], np.eye(8)[KEPT[0]], atol=1e-6)
        assert numbers["kept_N"].nonzero()[0].tolist() == KEPT
        assert numbers["grid"].tolist() == list(GRID)
        assert numbers["words"].tolist()[-1] == "<eos>"


def draw(path: Path, labels: Sequence[str], title: str) -> None:
    maps = np.full((max(len(labels), 1), 8), 0.125)
    draw_panels(np.zeros((20, 40, 3)), maps, np.ones(8, bool), GRID, labels, title, path)


def test_any_caption_can_be_a_title(tmp_path):
    draw(tmp_path / "a.png", ["$\\frac$", "a_b$", " "], "a price of $5 and \\$x^$")
    draw(tmp_path / "b.png", [], "")
    draw(tmp_path / "c.png", ["<eos>"], "")
    draw(tmp_path / "d.png", ["word"] * 20, "long")
    assert len(list(tmp_path.iterdir())) == 4
