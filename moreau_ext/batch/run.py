"""``explain_dataset`` and ``explain_config``: a whole data set on this machine.

A shard is a fixed slice of the source, and a batch is a fixed slice of a shard. So an interrupted and resumed run
explains the same batches as an uninterrupted one, and its maps have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from .._errors import before_work
from ..data.progress import report
from ..explainers.base import Explainer
from .config import Config, fix_max_batch
from .engine import Engine
from .job import (
    Summary,
    batches_of,
    check_job,
    configuration_of,
    describe_explainer,
    locked,
    open_job,
    without_warnings,
)
from .local import run_local
from .preprocess import Preprocess
from .readers import read_batches
from .sources.base import Source, Unreadable
from .sources.datasets import Stream
from .sources.open import open_source


def explain_config(
    config: Config,
    source: object,
    out: str | Path,
    *,
    column: str | None = None,
    batch: int = 32,
    shard_rows: int | None = None,
    workers: int = 1,
    map_dtype: str = "float32",
    map_format: str = "dense",
    progress: bool = False,
) -> Summary:
    """Runs a job that is described by names on this machine, or resumes it.

    Args:
        config: the settings.
        source, out, column, batch, shard_rows, workers, map_dtype, map_format, progress: see :func:`explain_dataset`.

    Raises:
        ValueError, OSError, KeyboardInterrupt: see :func:`explain_dataset`.
    """
    check_job(batch, shard_rows, map_dtype, map_format, workers)
    with without_warnings(), locked(out) as output:
        with before_work(Unreadable):
            report(f"loading {config.model}", progress)
            model, preprocess = config.load()
            opened = open_source(source, preprocess=preprocess, column=column, target=config.target_column)
            settings = config.record(model, preprocess)
            configuration = configuration_of(settings, opened, batch, map_dtype, map_format)

            def make(example: Tensor, choices: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
                report(
                    f"{len(opened)} inputs; preparing the model" if isinstance(opened, Source) else "preparing",
                    progress,
                )
                config.check_target(model, example, getattr(opened, "classes", ()))
                return config.prepared_explainer(model, example, choices)

            job = open_job(opened, output, make, configuration, config.target, shard_rows)
        return run_local(opened, job, workers, progress)


@overload
def explain_dataset(
    explainer: Explainer,
    dataset: object,
    out: None = None,
    *,
    target: str | int = "predicted",
    column: str | None = None,
    preprocess: Preprocess | None = None,
    batch: int = 32,
    shard_rows: int | None = None,
    workers: int = 0,
    map_dtype: str = "float32",
    map_format: str = "dense",
    progress: bool = False,
) -> Iterator[dict[str, Any]]: ...


@overload
def explain_dataset(
    explainer: Explainer,
    dataset: object,
    out: str | Path,
    *,
    target: str | int = "predicted",
    column: str | None = None,
    preprocess: Preprocess | None = None,
    batch: int = 32,
    shard_rows: int | None = None,
    workers: int = 0,
    map_dtype: str = "float32",
    map_format: str = "dense",
    progress: bool = False,
) -> Summary: ...


def explain_dataset(
    explainer: Explainer,
    dataset: object,
    out: str | Path | None = None,
    *,
    target: str | int = "predicted",
    column: str | None = None,
    preprocess: Preprocess | None = None,
    batch: int = 32,
    shard_rows: int | None = None,
    workers: int = 0,
    map_dtype: str = "float32",
    map_format: str = "dense",
    progress: bool = False,
) -> Summary | Iterator[dict[str, Any]]:
    """Explains a whole data set, and writes the results or yields them.

    Args:
        explainer: any of the package.
        dataset: see :func:`open_source`: paths, a tensor, a Dataset, a DataLoader, ...
        out: a folder. If the call is interrupted, repeat it: it resumes after the finished shards. Another explainer,
            model or source is refused. None yields the results.
        target: "predicted", a class, or the name of the column of targets ("label" for pairs, "class" for image
            folders).
        column: the column to explain, if several are possible.
        preprocess: applied to each input.
        batch: inputs per call of the explainer.
        shard_rows: rows of a file; 64 MiB of maps or 256 rows by default.
        workers: processes that read ahead; 0 reads in this one.
        map_dtype: "float32" or "float16".
        map_format: "dense", or "sparse" for lists of indices and values.
        progress: show a bar (needs tqdm).

    Returns:
        With ``out``, a :class:`Summary`. Without, an iterator of one dict per input: the columns of
        :data:`moreau_ext.batch.COLUMNS` and ``map``, an array.

    Raises:
        ValueError: a setting, a source or an output folder that does not fit.
        OSError: the output cannot be written. Finished shards are kept.
        KeyboardInterrupt: at the first Ctrl-C, after the current shard is written.

    Example:
        >>> import torch
        >>> from moreau_ext import Gradient
        >>> from moreau_ext.batch import explain_dataset
        >>> found = list(explain_dataset(Gradient(lambda x: x.square().sum(1)), torch.ones(5, 3)))
        >>> found[4]["id"], found[4]["map"].tolist()
        (4, [2.0, 2.0, 2.0])

    The noise of an input depends only on the seed and its id. So results do not depend on batches, workers or
    interruptions, up to the rounding of the model's passes; with the same batches they have the same bits.
    """
    check_job(batch, shard_rows, map_dtype, map_format, workers)
    target_column = None if isinstance(target, int) or target == "predicted" else target
    source = open_source(dataset, preprocess=preprocess, column=column, target=target_column)
    if out is None:
        return _yield(explainer, source, target, batch, workers, map_dtype)
    with without_warnings(), locked(out) as output:
        settings = {**describe_explainer(explainer), "target": target}
        settings["preprocess"] = None if preprocess is None else preprocess.record()
        configuration = configuration_of(settings, source, batch, map_dtype, map_format)

        def make(example: Tensor, choices: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
            inputs = Engine(explainer, target, tuple(example.shape[1:]), map_dtype).to_model(example)
            return fix_max_batch(explainer, inputs, choices)

        job = open_job(source, output, make, configuration, target, shard_rows)
        return run_local(source, job, workers, progress)


def _yield(
    explainer: Explainer, source: Source | Stream, target: str | int, batch: int, workers: int, map_dtype: str
) -> Iterator[dict[str, Any]]:
    engine = None
    if isinstance(source, Stream):
        batches = source.batches(batch)
    else:
        batches = read_batches(source, batches_of(0, len(source), batch), workers, False)
    for _, loaded in batches:
        if engine is None:
            shape = (0,) if loaded.inputs is None else tuple(loaded.inputs.shape[1:])
            engine = Engine(explainer, target, shape, map_dtype)
        with without_warnings():
            rows = engine.rows(loaded)
        if loaded.inputs is None and engine.shape == (0,):
            engine = None
        for i in range(len(rows)):
            yield {**{name: values[i] for name, values in rows.columns.items()}, "map": rows.maps[i]}
