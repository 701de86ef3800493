"""Figures of maps and of metrics. They do not use pyplot's global state, so they work in servers and threads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bands", "bars", "gallery"]

# Names of files, classes and methods are text: no formulas between dollars, no TeX.
_PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
_PANEL = 1.15  # inches, edge of one image
_LABEL = 0.75  # inches, for the row titles
_HEAD = 0.45  # inches, for the column titles
_CAPTION_LINE = 0.17  # inches per line of the caption
_LETTER = 0.061  # inches per letter of the caption, a little more than the average


def _image(batch: Tensor, name: str, rows: int) -> Tensor:
    """[B, H, W] float64 on the CPU: channels summed."""
    if batch.dim() not in (3, 4) or batch.shape[0] != rows or batch.numel() == 0:
        raise ValueError(
            f"{name}: expected {rows} images, [B, H, W] or [B, channels, H, W], got shape {tuple(batch.shape)}"
        )
    image = batch.detach().to("cpu", torch.float64)
    bad = (~image.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(f"{name}: input {int(bad[0])} holds NaN or infinity, which no colour can show")
    return image.sum(1) if image.dim() == 4 else image


def _plain(legend: Any) -> None:
    for text in legend.get_texts():
        text.set(**_PLAIN)


def gallery(
    inputs: Tensor, maps: Mapping[str, Tensor], titles: Sequence[str] | None = None, caption: str = ""
) -> Figure:
    """A grid of inputs beside their maps: one row per input, one column per method.

    Inputs are gray, from dark at their minimum to light at their maximum. A map has a colour scale of its own, from
    -max|map| (blue: raising the feature lowers the score) over exactly 0 (neutral, near white) to +max|map| (red: it
    raises the score). So colours can be compared within a map, not between maps. Channels are summed. A map of zeros is
    drawn blank, with the word "empty".

    Args:
        inputs: [B, H, W] or [B, channels, H, W].
        maps: by the title of their column, in the order of the columns, each shaped like ``inputs``.
        titles: one per input, left of its row.
        caption: below the grid; line breaks are kept, long lines wrapped.

    Returns:
        A matplotlib Figure with an Agg canvas; write it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes or counts that do not match, no inputs, NaN or infinity.

    Example:
        >>> import torch
        >>> from moreau_ext.plots import gallery
        >>> figure = gallery(torch.rand(2, 1, 8, 8), {"one": torch.randn(2, 1, 8, 8), "none": torch.zeros(2, 1, 8, 8)})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['input', 'one', 'none']
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'pictures need matplotlib ({error}); install it with: pip install "moreau_ext[demo]"'
        ) from error

    rows, columns = len(inputs), 1 + len(maps)
    grays = _image(inputs, "inputs", rows)
    images = {name: _image(batch, f"maps[{name!r}]", rows) for name, batch in maps.items()}
    for name, image in images.items():
        if image.shape != grays.shape:
            raise ValueError(
                f"maps[{name!r}]: expected pictures of {tuple(grays.shape[1:])}, as the inputs are, "
                f"got {tuple(image.shape[1:])}"
            )
    if titles is not None and len(titles) != rows:
        raise ValueError(f"titles: expected one per input, {rows}, got {len(titles)}")

    left = _LABEL if titles is not None else 0.1
    width = left + columns * _PANEL + 0.1
    lines = [part for line in caption.splitlines() for part in textwrap.wrap(line, int((width - 0.2) / _LETTER))]
    foot = 0.1 + _CAPTION_LINE * len(lines)
    height = _HEAD + rows * _PANEL + foot
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": 1 - 0.1 / width,
            "top": 1 - _HEAD / height,
            "bottom": foot / height,
            "wspace": 0.08,
            "hspace": 0.08,
        },
    )
    # An odd number of colours, so that the middle one stands for exactly 0.
    diverging = colormaps["RdBu_r"].resampled(257)
    for row in range(rows):
        panels[row, 0].imshow(grays[row].numpy(), cmap="gray", interpolation="nearest")
        if titles is not None:
            panels[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=9, **_PLAIN)
        for column, image in enumerate(images.values(), 1):
            _draw(panels[row, column], image[row], diverging)
    for axes, title in zip(panels[0], ["input", *maps], strict=True):
        axes.set_title(title, fontsize=8.5, **_PLAIN)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.7")
    if lines:
        text = "\n".join(lines)
        figure.text(
            0.1 / width, 0.07 / height, text, fontsize=7.5, va="bottom", color="0.25", linespacing=1.25, **_PLAIN
        )
    return figure


def _draw(axes: Any, image: Tensor, diverging: Any) -> None:
    largest = float(image.abs().max())
    if largest == 0:
        axes.imshow(torch.ones(*image.shape, 3).numpy())
        axes.text(0.5, 0.5, "empty", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="0.4")
        return
    axes.imshow((image / largest).numpy(), cmap=diverging, vmin=-1, vmax=1, interpolation="nearest")


