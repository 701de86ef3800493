"""Pictures of maps: over their images, and side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..solvers.groups import Groups
from ._arrays import Array, Drawn, as_batch, drawable, gray_of, labels_of, norms_of, rows_of
from ._figure import (
    CAPTION_LINE,
    CERTAIN,
    GROUP,
    PLAIN,
    blend,
    block_of,
    colour_bar,
    draw_foot,
    draw_groups,
    draw_map,
    draw_outline,
    new_figure,
    signed_colours,
    strength_colours,
    wrapped,
    write_caption,
)
from .heat import HEAT_WORDS, heat_colours, heat_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 1.15  # inches, edge of an image in a gallery
_WIDE = 2.6  # inches, width of an image of an overlay
_LABEL = 0.75  # inches, for the row titles
_HEAD = 0.45  # inches, for the column titles
_FOOT = 0.42  # inches, for the colour bar and the legend


def gallery(
    inputs: Drawn,
    maps: Mapping[str, Drawn],
    titles: Sequence[str] | None = None,
    caption: str = "",
    *,
    groups: Mapping[str, Groups | Drawn] | None = None,
    percentile: float = 100,
) -> Figure:
    """A grid of inputs beside their maps: one row per input, one column per method.

    Inputs of three channels are drawn in colour, others in gray, from dark at their minimum to light at their maximum.
    A map has a colour scale of its own, from -max|map| (blue: raising the feature lowers the score) to +max|map| (red:
    it raises the score). So colours can be compared within a map, not between maps. Small values are gray, and values
    that are exactly 0 are white. Channels are summed. A map of zeros is drawn blank, with the word "empty". Of maps
    with more pixels than a panel, the strongest of each 2 × 2 (or more) is drawn, which the figure states.

    Args:
        inputs: [B, H, W] or [B, channels, H, W], tensors or arrays; colours in [0, 1], or any range, which is then
            scaled to that, image by image, and stated.
        maps: by the title of their column, in the order of the columns, each shaped like ``inputs``.
        titles: one per input, left of its row.
        caption: below the grid; line breaks are kept, long lines wrapped.
        groups: by the title of a column, the groups of its maps, as in :func:`overlay`; those in a map are outlined.
        percentile: of a map's non-zero |values|, from which on colours are full; 100 clips nothing.

    Returns:
        A matplotlib Figure; write it with ``figure.savefig(path)``.

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
    sized: Any = inputs
    rows, columns = len(sized), 1 + len(maps)
    given = rows_of(inputs, "inputs", rows)
    images = {name: rows_of(batch, f"maps[{name!r}]", rows) for name, batch in maps.items()}
    for name, image in images.items():
        if image.shape[2:] != given.shape[2:]:
            raise ValueError(
                f"maps[{name!r}]: expected pictures of {given.shape[2:]}, as the inputs are, got {image.shape[2:]}"
            )
    if titles is not None and len(titles) != rows:
        raise ValueError(f"titles: expected one per input, {rows}, got {len(titles)}")
    if unknown := set(groups or {}) - set(maps):
        raise ValueError(f"groups: expected names of maps, got {', '.join(sorted(unknown))}")
    drawn, scaled = drawable(given)
    _check_percentile(percentile)
    block = block_of(given, _PANEL)
    first = next(iter(images.values()), given)
    stated = _stated(first, percentile, block, norms=False, blur=0, scaled=scaled)
    caption = f"{caption}\n{stated}".strip()

    left = _LABEL if titles is not None else 0.1
    width = max(left + columns * _PANEL + 0.1, 3.6)
    tall = _PANEL * given.shape[2] / given.shape[3]
    lines = wrapped(caption, width - 0.2)
    foot = 0.12 + CAPTION_LINE * len(lines)
    height = _HEAD + rows * (tall + 0.1) + _FOOT + foot
    figure = new_figure(width, height)
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": (left + columns * _PANEL) / width,
            "top": 1 - _HEAD / height,
            "bottom": (foot + _FOOT + 0.05) / height,
            "wspace": 0.08,
            "hspace": 0.08,
        },
    )
    colours = signed_colours()
    for row in range(rows):
        panels[row, 0].imshow(drawn[row], cmap="gray", interpolation="nearest")
        if titles is not None:
            panels[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=9, **PLAIN)
    for column, (name, batch) in enumerate(images.items(), 1):
        of = None if groups is None or name not in groups else labels_of(groups[name], batch.shape)
        zero = (batch == 0).all(1)
        for row in range(rows):
            axes = panels[row, column]
            draw_map(axes, batch[row].sum(0), percentile, colours, -1, block)
            if of is not None:
                draw_groups(axes, of[row], ~zero[row], 0.7)
    for axes, title in zip(panels[0], ["input", *maps], strict=True):
        axes.set_title(title, fontsize=8.5, **PLAIN)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.7")
    marks = [("0.6", "exactly 0"), *([(GROUP, "group in the map")] if groups else [])]
    draw_foot(figure, foot, colours, -1, ("lowers the score", "", "raises it"), marks)
    write_caption(figure, lines)
    return figure


