"""The gallery: what stands where, in which colour."""

from __future__ import annotations

import doctest
import importlib
import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from moreau_ext import TextExplainer, Tiles, plots
from moreau_ext.plots import gallery

INPUTS = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(1))


def colours(figure: Figure, panel: int) -> np.ndarray:
    """RGB [H, W, 3] as drawn."""
    (image,) = figure.axes[panel].images
    return np.asarray(image.to_rgba(image.get_array()))[..., :3]


def test_rows_are_inputs_and_columns_methods() -> None:
    figure = gallery(INPUTS, {"b": MAPS, "a": -MAPS}, titles=["x", "y", "z"], caption="settings")
    axes = figure.axes
    assert len(axes) == 10  # with the colour bar
    assert [a.get_title() for a in axes] == ["input", "b", "a"] + [""] * 7
    assert [a.get_ylabel() for a in axes[:9:3]] == ["x", "y", "z"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["exactly 0"]
    assert [t.get_text() for t in figure.texts] == ["settings"]
    np.testing.assert_allclose(axes[3].images[0].get_array(), INPUTS[1, 0])
    np.testing.assert_allclose(axes[4].images[0].get_array(), MAPS[1, 0] / MAPS[1].abs().max(), rtol=1e-6)


def test_red_raises_blue_lowers_and_only_zero_is_white() -> None:
    value = torch.tensor([[[-2.0, -1e-9, 0.0, 1e-9, 2.0]]])
    minus, *small, plus = colours(gallery(torch.ones(1, 1, 5), {"map": value}), 1)[0]
    assert plus[0] > plus[2]
    assert minus[2] > minus[0]
    assert (small[1] == 1).all()
    # Small values of both signs are the same gray, well below white.
    for near in (small[0], small[2]):
        assert near.max() < 0.86
        assert near.max() - near.min() < 0.02
    # Symmetric: neither sign looks stronger than the other.
    assert abs(plus.sum() - minus.sum()) < 0.3


def test_the_scale_of_a_map_is_its_own() -> None:
    drawn = gallery(INPUTS, {"map": MAPS, "small": 1e-6 * MAPS, "negative": -MAPS.abs()})
    np.testing.assert_allclose(colours(drawn, 1), colours(drawn, 2), atol=0.02)
    for panel in range(1, 4):
        image = drawn.axes[panel].images[0]
        assert (image.norm.vmin, image.norm.vmax) == (-1, 1)


def test_a_map_of_zeros_is_blank_and_says_so() -> None:
    figure = gallery(INPUTS, {"map": torch.zeros_like(INPUTS)})
    assert [t.get_text() for t in figure.axes[1].texts] == ["empty"]
    assert (colours(figure, 1) == 1).all()


def test_inputs_of_three_channels_have_colours_and_maps_are_summed() -> None:
    rgb = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    figure = gallery(rgb, {"map": rgb})
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), rgb[0].permute(1, 2, 0), rtol=1e-6)
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), rgb[0].sum(0) / rgb[0].sum(0).max(), rtol=1e-6)
    assert "colours scaled" not in figure.texts[0].get_text()
    # Of another range: scaled, and said so.
    other = gallery(5 * rgb - 2, {"map": rgb})
    assert other.axes[0].images[0].get_array().max() == 1
    assert "colours scaled from its minimum to its maximum" in " ".join(other.texts[0].get_text().split())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_tensors_that_carry_a_graph(dtype: torch.dtype) -> None:
    gallery(INPUTS.to(dtype), {"map": MAPS.to(dtype).requires_grad_()})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [1, 5])
