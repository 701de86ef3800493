"""Processes that read ahead. Batches come through pipes: no shared memory, no threads, no locks between processes.

Every wait ends. If a reader dies, its pipe ends, and the job stops with an error. If the job dies, the kernel closes
its ends of the pipes, so a reader fails to write, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from .sources.base import Loaded, Source

_PR_SET_PDEATHSIG = 1
# Readers may wait for a disk or a network; more than a few per core only take memory.
_PER_CORE = 4


def read_batches(
    source: Source, batches: list[tuple[int, int]], workers: int, pin: bool
) -> Iterator[tuple[int, Loaded]]:
    """Reads batches in order.

    Args:
        source: of the rows.
        batches: (first row, last row + 1) of each.
        workers: processes that read ahead, no more than there are batches, or four per core; 0 reads in this one.
        pin: copy the inputs to pinned memory, for a GPU.

    Raises:
        RuntimeError: a reader ended, or failed on more than a row.
    """
    count = min(workers, len(batches), _PER_CORE * len(os.sched_getaffinity(0)))
    with _started(source, batches, count) as readers:
        for number, (start, stop) in enumerate(batches):
            loaded = _receive(*readers[number % count]) if readers else source.load(start, stop)
            yield start, loaded.pin_memory() if pin else loaded


@contextlib.contextmanager
def _started(source: Source, batches: list[tuple[int, int]], count: int) -> Iterator[list[tuple[Any, Connection]]]:
    """(process, pipe) of the readers, which end with the block. Reader k reads every count-th batch."""
    context = multiprocessing.get_context("fork")
    readers: list[tuple[Any, Connection]] = []
    try:
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            inherited = [ours, *(pipe for _, pipe in readers)]
            process = context.Process(
                target=_read, args=(source, batches[number::count], theirs, inherited, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            readers.append((process, ours))
        yield readers
    finally:
        for process, pipe in readers:
            pipe.close()
            process.kill()
        for process, _ in readers:
            process.join()


def _receive(process: Any, pipe: Connection) -> Loaded:
    try:
        message = pipe.recv_bytes()
    except (EOFError, ConnectionError):
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        raise RuntimeError(
            f"a process that reads inputs ended (exit code {process.exitcode}"
            + (", likely out of memory" if killed else "")
            + "); finished shards are kept, and the same call resumes after them; workers 0 reads without processes"
        ) from None
    found = pickle.loads(message)  # made by our own process
    if isinstance(found, str):
        raise RuntimeError(f"a process that reads inputs failed: {found}")
    loaded, raw, dtype, shape = found
    if raw is not None:
        loaded.inputs = torch.from_numpy(raw).view(dtype).view(shape)
    return loaded  # type: ignore[no-any-return]  # torch.load


def _read(
    source: Source, batches: list[tuple[int, int]], pipe: Connection, inherited: list[Connection], parent: int
) -> None:
    """The work of a reader. It never waits for another process but in ``pipe``."""
    # The job's ends of the pipes: while any process holds them, a reader's write would wait for ever.
    for other in inherited:
        other.close()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Ctrl-C reaches every process of the terminal; the job decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        for start, stop in batches:
            loaded = source.load(start, stop)
            inputs, raw = loaded.inputs, None
            dtype, shape = (None, None) if inputs is None else (inputs.dtype, inputs.shape)
            if inputs is not None:
                raw = np.asarray(inputs.contiguous().view(-1).view(torch.uint8))
                loaded.inputs = None
            pipe.send_bytes(pickle.dumps((loaded, raw, dtype, shape), pickle.HIGHEST_PROTOCOL))
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
    finally:
        # Not the exit handlers of the job.
        os._exit(0)
