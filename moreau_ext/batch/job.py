"""A job: its configuration, its shards, its lock, its summary."""

from __future__ import annotations

import contextlib
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .._checks import check_count
from ..explainers.base import Explainer
from ..preparation.report import Prepared
from .engine import EXAMPLE, Engine, example_of, in_turn
from .models import fingerprint
from .sink import Output, concerns, explain_os_error
from .sources.base import Source, Unreadable
from .sources.datasets import Stream

# A shard's maps: small enough to be done again after a crash, large enough for a file.
_SHARD_BYTES, _SHARD_ROWS = 64 << 20, 256

MAP_DTYPES = ("float32", "float16")

MAP_FORMATS = ("dense", "sparse")


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Args:
        inputs: rows of the source; all that came, for a stream.
        explained: rows explained by this call.
        skipped: rows that earlier runs had done.
        errors: rows with an error, of all runs.
        converged: share of the rows explained by this call.
        seconds: from the first batch to the last byte.
        bytes: of the shards written by this call.
    """

    inputs: int
    explained: int
    skipped: int
    errors: int
    converged: float
    seconds: float
    bytes: int


def versions() -> dict[str, str]:
    return {"moreau_ext": __version__, "torch": torch.__version__}


def about_job(device: torch.device) -> dict[str, Any]:
    """Who made a shard: not compared between runs."""
    import pyarrow

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "host": platform.node(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
    }


def shard_size(shard_rows: int | None, batch: int, shape: tuple[int, ...]) -> int:
    """Rows of a shard: asked for, or 64 MiB of float32 maps, 256 rows at most, whole batches."""
    if shard_rows is not None:
        return shard_rows
    fitting = min(_SHARD_ROWS, _SHARD_BYTES // (4 * math.prod(shape)))
    return max(batch, fitting // batch * batch)


Make = Callable[[Tensor, dict[str, Any] | None], tuple[Any, dict[str, Any] | None]]


@dataclass(frozen=True)
class Work:
    """A job that was agreed on with its output: what is to be done, by whoever does it."""

    output: Output
    manifest: dict[str, Any]
    engine: Engine
    batch: int
    rows: int


def agree(
    source: Source | Stream,
    output: Output,
    make: Make,
    configuration: dict[str, Any],
    target: str | int,
    shard_rows: int | None,
) -> Work:
    """Compares with what is there, or begins anew; makes the engine."""
    chosen = output.held(configuration)
    try:
        example = example_of(source)
    except Unreadable:
        if isinstance(source, Source):
            _report_unreadable(source, output)
        raise
    shape, batch = tuple(example.shape[1:]), configuration["batch"]
    if chosen is not None and tuple(chosen["shape"]) != shape:
        raise ValueError(
            f"source: its first input has shape {shape}, and had {tuple(chosen['shape'])} in the first run"
        )
    explainer, prepared = make(example, None if chosen is None else chosen["prepared"])
    if chosen is None:
        rows = shard_size(shard_rows, batch, shape)
        about = {"shape": shape, "shard_rows": rows, "prepared": prepared}
        manifest = output.begin(configuration, about)
    else:
        manifest, rows = chosen, chosen["shard_rows"]
    return Work(output, manifest, Engine(explainer, target, shape, configuration["map_dtype"]), batch, rows)


def _report_unreadable(source: Source, output: Output) -> None:
    """errors.parquet of a source that holds nothing else."""
    found = [loaded for _, loaded in in_turn(source, EXAMPLE)]
    output.write_errors(
        [
            (i, n, loaded.errors[p])
            for loaded in found
            for p, (i, n) in enumerate(zip(loaded.ids, loaded.names, strict=True))
        ]
    )


def pieces_of(start: int, stop: int, batch: int) -> list[tuple[int, int]]:
    """A shard's batches."""
    return [(at, min(at + batch, stop)) for at in range(start, stop, batch)]


def pending(source: Source, work: Work) -> list[tuple[int, int, int]]:
    """(shard, first row, last row + 1) of what is not done."""
    shards = [(k, at, min(at + work.rows, len(source))) for k, at in enumerate(range(0, len(source), work.rows))]
    return [s for s in shards if work.output.rows_in(s[0]) != s[2] - s[1]]


@contextlib.contextmanager
def job_bar(total: int | None, done: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f'the progress bar needs tqdm ({error}): pip install "moreau_ext[batch]"') from error
    with tqdm(total=total, initial=done, unit="image", smoothing=0.05) as bar:
        yield bar


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """What explainers warn of batch by batch is in the columns here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*maps are zero everywhere")
        warnings.filterwarnings("ignore", message="the model is in train mode")
        yield


def check_job(batch: int, shard_rows: int | None, map_dtype: str, map_format: str, workers: int) -> None:
    check_count("batch", batch)
    if shard_rows is not None:
        check_count("shard_rows", shard_rows)
        if shard_rows % batch:
            raise ValueError(f"shard_rows: expected a multiple of batch, {batch}, got {shard_rows}")
    for name, value, expected in (("map_dtype", map_dtype, MAP_DTYPES), ("map_format", map_format, MAP_FORMATS)):
        if value not in expected:
            raise ValueError(f"{name}: expected one of {', '.join(expected)}, got {value!r}")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers!r}")


def configuration_of(
    settings: dict[str, Any], source: Source | Stream, batch: int, map_dtype: str, map_format: str
) -> dict[str, Any]:
    """All that decides the results, as it is compared between runs."""
    return {
        **settings,
        "source": source.describe(),
        "batch": batch,
        "map_dtype": map_dtype,
        "map_format": map_format,
        "versions": versions(),
    }


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[Output]:
    """The output for this process alone; what the system refuses is said in words."""
    folder = Path(out)
    try:
        output = Output(folder)
        with output.locked():
            yield output
    except OSError as error:
        if not concerns(error, folder):
            raise
        raise OSError(explain_os_error(error, folder)) from error


def describe_explainer(explainer: Explainer) -> dict[str, Any]:
    """An explainer's settings and its model's weights, as they are compared between runs."""
    model: Any = explainer.model
    prepared = isinstance(model, Prepared)
    settings = {f.name: _plain(getattr(explainer, f.name)) for f in fields(explainer) if f.init and f.name != "model"}
    described = {
        "explainer": type(explainer).__name__,
        **settings,
        "model": fingerprint(model.model if prepared else model),
    }
    return {**described, "layout": str(model.memory_format)} if prepared else described


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
