"""A job: the agreement between a source, an explainer and an output folder, whoever does the work."""

from __future__ import annotations

import contextlib
import math
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .._checks import check_count
from .._errors import ConvergenceWarning, EmptyMapWarning, SettingError, TrainModeWarning, one_line, without
from ..explainers.base import Explainer
from ..preparation.report import Prepared
from .engine import EXAMPLE, Engine, example_of
from .models import class_names, fingerprint
from .sink import Output, output_error
from .sources.base import Source, Unreadable
from .sources.datasets import Stream

# Maps of a shard by default: few enough to compute again after a crash, enough for one file.
_SHARD_BYTES, _SHARD_ROWS = 64 << 20, 256

MAP_DTYPES = ("float32", "float16")

MAP_FORMATS = ("dense", "sparse")

# (example inputs, choices of the first run or None) -> (explainer, choices).
MakeExplainer = Callable[[Tensor, dict[str, Any] | None], tuple[Any, dict[str, Any] | None]]


@dataclass(frozen=True)
class Summary:
    """The result of a job.

    Args:
        inputs: rows of the source; for a stream, rows that came.
        explained: rows explained by this call.
        skipped: rows finished by earlier runs.
        errors: rows with an error, of all runs.
        failed: rows with an error among those of this call.
        converged: share of the rows explained by this call.
        seconds: from the first batch to the last byte.
        bytes: of the shards written by this call.
        empty: rows explained by this call whose map is zero everywhere.
        left_out: number of the source's entries that are no rows, such as files that are no images, by the reason.
    """

    inputs: int
    explained: int
    skipped: int
    errors: int
    converged: float
    seconds: float
    bytes: int
    left_out: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    empty: int = 0


