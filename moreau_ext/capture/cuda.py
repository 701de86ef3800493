"""CUDA graphs: streams, memory pool, capture."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

from .. import ops


class Device(Protocol):
    """What graphs need of a device; :class:`CudaDevice` but for tests."""

    def scope(self) -> AbstractContextManager[None]:
        """Where records are copied, captured and replayed: one queue, in order with the caller's."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work of ``body`` at the same addresses; the capture itself does none of it."""


class CudaDevice:
    """Two streams and a memory pool. All memory of the graphs is used on one stream, whatever stream the caller is on,
    so the caching allocator may free and give it anew without further care.

    Captures run on the second stream. torch lends cuBLAS a workspace per stream, at its first use there, and takes it
    back when any graph that was captured there is destroyed, or when it is told to clear them all (torch.compile does):
    a graph would go on writing to it. On a stream that nobody else has and on which nothing ever runs, the first use is
    in a capture, so the workspace comes from the pool, whose memory stays as long as one of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._capturing_stream = ops.private_stream(device)
        # Shared: nothing in it outlives a replay, and replays of one stream do not overlap.
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def scope(self) -> Iterator[None]:
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            callers.wait_stream(self._stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which waits for the device and empties the cache of its memory each time. The cache of
        # the warm-up is of no use to the graph's pool, which needs as much again.
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if cached > torch.cuda.mem_get_info(self._device)[0]:
            torch.cuda.empty_cache()
        # An object that dies during a capture may take CUDA calls with it that a capture forbids.
        collecting = gc.isenabled()
        gc.disable()
        try:
            # capture_begin writes the seeds of the graphs' random numbers, which a replay may be reading.
            self._capturing_stream.wait_stream(self._stream)
            with torch.cuda.stream(self._capturing_stream):
                # "thread_local": other threads may allocate meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    with _without_autocast_cache():
                        body()
                except BaseException:
                    # The capture is invalid already; what made it so is on its way. Older versions of torch go on
                    # giving out memory of the pool after that.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    with suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
                    raise
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        replay: Callable[[], None] = graph.replay
        return replay


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """The weights that an autocast of the caller has cast are gone at its end; a graph must cast them itself."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
