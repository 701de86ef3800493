"""The inputs of a call: checks, and solutions in their form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..model.fixed import Fixed
from ..model.precision import check_dtypes
from ..ops.layout import Tensors, flat_rows, memory_layout, tensor_of
from ..solvers.errors import Errors
from ..solvers.solution import Solution

# Names of inputs to the noise bank: one per input [B], one for all, or None for their positions.
Ids = int | Tensor | None
# Which features are fixed: a mask for the input, or one or None for each of several.
Mask = Tensor | tuple[Tensor | None, ...] | None


def check_inputs(inputs: Any, model: Callable[..., Any], precision: str, layout: torch.memory_format) -> Tensors:
    """Checked copies of the inputs of a call, dense and owned by it.

    Args:
        inputs: a tensor or a tuple of them, as given.
        model: that will run on them; its parameters must be on their device.
        precision: of the passes.
        layout: of image batches [B, C, H, W].

    Raises:
        TypeError, ValueError: by name.
    """
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"inputs: expected a tensor or a tuple of tensors, got {_made_of(inputs)}")
    for i, x in enumerate(tensors):
        name = "inputs" if isinstance(inputs, Tensor) else f"inputs[{i}]"
        if x.is_complex():
            raise TypeError(
                f"{name}: expected real numbers, got {x.dtype}; explain real and imaginary parts, "
                "torch.view_as_real(x), with a model that takes them: model(torch.view_as_complex(x))"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name}: expected floating point, got {x.dtype}. Token ids cannot be displaced: explain the "
                "embeddings, with a model that takes them as input; pixels are, as x.float() / 255 or as the model "
                "takes them"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call .to_dense() first")
        if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
        if x.dim() < 1:
            raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
        if x.shape[0] != tensors[0].shape[0]:
            raise ValueError(f"{name}: expected {tensors[0].shape[0]} inputs, as in inputs[0], got {x.shape[0]}")
        if x.device != tensors[0].device:
            raise ValueError(f"{name}: expected a tensor on {tensors[0].device}, as inputs[0], got one on {x.device}")
        if x.shape[0] and x.numel() == 0:
            raise ValueError(f"{name}: has no features, shape {tuple(x.shape)}")
        finite = flat_rows(torch.isfinite(x)).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"{name}: input {row} holds NaN or infinity")
    if isinstance(model, nn.Module):
        devices = {p.device for p in model.parameters()}
        if len(devices) == 1 and tensors[0].device not in devices:
            raise ValueError(f"inputs: are on {tensors[0].device}, but the model is on {devices.pop()}")
    check_dtypes(precision, tensors)
    return tuple(_own(x, layout) for x in tensors)


def _made_of(inputs: Any) -> str:
    """The type of what is no tensor, and how it becomes one."""
    name = type(inputs).__name__
    if isinstance(inputs, np.ndarray) or hasattr(inputs, "to_numpy"):
        array = "x" if isinstance(inputs, np.ndarray) else "x.to_numpy()"
        return f"{name}; torch.tensor({array}, dtype=torch.float32) is one, in the dtype of a float32 model"
    if isinstance(inputs, list) and inputs and all(isinstance(x, Tensor) for x in inputs):
        return "a list of tensors; torch.stack(x) is a batch of them, tuple(x) several inputs of one model"
    if isinstance(inputs, (list, tuple)):
        return f"a {name} of {', '.join(sorted({type(x).__name__ for x in inputs})) or 'nothing'}"
    return name


def check_ids(ids: Ids, batch: int, device: torch.device) -> Tensor:
    """The names of the inputs, int64 [B]: their positions by default; one integer names all."""
    if ids is None:
        return torch.arange(batch, device=device)
    try:
        names = tensor_of(ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"ids: expected int64, one per input or one for all, got {ids!r}") from None
    if names.is_floating_point() or names.is_complex() or names.dtype == torch.bool:
        raise TypeError(f"ids: expected int64, got {names.dtype}")
    if names.dim() == 0:
        names = names.repeat(batch)
    if names.shape != (batch,):
        raise ValueError(f"ids: expected one per input, [{batch}], or one integer, got shape {tuple(names.shape)}")
    return names.to(device=device, dtype=torch.int64)


def check_fixed(fixed: Any, inputs: Any, tensors: Tensors) -> Fixed | None:
    """The fixed features of a call; None where there are none.

    Args:
        fixed: as given: a mask, a tuple of masks where the inputs are one, or None.
        inputs: as given.
        tensors: the checked inputs.

    Raises:
        TypeError, ValueError: by name.
    """
    if fixed is None:
        return None
    masks = (fixed,) if isinstance(inputs, Tensor) else fixed
    if not isinstance(masks, tuple) or len(masks) != len(tensors):
        raise TypeError(f"fixed: expected a mask for each of the {len(tensors)} input tensors, in a tuple, or None")
    made = []
    for i, (given, x) in enumerate(zip(masks, tensors, strict=True)):
        name = "fixed" if isinstance(inputs, Tensor) else f"fixed[{i}]"
        try:
            mask = torch.zeros((), dtype=torch.bool, device=x.device) if given is None else tensor_of(given)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected a bool mask, got {type(given).__name__}") from None
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected bool, True where a feature is fixed, got {mask.dtype}")
        if isinstance(given, Tensor) and given.device != x.device:
            raise ValueError(f"{name}: expected a mask on {x.device}, as the inputs, got one on {given.device}")
        mask, shape = mask.to(x.device), tuple(x.shape)
        one = mask.dim() < x.dim() or (mask.dim() == x.dim() and mask.shape[0] == 1)
        try:
            full = mask.expand(1 if one else x.shape[0], *x.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"{name}: expected a shape that broadcasts to {shape[1:]}, or to {shape} for one mask per input, got "
                f"{tuple(mask.shape)}"
            ) from None
        made.append(torch.empty_like(x[: full.shape[0]], dtype=torch.bool).copy_(full))
    if not any(bool(mask.any()) for mask in made):
        return None
    return Fixed(tuple(made), tensors, torch.arange(tensors[0].shape[0], device=tensors[0].device))


def _own(x: Tensor, layout: torch.memory_format) -> Tensor:
    copy = x.detach().clone(memory_format=layout if x.dim() == 4 else torch.preserve_format)
    return copy if memory_layout(copy) is not None else copy.contiguous()


def in_form(solution: Solution, single: bool) -> Solution:
    """A solver's tuples as the inputs were given: one tensor, or a tuple."""
    if single:
        form = (
            "attribution",
            "displacement",
            "envelope_gradient",
            "eta",
            "sigma",
            "standard_error",
            "p_value",
            "fixed",
        )
        return replace(solution, **{name: getattr(solution, name)[0] for name in form})
    if all(e.dim() == 1 for e in solution.eta):
        return replace(solution, eta=solution.eta[0])
    return solution


def empty_solution(inputs: Tensors) -> Solution:
    """The solution of a batch without inputs."""
    device = inputs[0].device
    states = tuple(x.to(ops.state_dtype(x.dtype)) for x in inputs)
    scalars = tuple(s.new_empty(0) for s in states)
    numbers, counts = (
        torch.empty(0, dtype=torch.float64, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
    )
    flags = torch.empty(0, dtype=torch.bool, device=device)
    return Solution(
        attribution=inputs,
        displacement=states,
        envelope=numbers,
        envelope_gradient=states,
        score=inputs[0].new_empty(0),
        residual=numbers,
        relative_residual=numbers,
        steps=counts,
        gradient_evaluations=counts,
        converged=flags,
        nnz=counts,
        support=counts,
        empty=flags,
        eta=scalars,
        rho=scalars[0],
        sigma=scalars,
        standard_error=inputs,
        p_value=states,
        error=Errors.unknown(numbers),
        target=counts[:, None],
        ids=counts,
        fixed=tuple(torch.zeros_like(x, dtype=torch.bool) for x in inputs),
    )
