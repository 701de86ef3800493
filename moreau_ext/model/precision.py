"""How exactly the model's passes multiply: in float32, TF32 or bfloat16. A solver's state is float32 in each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.layout import Tensors
from .restore import Change, Turns

Precision = Literal["float32", "tf32", "bfloat16"]

PRECISIONS = ("float32", "tf32", "bfloat16")

# The spacing of numbers at 1 of what is multiplied.
_EPS = {"bfloat16": 2.0**-7, "tf32": 2.0**-10}


def check_precision(precision: str) -> None:
    """Raises ValueError for an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_dtypes(precision: str, inputs: Tensors, called: str = "inputs") -> None:
    """Raises ValueError for inputs whose passes the precision would leave as they are."""
    for i, x in enumerate(inputs):
        if precision != "float32" and x.dtype != torch.float32:
            name = called if len(inputs) == 1 else f"{called}[{i}]"
            raise ValueError(
                f"precision: {precision!r} is a way to run float32 models, and {name} is {x.dtype}, which decides how "
                "its model multiplies; leave precision out, or give float32"
            )


def resolution(precision: str, x: Tensor) -> float:
    """The spacing at 1 of the coarsest numbers in a pass of ``x``, as torch.finfo(...).eps."""
    own = torch.finfo(x.dtype).eps
    return max(own, _EPS[precision]) if precision == "bfloat16" or (precision == "tf32" and x.is_cuda) else own


class _Autocast(Change):
    """Switches this thread's autocast. Unlike torch.autocast it leaves no half-made change after an interrupt."""

    def __init__(self, kind: str, enabled: bool) -> None:
        self._kind, self._enabled = kind, enabled
        self._before: tuple[bool, torch.dtype, bool] | None = None

    def do(self) -> None:
        kind = self._kind
        self._before = (
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )
        torch.set_autocast_enabled(kind, self._enabled)
        if self._enabled:
            torch.set_autocast_dtype(kind, torch.bfloat16)
            # The cache would hold the weights of a pass without gradient for a later one that needs theirs.
            torch.set_autocast_cache_enabled(False)

    def undo(self) -> None:
        if self._before is not None:
            enabled, dtype, cache = self._before
            torch.set_autocast_enabled(self._kind, enabled)
            torch.set_autocast_dtype(self._kind, dtype)
            torch.set_autocast_cache_enabled(cache)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass: ``precision`` decides, whatever autocast the caller is in."""
    if precision == "bfloat16":
        return _Autocast(device.type, True)
    return _Autocast(device.type, False) if torch.is_autocast_enabled(device.type) else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The context of a whole call, whose own sums are not a model's."""
    return _Autocast(device.type, False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _legacy(read: Callable[[], Any]) -> Any:
    """A setting of torch's first interface to TF32; None where the caller's use of the second made it unreadable."""
    try:
        return read()
    except RuntimeError:
        return None


def _restore_later(stack: ExitStack, backend: Any, operation: Any) -> None:
    value = operation.fp32_precision
    # A value that is the backend's own was inherited, as far as can be told, and shall go on to be.
    stack.callback(setattr, operation, "fp32_precision", "none" if value == backend.fp32_precision else value)


def _switch(stack: ExitStack, tf32: bool, without_cudnn: bool) -> None:
    """Sets the process's flags; closing the stack restores them.

    torch has two interfaces to them, and reading the first raises where the second says something else, as
    torch.backends.cudnn.flags() inside a model would: so both are set. What is as wanted is not touched.
    """
    backends: Any = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    word = "tf32" if tf32 else "ieee"
    layers = (cudnn.conv, cudnn.rnn)
    if any((layer.fp32_precision == "tf32") != tf32 for layer in layers):
        for layer in layers:
            _restore_later(stack, cudnn, layer)
        legacy = _legacy(lambda: cudnn.allow_tf32)
        if legacy is not None:
            stack.callback(setattr, cudnn, "allow_tf32", legacy)
            cudnn.allow_tf32 = tf32
        for layer in layers:
            layer.fp32_precision = word
    if (matmul.fp32_precision == "tf32") != tf32:
        _restore_later(stack, cudnn, matmul)
        legacy = _legacy(torch.get_float32_matmul_precision)
        if legacy is not None:
            # Setting it sets oneDNN's as well.
            _restore_later(stack, backends.mkldnn, backends.mkldnn.matmul)
            stack.callback(torch.set_float32_matmul_precision, legacy)
            matmul.allow_tf32 = tf32
        matmul.fp32_precision = word
    if without_cudnn and cudnn.enabled:
        stack.callback(setattr, cudnn, "enabled", True)
        cudnn.enabled = False


class _FlagsUse(Change):
    def __init__(self, flags: _Flags, wanted: tuple[bool, bool]) -> None:
        self._flags, self._wanted = flags, wanted

    def do(self) -> None:
        try:
            self._flags.turns.take(self, self._wanted, lambda: _switch(self._flags.before, *self._wanted))
        except ValueError:
            raise RuntimeError(
                "precision: a pass at one precision began within a pass at another; explain neither inside the "
                "other's model, or give both the same precision"
            ) from None

    def undo(self) -> None:
        self._flags.turns.leave(self, self._flags.before.close)


class _Flags:
    """torch's flags are the process's: passes that want the same ones overlap, others wait for the last of these."""

    def __init__(self) -> None:
        self.turns = Turns()
        # Restores what was there before the first of those that overlap.
        self.before = ExitStack()

    def __call__(self, tf32: bool, without_cudnn: bool) -> _FlagsUse:
        return _FlagsUse(self, (tf32, without_cudnn))


_flags = _Flags()


def flags(precision: str, device: torch.device, without_cudnn: bool) -> AbstractContextManager[None]:
    """What a pass with its gradients runs under: on CUDA, TF32 in cuDNN and cuBLAS for "tf32" and off for the others,
    whatever the process's flags say (torch's default lets cuDNN convolve float32 in TF32). Elsewhere, nothing.

    Args:
        precision: of the pass.
        device: that it runs on.
        without_cudnn: switch cuDNN off too.
    """
    return _flags(precision == "tf32", without_cudnn) if device.type == "cuda" else nullcontext()
