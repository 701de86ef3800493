"""The job: read, explain, write, each while the others work. One shard after the other, whole or not at all.

A shard is a fixed slice of the source's order and a batch a fixed slice of a shard, so that a run that was interrupted
explains the same batches as one that was not, and its maps have the same bits.
"""

from __future__ import annotations

import contextlib
import math
import platform
import queue
import signal
import sys
import threading
import time
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
from ..model.modes import evaluating
from ..model.score import bind_score
from ..preparation.report import Prepared
from ..solvers.solution import Solution
from .config import Config, settled
from .models import fingerprint
from .preprocess import Preprocess
from .sink import COLUMNS, Differs, Output, Rows, concerns, explain_os_error
from .sources import Loaded, Source, Stream, Unreadable, _other_shape, open_source, reason

# A shard's maps: small enough to be done again after a crash, large enough for a file.
_SHARD_BYTES, _SHARD_ROWS = 64 << 20, 256
_EXAMPLE = 8
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


class Engine:
    """Explains loaded rows: the one mechanism that a local run, a stream and Ray's workers share.

    Args:
        explainer: any of ours.
        target: "predicted", a class, or anything else for the targets that came with the rows.
        shape: of an input.
        map_dtype: of the maps in memory.
    """

    def __init__(self, explainer: Explainer, target: str | int, shape: tuple[int, ...], map_dtype: str):
        self.explainer, self.target, self.shape, self.map_dtype = explainer, target, shape, map_dtype
        model: Any = explainer.model
        self._module = model.model if isinstance(model, Prepared) else model
        tensors = (
            [*self._module.parameters(), *self._module.buffers()] if isinstance(self._module, torch.nn.Module) else []
        )
        self.device = tensors[0].device if tensors else torch.device("cpu")
        # Arrays are often of float64, models hardly ever.
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        self._worked = False

    def ready(self, inputs: Tensor) -> Tensor:
        """Inputs where and as the model takes them."""
        return inputs.to(self.device, self.dtype or inputs.dtype, non_blocking=True)

    def rows(self, loaded: Loaded) -> Rows:
        """The results of loaded rows, in their order. A batch that the model fails on is halved until the inputs to
        blame stand alone; these become rows with the reason.

        Raises:
            Exception: the model's, where it fails on every input of the first batch: then it is the job.
        """
        count = len(loaded)
        columns: dict[str, list[Any]] = {name: [None] * count for name in COLUMNS}
        columns["id"], columns["source"] = list(loaded.ids), list(loaded.names)
        seed = getattr(self.explainer, "seed", None)
        columns["seed"] = [None if seed is None else int(seed)] * count
        maps = np.full((count, *self.shape), np.nan, self.map_dtype)
        errors = dict(loaded.errors)
        if loaded.inputs is not None:
            if tuple(loaded.inputs.shape[1:]) != self.shape:
                errors |= dict.fromkeys(loaded.good, _other_shape(loaded.inputs.shape[1:], self.shape))
            else:
                last = self._attempt(loaded, list(range(len(loaded.good))), columns, maps, errors)
                if not self._worked and last is not None:
                    raise last
        for position, error in errors.items():
            columns["error"][position] = error
            columns["converged"][position] = False
            maps[position] = np.nan
        return Rows(columns, maps)

    def _attempt(
        self,
        loaded: Loaded,
        these: list[int],
        columns: dict[str, list[Any]],
        maps: np.ndarray[Any, Any],
        errors: dict[int, str],
    ) -> Exception | None:
        """Explains some of the good rows; returns the last error."""
        positions = [loaded.good[i] for i in these]
        try:
            self._explain(loaded, these, positions, columns, maps, errors)
            self._worked = True
            return None
        except Exception as error:
            # A GPU that has failed fails on everything after it.
            if isinstance(error, torch.AcceleratorError):
                raise
            if len(these) == 1:
                errors[positions[0]] = reason(error)
                return error
            last = error
        middle = len(these) // 2
        for half in (these[:middle], these[middle:]):
            last = self._attempt(loaded, half, columns, maps, errors) or last
        return last

    def _explain(
        self,
        loaded: Loaded,
        these: list[int],
        positions: list[int],
        columns: dict[str, list[Any]],
        maps: np.ndarray[Any, Any],
        errors: dict[int, str],
    ) -> None:
        if loaded.inputs is None:
            return
        inputs = loaded.inputs if len(these) == len(loaded.good) else loaded.inputs[these]
        x = self.ready(inputs)
        ids = torch.tensor([loaded.ids[p] for p in positions], dtype=torch.int64)
        targets: Any = self.target
        if isinstance(self.target, str):
            targets = None if self.target == "predicted" else [loaded.targets[p] for p in positions]
        predicted = self._predicted(x, needed=targets is None)
        if targets is None and predicted is not None:
            targets = predicted
        found: Solution = self.explainer.attribute(x, targets, ids=ids, return_solution=True)
        values = found.attribution.detach().float().cpu().numpy()
        if self.map_dtype == "float16":
            large = np.abs(values.reshape(len(values), -1)).max(1) > np.finfo(np.float16).max
            errors |= {
                p: "the map has values above float16's 65504" for p, bad in zip(positions, large, strict=True) if bad
            }
            values = np.where(large.reshape(-1, *[1] * (values.ndim - 1)), 0, values)
        maps[positions] = values
        numbers: dict[str, Any] = {
            "score": found.score,
            "residual": found.residual,
            "relative_residual": found.relative_residual,
            "converged": found.converged,
            "steps": found.steps,
            "gradient_evaluations": found.gradient_evaluations,
            "nnz": found.nnz,
            "support": found.support,
            # Null, as the residual is, for methods that solve nothing.
            "rho": torch.where(found.relative_residual.isnan(), torch.nan, found.rho),
            "sigma": found.sigma,
            "predicted": predicted,
            "target": torch.as_tensor(targets).expand(len(these)) if targets is not None else None,
            # One per feature has no single number.
            "eta": found.eta if found.eta.dim() == 1 else None,
        }
        for name, tensor in numbers.items():
            if tensor is not None:
                for position, value in zip(positions, tensor.tolist(), strict=True):
                    columns[name][position] = None if value != value else value

    def _predicted(self, x: Tensor, needed: bool) -> Tensor | None:
        """The class of every input; None for one output, or for outputs of higher rank with a target of their own."""
        rows = self.explainer.rows_per_pass(x)
        with torch.inference_mode(False), torch.no_grad(), evaluating(self._module):
            try:
                bound, _ = bind_score(self._module, (x,), None, max_batch=rows, precision=self.explainer.precision)
            except ValueError:
                if needed:
                    raise
                return None
        return bound.target.squeeze(1).cpu() if isinstance(bound.target, Tensor) else None


