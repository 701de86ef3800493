"""Photographs with maps as heat over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, gray_of, rows_of
from ._figure import (
    CAPTION_LINE,
    PLAIN,
    colour_bar,
    draw_map,
    matplotlib,
    new_figure,
    signed_colours,
    wrapped,
    write_caption,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = 0.45  # inches, for the column titles
_PANEL = 1.5  # inches, edge of a photograph
_GAP = 0.1  # between photographs, in edges of a photograph
_LEGEND = 0.5  # inches, for the two colour bars
HEAT_WORDS = ("|map| 0", "", "large")


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images convolved with a Gaussian of standard deviation ``sigma`` pixels; beyond the border they are reflected.

    Args:
        images: [B, channels, H, W].
        sigma: positive. The kernel ends at 3·sigma, or where the image ends.

    Example:
        >>> import torch
        >>> from moreau_ext.plots import gaussian_blur
        >>> gaussian_blur(torch.ones(1, 1, 4, 4), 1.0).mean().round(decimals=6).item()
        1.0
    """
    reach = max(0, min(round(3 * sigma), min(images.shape[-2:]) - 1))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = torch.nn.functional.pad(flat, (reach,) * 4, mode="reflect")
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(flat, kernel.view(1, 1, 1, -1)).reshape(images.shape)


def heat_gallery(
    images: Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str],
    caption: str = "",
    *,
    blur: float = 3.0,
    signed_share: float = 0.99,
    heat_share: float = 0.995,
) -> Figure:
    """Photographs beside their maps, two rows each: the signed map, and the map as heat over the gray photograph.

    Signed: channels are summed, of each 2 × 2 pixels the strongest is shown, and full colour begins at the given
    quantile of its |values| that are not zero. Heat: |map| summed over channels, blurred, with full colour from the
    given quantile on. Every panel has a scale of its own.

    Args:
        images: [B, 3, H, W] in [0, 1].
        maps: by the title of their column, each [B, 3, H, W].
        titles: one per photograph, under it.
        caption: below the grid; line breaks are kept, long lines wrapped.
        blur: standard deviation in pixels.
        signed_share, heat_share: the quantiles.

    Returns:
        A matplotlib Figure; write it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes or counts that do not match, NaN or infinity.

    Example:
        >>> import torch
        >>> from moreau_ext.plots import heat_gallery
        >>> figure = heat_gallery(torch.rand(1, 3, 16, 16), {"map": torch.randn(1, 3, 16, 16)}, ["noise"])
        >>> figure.axes[1].get_title()
        'map'
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(titles) != len(images):
        raise ValueError(f"images: expected [B, 3, H, W] and B titles, got {tuple(images.shape)} and {len(titles)}")
    arrays = {name: rows_of(batch, f"maps[{name!r}]", len(images)) for name, batch in maps.items()}
    photographs = images.detach().double().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()

    columns = 1 + len(maps)
    left = 0.1
    width = 2 * left + columns * _PANEL
    lines = wrapped(caption, width - 0.2)
    foot = 0.15 + CAPTION_LINE * len(lines) + _LEGEND
    height = _HEAD + (len(images) * (2 + _GAP) - _GAP) * _PANEL + foot
    figure = new_figure(width, height)
    grid = figure.add_gridspec(
        3 * len(images) - 1,
        columns,
        height_ratios=[1, 1, _GAP] * (len(images) - 1) + [1, 1],
        left=left / width,
        right=1 - left / width,
        top=1 - _HEAD / height,
        bottom=foot / height,
        wspace=0.04,
        hspace=0.04,
    )
    rows = [row for row in range(3 * len(images) - 1) if row % 3 < 2]
    panels = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in rows]
    for row, title in enumerate(titles):
        first, second = panels[2 * row], panels[2 * row + 1]
        first[0].imshow(photographs[row])
        first_line, _, others = title.partition("\n")
        for line, y, weight in ((first_line, 0.97, "bold"), (others, 0.85, "normal")):
            second[0].text(0.5, y, line, ha="center", va="top", fontsize=11, weight=weight, linespacing=1.3, **PLAIN)
        for column, batch in enumerate(arrays.values(), 1):
            draw_map(first[column], batch[row].sum(0), 100 * signed_share, signed_colours(), -1, block=2)
            over = heat_over(gray_of(photographs[row]), np.abs(batch[row].sum(0)), blur, 100 * heat_share)
            second[column].imshow(over, interpolation="antialiased")
    for axes, name in zip(panels[0], ["photograph", *maps], strict=True):
        axes.set_title(name, fontsize=11, **PLAIN)
    for axes in (axes for row in panels for axes in row):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("0.8")
        axes.spines[:].set_visible(bool(axes.images))
    bars = ((signed_colours(), -1, ("lowers the score", "", "raises it")), (heat_colours(), 0, HEAT_WORDS))
    for number, (colours, low, words) in enumerate(bars):
        place = ((0.27 + 0.47 * number) * width - 0.8, foot - 0.26, 1.6, 0.1)
        colour_bar(figure, place, colours, low, words)
    write_caption(figure, lines)
    return figure


def heat_colours() -> Any:
    """The colours of heat."""
    return matplotlib().colormaps["inferno"]


def heat_over(gray: Array, size: Array, blur: float, percentile: float) -> Array:
    """RGB [H, W, 3] of a blurred map as heat over a gray photograph.

    Args:
        gray: [H, W] in [0, 1].
        size: [H, W], |map|.
        blur: standard deviation in pixels.
        percentile: of the blurred map, from which on the heat is full.
    """
    heat = gaussian_blur(torch.from_numpy(size)[None, None], blur)[0, 0].numpy()
    full = float(np.percentile(heat, percentile)) or float(heat.max()) or 1.0
    level = (heat / full).clip(0, 1)
    strength = level[..., None] ** 0.75
    base = (0.15 + 0.8 * gray)[..., None]
    coloured = heat_colours()(0.2 + 0.8 * level)[..., :3]
    return np.asarray((1 - strength) * base + strength * coloured)