def test_nothing_is_clipped(rows: int, columns: int) -> None:
    maps = {f"Group-Sparse\nMoreauGrad{' ' * i}": MAPS[:rows] for i in range(columns)}
    figure = gallery(INPUTS[:rows], maps, ["3\n(is 5)"] * rows, "a caption of many words " * 12)
    figure.canvas.draw()
    width, height = figure.bbox.width, figure.bbox.height
    texts = [*figure.texts, *(a.title for a in figure.axes), *(a.yaxis.label for a in figure.axes)]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_the_figure_writes_itself() -> None:
    file = io.BytesIO()
    gallery(INPUTS, {"map": MAPS}).savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gallery(INPUTS, {"m": MAPS[:2]}), r"maps\['m'\]: expected 3 images.* got shape \(2, 1, 4, 5\)"),
        (lambda: gallery(INPUTS, {"m": MAPS[..., :4]}), r"maps\['m'\]: expected pictures of \(4, 5\).* got \(4, 4\)"),
        (lambda: gallery(torch.rand(3, 7), {"m": MAPS}), r"inputs: expected 3 images.* got shape \(3, 7\)"),
        (lambda: gallery(INPUTS[:0], {"m": MAPS[:0]}), "inputs: expected 0 images"),
        (lambda: gallery(INPUTS, {"m": MAPS}, titles=["one"]), "titles: expected one per input, 3, got 1"),
        (lambda: gallery(INPUTS, {"m": MAPS / 0 * 0}), r"maps\['m'\]: input 0 holds NaN or infinity"),
    ],
)
def test_errors_say_what_came(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install \"moreau_ext\[demo\]\""):
        gallery(INPUTS, {"map": MAPS})


@pytest.mark.slow
def test_no_global_state() -> None:
    code = (
        "import sys, moreau_ext.plots as p; assert 'matplotlib' not in sys.modules\n"
        "import torch; p.gallery(torch.ones(1, 2, 2), {'m': torch.ones(1, 2, 2)})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("module", ["charts", "heat", "maps"])
def test_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"moreau_ext.plots.{module}")).failed == 0


# --- a map over its image ------------------------------------------------------------------------------------------

IMAGE = np.random.default_rng(0).random((3, 8, 6))
TILES = Tiles(2)


def sparse(channels: int = 3) -> torch.Tensor:
    """[channels, 8, 6]: tile (0, 0), a tile at the right edge, and zeros."""
    one = torch.zeros(channels, 8, 6)
    one[:, :2, :2], one[:, 2:4, 4:] = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), 4.0
    return one


@pytest.mark.parametrize(
    ("image", "map", "rows"),
    [
        (IMAGE, sparse(), 1),
        (IMAGE[0], sparse(1)[0].numpy(), 1),
        (IMAGE[None].repeat(3, 0), torch.stack([sparse()] * 3), 3),
        (IMAGE[None].repeat(2, 0), torch.stack([sparse(1)[0]] * 2), 2),  # channels summed before
        ((255 * IMAGE).astype(np.uint8), sparse().bfloat16(), 1),
        (torch.rand(2, 8, 6), sparse()[::1].flip(0).numpy()[::-1], 1),  # two channels; strides below zero
        (None, sparse(), 1),
    ],
)
@pytest.mark.parametrize("how", [{}, {"groups": TILES}, {"groups": TILES, "norms": True}, {"blur": 1.0}])
def test_overlay_takes_all_shapes(image, map, rows: int, how: dict) -> None:
    figure = plots.overlay(image, map, "title", "caption", **how)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == rows * (1 if image is None else 3)
    titles = [axes.get_title() for axes in panels]
    assert ("over the image" in titles) == (image is not None)
    assert titles[0].startswith("title")
    assert figure.texts[0].get_text().startswith("caption\n")
    assert figure._repr_png_().startswith(b"\x89PNG")  # as notebooks ask for it
    width, height = figure.bbox.width, figure.bbox.height
    for text in [*figure.texts, *figure.legends[0].get_texts(), *(axes.title for axes in figure.axes)]:
        box = text.get_window_extent()
        assert -1 <= box.x0 <= box.x1 <= width + 1, text
        assert -1 <= box.y0 <= box.y1 <= height + 1, text


