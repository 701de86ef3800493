"""Figures without pyplot, and the parts that all of them have: captions, colour bars, legends."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import Array, scale_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of files, classes and methods are text: no formulas between dollars, no TeX.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
_PIXELS = 110  # of a map, per inch of its panel
GROUP = "black"  # borders of groups
CERTAIN = "#00a03c"  # borders of what is significant
CAPTION_LINE = 0.17  # inches per line of the caption
_LETTER = 0.061  # inches per letter of the caption, a little more than the average
# Ends of RdBu, with a gray in the middle where that has white: white is left to what is exactly zero.
_SIGNED = ("#053061", "#2166ac", "#4393c3", "#92c5de", "#d2d2d2", "#f4a582", "#d6604d", "#b2182b", "#67001f")
_STRENGTH = ("#d2d2d2", "#c9a9d9", "#9e5fb5", "#6a1b8a", "#2d004b")


def matplotlib() -> Any:
    """The package matplotlib.

    Raises:
        ImportError: it is missing; the text says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f'pictures need matplotlib ({error}); install it with: pip install "moreau_ext[demo]"'
        ) from error
    return matplotlib


def new_figure(width: float, height: float, **how: Any) -> Figure:
    """An empty figure of a size in inches, which notebooks show.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), **how)
    FigureCanvasAgg(figure)
    # IPython shows a figure by itself only after pyplot was set up.
    figure._repr_png_ = functools.partial(png_of, figure)
    made: Figure = figure
    return made


def png_of(figure: Figure, dpi: float = 100) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


@functools.cache
def signed_colours() -> Any:
    """The colours of a signed map: blue, gray, red; white for what is masked."""
    from matplotlib.colors import LinearSegmentedColormap

    # An odd number of colours, so that the middle one stands for the smallest values of both signs.
    return LinearSegmentedColormap.from_list("signed", _SIGNED, 257).with_extremes(bad="white")


@functools.cache
def strength_colours() -> Any:
    """The colours of a strength without sign: gray to violet; white for what is masked."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("strength", _STRENGTH, 256).with_extremes(bad="white")


def wrapped(text: str, width: float) -> list[str]:
    """The lines of a caption that is ``width`` inches wide; line breaks are kept."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, max(20, int(width / _LETTER)))]


def write_caption(figure: Figure, lines: Sequence[str], left: float = 0.1) -> None:
    """Writes lines at the foot of a figure, ``left`` inches from its edge."""
    width, height = figure.get_size_inches()
    if lines:
        text = "\n".join(lines)
        figure.text(
            left / width, 0.07 / height, text, fontsize=7.5, va="bottom", color="0.25", linespacing=1.25, **PLAIN
        )


def colour_bar(
    figure: Figure, place: tuple[float, float, float, float], colours: Any, low: float, words: tuple[str, str, str]
) -> None:
    """A horizontal colour bar, with words under its ends and its middle.

    Args:
        place: left, bottom, width and height in inches.
        low: -1 for signed colours, 0 for a strength.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
    bar: Any = figure.colorbar(ScalarMappable(Normalize(low, 1), colours), cax=axes, orientation="horizontal")
    bar.set_ticks([low, (low + 1) / 2, 1], labels=list(words))
    bar.ax.tick_params(labelsize=7.5, length=0, pad=2)
    bar.outline.set_linewidth(0.5)


def plain(legend: Any) -> None:
    """Takes formulas out of the texts of a legend."""
    for text in legend.get_texts():
        text.set(**PLAIN)


def block_of(maps: Array, inches: float) -> int:
    """The edge of the blocks of which one pixel is drawn: 1, unless maps have more pixels than a panel can show."""
    return max(1, math.ceil(int(maps.shape[-1]) / (_PIXELS * inches)))


def _strongest(image: Array, block: int) -> Array:
    """Of every block of pixels the one with the largest |value|; the last ones are repeated to fill a block."""
    height, width = image.shape
    rows, columns = -(-height // block), -(-width // block)
    image = np.pad(image, ((0, rows * block - height), (0, columns * block - width)), mode="edge")
    blocks = image.reshape(rows, block, columns, block).transpose(0, 2, 1, 3).reshape(rows, columns, block**2)
    return np.asarray(np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0])


