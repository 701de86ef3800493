"""Sums of gradients over samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._arguments import DTYPES, check_disjoint, expect, extents_of, layout_of, state_of, stream_of
from ._register import _core, register


def _check(total: Tensor, gradients: Tensor, carry: bool) -> None:
    state = state_of("gradients", gradients)
    batch = total.shape[0]
    if gradients.shape[0] % batch if batch else gradients.shape[0]:
        raise ValueError(f"gradients: {gradients.shape[0]} rows are no multiple of the {batch} inputs")
    expect("total", total, (batch, *gradients.shape[1:]), state, gradients.device)
    layout_of("gradients", gradients, layout_of("total", total))


def _fake(*args: Any) -> None:
    _check(*args)


def _kernel(total: Tensor, gradients: Tensor, carry: bool) -> None:
    _check(total, gradients, carry)
    if total.numel() == 0:
        return
    check_disjoint(total=total, gradients=gradients)
    device, stream = stream_of(total)
    _core.accumulate(
        dtype=DTYPES[gradients.dtype],
        extents=extents_of(total),
        gradients=gradients.data_ptr(),
        samples=gradients.shape[0] // total.shape[0],
        sum=total.data_ptr(),
        carry=carry,
        device=device,
        stream=stream,
    )
    increment_version(total)


def _reference(total: Tensor, gradients: Tensor, carry: bool) -> None:
    _check(total, gradients, carry)
    if total.numel():
        reference.accumulate(gradients, total, carry=carry)


def accumulate(gradients: Tensor, total: Tensor, *, carry: bool) -> Tensor:
    """Sum over samples in the order of the samples, so that chunking does not change it; see
    :func:`reference.accumulate`."""
    _accumulate(total, gradients, carry)
    return total


_accumulate = register(
    "accumulate(Tensor(a!) total, Tensor gradients, bool carry) -> ()",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