def test_the_figure_states_what_was_done() -> None:
    figure = plots.overlay(IMAGE, sparse(), percentile=75, blur=2.0, significant=sparse() > 2)
    said = " ".join(figure.texts[0].get_text().split())
    assert "75 % quantile of the non-zero |values|" in said
    assert "blurred by 2 pixels" in said
    summed = sparse().sum(0)
    full = np.percentile(summed[summed != 0].abs(), 75)
    assert figure.axes[1].get_title() == f"full colour from {full:.2g} on\n5 of 8 pixels significant"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["exactly 0", "significant"]
    large = plots.overlay(None, torch.rand(1, 600, 600), percentile=100)
    assert "Of each 3 x 3 pixels of a map the strongest is drawn" in " ".join(large.texts[0].get_text().split())


def test_groups_are_outlined_and_norms_are_their_lengths() -> None:
    figure = plots.overlay(IMAGE, sparse(), groups=TILES, norms=True)
    drawn = np.ma.filled(figure.axes[1].images[0].get_array(), 0.0)
    lengths = np.array([np.sqrt(3 * 14.25), np.sqrt(3 * 64)]) / np.sqrt(3 * 64)
    np.testing.assert_allclose(drawn[:2, :2], lengths[0], rtol=0.01)
    np.testing.assert_allclose(drawn[2:4, 4:], 1, rtol=0.01)
    assert (drawn != 0).sum() == 8
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["exactly 0", "group in the map"]
    (borders,) = figure.axes[1].collections
    ends = {tuple(sorted(map(tuple, path.vertices.tolist()))) for path in borders.get_paths()}
    expected = set()
    for top, left in ((0, 0), (2, 4)):
        y, x = top - 0.5, left - 0.5
        for i in (0, 1):
            expected |= {((x + i, at), (x + i + 1, at)) for at in (y, y + 2)}
            expected |= {((at, y + i), (at, y + i + 1)) for at in (x, x + 2)}
    assert ends == expected


