"""Figures of results: the image, the map, and the map over the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import SettingError, printable
from .preprocess import Preprocess
from .sink import dense, manifest, read
from .sources.base import image_input

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of files are text: no formulas between dollars, no TeX.
_PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
_WIDTH = 2.6  # inches of one picture
# Quantile of |map| that has full colour: the few largest values would leave the others invisible.
_BRIGHTEST = 0.995


def pick(out: Path, ids: list[int] | None, limit: int) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The rows to draw, and the shape of a map.

    Args:
        out: the folder of results.
        ids: of the rows; None for the first ones with a map.
        limit: number of rows without ``ids``.

    Raises:
        FileNotFoundError: no results.
        ValueError: an id that is missing or has no map.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = tuple(manifest(out)["shape"])
    table = read(out)
    if ids is None:
        table = table.filter(pc.is_null(table["error"])).slice(0, limit)
    else:
        at = pc.index_in(pa.array(ids, pa.int64()), value_set=table["id"].combine_chunks())
        for name, position in zip(ids, at.to_pylist(), strict=True):
            if position is None:
                raise SettingError("ids", f"{out} has no such row, {name}")
            if (error := table["error"][position].as_py()) is not None:
                raise SettingError("ids", f"{table['source'][position]} has no map: {error}")
        table = table.take(at)
    if table.num_rows == 0:
        raise SettingError("out", f"{out} holds no map")
    return table.to_pylist(), shape


def overlays(rows: list[dict[str, Any]], shape: tuple[int, ...], source: Path | None, out: Path) -> Figure:
    """A grid with one row per map: the image, the map, the map over the gray image.

    Red raises the score, blue lowers it; channels are summed; each map has a scale of its own.

    Args:
        rows: of :func:`pick`.
        shape: of a map, [H, W] or [channels, H, W].
        source: the folder of the image files, or one file; None draws gray in place of the images.
        out: the results; their preprocessing brings an image to the size of its map.

    Raises:
        ValueError: maps that are not images, or an image that is missing or has another size than its map.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(shape) not in (2, 3):
        raise SettingError("out", f"the maps of {out} have shape {shape}, which is no image")
    settings = manifest(out)["configuration"].get("preprocess") or {}
    plain = Preprocess.of({k: v for k, v in settings.items() if k not in ("mean", "std", "scale")}, "manifest")
    plain = dataclasses.replace(plain, mode="RGB" if plain.mode == "BGR" else plain.mode)
    height, width = _WIDTH * shape[-2] / shape[-1], _WIDTH
    figure = Figure(figsize=(3 * width + 0.2, len(rows) * (height + 0.45) + 0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    colours = colormaps["RdBu_r"]
    for row, axes in zip(rows, panels, strict=True):
        values = dense(row, shape)
        values = values.sum(0) if values.ndim == 3 else values
        largest = float(np.quantile(np.abs(values[values != 0]), _BRIGHTEST)) if values.any() else 1.0
        signed = np.clip(values / largest, -1, 1)
        image = _image(row["source"], source, plain, shape)
        gray = np.full(shape[-2:], 0.9) if image is None else image.mean(-1)
        strength = np.sqrt(np.abs(signed))[..., None]  # makes the middle of the scale visible over an image
        over = (1 - strength) * (0.35 + 0.65 * gray[..., None]) + strength * colours((signed + 1) / 2)[..., :3]
        axes[0].imshow(np.broadcast_to(gray[..., None], over.shape) if image is None else image)
        axes[1].imshow(signed, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        axes[2].imshow(np.clip(over, 0, 1), interpolation="nearest")
        axes[0].set_title(f"{printable(row['source'])}: class {row['target']}", fontsize=8, **_PLAIN)
        state = "" if row["residual"] is None else f", residual {row['relative_residual']:.1%}"
        axes[1].set_title(
            f"{row['nnz'] / values.size / (shape[0] if len(shape) == 3 else 1):.0%} non-zero{state}",
            fontsize=8,
            **_PLAIN,
        )
        axes[2].set_title("over the image", fontsize=8, **_PLAIN)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.tight_layout(pad=0.4)
    return figure


def _image(name: str, source: Path | None, preprocess: Preprocess, shape: tuple[int, ...]) -> Any:
    """The image as [H, W, 3] in [0, 1], or None."""
    if source is None:
        return None
    path = source if source.is_file() else source / name
    if not path.is_file():
        raise SettingError("source", f"{source} holds no {name}")
    pixels = image_input(path, preprocess).numpy().transpose(1, 2, 0)
    if pixels.shape[:2] != tuple(shape[-2:]):
        raise SettingError("source", f"{name} has {pixels.shape[:2]} pixels, its map {tuple(shape[-2:])}")
    return np.clip(np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels, 0, 1)
