"""Charts of numbers: curves with bands, points with intervals, bars of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import Drawn, finite
from ._figure import CAPTION_LINE, PLAIN, matplotlib, new_figure, plain, write_caption

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        A matplotlib Figure and a transparent background.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from moreau_ext.plots import bands
        >>> points = [(0.1, 0.9, 0.8, 1.0), (1.0, 0.5, 0.4, 0.6)]
        >>> len(bands({"SSIM": {"frozen": {"a": points}}}, {"a": "A"}, "radius").axes)
        1
    """
    colormaps = matplotlib().colormaps
    from matplotlib.ticker import FixedLocator, NullLocator

    rows, columns = len(panels), max((len(p) for p in panels.values()), default=1)
    ink = "#e6e6e6" if dark else "#222222"
    figure = new_figure(1.2 + 3.1 * columns + 2.4, 0.7 + 2.3 * rows, layout="constrained")
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
                axes.set_title(attack, fontsize=10, color=ink, **PLAIN)
            if axes in grid[-1]:
                axes.set_xlabel(axis, fontsize=9, color=ink, **PLAIN)
            if column == 0:
                axes.set_ylabel(metric, fontsize=9, color=ink, **PLAIN)
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
        plain(legend)
    return figure


def bars(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]]) -> Figure:
    """Means as points with intervals as lines: one panel per metric, one row per method, one colour per group.

    Args:
        panels: by metric, then group, then method: (mean, low, high).

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from moreau_ext.plots import bars
        >>> len(bars({"cosine": {"seeds": {"A": (0.5, 0.4, 0.6)}}}).axes)
        1
    """
    colormaps = matplotlib().colormaps

    names = list(dict.fromkeys(m for groups in panels.values() for found in groups.values() for m in found))
    kinds = list(dict.fromkeys(g for groups in panels.values() for g in groups))
    figure = new_figure(2.4 + 3.2 * len(panels), 1.3 + 0.42 * len(names), layout="constrained")
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
        axes.set_xlabel(metric, fontsize=9, **PLAIN)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, lw=0.5)
        axes.set_yticks(range(len(names)), names, fontsize=8.5, **PLAIN)
    row[0].invert_yaxis()
    legend = figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    plain(legend)
    return figure


def features(
    map: Drawn,
    names: Sequence[str] | None = None,
    title: str = "",
    *,
    errors: Drawn | None = None,
    significant: Drawn | None = None,
    limit: int = 20,
) -> Figure:
    """The map of a table row as bars, the largest first, with error bars.

    Args:
        map: [features], a tensor or array.
        names: of the features; their numbers by default.
        title: above the bars.
        errors: like ``map``, as of ``Solution.standard_error``: drawn as lines of one error to both sides. NaN draws
            none.
        significant: bool, like ``map``, as of :meth:`Solution.significant`; the bars of other features are hollow.
        limit: number of bars; the caption counts the rest.

    Returns:
        A matplotlib Figure; write it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes or counts that do not match, NaN or infinity in the map.

    Example:
        >>> import torch
        >>> from moreau_ext.plots import features
        >>> figure = features(torch.tensor([0.1, -0.5, 0.0]), ["age", "height", "weight"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['height', 'age', 'weight']
    """
    from matplotlib.patches import Patch

    values = finite(map, "map", (1,))
    if names is not None and len(names) != len(values):
        raise ValueError(f"names: expected one per feature, {len(values)}, got {len(names)}")
    given = {"errors": errors, "significant": significant}
    for name, value in given.items():
        if value is not None and np.shape(value) != values.shape:
            raise ValueError(f"{name}: expected {list(values.shape)}, as the map, got {list(np.shape(value))}")
    named = [str(n) for n in range(len(values))] if names is None else list(names)
    order = np.argsort(-np.abs(values), kind="stable")
    left_out, order = order[limit:], order[:limit]
    lines = []
    if len(left_out):
        zeros = int((values[left_out] == 0).sum())
        which = "all" if zeros == len(left_out) else f"{zeros} of them"
        lines.append(f"Not shown: {len(left_out)} smaller ones; {which} exactly 0.")
    above = 0.12 + 0.16 * len(title.splitlines())
    height = above + 0.65 + 0.24 * len(order) + CAPTION_LINE * len(lines)
    figure = new_figure(5.2, height)
    longest = max(len(named[i]) for i in order)
    start, foot = min(0.3 + 0.075 * longest, 2.4) / 5.2, (0.62 + CAPTION_LINE * len(lines)) / height
    axes = figure.add_axes((start, foot, 0.97 - start, 1 - foot - above / height))
    blue, red = "#2166ac", "#b2182b"
    sure = np.ones(len(values), bool) if significant is None else finite(significant, "significant", (1,)) > 0
    bar = None if errors is None else np.abs(np.asarray(errors.detach().cpu() if hasattr(errors, "detach") else errors))
    for at, i in enumerate(order):
        colour = red if values[i] > 0 else blue
        axes.barh(at, values[i], 0.68, facecolor=colour if sure[i] else "white", edgecolor=colour, lw=0.9)
        if values[i] == 0:
            axes.annotate("0", (0, at), (3, 0), textcoords="offset points", va="center", fontsize=7.5, color="0.4")
        if bar is not None and np.isfinite(bar[i]):
            axes.plot([values[i] - bar[i], values[i] + bar[i]], [at, at], color="black", lw=1.1, solid_capstyle="butt")
    axes.axvline(0, color="0.3", lw=0.7)
    axes.set_yticks(range(len(order)), [named[i] for i in order], fontsize=8, **PLAIN)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.margins(y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9, **PLAIN)
    marks: list[Any] = [Patch(facecolor=red, label="raises the score"), Patch(facecolor=blue, label="lowers it")]
    if significant is not None:
        marks.append(Patch(facecolor="white", edgecolor="0.4", label="not significant"))
    if bar is not None:
        marks.append(axes.plot([], [], color="black", lw=1.1, label="± one standard error")[0])
    figure.legend(
        handles=marks,
        loc="lower center",
        bbox_to_anchor=(0.5, (0.1 + CAPTION_LINE * len(lines)) / height),
        ncols=len(marks),
        fontsize=7.5,
        frameon=False,
        borderpad=0,
        handlelength=1.2,
        columnspacing=1.1,
    )
    write_caption(figure, lines)
    return figure
