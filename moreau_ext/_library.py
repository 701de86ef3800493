"""A typed front to torch.library, whose own functions carry no annotations that mypy's strict mode accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "moreau_ext"
_library = torch.library.Library(_NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Declares an operation, e.g. ``"f(Tensor x) -> Tensor"``."""
    _library.define(schema)


def implement(name: str, key: str, function: Callable[..., Any]) -> None:
    """Registers ``function`` for a dispatch key such as "CPU"."""
    _library.impl(name, function, key)


def fake(name: str, function: Callable[..., Any]) -> None:
    """Registers the shape function that tracing uses."""
    torch.library.register_fake(f"{_NAMESPACE}::{name}", function, lib=_library)


def operation(name: str) -> Callable[..., Any]:
    """The callable torch.ops.moreau_ext.<name>."""
    packet = getattr(torch.ops.moreau_ext, name)
    overload: Callable[..., Any] = packet.default
    return overload
