"""A device for graphs without a GPU: captures on the CPU what a CUDA graph would.

Every operation that reaches the dispatcher is written down with the tensors it works on and the numbers it was given,
and a replay does the same operations on the same memory. So what a graph freezes is frozen: a Python number, the
identity of a tensor; and what a capture forbids is refused: reading a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Values, or sizes of results, that the host must know; and numbers that it would have to send.
_WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.lift_fresh}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in _WAITING or any(
            isinstance(i, Tensor)
            and i.dtype == torch.bool
            and function.overloadpacket in (_aten.index, _aten.index_put)
            for i in tree_leaves(args[1:2])
        ):
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        made = function(*args, **kwargs)
        storages = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # A view or a result in place is the same memory again in a replay; anything else must be put there.
        fresh = [
            t if isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages else None
            for t in tree_leaves(made)
        ]
        self.tape.append((function, args, kwargs, fresh))
        return made


class Tape:
    """Counts captures and replays."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        recorder = _Recorder()
        with recorder:
            body()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for function, args, kwargs, fresh in recorder.tape:
                    made = tree_leaves(function(*args, **kwargs))
                    for value, place in zip(made, fresh, strict=True):
                        if place is not None:
                            place.copy_(value)

        # What the work left in its memory is worth nothing.
        for _, _, _, fresh in recorder.tape:
            for t in fresh:
                if t is not None and t.is_floating_point() and not t.requires_grad:
                    t.fill_(float("nan"))
        return replay
