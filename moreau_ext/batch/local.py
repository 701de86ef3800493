"""A job on this machine: reading, explaining and writing at the same time."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .job import Summary, Work, about_job, job_bar, pending, pieces_of
from .sink import Differs, Rows
from .sources.base import Loaded, Source
from .sources.datasets import Stream


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


def read_batches(
    source: Source, pieces: list[tuple[int, int]], workers: int, pin: bool
) -> Iterator[tuple[int, Loaded]]:
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


def run_local(source: Source | Stream, work: Work, workers: int, progress: bool) -> Summary:
    """Explains what is not done, in this process, with others that read.

    Raises:
        KeyboardInterrupt: after the shard that was begun is written.
        OSError: the output cannot be written.
    """
    engine, about = work.engine, about_job(work.engine.device)
    total = None if isinstance(source, Stream) else len(source)
    todo = [] if isinstance(source, Stream) else pending(source, work)
    skipped = 0 if total is None else total - sum(stop - start for _, start, stop in todo)
    if isinstance(source, Stream):
        batches = source.batches(work.batch)
    else:
        pieces = [piece for _, start, stop in todo for piece in pieces_of(start, stop, work.batch)]
        batches = read_batches(source, pieces, workers, engine.device.type == "cuda")
    writer = _Writer(lambda key, rows: work.output.write(key, rows, work.manifest, about))
    began, explained, converged, inputs = time.perf_counter(), 0, 0, 0
    held: list[Rows] = []
    done: int | None = None
    with _Interruption() as interruption, job_bar(total, skipped, progress) as bar:
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