def draw_map(axes: Any, values: Array, percentile: float, colours: Any, low: int, block: int = 1) -> float:
    """Draws a map, white where it is exactly zero, and returns the value with full colour; 0 for a map of zeros.

    Args:
        values: [H, W].
        percentile: of the non-zero |values|, from which on colours are full.
        low: -1 for signed colours, 0 for a strength.
        block: of every block of pixels the strongest is drawn.
    """
    height, width = values.shape
    if block > 1:
        values = _strongest(values, block)
    largest = scale_of(values, percentile)
    if largest == 0:
        axes.imshow(np.ones((height, width, 3)))
        axes.text(0.5, 0.5, "empty", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="0.4")
        return 0.0
    shown = np.ma.masked_where(values == 0, (values / largest).clip(-1, 1))
    edges = (-0.5, values.shape[1] * block - 0.5, values.shape[0] * block - 0.5, -0.5)
    axes.imshow(shown, cmap=colours, vmin=low, vmax=1, interpolation="nearest", extent=edges)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return largest


def draw_outline(
    axes: Any, labels: Array, of: Array, colour: str, width: float, *, halo: bool = False, inset: float = 0.0
) -> None:
    """Draws the borders between labels, where one of the two sides is in ``of``.

    Args:
        labels, of: [H, W], whole numbers from 0 and bool.
        width: of the lines in points.
        halo: white beside the lines, for borders that are seen on dark and on light pixels.
        inset: pixels by which a line lies inside ``of``, which shows on which side of it that is.
    """
    from matplotlib.collections import LineCollection

    around = np.pad(np.where(of, labels, -1), 1, constant_values=-1)
    lines = []
    for axis in (0, 1):  # lines between rows, then between columns
        before = around[:-1, 1:-1] if axis == 0 else around[1:-1, :-1]
        after = around[1:, 1:-1] if axis == 0 else around[1:-1, 1:]
        y, x = np.nonzero(before != after)
        at = np.stack([x, y], 1) - 0.5
        at[:, 1 - axis] += inset * np.where(after[y, x] >= 0, 1, -1)
        along = np.eye(2)[axis]
        lines += [*np.stack([at, at + along], 1)]
    for more, stroke in ([(2.0, "white")] if halo else []) + [(1.0, colour)]:
        drawn = LineCollection(lines, colors=stroke, linewidths=more * width, capstyle="projecting", clip_on=False)
        axes.add_collection(drawn, autolim=False)


def draw_groups(axes: Any, labels: Array, where: Array, width: float, *, halo: bool = False) -> None:
    """Outlines the groups of which some pixel is in ``where``, whole."""
    draw_outline(axes, labels, np.isin(labels, labels[where]), GROUP, width, halo=halo)


def blend(gray: Array, values: Array, zero: Array, largest: float, colours: Any, low: int) -> Array:
    """RGB [H, W, 3] of a map over a gray image."""
    base = np.repeat(0.35 + 0.65 * gray[..., None], 3, 2)
    if largest == 0:
        return base
    level = np.clip(values / largest, -1, 1)
    strength = np.sqrt(np.abs(level))[..., None]  # makes the middle of the scale visible over an image
    strength[zero] = 0
    coloured = colours((level + 1) / 2 if low < 0 else level)[..., :3]
    return np.asarray(((1 - strength) * base + strength * coloured).clip(0, 1))


def draw_foot(
    figure: Any, bottom: float, colours: Any, low: int, words: tuple[str, str, str], marks: Sequence[tuple[str, str]]
) -> None:
    """The colour bar, and a legend of marks (colour of the border, text) to its right."""
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    bar = min(1.7, 0.42 * width)
    colour_bar(figure, (0.55, bottom + 0.2, bar, 0.1), colours, low, words)
    patches = [Patch(facecolor="none" if c != "0.6" else "white", edgecolor=c, label=text) for c, text in marks]
    legend = figure.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=((bar + 0.95) / width, (bottom + 0.02) / height),
        ncols=len(patches) if width > 5 else 1,
        fontsize=7.5,
        frameon=False,
        handlelength=1.1,
        handleheight=0.9,
        borderpad=0,
        labelspacing=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )
    for text in legend.get_texts():
        text.set(**PLAIN)
