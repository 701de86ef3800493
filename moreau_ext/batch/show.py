"""Figures of results: rows that are chosen, with their images and the names of their classes."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._errors import SettingError, SettingFileNotFoundError, printable
from ..plots import features, overlay
from ..solvers.groups import Groups, Tiles
from .preprocess import Preprocess
from .sink import dense, manifest, read
from .sources.arrays import ARRAYS
from .sources.base import Source, image_input
from .sources.open import open_source
from .sources.tables import TABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Choice = Literal["first", "random", "class"]
# Rows without a limit: as many as fit on a screen, or as classes fit on a page.
_ROWS, _CLASSES = 4, 20
_LETTERS = 44  # of a title above an image


def pick(
    out: Path, ids: list[int] | None = None, choice: Choice = "first", limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows to draw.

    Args:
        out: the folder of results.
        ids: of the rows; None chooses among those with a map.
        choice: "first", "random", or "class" for the first of each explained class, in the order of the classes.
        limit: number of rows without ``ids``; 4 by default, or 20 for "class".
        seed: of "random".

    Raises:
        FileNotFoundError: no results.
        SettingError: an id that is missing or has no map, or no map at all.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    manifest(out)  # a folder without one is no output, which says more than that it has no shard
    table = read(out)
    if ids is not None:
        at = pc.index_in(pa.array(ids, pa.int64()), value_set=table["id"].combine_chunks()).to_pylist()
        for name, position in zip(ids, at, strict=True):
            if position is None:
                raise SettingError("ids", f"{out} has no such row, {name}")
            if (error := table["error"][position].as_py()) is not None:
                raise SettingError("ids", f"{table['source'][position]} has no map: {error}")
        return list(table.take(at).to_pylist())
    table = table.filter(pc.is_null(table["error"]))
    if table.num_rows == 0:
        raise SettingError("out", f"{out} holds no map")
    rows = np.arange(table.num_rows)
    if choice == "class":
        targets = table["target"].to_pylist()
        if targets[0] is None:
            raise SettingError("choice", f"the model of {out} has one output, and no classes")
        rows = np.unique(np.array(targets), return_index=True)[1]
    elif choice == "random":
        rows = np.random.default_rng(seed).permutation(rows)
    chosen = rows[: limit or (_CLASSES if choice == "class" else _ROWS)]
    return list(table.take(chosen).to_pylist())


def picture(
    out: Path,
    rows: list[dict[str, Any]],
    *,
    source: Path | None = None,
    names: list[str] | None = None,
    norms: bool = False,
    blur: float = 0.0,
) -> Figure:
    """The maps of some rows over their images, or the map of one row of a table as bars.

    Args:
        out: the folder of results.
        rows: of :func:`pick`.
        source: the folder of the image files, one file, or the .npy, .npz or Parquet file that was explained; without
            it maps are drawn alone.
        names: of the classes, by number; by default those that the results hold.
        norms, blur: see :func:`moreau_ext.plots.overlay`.

    Raises:
        SettingError: maps that are no images, or an image that is missing or has another size than its map.
    """
    about = manifest(out)
    shape, settings = tuple(about["shape"]), about["configuration"]
    known = about.get("classes") or settings["source"].get("classes") or [] if names is None else names
    titles = [_title(row, shape, known) for row in rows]
    maps = np.stack([dense(row, shape) for row in rows])
    if len(shape) == 1:
        if len(rows) > 1:
            raise SettingError("limit", f"rows of a table are drawn one at a time, got {len(rows)}; give 1, or an id")
        columns = settings["source"].get("column", "").split(", ")
        return features(maps[0], columns if len(columns) == len(maps[0]) else None, titles[0])
    if len(shape) > 3:
        raise SettingError("out", f"the maps of {out} have shape {shape}, which is no image")
    groups = _groups(settings)
    if norms and groups is None:
        raise SettingError("norms", f"{out} has no groups of pixels: it was explained without a tile")
    images = None if source is None else np.stack(_images(rows, source, settings, shape))
    if len(shape) == 2:
        maps = maps[:, None]
    return overlay(images, maps, titles, groups=groups, norms=norms, blur=blur)


def _title(row: dict[str, Any], shape: tuple[int, ...], names: list[str]) -> str:
    """The name of a row, its class, and how sparse and how well solved its map is."""
    name = printable(row["source"])
    lines = [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"]
    if row["target"] is not None:
        seen = row["predicted"]
        other = "" if seen in (None, row["target"]) else f"; predicted: {_class(seen, names)}"
        lines.append(f"{_class(row['target'], names)}{other}")
    state = f"{row['nnz'] / np.prod(shape):.0%} non-zero"
    if row["relative_residual"] is not None:
        state += f", residual {row['relative_residual']:.1%}" + ("" if row["converged"] else ", not converged")
    return "\n".join(part for line in [*lines, state] for part in textwrap.wrap(line, _LETTERS))


def _class(number: int, names: list[str]) -> str:
    named = names[number] if 0 <= number < len(names) else ""
    return f"class {number}" + (f", {printable(named)}" if named not in ("", str(number), f"class {number}") else "")


def _groups(settings: dict[str, Any]) -> Groups | None:
    """The tiles of a job; None without any."""
    tile = settings.get("tile")
    if tile is None and (found := re.match(r"Tiles\(size=(\d+), .*channel_axis=1\)$", str(settings.get("groups")))):
        tile = int(found[1])
    return None if tile is None else Tiles(tile)


def _images(
    rows: list[dict[str, Any]], source: Path, settings: dict[str, Any], shape: tuple[int, ...]
) -> list[np.ndarray[Any, Any]]:
    """The images of rows, [channels, H, W] in [0, 1]."""
    given = settings.get("preprocess") or {}
    plain = Preprocess.of({k: v for k, v in given.items() if k not in ("mean", "std", "scale")}, "manifest")
    plain = dataclasses.replace(plain, mode="RGB" if plain.mode == "BGR" else plain.mode)
    if not source.exists():
        raise SettingFileNotFoundError("source", f"{source} is not there")
    opened = None
    if source.suffix.lower() in (*ARRAYS, *TABLES) or (source.is_dir() and settings["source"]["kind"] == "parquet"):
        opened = open_source(source, preprocess=plain, column=settings["source"].get("column"))
    if opened is None and settings["source"]["kind"] != "images":
        raise SettingError("source", f"{source}: expected the file or the folder of Parquet files that was explained")
    found = []
    for row in rows:
        pixels = _of_row(opened, row) if isinstance(opened, Source) else _of_file(source, row["source"], plain)
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.shape[1:] != tuple(shape[-2:]):
            raise SettingError("source", f"{row['source']} has {pixels.shape[1:]} pixels, its map {tuple(shape[-2:])}")
        found.append(pixels)
    return found


def _of_row(opened: Source, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    if not 0 <= row["id"] < len(opened):
        raise SettingError("source", f"it has {len(opened)} rows, and no row {row['id']}")
    return opened.read(row["id"]).numpy()


def _of_file(source: Path, name: str, preprocess: Preprocess) -> np.ndarray[Any, Any]:
    path = source / name if source.is_dir() else source
    if not path.is_file() or (path == source and path.name != Path(name).name):
        raise SettingError("source", f"{source} {'is' if path == source else 'holds'} no {name}")
    return image_input(path, preprocess).numpy()
