"""The inputs of a call: checks, and solutions in their form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..model.fixed import Fixed
from ..model.precision import check_dtypes
from ..model.target import Target
from ..ops.layout import Tensors, flat_rows, in_form_of, memory_layout, tensor_of, tensors_of
from ..solvers.errors import Errors
from ..solvers.solution import Solution

# The inputs of a call, and maps in their form: one tensor [B, *features], several by position, or several by name.
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
# Names of inputs to the noise bank: one per input [B], one for all, or None for their positions.
Ids = int | Tensor | None
# Which features are fixed: a mask for the input, or one or None for each of several.
Mask = Tensor | tuple[Tensor | None, ...] | Mapping[str, Tensor | None] | None


@dataclass(frozen=True)
class Call:
    """What a call was given; see :meth:`moreau_ext.Explainer.attribute`.

    Args:
        inputs, target, arguments, keywords, ids, fixed: as given; the third and fourth are those of the model.
    """

    inputs: Inputs
    target: Target
    arguments: Any
    keywords: Mapping[str, Any] | None
    ids: Ids
    fixed: Mask


def names_of(inputs: Any) -> list[str]:
    """How messages call the tensors of the inputs."""
    if isinstance(inputs, Tensor):
        return ["inputs"]
    return [f"inputs[{key!r}]" for key in (inputs if isinstance(inputs, Mapping) else range(len(inputs)))]


def check_batch(inputs: Any) -> Tensors:
    """The tensors of inputs, checked to have one batch axis and one device.

    Raises:
        TypeError, ValueError: by name.
    """
    held = tensors_of(inputs) if isinstance(inputs, (Tensor, tuple, Mapping)) else ()
    if not held or not all(isinstance(x, Tensor) for x in held):
        raise TypeError(f"inputs: expected a tensor, or a tuple or dict of tensors, got {_made_of(inputs)}")
    names = names_of(inputs)
    for name, x in zip(names, held, strict=True):
        if x.dim() < 1:
            raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
        if x.shape[0] != held[0].shape[0]:
            raise ValueError(f"{name}: expected {held[0].shape[0]} inputs, as in {names[0]}, got {x.shape[0]}")
        if x.device != held[0].device:
            raise ValueError(f"{name}: expected a tensor on {held[0].device}, as {names[0]}, got one on {x.device}")
    return held


def check_inputs(
    inputs: Any, model: Callable[..., Any], precision: str, layout: torch.memory_format, called: str = "inputs"
) -> Tensors:
    """Checked copies of the inputs of a call, dense and owned by it.

    Args:
        inputs: a tensor, a tuple or a dict of them, as given.
        model: that will run on them; its parameters must be on their device.
        precision: of the passes.
        layout: of image batches [B, C, H, W].
        called: their name in messages.

    Raises:
        TypeError, ValueError: by name.
    """
    tensors = check_batch(inputs)
    for name, x in zip(names_of(inputs), tensors, strict=True):
        name = name.replace("inputs", called, 1)
        if x.is_complex():
            raise TypeError(
                f"{name}: expected real numbers, got {x.dtype}; explain real and imaginary parts, "
                "torch.view_as_real(x), with a model that takes them: model(torch.view_as_complex(x))"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name}: expected floating point, got {x.dtype}. Token ids cannot be displaced: explain the "
                "embeddings, the output of layer= (TextExplainer does it for sentences); pixels are, as "
                "x.float() / 255 or as the model takes them. What the model needs beside them, such as an attention "
                "mask, goes into forward_kwargs"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call .to_dense() first")
        if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
        if x.shape[0] and x.numel() == 0:
            raise ValueError(f"{name}: has no features, shape {tuple(x.shape)}")
        finite = flat_rows(torch.isfinite(x)).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"{name}: input {row} holds NaN or infinity")
    if isinstance(model, nn.Module):
        devices = {p.device for p in model.parameters()}
        # Offloaded parameters lie on "meta" until a hook, of torch or of accelerate, brings them.
        if torch.device("meta") in devices and any(
            m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules()
        ):
            devices -= {torch.device("meta")}
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
    if isinstance(inputs, (list, tuple, Mapping)):
        held = inputs.values() if isinstance(inputs, Mapping) else inputs
        return f"a {name} of {', '.join(sorted({type(x).__name__ for x in held})) or 'nothing'}"
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
        fixed: as given: a mask, a tuple or dict of masks where the inputs are one, or None.
        inputs: as given.
        tensors: the checked inputs.

    Raises:
        TypeError, ValueError: by name.
    """
    if fixed is None:
        return None
    masks = (fixed,) if isinstance(inputs, Tensor) else fixed
    if isinstance(inputs, Mapping) and isinstance(fixed, Mapping):
        if not set(fixed) <= set(inputs):
            raise ValueError(f"fixed: {', '.join(map(repr, set(fixed) - set(inputs)))} is no name of an input")
        masks = tuple([fixed.get(key) for key in inputs])
    if not isinstance(masks, tuple) or len(masks) != len(tensors):
        raise TypeError(
            f"fixed: expected a mask for each of the {len(tensors)} input tensors, in a tuple, or a dict as the inputs "
            "are, or None"
        )
    made = []
    for name, given, x in zip(names_of(inputs), masks, tensors, strict=True):
        name = name.replace("inputs", "fixed", 1)
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


# The fields of a Solution that have the form of the inputs.
_IN_FORM = (
    "attribution",
    "displacement",
    "envelope_gradient",
    "eta",
    "sigma",
    "standard_error",
    "p_value",
    "fixed",
)


def in_form(solution: Solution, like: Inputs) -> Solution:
    """A solver's tuples as the inputs were given: one tensor, a tuple or a dict."""
    formed = {name: in_form_of(like, getattr(solution, name)) for name in _IN_FORM}
    if not isinstance(like, Tensor) and all(e.dim() == 1 for e in solution.eta):
        formed["eta"] = solution.eta[0]
    return replace(solution, **formed)


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
