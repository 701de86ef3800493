"""A job on this machine: processes read, this one explains, and a thread writes, all at the same time."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..data.manifest import Differs
from ..data.progress import progress_bar
from .job import Job, Summary, about_job, batches_of
from .readers import read_batches
from .sink import Rows
from .sources.base import Source
from .sources.datasets import Stream


class _Writer:
    """A thread that writes shards. While it writes one, another may wait; ``put`` blocks on a third."""

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
                except BaseException as error:  # raised in the main thread
                    self._error = error
            del item

    def put(self, key: int, rows: Rows) -> None:
        self._raise()
        self._queue.put((key, rows))

    def close(self) -> None:
        """Waits until everything is written."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class _Interruption:
    """Handles Ctrl-C: the first asks to stop after the shard, the second stops at once."""

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


def run_local(source: Source | Stream, job: Job, workers: int, progress: bool) -> Summary:
    """Explains the pending rows of a job.

    Args:
        source: of the rows.
        job: its output folder is locked.
        workers: processes that read ahead; 0 reads in this one.
        progress: show a bar (needs tqdm).

    Raises:
        KeyboardInterrupt: at the first Ctrl-C, after the current shard is written.
        OSError: the output cannot be written.
    """
    engine, about = job.engine, about_job(job.engine.device)
    total, todo, skipped = None, [], 0
    if isinstance(source, Stream):
        batches = source.batches(job.batch)
    else:
        total, todo = len(source), job.pending(source)
        skipped = total - sum(stop - start for _, start, stop in todo)
        pieces = [piece for _, start, stop in todo for piece in batches_of(start, stop, job.batch)]
        batches = read_batches(source, pieces, workers, engine.device.type == "cuda")
    writer = _Writer(lambda key, rows: job.output.write(key, rows, job.manifest, about))
    began, explained, failed, converged, empty, inputs = time.perf_counter(), 0, 0, 0, 0, 0
    shard: list[Rows] = []
    solves = False  # the method has a residual
    finished: int | None = None  # rows of the stream's current shard, if an earlier run wrote it
    with (
        _Interruption() as interruption,
        progress_bar(total, show=progress, extra="batch", initial=skipped, unit="image", smoothing=0.05) as advance,
    ):
        try:
            for start, loaded in batches:
                key, stop = start // job.shard_rows, start + len(loaded)
                inputs = stop
                if isinstance(source, Stream) and not shard and start % job.shard_rows == 0:
                    finished = job.rows_in(key)
                if finished is not None:
                    end = key * job.shard_rows + finished
                    if stop > end:
                        raise Differs("source", f"goes on after row {end}, where it ended in the first run")
                    skipped += len(loaded)
                    continue
                rows = engine.rows(loaded)
                shard.append(rows)
                explained += len(rows)
                failed += sum(error is not None for error in rows.columns["error"])
                converged += sum(map(bool, rows.columns["converged"]))
                empty += rows.columns["nnz"].count(0)
                solves |= any(value is not None for value in rows.columns["residual"])
                advance(len(rows), f"{converged / explained:.0%} converged" if solves else "")
                if stop % job.shard_rows == 0 or stop == total:
                    writer.put(key, Rows.concatenate(shard))
                    shard = []
                    if interruption.asked:
                        raise KeyboardInterrupt
            if shard:  # the last one of a stream
                writer.put((inputs - 1) // job.shard_rows, Rows.concatenate(shard))
        except BaseException:
            # Explained shards are written.
            writer.close()
            job.output.check_place()
            job.output.write_errors()
            raise
        writer.close()
        errors = job.finish(inputs if total is None else total)
    return Summary(
        inputs=inputs if total is None else total,
        explained=explained,
        skipped=skipped,
        errors=errors,
        converged=converged / explained if explained else 0.0,
        seconds=time.perf_counter() - began,
        bytes=writer.bytes,
        left_out=dict(source.left_out),
        failed=failed,
        empty=empty,
    )