@dataclass(frozen=True)
class Job:
    """A job whose configuration is that of its output folder.

    Args:
        output: the folder, locked.
        manifest: of the folder.
        engine: explains the rows.
        batch: rows per call of the explainer.
        shard_rows: rows per shard.
    """

    output: Output
    manifest: dict[str, Any]
    engine: Engine
    batch: int
    shard_rows: int

    def pending(self, source: Source) -> list[tuple[int, int, int]]:
        """(number, first row, last row + 1) of the shards that are missing or damaged."""
        starts = range(0, len(source), self.shard_rows)
        shards = [(key, start, min(start + self.shard_rows, len(source))) for key, start in enumerate(starts)]
        return [(key, start, stop) for key, start, stop in shards if self.rows_in(key) != stop - start]

    def rows_in(self, key: int) -> int | None:
        """The number of rows of a shard; None if it is missing or damaged."""
        return self.output.rows_in(key, self.manifest)

    def finish(self, rows: int) -> int:
        """Writes errors.parquet, and returns the number of the rows with an error.

        Args:
            rows: of all shards.

        Raises:
            OSError: the folder or a shard was deleted meanwhile.
        """
        self.output.check_complete(-(-rows // self.shard_rows))
        return self.output.write_errors()


def open_job(
    source: Source | Stream,
    output: Output,
    make_explainer: MakeExplainer,
    configuration: dict[str, Any],
    target: str | int,
    shard_rows: int | None,
) -> Job:
    """Resumes the job of an output folder, or begins a new one.

    Args:
        source: of the inputs.
        output: the folder, locked.
        make_explainer: called with example inputs and the choices of the first run.
        configuration: see :func:`configuration_of`.
        target: see :class:`Engine`.
        shard_rows: rows per shard; None for a default. A resumed job keeps those of the first run.

    Raises:
        Differs: the folder belongs to another configuration.
        Unreadable: no input can be read; errors.parquet then lists them.
    """
    manifest = output.resume(configuration)
    try:
        example = example_of(source)
    except Unreadable:
        if isinstance(source, Source):
            _write_unreadable(source, output)
        raise
    shape, batch = tuple(example.shape[1:]), configuration["batch"]
    if manifest is not None and tuple(manifest["shape"]) != shape:
        raise SettingError(
            "source", f"its first input has shape {shape}, and had {tuple(manifest['shape'])} in the first run"
        )
    try:
        explainer, choices = make_explainer(example, None if manifest is None else manifest["prepared"])
    except Exception as error:
        cure = _cure(error)
        if cure is None or isinstance(error, SettingError):
            raise
        raise SettingError(
            cure[0], f"the model fails on the first inputs, of shape {shape}: {one_line(error)[:300]}. {cure[1]}"
        ) from error
    if manifest is None:
        rows = shard_size(shard_rows, batch, shape)
        model: Any = explainer.model
        names = class_names(model.model if isinstance(model, Prepared) else model)
        named = {} if names is None else {"classes": names}
        manifest = output.begin(configuration, {"shape": shape, "shard_rows": rows, "prepared": choices, **named})
    engine = Engine(explainer, target, shape, configuration["map_dtype"])
    return Job(output, manifest, engine, batch, manifest["shard_rows"])


def _cure(error: Exception) -> tuple[str, str] | None:
    """(setting, cure) of an error of a model that gets its first inputs; None if the cause is not plain."""
    text = str(error)
    if channels := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
        wanted, got = channels.groups()
        if {wanted, got} == {"1", "3"}:
            colour = "gray" if wanted == "1" else "colour"
            return "preprocess", f'It takes {colour} images: set mode = "{"L" if wanted == "1" else "RGB"}"'
    if "Guard failed" in text or re.search(r"to be equal to \d+, but got", text):
        return "model", (
            "It was exported for fixed sizes: export it with dynamic_shapes for the batch, and bring inputs to its "
            "size (resize of preprocess)"
        )
    words = (
        "mat1 and mat2",
        "must match the size",
        "size mismatch",
        "doesn't match model",
        "is invalid for input of size",
    )
    if any(word in text for word in words):
        return "preprocess", "Likely cause: inputs of another size than the model takes: set resize and crop"
    return None


def _write_unreadable(source: Source, output: Output) -> None:
    """errors.parquet of a source without a readable input."""
    output.write_errors(
        [
            (loaded.ids[i], loaded.names[i], loaded.errors[i])
            for _, loaded in source.batches(EXAMPLE)
            for i in range(len(loaded))
        ]
    )


def shard_size(shard_rows: int | None, batch: int, shape: tuple[int, ...]) -> int:
    """Rows of a shard: as asked for, or 64 MiB of float32 maps in whole batches, 256 rows at most."""
    if shard_rows is not None:
        return shard_rows
    fitting = min(_SHARD_ROWS, _SHARD_BYTES // (4 * math.prod(shape)))
    return max(batch, fitting // batch * batch)


def batches_of(start: int, stop: int, batch: int) -> list[tuple[int, int]]:
    """(first row, last row + 1) of the batches of a shard."""
    return [(at, min(at + batch, stop)) for at in range(start, stop, batch)]


def check_job(batch: int, shard_rows: int | None, map_dtype: str, map_format: str, workers: int) -> None:
    """Checks the settings that all jobs have."""
    check_count("batch", batch)
    if shard_rows is not None:
        check_count("shard_rows", shard_rows)
        if shard_rows % batch:
            raise SettingError("shard_rows", f"expected a multiple of batch, {batch}, got {shard_rows}")
    for name, value, expected in (("map_dtype", map_dtype, MAP_DTYPES), ("map_format", map_format, MAP_FORMATS)):
        if value not in expected:
            raise SettingError(name, f"expected one of {', '.join(expected)}, got {value!r}")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise SettingError("workers", f"expected 0 or more, got {workers!r}")


def configuration_of(
    settings: dict[str, Any], source: Source | Stream, batch: int, map_dtype: str, map_format: str
) -> dict[str, Any]:
    """Every setting that determines the results, as the manifest holds it."""
    return {
        **settings,
        "source": source.describe(),
        "batch": batch,
        "map_dtype": map_dtype,
        "map_format": map_format,
        "versions": {"moreau_ext": __version__, "torch": torch.__version__},
    }


def describe_explainer(explainer: Explainer) -> dict[str, Any]:
    """The settings of an explainer and the weights of its model, as the manifest holds them."""
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
    if isinstance(value, FunctionType):  # its repr holds an address, which another run does not have
        return f"{value.__module__}.{value.__qualname__}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def about_job(device: torch.device) -> dict[str, Any]:
    """The writer of a shard: a part of its metadata, not compared between runs."""
    import pyarrow

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "host": platform.node(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
    }


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[Output]:
    """The output folder, locked for this process.

    Raises:
        SettingError: another process is writing there, or the folder holds something else.
        OSError: it cannot be written; the text says why in words.
    """
    folder = Path(out)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    begun = False
    try:
        output = Output(folder)
        with output.locked():
            begun = True
            yield output
    except OSError as error:
        in_words = output_error(error, folder)
        if in_words is None:
            raise
        if not begun:
            in_words.before_work = True  # type: ignore[attr-defined]  # our mark
        raise in_words from error
    finally:
        # A job that was refused leaves no empty folder.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def without_warnings() -> contextlib.AbstractContextManager[None]:
    """Silences the warnings of explainers whose contents are columns of the results."""
    return without(ConvergenceWarning, EmptyMapWarning, TrainModeWarning)
