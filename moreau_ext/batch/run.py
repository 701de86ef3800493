"""The job: read, explain, write, each while the others work. One shard after the other, whole or not at all.

A shard is a fixed slice of the source's order and a batch a fixed slice of a shard, so that a run that was interrupted
explains the same batches as one that was not, and its maps have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..explainers.base import Explainer
from .config import Config, settled
from .engine import Engine
from .job import Summary, agree, check_job, configuration_of, describe_explainer, locked, pieces_of, without_warnings
from .local import read_batches, run_local
from .preprocess import Preprocess
from .sources.base import Source
from .sources.datasets import Stream
from .sources.open import open_source


def explain_config(
    config: Config,
    source: Any,
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
    """Runs a job by name on this machine; see :func:`explain_dataset` for the arguments. What is done already in
    ``out`` is not done again."""
    check_job(batch, shard_rows, map_dtype, map_format, workers)
    with without_warnings(), locked(out) as output:
        model, preprocess = config.load()
        opened = open_source(source, preprocess=preprocess, column=column, target=config.target_column)
        settings = config.record(model, preprocess)
        configuration = configuration_of(settings, opened, batch, map_dtype, map_format)
        work = agree(
            opened, output, lambda x, chosen: config.ready(model, x, chosen), configuration, config.target, shard_rows
        )
        return run_local(opened, work, workers, progress)


def explain_dataset(
    explainer: Explainer,
    dataset: Any,
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
) -> Any:
    """Explains a whole data set, and yields the results or writes them.

    Args:
        explainer: any of this package's.
        dataset: what :func:`open_source` takes: paths, a tensor, a Dataset, a DataLoader, ...
        out: a folder. A call that was cut short, by whatever, is repeated to go on from the last whole shard; another
            explainer, model or source is refused. None yields.
        target: "predicted", a class, or the name of the column with the targets ("label" for pairs, "class" for image
            folders).
        column: which column is explained, where several could be.
        preprocess: what is done to each input.
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
        ValueError: settings, a source or an output that do not fit; says what.
        OSError: the output cannot be written. Nothing that was written is lost.
        KeyboardInterrupt: after the shard that was begun, at the first Ctrl-C.

    Example:
        >>> import torch
        >>> from moreau_ext import Gradient
        >>> from moreau_ext.batch import explain_dataset
        >>> found = list(explain_dataset(Gradient(lambda x: x.square().sum(1)), torch.ones(5, 3)))
        >>> found[4]["id"], found[4]["map"].tolist()
        (4, [2.0, 2.0, 2.0])

    An input's noise depends on the seed and its id alone, so results do not depend on batches, workers or
    interruptions, beyond the rounding of the model's passes; where the batches are the same, they have the same bits.
    """
    check_job(batch, shard_rows, map_dtype, map_format, workers)
    columns = None if isinstance(target, int) or target == "predicted" else target
    source = open_source(dataset, preprocess=preprocess, column=column, target=columns)
    if out is None:
        return _yield(explainer, source, target, batch, workers, map_dtype)
    with without_warnings(), locked(out) as output:
        settings = {**describe_explainer(explainer), "target": target}
        settings["preprocess"] = None if preprocess is None else preprocess.record()
        configuration = configuration_of(settings, source, batch, map_dtype, map_format)

        def make(example: Tensor, chosen: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
            ready = Engine(explainer, target, tuple(example.shape[1:]), map_dtype).ready(example)
            return settled(explainer, ready, chosen)

        work = agree(source, output, make, configuration, target, shard_rows)
        return run_local(source, work, workers, progress)


def _yield(
    explainer: Explainer, source: Source | Stream, target: str | int, batch: int, workers: int, map_dtype: str
) -> Iterator[dict[str, Any]]:
    engine = None
    if isinstance(source, Stream):
        batches = source.batches(batch)
    else:
        batches = read_batches(source, pieces_of(0, len(source), batch), workers, False)
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
