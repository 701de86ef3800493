"""Settings: a number, or one per input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.layout import Tensors, tensor_of

# One number, or one per input of the batch to come.
Scalar = float | Tensor


def check_scalar(name: str, value: Any, *, positive: bool = False) -> None:
    try:
        tensor = tensor_of(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    low = tensor <= 0 if positive else tensor < 0
    if bool((low | ~torch.isfinite(tensor)).any()):
        expected = "a positive" if positive else "a non-negative"
        raise ValueError(f"{name}: expected {expected} finite number, got {value!r}")


def per_input_setting(name: str, value: Scalar, x: Tensor) -> Tensor:
    """A setting as state dtype [B] for one tensor."""
    state, batch = ops.state_dtype(x.dtype), x.shape[0]
    # In the state dtype at once: a Python number would otherwise pass through float32.
    tensor = tensor_of(value, state).to(x.device)
    if tensor.dim() == 0:
        return tensor.expand(batch).contiguous()
    if tensor.shape != (batch,):
        raise ValueError(f"{name}: expected a number or one per input, [{batch}], got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def per_feature(eta: Tensor, inputs: Tensors) -> Tensor:
    if len(inputs) > 1:
        raise ValueError("eta: one per feature is for a single input tensor, not for a tuple")
    x = inputs[0]
    if eta.shape not in ((1, *x.shape[1:]), tuple(x.shape)):
        raise ValueError(
            f"eta: expected a number, one per input [{x.shape[0]}], or one per feature {(1, *x.shape[1:])} or "
            f"{tuple(x.shape)}, got shape {tuple(eta.shape)}"
        )
    like = torch.empty_like(x[: eta.shape[0]], dtype=ops.state_dtype(x.dtype))
    return like.copy_(eta)