def overlay(
    image: Drawn | None,
    map: Drawn,
    titles: str | Sequence[str] = "",
    caption: str = "",
    *,
    groups: Groups | Tensor | None = None,
    norms: bool = False,
    significant: Drawn | None = None,
    percentile: float = 99.5,
    blur: float = 0.0,
) -> Figure:
    """One row per image: the image, its map, and the map over the gray image.

    Red raises the score, blue lowers it, small values are gray, and values that are exactly 0 are white (over the
    image: transparent). Channels are summed. Each map has a scale of its own, stated above it: the value from which on
    colours are full. A map of zeros is drawn blank, with the word "empty".

    Args:
        image: [H, W], [channels, H, W] or [B, channels, H, W], a tensor or array; None draws the map alone. Colours in
            [0, 1] or of uint8, or any range, which is then scaled to that and stated.
        map: likewise, of the same height and width.
        titles: above the images, one for each.
        caption: below them, before what the function states itself.
        groups: the explainer's groups, or group numbers [H, W] or [B, H, W]; those in the map are outlined.
        norms: draw each of the ``groups`` as one colour, the length of its values, which has no sign.
        significant: bool, like ``map``, as of :meth:`Solution.significant`; those pixels are outlined.
        percentile: of the non-zero |values|, from which on colours are full; 100 clips nothing.
        blur: pixels, the standard deviation of a Gaussian; over the image, |map| is then drawn blurred, as heat.

    Returns:
        A matplotlib Figure; write it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes or counts that do not match, NaN or infinity, or settings that exclude each other.

    Example:
        >>> import torch
        >>> from moreau_ext import Tiles
        >>> from moreau_ext.plots import overlay
        >>> figure = overlay(torch.rand(3, 8, 8), torch.randn(3, 8, 8), "noise", groups=Tiles(4))
        >>> [axes.get_title() for axes in figure.axes[::2]]
        ['noise', 'over the image']
    """
    _check_percentile(percentile)
    if not 0 <= blur < float("inf"):
        raise ValueError(f"blur: expected a number of pixels, at least 0, got {blur!r}")
    if norms and groups is None:
        raise ValueError("norms: needs groups")
    if norms and blur:
        raise ValueError("norms: one colour for a group leaves nothing to blur; leave one of the two out")
    count = np.shape(image)[0] if image is not None and np.ndim(image) == 4 else None
    maps = as_batch(map, "map", count)
    batch = None if image is None else as_batch(image, "image", len(maps) if np.ndim(map) == 4 else None)
    of_map = f"a map of shape {tuple(np.shape(map))}"
    if image is not None and batch is not None and (len(batch), *batch.shape[2:]) != (len(maps), *maps.shape[2:]):
        first = f"; channels come before the pixels: transpose to {(3, *batch.shape[1:3])}" * (batch.shape[3] == 3)
        raise ValueError(f"image: shape {tuple(np.shape(image))} does not fit {of_map}{first}")
    named = [titles] * len(maps) if isinstance(titles, str) else list(titles)
    if len(named) != len(maps):
        raise ValueError(f"titles: expected one per map, {len(maps)}, got {len(named)}")
    labels = None if groups is None else labels_of(groups, maps.shape)
    marked: Array | None = None
    if significant is not None:
        marked = np.asarray(as_batch(significant, "significant", len(maps)).any(1))
        if marked.shape != (len(maps), *maps.shape[2:]):
            raise ValueError(f"significant: shape {tuple(np.shape(significant))} does not fit {of_map}")
    pictures, scaled = ([], False) if batch is None else drawable(batch)
    zero = (maps == 0).all(1)
    values = norms_of(maps, labels) if norms and labels is not None else maps.sum(1)
    if norms:
        zero = values == 0

    columns = 1 if batch is None else 3
    tall = _WIDE * maps.shape[2] / maps.shape[3]
    above = max(name.count("\n") for name in named) + (2 if batch is None else 1) + (marked is not None)
    titled = 0.06 + 0.14 * above
    width = max(columns * _WIDE + 0.1 * (columns + 1), 3.6)
    block = block_of(maps, _WIDE)
    blurred = 0.0 if batch is None else blur
    stated = _stated(maps, percentile, block, norms=norms, blur=blurred, scaled=scaled)
    lines = wrapped(f"{caption}\n{stated}".strip(), width - 0.2)
    foot = 0.12 + CAPTION_LINE * len(lines)
    height = len(maps) * (tall + titled + 0.1) + 0.05 + _FOOT + foot
    figure = new_figure(width, height)
    colours, low = (strength_colours(), 0) if norms else (signed_colours(), -1)
    pixel = _WIDE * 72 / maps.shape[3]  # points
    for row in range(len(maps)):
        places = []
        for column in range(columns):
            bottom = height - 0.05 - (row + 1) * (tall + titled + 0.1) + 0.1
            start = (width - columns * (_WIDE + 0.1) + 0.1) / 2 + column * (_WIDE + 0.1)
            axes = figure.add_axes((start / width, bottom / height, _WIDE / width, tall / height))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("0.7")
            places.append(axes)
        middle = places[min(1, columns - 1)]
        largest = draw_map(middle, values[row], percentile, colours, low, block)
        said = f"full colour from {largest:.2g} on" if largest else "all values are 0"
        if marked is not None:
            said += f"\n{int(marked[row].sum()):,} of {int((~zero[row]).sum()):,} pixels significant"
        middle.set_title(said if batch is not None else f"{named[row]}\n{said}".strip(), fontsize=8, **PLAIN)
        outlined = [middle]
        if batch is not None:
            picture = pictures[row]
            places[0].imshow(picture, cmap="gray", interpolation="nearest")
            places[0].set_title(named[row], fontsize=8, **PLAIN)
            over = (
                heat_over(gray_of(picture), np.abs(maps[row]).sum(0), blur, percentile)
                if blur
                else blend(gray_of(picture), values[row], zero[row], largest, colours, low)
            )
            places[2].imshow(over, interpolation="nearest")
            places[2].set_title("over the image", fontsize=8, **PLAIN)
            outlined.append(places[2])
        for axes in outlined:
            if labels is not None:
                draw_groups(axes, labels[row], ~zero[row], min(0.9, pixel), halo=axes is not middle)
            if marked is not None:
                thin = min(1.1, 0.3 * pixel + 0.1)
                draw_outline(axes, marked[row].astype(int), marked[row], CERTAIN, thin, inset=0.07)
    marks = [("0.6", "exactly 0")]
    marks += [(GROUP, "group in the map")] if labels is not None else []
    marks += [(CERTAIN, "significant")] if marked is not None else []
    words = ("small", "", "largest norm") if norms else ("lowers the score", "", "raises it")
    draw_foot(figure, foot, colours, low, words, marks)
    if batch is not None and blur:
        colour_bar(figure, (width - 2.0, foot + 0.2, 1.5, 0.1), heat_colours(), 0, HEAT_WORDS)
    write_caption(figure, lines)
    return figure


def _check_percentile(percentile: float) -> None:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a number above 0, up to 100, got {percentile!r}")


def _stated(maps: Array, percentile: float, block: int, *, norms: bool, blur: float, scaled: bool) -> str:
    """What was done to maps [B, channels, H, W] before they were drawn, in words."""
    said, what = [], "norms" if norms else "values"
    if norms:
        said.append("The colour of a group is the length of its values, without a sign.")
    elif maps.shape[1] > 1:
        said.append("Channels are summed.")
    if percentile < 100:
        said.append(f"Full colour from the {percentile:g} % quantile of the non-zero |{what}| on.")
    if block > 1:
        said.append(f"Of each {block} x {block} pixels of a map the strongest is drawn.")
    if blur:
        said.append(f"Over the image: |map|, blurred by {blur:g} pixels, full colour from the same quantile on.")
    if scaled:
        said.append("Image: colours scaled from its minimum to its maximum.")
    return " ".join(said)
