"""Registration of the operations with torch.library, and the compiled core.

The functions of torch.library carry no annotations that mypy's strict mode accepts; this is the only place that calls
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _core
except ImportError as error:
    raise ImportError(
        f"moreau_ext's compiled core cannot be loaded ({error}). Likely causes: Python found the source tree in the "
        "current folder instead of the installed package (run from another folder, or pip install -e .), or the "
        "package was built for another Python"
    ) from error

__all__ = ["_core", "register"]

_NAMESPACE = "moreau_ext"
_library = torch.library.Library(_NAMESPACE, "DEF")


def register(
    schema: str, *, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers an operation and returns the callable ``torch.ops.moreau_ext.<name>``.

    Args:
        schema: of torch.library, e.g. ``"f(Tensor x) -> Tensor"``.
        kernel: calls the compiled core; for the CPU, and for CUDA where the core was built with it. It counts a new
            version of each tensor that it writes, which autograd and captures look at.
        reference: for every other device.
        fake: the shape function that tracing uses; checks the arguments.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, kernel, "CPU")
    if _core.cuda_version is not None:
        _library.impl(name, kernel, "CUDA")
    overload: Callable[..., Any] = getattr(torch.ops.moreau_ext, name).default
    names = [argument.name for argument in overload._schema.arguments]  # type: ignore[attr-defined]  # torch's
    _library.impl(name, _on_one_device(names, _warn_once(reference)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _on_one_device(names, fake), lib=_library)
    return overload


def _on_one_device(names: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses tensors of several devices: one stray meta tensor leads torch to the shape function, which does nothing.

    The kernels need no such check: they get tensors of one device, or say which of them are not.
    """

    def checked(*args: Any) -> Any:
        first: Tensor | None = None
        for name, value in zip(names, args, strict=False):
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, Tensor):
                    continue
                if tensor.layout != torch.strided:
                    raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")
                first = tensor if first is None else first
                if tensor.device != first.device:
                    raise ValueError(f"{name}: expected a tensor on {first.device}, got one on {tensor.device}")
        return function(*args)

    return checked


def _warn_once(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a fallback, with one warning that no kernel ran."""
    warned = False

    def fallback(*args: Any) -> Any:
        nonlocal warned
        if not warned:
            warned = True
            tensors = (t for a in args for t in (a if isinstance(a, list) else [a]))
            device = next(t.device for t in tensors if isinstance(t, Tensor))
            warnings.warn(
                f"moreau_ext has no compiled kernels for {device.type}; the much slower reference runs. For CUDA, "
                "reinstall where nvcc is found (moreau-ext info shows what was built).",
                stacklevel=2,
            )
        return reference(*args)

    return fallback
