"""Group norms, and the proximal map that uses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._arguments import DTYPES, expect, extents_of, layout_of, stream_of
from ._register import _core, register
from .layout import in_memory_order
from .partition import Partition
from .reference import soft_threshold


def check_groups(x: Tensor, state: torch.dtype, groups: Partition) -> None:
    features, rows = math.prod(x.shape[1:]), groups.labels.shape[0]
    if rows not in (1, x.shape[0]):
        raise ValueError(f"groups: made for {rows} inputs, got {x.shape[0]}")
    for name, tensor, columns, dtype in (
        ("labels", groups.labels, features, torch.int32),
        ("order", groups.order, features, torch.int32),
        ("offsets", groups.offsets, groups.count + 1, torch.int32),
        ("weights", groups.weights, groups.count, state),
    ):
        expect(f"groups.{name}", tensor, (rows, columns), dtype, x.device)
        if not tensor.is_contiguous():
            raise ValueError(f"groups.{name}: expected a contiguous tensor")


def core_groups(groups: Partition) -> _core.Groups:
    return _core.Groups(
        order=groups.order.data_ptr(),
        offsets=groups.offsets.data_ptr(),
        labels=groups.labels.data_ptr(),
        weights=groups.weights.data_ptr(),
        count=groups.count,
        per_input=groups.per_input,
    )


def _fake(v: Tensor, *partition: Tensor) -> Tensor:
    if v.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"v: expected float32 or float64, got {v.dtype}")
    layout_of("v", v)
    groups = Partition(*partition)
    check_groups(v, v.dtype, groups)
    return v.new_empty(v.shape[0], groups.count, dtype=torch.float64)


def _kernel(v: Tensor, *partition: Tensor) -> Tensor:
    norms = _fake(v, *partition)
    if v.numel() == 0:
        return norms.zero_()
    device, stream = stream_of(v)
    _core.group_norms(
        dtype=DTYPES[v.dtype],
        extents=extents_of(v),
        v=v.data_ptr(),
        groups=core_groups(Partition(*partition)),
        norms=norms.data_ptr(),
        device=device,
        stream=stream,
    )
    return norms


def _reference(v: Tensor, *partition: Tensor) -> Tensor:
    _fake(v, *partition)
    return reference.group_norms(v, Partition(*partition))


def group_norms(v: Tensor, groups: Partition) -> Tensor:
    """Euclidean norm of every group, [B, count]; see :func:`reference.group_norms`."""
    norms: Tensor = _group_norms(v, groups.labels, groups.order, groups.offsets, groups.weights)
    return norms


def shrink(v: Tensor, eta: Tensor, groups: Partition | None = None) -> Tensor:
    """The proximal map S_η(v) of η·Ω, out of place; see :func:`reference.shrink`. Runs once per explanation, so it is
    composed of tensor operations and :func:`group_norms` rather than a kernel of its own."""
    if groups is None:
        if eta.dim() == 1:
            eta = eta.view(-1, *[1] * (v.dim() - 1))
        return soft_threshold(v, eta.expand_as(v))
    flat = in_memory_order(v)
    norms = group_norms(v, groups)
    factors = reference.group_factors(norms, eta.double()[:, None] * groups.weights.double()).to(v.dtype)
    scale = factors.gather(1, groups.labels.long().expand(flat.shape[0], -1))
    out = torch.empty_like(v)
    in_memory_order(out).copy_(torch.where(scale == 0, 0 * (flat - flat), flat * scale))
    return out


_group_norms = register(
    "group_norms(Tensor v, Tensor labels, Tensor order, Tensor offsets, Tensor weights) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
