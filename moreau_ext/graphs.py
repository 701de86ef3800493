"""Steps of a solver, captured once as CUDA graphs and replayed.

A step of a small network is hundreds of launches, which a processor issues more slowly than a GPU runs them; a captured
step is one launch. What is captured is a *body*: a function that changes the tensors of a record (a dataclass of
tensors, numbers and further records) in place and waits for nothing. A graph works at fixed addresses, so it has a copy
of the record of its own: :meth:`Steps.run` copies the record in, replays, and copies it out. A caller cannot tell a
replay from the body itself but by the time it takes, and where nothing can be captured the body runs.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .memory import Limit
from .scores import has_global_hooks, has_hooks

Mode = Literal["auto"] | bool

# What a body does with the tensors of a field: field(metadata=READ). Without it they are state, copied in and out.
# Scratch holds nothing from one run of the body to the next.
_SCRATCH, _READ, _STATE = 0, 1, 2
SCRATCH, READ = {"role": _SCRATCH}, {"role": _READ}
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


class Device(Protocol):
    """What graphs need of a device; :class:`_Cuda` but for tests."""

    def scope(self) -> AbstractContextManager[None]:
        """Where records are copied, captured and replayed: one queue, in order with the caller's."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work of ``body`` at the same addresses; the capture itself does none of it."""


class _Cuda:
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