def test_blank_maps_are_drawn_blank() -> None:
    for how in ({}, {"groups": TILES, "norms": True}, {"blur": 2.0}, {"significant": torch.zeros(3, 8, 6).bool()}):
        figure = plots.overlay(IMAGE, torch.zeros(3, 8, 6), **how)
        assert [t.get_text() for t in figure.axes[1].texts] == ["empty"]
        assert figure.axes[1].get_title().startswith("all values are 0")
        assert (colours(figure, 1) == 1).all()
        over = np.asarray(figure.axes[2].images[0].get_array())
        np.testing.assert_allclose(over, over[..., :1].repeat(3, -1))
    # Tiny values are values.
    assert not plots.overlay(IMAGE, torch.full((3, 8, 6), 1e-300, dtype=torch.float64)).axes[1].texts


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.overlay(IMAGE.transpose(1, 2, 0), sparse()), r"channels come before .* to \(3, 8, 6\)"),
        (lambda: plots.overlay(IMAGE, sparse()[:, :4]), r"image: shape \(3, 8, 6\) does not fit .*\(3, 4, 6\)"),
        (lambda: plots.overlay(IMAGE, sparse() / 0), "map: .*NaN or infinity"),
        (lambda: plots.overlay(IMAGE, torch.rand(4)), r"map: expected \[H, W\] or .*got shape \(4,\)"),
        (lambda: plots.overlay(IMAGE, sparse(), ["a", "b"]), "titles: expected one per map, 1, got 2"),
        (lambda: plots.overlay(IMAGE, sparse(), percentile=0), "percentile: expected"),
        (lambda: plots.overlay(IMAGE, sparse(), norms=True), "norms: needs groups"),
        (lambda: plots.overlay(IMAGE, sparse(), groups=TILES, norms=True, blur=1), "norms: .*nothing to blur"),
        (lambda: plots.overlay(IMAGE, sparse(), groups=torch.zeros(3, 3).long()), "groups: expected Groups, or whole"),
        (lambda: plots.overlay(IMAGE, sparse(), significant=torch.ones(2, 2)), "significant: shape"),
        (lambda: plots.features(torch.ones(3), ["a"]), "names: expected one per feature, 3, got 1"),
        (lambda: plots.features(torch.ones(3), errors=torch.ones(2)), r"errors: expected \[3\]"),
        (lambda: gallery(INPUTS, {"m": MAPS}, groups={"n": TILES}), "groups: expected names of maps, got n"),
    ],
)
def test_overlay_errors_say_what_came(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_features_are_bars_with_errors() -> None:
    values = torch.tensor([0.1, -2.0, 0.0, 1.0])
    errors, sure = torch.tensor([0.5, 0.1, float("nan"), 0.2]), torch.tensor([False, True, False, True])
    figure = plots.features(values, ["a", "b$", "c", "d"], "title", errors=errors, significant=sure, limit=3)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b$", "d", "a"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([-2.0, 1.0, 0.1])
    assert [tuple(bar.get_facecolor()[:3]) == (1, 1, 1) for bar in axes.patches] == [False, False, True]
    lines = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(lines[:3], [[-2.1, -1.9], [0.8, 1.2], [-0.4, 0.6]], rtol=1e-6)
    assert figure.texts[0].get_text() == "Not shown: 1 smaller ones; all exactly 0."
    assert len(figure.legends[0].get_texts()) == 4
    plots.features(torch.zeros(2)).savefig(io.BytesIO(), format="svg")


# --- curves and points ---------------------------------------------------------------------------------------------


def test_bands_draw_every_method_with_its_interval() -> None:
    points = [(0.1, 0.9, 0.8, 1.0), (1.0, 0.5, 0.4, 0.6)]
    panels = {"SSIM": {"frozen": {"a": points, "b": points}, "adaptive": {"a": points, "b": []}}}
    for dark in (False, True):
        figure = plots.bands(panels, {"a": "A", "b": "B"}, "radius", strong=["a"], dark=dark)
        first, second = figure.axes
        assert [axes.get_title() for axes in figure.axes] == ["frozen", "adaptive"]
        assert first.get_xscale() == "log"
        assert (len(first.lines), len(first.collections)) == (2, 2)
        assert (len(second.lines), len(second.collections)) == (1, 1)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
        assert first.lines[0].get_linewidth() > first.lines[1].get_linewidth()
        figure.savefig(io.BytesIO(), format="png")


def test_bars_have_a_row_per_method_and_a_colour_per_group() -> None:
    panels = {"cosine": {"seeds": {"A": (0.5, 0.4, 0.6), "B": (0.2, 0.1, 0.3)}, "nets": {"A": (0.1, 0.0, 0.2)}}}
    figure = plots.bars(panels)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]
    assert len(axes.lines) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seeds", "nets"]
    figure.savefig(io.BytesIO(), format="png")


# --- sentences -----------------------------------------------------------------------------------------------------


