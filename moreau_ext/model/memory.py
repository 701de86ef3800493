"""Memory: footprints of passes, budgets, and out-of-memory checks."""

from __future__ import annotations

import os
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode
from torch.utils._pytree import tree_leaves

from .restore import Change, Turns

Result = TypeVar("Result")

# Rows per pass where memory cannot be measured: the published number of samples.
BLIND_ROWS = 32

# Share of the free memory to plan for. CUDA: half, because a captured step has a pool beside the warm-up's cache.
# CPU: a quarter, because the kernel kills the process, and second derivatives need up to three times the measured
# bytes.
_CUDA_SHARE, _CPU_SHARE = 1 / 2, 1 / 4

# A pass of more bytes than this, per thread, is slower on the CPU: its tensors leave the caches, and glibc takes blocks
# of 32 MiB from the system and gives them back each time, so that every page is a fault again (measured: up to 2.4
# times slower at a gigabyte, on convolutions, transformers and an LSTM; equal within 10 % from 16 to 128 MiB).
_CPU_PASS = 64 << 20

# Rows of such a pass, at least: one row alone does not fill a large model (EfficientNet-Lite0 at 224 x 224 is 20 %
# slower than with four), and the samples of a pair go together.
_CPU_FEWEST = 4

# Where the system does not say what is free.
_CPU_BLIND = 4 << 30

_REFUSED = ("allocate memory", "STATUS_ALLOC_FAILED")

_CGROUPS = Path("/sys/fs/cgroup")


def budget(device: torch.device) -> int:
    """Bytes that one caller may plan for: half of a GPU's free memory, a quarter of what the CPU's processes can have.

    Free is on CUDA also what the caching allocator holds and does not use; on the CPU at most what the limits of the
    cgroups (of containers) leave.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, int(_CUDA_SHARE * (torch.cuda.mem_get_info(device)[0] + held)))
    return max(1, int(_CPU_SHARE * min([_available(), *_left_by_cgroups()])))


def _available() -> int:
    """Bytes that could be had without swapping, as the system estimates it."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return _CPU_BLIND


