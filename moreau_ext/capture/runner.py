"""Steps of a solver, captured once as CUDA graphs and replayed.

A step of a small network is hundreds of launches, which a processor issues more slowly than a GPU runs them; a captured
step is one launch. What is captured is a *body*: a function that changes the tensors of a record (a dataclass of
tensors, numbers and further records) in place and waits for nothing. A graph works at fixed addresses, so it has a copy
of the record of its own: :meth:`Steps.run` copies the record in, replays, and copies it out. A caller cannot tell a
replay from the body itself but by the time it takes, and where nothing can be captured the body runs.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from .. import ops
from ..model.modes import has_global_hooks, has_hooks
from .cuda import CudaDevice, Device
from .records import ROLE_READ, ROLE_STATE, Parts, copy_all
from .weights import Weights

Mode = Literal["auto"] | bool

# A pass of more elements keeps a GPU busy for longer than its launches take to issue, and a graph's own copy of its
# tensors would cost memory: 2^24 floats are 64 MiB, 5,461 rows of 3x32x32 or 111 of 3x224x224.
_MOST_ELEMENTS = 1 << 24

# A capture costs about two steps.
_WORTH = 4

# Graphs kept, the last ones used: a batch meets a few sizes at every level of a solver, and each has six graphs. Their
# tensors are few maps where a level takes few samples, and where it takes many, few inputs are in one pass.
_KEPT = 128

# Signatures whose uses are counted.
_COUNTED = 1024

# One capture at a time in a process, says torch.
_capturing = threading.Lock()


def check_mode(mode: Any) -> None:
    """Raises ValueError for what is no :data:`Mode`."""
    if mode != "auto" and not isinstance(mode, bool):
        raise ValueError(f"cuda_graphs: expected 'auto', True or False, got {mode!r}")


def _settings(device: torch.device) -> Hashable:
    """What is read while a pass is captured, and would be frozen."""
    backends: Any = torch.backends
    cudnn, cuda, matmul = backends.cudnn, backends.cuda, backends.cuda.matmul
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


class _Captured:
    """A graph, the record it works on, and what its body returned."""

    def __init__(self, parts: Parts, record: Any, body: Callable[[Any], Any], device: Device) -> None:
        # The signature names what is opaque by its address.
        self._opaque = parts.opaque
        self._read = {i: parts.tensors[i].detach().clone() for i in parts.of_role(ROLE_READ)}
        self._state = parts.of_role(ROLE_STATE)
        self._made: Any = None

        def work() -> None:
            # Scratch is made here: in the memory that all graphs of a device have in common.
            tensors = [self._read[i] if i in self._read else torch.empty_like(t) for i, t in enumerate(parts.tensors)]
            self._made = body(parts.copied(record, tensors))

        self._replay = device.capture(work)
        self._results = Parts(self._made)
        self._device = device  # whose streams and pool go after the graph

    def run(self, parts: Parts, times: int) -> None:
        with self._device.scope():
            self._work(parts, times)
            copy_all([parts.tensors[i] for i in self._state], [self._read[i] for i in self._state])

    def result(self, parts: Parts) -> Any:
        given = [torch.empty_like(t) for t in self._results.tensors]  # on the stream of the caller, who frees them
        with self._device.scope():
            self._work(parts, 1)
            copy_all(given, self._results.tensors)
        return self._results.copied(self._made, given)

    def _work(self, parts: Parts, times: int) -> None:
        copy_all([*self._read.values()], [parts.tensors[i] for i in self._read])
        for _ in range(times):
            self._replay()


class Steps:
    """Runs bodies one by one: what solvers are given where nothing is captured."""

    def run(
        self, body: Callable[[Any], None], record: Any, times: int, *, key: Hashable = None, elements: int = 0
    ) -> None:
        """``body(record)``, ``times`` times.

        Args:
            body: changes the tensors of the record in place; must neither replace them nor wait for the device.
            record: a dataclass; see the module's description.
            times: how often.
            key: what the body depends on beside the record. Same key and signature, same work.
            elements: numbers that go through the model in one run of the body.
        """
        for _ in range(times):
            body(record)

    def result(self, body: Callable[[Any], Any], record: Any, *, key: Hashable = None, elements: int = 0) -> Any:
        """``body(record)``, tensors in a record; it changes nothing. Arguments as in :meth:`run`; ``elements``: that it
        works on."""
        return body(record)

    def size(self, count: int, full: int, elements: int) -> int:
        """Inputs to go on with when ``count`` of ``full`` are left: as many, or the next of a few fixed sizes, each of
        which needs a graph of its own. The surplus is to be filled up. ``elements``: of one input, see :meth:`run`."""
        return count


class _Sized(Steps):
    """The same, with the sizes that replays would have: results must not depend on whether a capture succeeded."""

    def size(self, count: int, full: int, elements: int) -> int:
        size = full
        while (size + 1) // 2 >= count and size > 1:
            size = (size + 1) // 2
        return size if size * elements <= _MOST_ELEMENTS else count


class _Replayed(_Sized):
    """Captures what is asked for often enough."""

    def __init__(self, graphs: Graphs, device: torch.device) -> None:
        self._graphs, self._where = graphs, device
        self._settings = _settings(device)

    def run(
        self, body: Callable[[Any], None], record: Any, times: int, *, key: Hashable = None, elements: int = 0
    ) -> None:
        if times == 0 or not self._may(elements):
            super().run(body, record, times)
            return
        parts = Parts(record)
        known, worth = self._known(key, parts, times)
        if known is None and worth:
            # A step for real, which also warms up: libraries choose their algorithms.
            body(record)
            times -= 1
            known = self._capture(key, parts, record, body)
        if known is None:
            super().run(body, record, times)
        else:
            known.run(parts, times)

    def result(self, body: Callable[[Any], Any], record: Any, *, key: Hashable = None, elements: int = 0) -> Any:
        if not self._may(elements):
            return super().result(body, record)
        parts = Parts(record, ROLE_READ)
        known, worth = self._known(key, parts, 1)
        if known is not None:
            return known.result(parts)
        made = super().result(body, record)
        if worth:
            self._capture(key, parts, record, body)
        return made

    def _may(self, elements: int) -> bool:
        return elements <= _MOST_ELEMENTS and not self._graphs._broken

    def _entry(self, key: Hashable, parts: Parts) -> Hashable:
        return (key, parts.signature, self._settings)

    def _known(self, key: Hashable, parts: Parts, times: int) -> tuple[_Captured | None, bool]:
        """What was captured, and if nothing, whether it is time to."""
        graphs, entry = self._graphs, self._entry(key, parts)
        if any(t.device != self._where for t in parts.tensors):
            return None, False  # a number of the CPU's would be frozen
        if graphs._mode == "auto" and any(o is not graphs._model for o in parts.opaque):
            return None, False  # what it holds could change, and the signature would not
        known = graphs._captured.get(entry)
        if known is not None:
            graphs._captured.move_to_end(entry)
            return known, True
        if len(graphs._uses) > _COUNTED:
            graphs._uses.clear()  # arguments that differ in every call would fill it
        graphs._uses[entry] += times
        return None, graphs._uses[entry] >= _WORTH

    def _capture(self, key: Hashable, parts: Parts, record: Any, body: Callable[[Any], Any]) -> _Captured | None:
        graphs = self._graphs
        where = graphs._device(self._where)
        try:
            with _capturing, where.scope():
                made = _Captured(parts, record, body, where)
        except Exception as error:
            graphs._cannot(error)
            return None
        graphs._captured[self._entry(key, parts)] = made
        while len(graphs._captured) > _KEPT:
            oldest, _ = graphs._captured.popitem(last=False)
            graphs._uses.pop(oldest, None)
        return made


class Graphs:
    """The captured steps of one explainer; their memory goes with it.

    Args:
        mode: "auto" captures what an nn.Module without hooks does on a CUDA device. True also captures other callables,
            whose parameters must then stay where they are. False captures nothing.
        device: makes the :class:`Device` for a torch device; for tests.
    """

    def __init__(self, mode: Mode = "auto", device: Callable[[torch.device], Device] | None = None) -> None:
        self._mode = mode
        self._make = device
        self._lock = threading.Lock()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or one in another process, captures anew.
        return Graphs, (self._mode, self._make)

    def _forget(self) -> None:
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._uses: Counter[Hashable] = Counter()
        self._devices: dict[torch.device, Device] = {}
        self._model: Any = None
        self._known: Weights | None = None
        self._broken = False

    @contextmanager
    def steps(self, model: Any, device: torch.device) -> Iterator[Steps]:
        """What runs the steps of one explanation. A second thread with the same explainer meanwhile has its steps run
        one by one: graphs have one set of buffers."""
        if not self._apply(model, device):
            yield Steps()
            return
        if not self._lock.acquire(blocking=False):
            yield _Sized()
            return
        try:
            if self._model is not model or self._known is None or not self._known.unmoved(model):
                self._forget()
                self._model, self._known = model, Weights(model)
            yield _Replayed(self, device) if self._known.on(device) else Steps()
        finally:
            self._lock.release()

    def _apply(self, model: Any, device: torch.device) -> bool:
        if self._mode is False or (self._make is None and device.type != "cuda"):
            return False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # the caller captures by themselves
        if not ops.has_kernels(device):
            return False  # the reference waits for the device
        # A replay runs no Python: it would leave out what hooks do beside the modules.
        if self._mode is True:
            return True
        return isinstance(model, nn.Module) and not (has_global_hooks() or any(has_hooks(m) for m in model.modules()))

    def _device(self, device: torch.device) -> Device:
        if device not in self._devices:
            self._devices[device] = CudaDevice(device) if self._make is None else self._make(device)
        return self._devices[device]

    def _cannot(self, error: Exception) -> None:
        """Says once why nothing is captured any more."""
        self._captured.clear()
        self._broken = True
        lines = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the model's passes cannot be captured as a CUDA graph ({lines[0]}): its steps are run one by one, with "
            "the same numbers, slower where the model is small. Likely causes: control flow that depends on values, "
            "values read on the CPU (.item(), .cpu(), print) in forward, or too little memory; cuda_graphs=False "
            "silences this",
            stacklevel=2,
        )
