"""A job on a Ray cluster: Ray Data distributes shards, and actors explain them and write the same files.

A task is the number of a shard, not its pixels. An actor reads the inputs of the shard in the same batches as a local
run, and writes the file atomically. So any actor may do a shard, and more than once: a killed actor leaves no file, and
another one repeats its shard.

The source and the output must be at the same path on every node (a shared file system).
"""

from __future__ import annotations

import importlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import SettingError, before_work
from ..data.progress import progress_bar, report
from .config import Config
from .engine import Engine, example_of
from .job import (
    Job,
    Summary,
    about_job,
    batches_of,
    check_job,
    configuration_of,
    locked,
    open_job,
    without_warnings,
)
from .sink import Output, Rows
from .sources.base import Source, Unreadable
from .sources.datasets import Stream
from .sources.open import open_source

# CPUs that actors leave to Ray's own tasks.
_RESERVE = 0.5


class _Actor:
    """Explains shards with a model that is loaded once."""

    def __init__(self, config: Config, source: Source, out: str, manifest: dict[str, Any], threads: int):
        torch.set_num_threads(threads)
        self._output, self._manifest, self._source = Output(out), manifest, source
        model, _ = config.load()
        with without_warnings():
            explainer, _ = config.prepared_explainer(model, example_of(source), manifest["prepared"])
        configuration = manifest["configuration"]
        self._batch = configuration["batch"]
        self._engine = Engine(explainer, config.target, tuple(manifest["shape"]), configuration["map_dtype"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {n: [] for n in ("shard", "rows", "failed", "converged", "empty", "bytes")}
        for shard, start, stop in zip(*(batch[n].tolist() for n in ("shard", "start", "stop")), strict=True):
            with without_warnings(), ThreadPoolExecutor(1) as reader:
                pieces = batches_of(start, stop, self._batch)
                # The next batch is read while one is explained.
                ahead = reader.submit(self._source.load, *pieces[0])
                parts = []
                for following in [*pieces[1:], None]:
                    loaded = ahead.result()
                    if following is not None:
                        ahead = reader.submit(self._source.load, *following)
                    parts.append(self._engine.rows(loaded))
            rows = Rows.concatenate(parts)
            size = self._output.write(shard, rows, self._manifest, about_job(self._engine.device))
            done["shard"].append(shard)
            done["rows"].append(len(rows))
            done["failed"].append(sum(error is not None for error in rows.columns["error"]))
            done["converged"].append(sum(map(bool, rows.columns["converged"])))
            done["empty"].append(rows.columns["nnz"].count(0))
            done["bytes"].append(size)
        return done


def explain(
    dataset: Any,
    config: Config,
    out: str | Path,
    *,
    address: str | None = None,
    concurrency: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    column: str | None = None,
    batch: int = 32,
    shard_rows: int | None = None,
    map_dtype: str = "float32",
    map_format: str = "dense",
    progress: bool = False,
) -> Summary:
    """Runs a job on a Ray cluster, or resumes it. The files are those of :func:`explain_config` on one machine.

    Args:
        dataset: paths on a file system that all nodes share, or any other value that :func:`open_source` takes, has a
            length and can be pickled.
        config: the settings.
        out: a folder that all nodes share.
        address: of a running cluster ("auto" for the one of this node); None starts one on this machine, unless Ray is
            initialised already.
        concurrency: number of actors; by default one per GPU with ``num_gpus``, else one per CPU.
        num_gpus: per actor; by default 1 if the config's device is "cuda", else 0.
        num_cpus: per actor; by default an equal share of the CPUs, less half a CPU for Ray's own tasks, and 1 at most.
        column, batch, shard_rows, map_dtype, map_format, progress: as in :func:`explain_config`.

    Returns:
        The :class:`Summary`.

    Raises:
        ValueError: actors that do not fit the cluster and would wait forever; see also :func:`explain_config`.
        TypeError: a stream or a Ray Dataset, whose rows have no stable numbers.

    A job may begin on one machine and resume on a cluster, or the other way round.
    """
    try:
        ray: Any = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ImportError as error:
        raise ImportError(f'explain on a cluster needs ray ({error}): pip install "moreau_ext[ray]"') from error

    if hasattr(dataset, "map_batches"):
        raise TypeError("dataset: a Ray Dataset has no stable row numbers to key the noise; give the paths it reads")
    check_job(batch, shard_rows, map_dtype, map_format, 0)
    with without_warnings(), locked(out) as output:
        with before_work(Unreadable):
            report(f"loading {config.model}", progress)
            model, preprocess = config.load()
            source = open_source(dataset, preprocess=preprocess, column=column, target=config.target_column)
            if isinstance(source, Stream):
                raise TypeError("dataset: a stream has one order; give paths, arrays or a map-style Dataset")
            settings = config.record(model, preprocess)
            configuration = configuration_of(settings, source, batch, map_dtype, map_format)

            def make(example: Tensor, choices: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
                config.check_target(model, example, getattr(source, "classes", ()))
                return config.prepared_explainer(model, example, choices)

            job = open_job(source, output, make, configuration, config.target, shard_rows)
        todo = job.pending(source)
        if not todo:
            return Summary(len(source), 0, len(source), job.finish(len(source)), 0.0, 0.0, 0, dict(source.left_out))
        started = not ray.is_initialized()
        if started:
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        try:
            return _run(
                data,
                ray.cluster_resources(),
                config,
                source,
                job,
                todo,
                concurrency,
                num_gpus,
                num_cpus,
                progress,
            )
        finally:
            output.sweep()  # of actors that were killed
            if started:
                ray.shutdown()


def _run(
    data: Any,
    cluster: dict[str, float],
    config: Config,
    source: Source,
    job: Job,
    todo: list[tuple[int, int, int]],
    concurrency: int | None,
    num_gpus: float | None,
    num_cpus: float | None,
    progress: bool,
) -> Summary:
    actors, gpus, cpus = share(cluster, config.device, len(todo), concurrency, num_gpus, num_cpus)
    threads = max(1, math.floor(cpus))
    shards = data.from_items([{"shard": k, "start": a, "stop": b} for k, a, b in todo], override_num_blocks=len(todo))
    results = shards.map_batches(
        _Actor,
        fn_constructor_args=(config, source, str(job.output.folder.absolute()), job.manifest, threads),
        batch_size=1,
        concurrency=actors,
        num_gpus=gpus or None,
        num_cpus=None if gpus else cpus,
        # Read when an actor imports torch: thread pools have the size of its share, and do not spin.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}},
    )
    total = len(source)
    explained = failed = converged = empty = size = 0
    began = time.perf_counter()
    skipped = total - sum(stop - start for _, start, stop in todo)
    bar = progress_bar(total, show=progress, extra="batch", initial=skipped, unit="image", smoothing=0.05)
    with bar as advance:
        for row in results.iter_rows():
            explained, converged, size = explained + row["rows"], converged + row["converged"], size + row["bytes"]
            failed, empty = failed + row["failed"], empty + row["empty"]
            advance(row["rows"], f"{converged / explained:.0%} converged" if config.solves else "")
    return Summary(
        inputs=total,
        explained=explained,
        skipped=total - explained,
        errors=job.finish(total),
        converged=converged / explained if explained else 0.0,
        seconds=time.perf_counter() - began,
        bytes=size,
        left_out=dict(source.left_out),
        failed=failed,
        empty=empty,
    )


def share(
    cluster: dict[str, float],
    device: str,
    shards: int,
    concurrency: int | None,
    num_gpus: float | None,
    num_cpus: float | None,
) -> tuple[int, float, float]:
    """(actors, GPUs per actor, CPUs per actor) on a cluster.

    Args:
        cluster: its resources, by Ray's names.
        device: of the job.
        shards: to do; there are no more actors than shards.
        concurrency, num_gpus, num_cpus: as asked for; see :func:`explain`.

    Raises:
        ValueError: they do not fit; Ray would wait forever.

    Example:
        >>> from moreau_ext.batch.ray import share
        >>> share({"CPU": 2.0}, "cpu", 100, None, None, None)
        (2, 0.0, 0.75)
    """
    has_cpus, has_gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    gpus = float(device.startswith("cuda")) if num_gpus is None else num_gpus
    if concurrency is None:
        concurrency = max(1, math.floor(has_gpus / gpus if gpus else has_cpus))
    if concurrency < 1:
        raise SettingError("concurrency", f"expected a positive integer, got {concurrency}")
    actors = min(concurrency, shards)
    cpus = min(1.0, (has_cpus - _RESERVE) / actors) if num_cpus is None else num_cpus
    if gpus * actors > has_gpus:
        raise SettingError("num_gpus", f"{actors} actors of {gpus:g} GPUs do not fit the cluster's {has_gpus:g}")
    if cpus <= 0 or cpus * actors > has_cpus - _RESERVE:
        raise SettingError(
            "num_cpus",
            f"{actors} actors of {cpus:g} CPUs leave less than {_RESERVE} of the cluster's {has_cpus:g} for Ray's own "
            "tasks, and the job would wait for ever; give fewer actors, or fractions",
        )
    return actors, gpus, cpus
