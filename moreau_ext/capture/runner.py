"""Steps of a solver, captured once as CUDA graphs and replayed.

A step of a small network is hundreds of launches, which a processor issues more slowly than a GPU runs them; a captured
step is one launch. What is captured is a *body*: a function that changes the tensors of a record (a dataclass of
tensors, numbers and further records) in place and waits for nothing. A graph works at fixed addresses, so it has a copy
of the record of its own: :meth:`Runner.repeat` copies the record in, replays, and copies it out. A replay gives the
same bits as the body itself, and where nothing can be captured the body runs.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .. import ops
from ..model.modes import has_global_hooks, has_hooks
from .cuda import CudaDevice, Device
from .records import Parts, copy_all
from .weights import Weights

Mode = Literal["auto"] | bool

# Work on more elements keeps a GPU busy for longer than its launches take to issue, and a graph's own copy of its
# tensors costs memory: 2^24 floats are 64 MiB, 5,461 maps of 3x32x32 or 111 of 3x224x224.
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


def _settings() -> Hashable:
    """Settings that a capture freezes."""
    backends: Any = torch.backends
    cudnn, cuda, matmul = backends.cudnn, backends.cuda, backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


class _Captured:
    """A graph, the record it works on, and the values that its body returned."""

    def __init__(
        self, parts: Parts, written: list[int], record: Any, body: Callable[[Any], Any], device: Device
    ) -> None:
        # The signature names what is opaque by its address.
        self._opaque = parts.opaque
        self._own = [t.detach().clone() for t in parts.tensors]
        self._written = written
        self._made: Any = None

        def work() -> None:
            self._made = body(parts.copied(record, self._own))

        self._replay = device.capture(work)
        self._results = Parts(self._made)
        self._device = device  # whose streams and pool go after the graph

    def run(self, parts: Parts, times: int) -> None:
        with self._device.scope():
            self._work(parts, times)
            copy_all([parts.tensors[i] for i in self._written], [self._own[i] for i in self._written])

    def result(self, parts: Parts) -> Any:
        given = [torch.empty_like(t) for t in self._results.tensors]  # on the stream of the caller, who frees them
        with self._device.scope():
            self._work(parts, 1)
            copy_all(given, self._results.tensors)
        return self._results.copied(self._made, given)

    def _work(self, parts: Parts, times: int) -> None:
        copy_all(self._own, parts.tensors)
        for _ in range(times):
            self._replay()


class Runner:
    """Runs bodies one by one: for solvers where nothing is captured."""

    def repeat(self, body: Callable[..., None], record: Any, times: int, **options: Any) -> None:
        """``body(record, **options)``, ``times`` times.

        Args:
            body: changes the tensors of the record in place; must neither replace them nor wait for the device. It
                depends on nothing but its arguments.
            record: a dataclass; see the module's description.
            times: how often.
            options: numbers and flags.
        """
        for _ in range(times):
            body(record, **options)

    def call(self, body: Callable[[Any], Any], record: Any) -> Any:
        """``body(record)``: tensors in a record. It changes nothing; see :meth:`repeat`."""
        return body(record)

    def bucket(self, count: int, full: int, elements: int) -> int:
        """The size to which ``count`` inputs are padded; here ``count``, see :class:`PaddedRunner`.

        Args:
            count: inputs that are left.
            full: inputs at the start.
            elements: numbers of one input that go through the model in a step.
        """
        return count


class PaddedRunner(Runner):
    """The same, with the sizes that replays would have: results must not depend on whether a capture succeeded."""

    def bucket(self, count: int, full: int, elements: int) -> int:
        size = full
        while (size + 1) // 2 >= count and size > 1:
            size = (size + 1) // 2
        return size if size * elements <= _MOST_ELEMENTS else count


class GraphRunner(PaddedRunner):
    """Captures a body once it was asked for often enough, and replays it.

    A graph is found by the body, its options, and the signature of the record. The tensors that a body writes are those
    whose versions one run of it changes; the others are read.
    """

    def __init__(self, graphs: Graphs, device: torch.device) -> None:
        self._graphs, self._where = graphs, device
        self._settings = _settings()

    def repeat(self, body: Callable[..., None], record: Any, times: int, **options: Any) -> None:
        if times == 0 or self._graphs._broken:
            super().repeat(body, record, times, **options)
            return
        parts = Parts(record)
        key = (body, tuple(options.items()), parts.signature, self._settings)
        known, worth = self._known(key, parts, times)
        if known is None and worth:
            # A step for real, which also warms up: libraries choose their algorithms.
            before = parts.versions()
            body(record, **options)
            times -= 1
            written = [i for i, (a, b) in enumerate(zip(before, parts.versions(), strict=True)) if a != b]
            known = self._capture(key, parts, written, record, partial(body, **options))
        if known is None:
            super().repeat(body, record, times, **options)
        else:
            known.run(parts, times)

    def call(self, body: Callable[[Any], Any], record: Any) -> Any:
        if self._graphs._broken:
            return body(record)
        parts = Parts(record)
        key = (body, parts.signature, self._settings)
        known, worth = self._known(key, parts, 1)
        if known is not None:
            return known.result(parts)
        made = body(record)
        if worth:
            self._capture(key, parts, [], record, body)
        return made

    def _known(self, key: Hashable, parts: Parts, times: int) -> tuple[_Captured | None, bool]:
        """The captured body, and if there is none, whether to capture it now."""
        graphs = self._graphs
        if parts.elements > _MOST_ELEMENTS:
            return None, False
        if any(t.device != self._where for t in parts.tensors):
            return None, False  # a number of the CPU's would be frozen
        if graphs._mode == "auto" and any(o is not graphs._model for o in parts.opaque):
            return None, False  # what it holds could change, and the signature would not
        known = graphs._captured.get(key)
        if known is not None:
            graphs._captured.move_to_end(key)
            return known, True
        if len(graphs._uses) > _COUNTED:
            graphs._uses.clear()  # arguments that differ in every call would fill it
        graphs._uses[key] += times
        return None, graphs._uses[key] >= _WORTH

    def _capture(
        self, key: Hashable, parts: Parts, written: list[int], record: Any, body: Callable[[Any], Any]
    ) -> _Captured | None:
        graphs = self._graphs
        where = graphs._device(self._where)
        try:
            with _capturing, where.scope():
                made = _Captured(parts, written, record, body, where)
        except Exception as error:
            graphs._cannot(error)
            return None
        graphs._captured[key] = made
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
    def runner(self, model: Any, device: torch.device) -> Iterator[Runner]:
        """The runner of one explanation. If another thread holds the graphs, its steps run uncaptured: graphs have one
        set of buffers."""
        if not self._apply(model, device):
            yield Runner()
            return
        if not self._lock.acquire(blocking=False):
            yield PaddedRunner()
            return
        try:
            if self._model is not model or self._known is None or not self._known.unmoved(model):
                self._forget()
                self._model, self._known = model, Weights(model)
            yield GraphRunner(self, device) if self._known.on(device) else Runner()
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