class _Parts:
    """The tensors of a record, each once, with their roles, and a signature: records of equal signatures differ in
    nothing but the contents of their tensors."""

    def __init__(self, record: Any, role: int = _STATE) -> None:
        self.tensors: list[Tensor] = []
        self.roles: list[int] = []
        self.opaque: list[Any] = []
        self._places: dict[int, int] = {}
        self.signature = self._visit(record, role)

    def _visit(self, value: Any, role: int) -> Hashable:
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
            place = self._places.setdefault(id(value), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(value)
                self.roles.append(role)
            self.roles[place] = max(self.roles[place], role)
            return (place, tuple(value.shape), value.stride(), value.dtype, value.device)
        if value is None or isinstance(value, (bool, int, float, str)):
            return (type(value), value)
        if type(value) in (tuple, list):
            return (type(value), *(self._visit(v, role) for v in value))
        if type(value) is dict:
            return (dict, *((key, self._visit(v, role)) for key, v in value.items()))
        if isinstance(value, Limit):
            return (Limit, value.rows)
        if _is_record(value):
            return (type(value), *(self._visit(getattr(value, f.name), _role(f, role)) for f in fields(value)))
        self.opaque.append(value)  # held, so that nothing else gets its address
        return (type(value), id(value))

    def copied(self, value: Any, tensors: list[Tensor]) -> Any:
        """The record, or a part of it, with other tensors in the places of its own."""
        if id(value) in self._places:
            return tensors[self._places[id(value)]]
        if type(value) in (tuple, list):
            return type(value)(self.copied(v, tensors) for v in value)
        if type(value) is dict:
            return {key: self.copied(v, tensors) for key, v in value.items()}
        if _is_record(value):
            made = copy.copy(value)
            for f in fields(value):
                object.__setattr__(made, f.name, self.copied(getattr(value, f.name), tensors))
            return made
        return value

    def of_role(self, least: int) -> list[int]:
        """Places of the tensors that are at least that."""
        return [place for place, role in enumerate(self.roles) if role >= least]


def _is_record(value: Any) -> bool:
    # Callable ones are models and the like, which no one here may take apart.
    return is_dataclass(value) and not isinstance(value, type) and not callable(value)


def _role(of: Any, inherited: int) -> int:
    return min(inherited, int(of.metadata.get("role", _STATE)))


def _copy_all(to: list[Tensor], values: list[Tensor]) -> None:
    """One launch per dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(to, values, strict=True):
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(value)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)


class _Weights:
    """What a model is made of: its modules, their numbers, and where their tensors lie."""

    def __init__(self, model: Any) -> None:
        self._tensors, self._rest = _made_of(model)
        self._aliases = [t.detach() for t in self._tensors]  # these keep the memory from others

    def unmoved(self, model: Any) -> bool:
        """Whether a graph that was captured with them still does what the model does; values of tensors may differ."""
        now, rest = _made_of(model)
        return (
            rest == self._rest
            and len(now) == len(self._tensors)
            and all(
                t is known and t.layout == torch.strided and t.is_set_to(alias)
                for t, known, alias in zip(now, self._tensors, self._aliases, strict=True)
            )
        )

    def on(self, device: torch.device) -> bool:
        """Whether all of them are dense and there: what lies elsewhere is a number to a graph."""
        return all(t.device == device and t.layout == torch.strided for t in self._tensors)


def _made_of(model: Any) -> tuple[list[Tensor], list[Any]]:
    if not isinstance(model, nn.Module):
        return [], []
    tensors, rest, seen = [*model.parameters(), *model.buffers()], list[Any](), set[int]()
    for module in model.modules():
        rest.append((id(module), type(module).forward))
        for name, value in vars(module).items():
            if name not in _OF_ALL_MODULES:
                rest.append((name, _settings_of(value, tensors, seen, _DEPTH)))
    return tensors, rest


# What torch keeps in every module: parameters, modules, hooks, which are looked at by other ways.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
# How deep and how far settings are followed: a configuration, not a vocabulary.
_DEPTH, _MOST_ITEMS = 6, 256


def _settings_of(value: Any, tensors: list[Tensor], seen: set[int], depth: int) -> Any:
    """The numbers and names in a value, copied, so that a later change shows; its tensors are added to ``tensors``.
    What was ``seen`` is not followed again."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors)
    items: Any = ()
    if depth and id(value) not in seen and not callable(value) and not isinstance(value, nn.Module):
        seen.add(id(value))
        if isinstance(value, (tuple, list)):
            items = enumerate(value)
        else:
            items = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).items()
        items = islice(items, _MOST_ITEMS)
    # Containers of equal contents are equal.
    same = type(value) if isinstance(value, (tuple, list, dict)) else id(value)
    return (same, [(key, _settings_of(v, tensors, seen, depth - 1)) for key, v in items])


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

    def __init__(self, parts: _Parts, record: Any, body: Callable[[Any], Any], device: Device) -> None:
        # The signature names what is opaque by its address.
        self._opaque = parts.opaque
        self._read = {i: parts.tensors[i].detach().clone() for i in parts.of_role(_READ)}
        self._state = parts.of_role(_STATE)
        self._made: Any = None

        def work() -> None:
            # Scratch is made here: in the memory that all graphs of a device have in common.
            tensors = [self._read[i] if i in self._read else torch.empty_like(t) for i, t in enumerate(parts.tensors)]
            self._made = body(parts.copied(record, tensors))

        self._replay = device.capture(work)
        self._results = _Parts(self._made)
        self._device = device  # whose streams and pool go after the graph

    def run(self, parts: _Parts, times: int) -> None:
        with self._device.scope():
            self._work(parts, times)
            _copy_all([parts.tensors[i] for i in self._state], [self._read[i] for i in self._state])

    def result(self, parts: _Parts) -> Any:
        given = [torch.empty_like(t) for t in self._results.tensors]  # on the stream of the caller, who frees them
        with self._device.scope():
            self._work(parts, 1)
            _copy_all(given, self._results.tensors)
        return self._results.copied(self._made, given)

    def _work(self, parts: _Parts, times: int) -> None:
        _copy_all([*self._read.values()], [parts.tensors[i] for i in self._read])
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
        parts = _Parts(record)
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
        parts = _Parts(record, _READ)
        known, worth = self._known(key, parts, 1)
        if known is not None:
            return known.result(parts)
        made = super().result(body, record)
        if worth:
            self._capture(key, parts, record, body)
        return made

    def _may(self, elements: int) -> bool:
        return elements <= _MOST_ELEMENTS and not self._graphs._broken

    def _entry(self, key: Hashable, parts: _Parts) -> Hashable:
        return (key, parts.signature, self._settings)

    def _known(self, key: Hashable, parts: _Parts, times: int) -> tuple[_Captured | None, bool]:
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

    def _capture(self, key: Hashable, parts: _Parts, record: Any, body: Callable[[Any], Any]) -> _Captured | None:
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
        self._known: _Weights | None = None
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
                self._model, self._known = model, _Weights(model)
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
            self._devices[device] = _Cuda(device) if self._make is None else self._make(device)
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