def _left_by_cgroups() -> Iterator[int]:
    """Limit less usage of this process's memory cgroups, both versions, with all that they are part of."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may see its own group at the root, and a path that is the host's.
        place = Path(path.lstrip("/"))
        for folder in (root / place, *((root / parent) for parent in place.parents)):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                if limit == "max":
                    continue
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # Files' pages that nobody asked for lately are given up first.
                yield max(0, int(limit) - int(used) + int(counts.get(names[2], 0)))
            except (OSError, ValueError):
                continue


class BytesAlive(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Bytes of the tensors made inside that are alive, after every operation; this thread's alone, and no one's
    statistics. What was there before, weights and inputs, is not counted, nor are views of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.after: list[int] = []
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def peak(self) -> int:
        """The most that was alive at once."""
        return max(self.after, default=0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in _storages((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        for storage in _storages(made):
            if id(storage) not in before:
                self._count(storage)
        self.after.append(self._now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size


class Counting(Change):
    """Runs a counter; an interrupt does not leave it running."""

    def __init__(self, counter: BytesAlive) -> None:
        self._counter = counter

    def do(self) -> None:
        self._counter.__enter__()  # type: ignore[no-untyped-call]  # torch's

    def undo(self) -> None:
        while self._counter in _get_current_dispatch_mode_stack():
            try:
                self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's
            except IndexError:  # an interrupted exit
                _pop_mode()


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]


@dataclass(frozen=True)
class Footprint:
    """Bytes of the tensors alive at once, at most: fixed + per_row·rows + per_input·inputs.

    Args:
        fixed: whatever the rows: copies of weights in another dtype, say.
        per_row: what each row of a pass adds.
        per_input: what each input of the call adds, in a pass or not.
    """

    fixed: int
    per_row: int
    per_input: int = 0

    def peak(self, rows: int, inputs: int = 0) -> int:
        """Bytes of a call with so many inputs and rows per pass; of one pass alone for no inputs."""
        return self.fixed + self.per_row * rows + self.per_input * inputs

    def rows(self, budget: int) -> int:
        """The largest power of two of rows that the budget holds, one at least: a budget that changes a little, as
        free memory does, leads to the same."""
        fitting = max(1, (budget - self.fixed) // max(1, self.per_row))
        return 1 << fitting.bit_length() - 1

    def fast_rows(self, device: torch.device, most: int) -> int:
        """A power of two of rows that a pass is fast with and the free memory holds, at most so many.

        By a rule instead of a timer, so that a machine that is busy makes the same passes as an idle one. Only the
        CPU has a size beyond which more rows are slower.
        """
        if device.type == "cpu":
            most = min(most, max(_CPU_FEWEST, Footprint(0, self.per_row).rows(_CPU_PASS * torch.get_num_threads())))
        return min(most, self.rows(budget(device)))


def measure_footprint(run: Callable[[int], Any], device: torch.device) -> Footprint | None:
    """Measures passes of one and of two rows, operation by operation.

    With a_t + b_t·rows bytes alive after operation t, both passes give a_t and b_t, and the peak for any number of rows
    is max_t(a_t + b_t·rows) ≤ max_t a_t + max_t b_t·rows. The slope between two peaks alone would be too small where
    another operation's share grows: bfloat16 copies of the weights are most of what one row takes, and nothing of what
    1,000 do. Scratch inside a library's kernels is not seen.

    Args:
        run: makes a pass of so many rows.
        device: of the pass.

    Returns:
        None for what does not run under the counter. Where two rows do not fit, what no budget holds two of.

    Raises:
        Exception: what ``run`` raises without the counter.
    """
    counters = []
    for rows in (1, 2):
        counter = BytesAlive()
        try:
            with Counting(counter):
                run(rows)
        except Exception as error:  # a model, or what it is made of, may fail in any way under a dispatch mode
            if out_of_memory(error):
                return Footprint(0, sys.maxsize)
            run(rows)  # if it is what runs that fails and not the counter, this says so
            return None
        counters.append(counter.after)
    one, two = counters
    if len(one) != len(two):
        # Not the same operations: every row is charged all that one takes.
        return Footprint(0, max(1, *one, max(two) // 2))
    fixed = max((2 * a - b for a, b in zip(one, two, strict=True)), default=0)
    per_row = max((b - a for a, b in zip(one, two, strict=True)), default=0)
    return Footprint(max(0, fixed), max(1, per_row))


class _SameRandomNumbers(Change):
    """See :func:`same_random_numbers`."""

    _turns = Turns()

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._before: Any = None

    def do(self) -> None:
        self._turns.take(self)
        self._before = [g.get_state() for g in self._generators], random.getstate(), np.random.get_state()  # noqa: NPY002  legacy
        # Not torch.manual_seed, which would reseed every accelerator too.
        for generator in self._generators:
            generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  what models draw from is the legacy generator

    def undo(self) -> None:
        if self._before is not None:
            states, pythons, numpys = self._before
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002  legacy, as above
            self._before = None
        self._turns.leave(self)


def same_random_numbers(device: torch.device) -> _SameRandomNumbers:
    """A model that draws draws the same in every pass that starts one of these; the generators of torch, Python and
    NumPy are restored. They are the process's: one thread at a time."""
    return _SameRandomNumbers(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    # The CPU's allocator and cuDNN's and cuBLAS's handles have no exception of their own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED)
    )


def may_retry(error: BaseException, device: torch.device) -> bool:
    """Whether the pass may be retried with fewer rows."""
    # In a captured CUDA graph nothing can be done again with fewer rows, or be freed.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not capturing and out_of_memory(error)


def release(device: torch.device) -> None:
    """Frees what can be freed before another attempt."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[[], Result], device: torch.device, last: bool) -> Result | None:
    """The result of ``run``; or None where memory did not suffice. The ``last`` attempt raises as it fails."""
    try:
        return run()
    except Exception as error:
        if last or not may_retry(error, device):
            raise
    # Out of the except block: the error held the frames of the pass, and they its tensors.
    release(device)
    return None