def bands(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]]],
    labels: Mapping[str, str],
    axis: str,
    *,
    strong: Sequence[str] = (),
    dark: bool = False,
) -> Figure:
    """Curves with confidence bands: one row of panels per metric, one column per attack, one line per method.

    Args:
        panels: by metric, then attack, then method: points (x, mean, low, high).
        labels: names of the methods in the legend.
        axis: label of the x axis, which is logarithmic.
        strong: methods with thick solid lines; the others are thin and dashed.
        dark: use light ink, for a dark page.

    Returns:
        A matplotlib Figure with an Agg canvas and a transparent background.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from moreau_ext.plots import bands
        >>> points = [(0.1, 0.9, 0.8, 1.0), (1.0, 0.5, 0.4, 0.6)]
        >>> len(bands({"SSIM": {"frozen": {"a": points}}}, {"a": "A"}, "radius").axes)
        1
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, NullLocator
    except ImportError as error:
        raise ImportError(
            f'pictures need matplotlib ({error}); install it with: pip install "moreau_ext[demo]"'
        ) from error
    rows, columns = len(panels), max((len(p) for p in panels.values()), default=1)
    ink = "#e6e6e6" if dark else "#222222"
    figure = Figure(figsize=(1.2 + 3.1 * columns + 2.4, 0.7 + 2.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    colours = [colormaps["tab10"](i) for i in range(10)]
    lines: dict[str, Any] = {}
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    for row, (metric, attacks) in zip(grid, panels.items(), strict=True):
        for column, (axes, (attack, curves)) in enumerate(zip(row, attacks.items(), strict=False)):
            axes.patch.set_alpha(0)
            for method, points in curves.items():
                if not points:
                    continue
                x, mean, low, high = zip(*points, strict=True)
                colour = colours[list(labels).index(method) % 10]
                thick = method in strong
                (line,) = axes.plot(
                    x,
                    mean,
                    "-o" if thick else "--",
                    color=colour,
                    lw=2 if thick else 1.2,
                    ms=3,
                    zorder=3 if thick else 2,
                )
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
                lines.setdefault(method, line)
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(FixedLocator(list(x)))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_xticklabels([f"{v:g}" for v in x])
            if axes in grid[0]:
                axes.set_title(attack, fontsize=10, color=ink, **_PLAIN)
            if axes in grid[-1]:
                axes.set_xlabel(axis, fontsize=9, color=ink, **_PLAIN)
            if column == 0:
                axes.set_ylabel(metric, fontsize=9, color=ink, **_PLAIN)
            axes.tick_params(colors=ink, labelsize=8)
            axes.spines[:].set_color(ink)
            axes.grid(alpha=0.25, lw=0.5)
    if lines:
        legend = figure.legend(
            lines.values(),
            [labels[m] for m in lines],
            loc="outside right upper",
            fontsize=8.5,
            frameon=False,
            labelcolor=ink,
        )
        _plain(legend)
    return figure


def bars(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]]) -> Figure:
    """Means as points with intervals as lines: one panel per metric, one row per method, one colour per group.

    Args:
        panels: by metric, then group, then method: (mean, low, high).

    Returns:
        A matplotlib Figure with an Agg canvas.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from moreau_ext.plots import bars
        >>> len(bars({"cosine": {"seeds": {"A": (0.5, 0.4, 0.6)}}}).axes)
        1
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'pictures need matplotlib ({error}); install it with: pip install "moreau_ext[demo]"'
        ) from error
    names = list(dict.fromkeys(m for groups in panels.values() for found in groups.values() for m in found))
    kinds = list(dict.fromkeys(g for groups in panels.values() for g in groups))
    figure = Figure(figsize=(2.4 + 3.2 * len(panels), 1.3 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    lines: dict[str, Any] = {}
    for axes, (metric, groups) in zip(row, panels.items(), strict=True):
        for group, found in groups.items():
            shift = 0.22 * (kinds.index(group) - (len(kinds) - 1) / 2)
            for method, (mean, low, high) in found.items():
                at = names.index(method) + shift
                colour = colormaps["tab10"](kinds.index(group) % 10)
                axes.plot([low, high], [at, at], color=colour, lw=2)
                (point,) = axes.plot([mean], [at], "o", color=colour, ms=4)
                lines.setdefault(group, point)
        axes.set_xlabel(metric, fontsize=9, **_PLAIN)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, lw=0.5)
        axes.set_yticks(range(len(names)), names, fontsize=8.5, **_PLAIN)
    row[0].invert_yaxis()
    legend = figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    _plain(legend)
    return figure