def example_of(source: Source | Stream) -> Tensor:
    """The first readable inputs of a source, up to eight.

    Raises:
        Unreadable: there is none; says why the first one is not.
    """
    first = None
    batches = source.batches(_EXAMPLE) if isinstance(source, Stream) else _in_turn(source, _EXAMPLE)
    for _, loaded in batches:
        if loaded.inputs is not None:
            return loaded.inputs
        first = first or f"{loaded.names[0]} {loaded.errors[0]}"
    raise Unreadable(f"source: none of the inputs can be read; {first or 'there are none'}")


def _in_turn(source: Source, size: int) -> Iterator[tuple[int, Loaded]]:
    for start in range(0, len(source), size):
        yield start, source.load(start, min(start + size, len(source)))


class _Slices(torch.utils.data.Dataset[Any]):
    """Pieces of a source as the items of a data set, so that DataLoader's workers read whole batches."""

    def __init__(self, source: Source, pieces: list[tuple[int, int]]):
        self._source, self._pieces = source, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> tuple[int, Loaded]:
        start, stop = self._pieces[index]
        return start, self._source.load(start, stop)


def _quiet(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the first is to decide what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(source: Source, pieces: list[tuple[int, int]], workers: int, pin: bool) -> Iterator[tuple[int, Loaded]]:
    """The pieces in order, read ahead by other processes: two per worker, which is what holds them back."""
    loader: Any = torch.utils.data.DataLoader(
        _Slices(source, pieces),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_quiet,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    yield from loader


class _Writer:
    """A thread that writes shards. It takes the next one while it writes; a third waits."""

    def __init__(self, write: Callable[[int, Rows], int]) -> None:
        self.bytes = 0
        self._write = write
        self._queue: queue.Queue[tuple[int, Rows] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="moreau-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self.bytes += self._write(*item)
                except BaseException as error:  # handed to the caller, who waits for it
                    self._error = error
            del item

    def put(self, key: int, rows: Rows) -> None:
        self._raise()
        self._queue.put((key, rows))

    def close(self) -> None:
        """Waits for what is under way."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class _Interruption:
    """The first Ctrl-C asks to stop after the shard, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interruption:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not signal.SIG_IGN:  # as in the background of a shell
                signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("moreau-ext: finishing the shard; Ctrl-C again stops at once and loses it", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    return {"moreau_ext": __version__, "torch": torch.__version__}


def _about(device: torch.device) -> dict[str, Any]:
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
    found = [loaded for _, loaded in _in_turn(source, _EXAMPLE)]
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


def run_local(source: Source | Stream, work: Work, workers: int, progress: bool) -> Summary:
    """Explains what is not done, in this process, with others that read.

    Raises:
        KeyboardInterrupt: after the shard that was begun is written.
        OSError: the output cannot be written.
    """
    engine, about = work.engine, _about(work.engine.device)
    total = None if isinstance(source, Stream) else len(source)
    todo = [] if isinstance(source, Stream) else pending(source, work)
    skipped = 0 if total is None else total - sum(stop - start for _, start, stop in todo)
    if isinstance(source, Stream):
        batches = source.batches(work.batch)
    else:
        pieces = [piece for _, start, stop in todo for piece in pieces_of(start, stop, work.batch)]
        batches = _read(source, pieces, workers, engine.device.type == "cuda")
    writer = _Writer(lambda key, rows: work.output.write(key, rows, work.manifest, about))
    began, explained, converged, inputs = time.perf_counter(), 0, 0, 0
    held: list[Rows] = []
    done: int | None = None
    with _Interruption() as interruption, _bar(total, skipped, progress) as bar:
        try:
            for start, loaded in batches:
                key, stop = start // work.rows, start + len(loaded)
                inputs = stop
                if isinstance(source, Stream) and not held and start % work.rows == 0:
                    done = work.output.rows_in(key)
                if done is not None and isinstance(source, Stream):
                    if stop > key * work.rows + done:
                        raise Differs(
                            f"source: goes on after row {key * work.rows + done}, where it ended in the first run"
                        )
                    skipped += len(loaded)
                    continue
                rows = engine.rows(loaded)
                held.append(rows)
                explained += len(rows)
                converged += sum(map(bool, rows.columns["converged"]))
                if bar is not None:
                    bar.update(len(rows))
                    bar.set_postfix_str(f"{converged / explained:.0%} converged")
                if stop % work.rows == 0 or stop == total:
                    writer.put(key, Rows.concatenate(held))
                    held = []
                    if interruption.asked:
                        raise KeyboardInterrupt
            if held:  # the last of a stream
                writer.put((inputs - 1) // work.rows, Rows.concatenate(held))
                held = []
        finally:
            # Also on the way out with an error: what is explained is written.
            writer.close()
            errors = work.output.write_errors()
    return Summary(
        inputs=inputs if total is None else total,
        explained=explained,
        skipped=skipped,
        errors=errors,
        converged=converged / explained if explained else 0.0,
        seconds=time.perf_counter() - began,
        bytes=writer.bytes,
    )


@contextlib.contextmanager
def _bar(total: int | None, done: int, progress: bool) -> Iterator[Any]:
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
def _without_warnings() -> Iterator[None]:
    """What explainers warn of batch by batch is in the columns here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*maps are zero everywhere")
        warnings.filterwarnings("ignore", message="the model is in train mode")
        yield


def _check(batch: int, shard_rows: int | None, map_dtype: str, map_format: str, workers: int) -> None:
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
    _check(batch, shard_rows, map_dtype, map_format, workers)
    with _without_warnings(), locked(out) as output:
        model, preprocess = config.load()
        opened = open_source(source, preprocess=preprocess, column=column, target=config.target_column)
        settings = config.record(model, preprocess)
        configuration = configuration_of(settings, opened, batch, map_dtype, map_format)
        work = agree(
            opened, output, lambda x, chosen: config.ready(model, x, chosen), configuration, config.target, shard_rows
        )
        return run_local(opened, work, workers, progress)


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
    _check(batch, shard_rows, map_dtype, map_format, workers)
    columns = None if isinstance(target, int) or target == "predicted" else target
    source = open_source(dataset, preprocess=preprocess, column=column, target=columns)
    if out is None:
        return _yield(explainer, source, target, batch, workers, map_dtype)
    with _without_warnings(), locked(out) as output:
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
        batches = _read(source, pieces_of(0, len(source), batch), workers, False)
    for _, loaded in batches:
        if engine is None:
            shape = (0,) if loaded.inputs is None else tuple(loaded.inputs.shape[1:])
            engine = Engine(explainer, target, shape, map_dtype)
        with _without_warnings():
            rows = engine.rows(loaded)
        if loaded.inputs is None and engine.shape == (0,):
            engine = None
        for i in range(len(rows)):
            yield {**{name: values[i] for name, values in rows.columns.items()}, "map": rows.maps[i]}
