"""The gallery: what stands where, in which colour."""

from __future__ import annotations

import doctest
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from moreau_ext import plots
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
    assert len(axes) == 9
    assert [a.get_title() for a in axes] == ["input", "b", "a"] + [""] * 6
    assert [a.get_ylabel() for a in axes[::3]] == ["x", "y", "z"]
    assert [t.get_text() for t in figure.texts] == ["settings"]
    np.testing.assert_allclose(axes[3].images[0].get_array(), INPUTS[1, 0])
    np.testing.assert_allclose(axes[4].images[0].get_array(), MAPS[1, 0] / MAPS[1].abs().max(), rtol=1e-6)


def test_red_raises_blue_lowers_and_zero_is_neutral() -> None:
    value = torch.tensor([[[-2.0, -1e-3, 0.0, 1e-3, 2.0]]])
    minus, _, zero, _, plus = colours(gallery(torch.ones(1, 1, 5), {"map": value}), 1)[0]
    assert plus[0] > plus[2]
    assert minus[2] > minus[0]
    # Exactly gray and near white, while the neighbouring colours of the scale are not gray.
    assert zero.min() == zero.max() > 0.95
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


def test_channels_are_summed() -> None:
    rgb = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    figure = gallery(rgb, {"map": rgb})
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), rgb[0].sum(0), rtol=1e-6)


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


def test_examples() -> None:
    assert doctest.testmod(plots).failed == 0


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
    np.testing.assert_allclose(colours(figure, 2), 0.97, atol=0.03)
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