class Sentences(torch.nn.Module):
    """The output is the sine of the second token's features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 4)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds[:, 1].sum(1).sin()


def test_words_have_the_colours_of_their_scores() -> None:
    batch = {"input_ids": torch.tensor([[5, 3, 7, 1]]), "special_tokens_mask": torch.tensor([[0, 0, 0, 1]])}
    (found,) = TextExplainer(Sentences().eval()).attribute(batch)
    scores = torch.tensor([0.0, 0.4, -0.1, 0.0], dtype=torch.float64)
    found = replace(found, words=("a", "$b_1$", "c", "end"), scores=scores)
    figure = plots.words([found, found], ["one", "two"], "settings")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [head for n in ("one", "two") for head in (f"{n}   full colour at 0.4", "a", "$b_1$", "c", "end")]
    # The special token has no box. The second word alone is in the map.
    boxes = figure.axes[0].patches
    assert len(boxes) == 6
    white, red, blue = (np.array(box.get_facecolor()[:3]) for box in boxes[:3])
    assert (white == 1).all()
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    edges = [box.get_edgecolor() for box in boxes[:3]]
    assert edges[0] == edges[2] != edges[1]
    assert figure.texts[0].get_text() == "settings"
    # Without a sign: violet.
    strengths = plots.words(found, norms=True).axes[0].patches
    assert [box.get_facecolor() for box in strengths[::2]] == [(1, 1, 1, 1)] * 2
    assert strengths[1].get_facecolor()[2] > strengths[1].get_facecolor()[0]
    # A long sentence takes several lines, within the figure.
    long = plots.words(replace(found, words=("word" * 10, "word" * 10, "c", "end")))
    long.savefig(io.BytesIO(), format="png")
    places = [text.get_position() for text in long.axes[0].texts[1:]]
    assert len({y for _, y in places}) == 2
    assert max(box.get_x() + box.get_width() for box in long.axes[0].patches) < long.get_figwidth()


def test_words_refuses() -> None:
    (found,) = TextExplainer(Sentences().eval()).attribute({"input_ids": torch.tensor([[5, 3]])})
    with pytest.raises(TypeError, match="those of a TextExplainer, got Tensor"):
        plots.words([torch.zeros(3)])
    with pytest.raises(ValueError, match="one sentence or more"):
        plots.words([])
    with pytest.raises(ValueError, match="titles: expected one per sentence, 1, got 2"):
        plots.words(found, ["one", "two"])


# --- photographs ---------------------------------------------------------------------------------------------------


def test_heat_gallery_has_two_rows_per_photograph() -> None:
    images, maps = torch.rand(2, 3, 12, 12), torch.randn(2, 3, 12, 12)
    figure = plots.heat_gallery(images, {"a": maps, "b": torch.zeros_like(maps)}, ["cat\n\nseen", "cup"], "settings")
    titles = [axes.get_title() for axes in figure.axes]
    # Four rows of three panels, and the colour bars of both kinds of rows.
    assert titles == ["photograph", "a", "b"] + [""] * 9 + ["", ""]
    assert [t.get_text() for t in figure.axes[3].texts] == ["cat", "\nseen"]
    assert figure.texts[-1].get_text() == "settings"
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), images[0].permute(1, 2, 0), rtol=1e-6)
    # A map of zeros is white, and leaves the photograph gray.
    np.testing.assert_allclose(colours(figure, 2), 1)
    gray = np.asarray(figure.axes[5].images[0].get_array())
    np.testing.assert_allclose(gray, gray[..., :1].repeat(3, -1))


def test_of_four_pixels_the_strongest_is_shown_with_its_sign() -> None:
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 0, 0, 0], maps[0, 1, 1, 1], maps[0, 2, 3, 3] = 1.0, -2.0, 1.0
    figure = plots.heat_gallery(torch.rand(1, 3, 4, 4), {"a": maps}, [""], signed_share=1.0)
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), [[-1.0, 0.0], [0.0, 0.5]])


def test_the_heat_is_where_the_map_is() -> None:
    maps = torch.zeros(1, 3, 32, 32)
    maps[0, :, 20:24, 8:12] = -1.0
    figure = plots.heat_gallery(torch.full((1, 3, 32, 32), 0.5), {"a": maps}, [""], blur=2.0)
    drawn = np.asarray(figure.axes[3].images[0].get_array())
    colour = drawn.max(-1) - drawn.min(-1)
    row, column = np.unravel_index(colour.argmax(), colour.shape)
    assert (18 <= row <= 25, 6 <= column <= 13) == (True, True)
    assert colour[:8].max() < 0.01


def test_heat_gallery_refuses() -> None:
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="images: expected"):
        plots.heat_gallery(images, {}, ["one"])
    with pytest.raises(ValueError, match="maps"):
        plots.heat_gallery(images, {"a": torch.rand(1, 3, 8, 8)}, ["one", "two"])


def test_a_blur_keeps_the_mean_of_a_constant_and_spreads_a_point() -> None:
    point = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    point[..., 16, 16] = 1
    found = plots.gaussian_blur(point, 2.0)[0, 0]
    assert float(found.sum()) == pytest.approx(1)
    # Its standard deviation, along an axis.
    along = found.sum(0)
    assert float((along * (torch.arange(33) - 16) ** 2).sum()) ** 0.5 == pytest.approx(2, rel=0.03)
    torch.testing.assert_close(plots.gaussian_blur(torch.ones(1, 2, 5, 9), 4.0), torch.ones(1, 2, 5, 9))
