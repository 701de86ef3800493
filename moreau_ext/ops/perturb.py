"""Noisy copies of every input."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._arguments import (
    DTYPES,
    address,
    check_disjoint,
    check_noise,
    check_read,
    core_noise,
    expect,
    extents_of,
    layout_of,
    noise_arguments,
    state_of,
    stream_of,
)
from ._register import _core, register
from .layout import rows_like
from .noise import Noise


class _Args(NamedTuple):
    out: Tensor
    x: Tensor
    displacement: Tensor | None
    keys: Tensor
    step: Tensor
    sigma: Tensor | None
    num_samples: int
    element_offset: int
    sample_offset: int
    antithetic: bool


def _check(*args: Any) -> _Args:
    a = _Args(*args)
    state = state_of("x", a.x)
    layout = layout_of("x", a.x)
    check_noise(a.x, state, layout, a)
    if a.displacement is not None:
        expect("displacement", a.displacement, tuple(a.x.shape), state, a.x.device)
        layout_of("displacement", a.displacement, layout)
    return a


def _fake(*args: Any) -> None:
    _check(*args)


def _kernel(*args: Any) -> None:
    a = _check(*args)
    if a.out.numel() == 0:
        return
    check_disjoint(out=a.out, x=a.x, displacement=a.displacement)
    check_read({"noise.keys": a.keys, "noise.step": a.step, "noise.sigma": a.sigma}, out=a.out)
    device, stream = stream_of(a.x)
    _core.perturb(
        dtype=DTYPES[a.x.dtype],
        extents=extents_of(a.x),
        x=a.x.data_ptr(),
        displacement=address(a.displacement),
        noise=core_noise(a),
        noisy=a.out.data_ptr(),
        device=device,
        stream=stream,
    )
    increment_version(a.out)


def _reference(*args: Any) -> None:
    a = _check(*args)
    noise = Noise(a.keys, a.step, a.sigma, a.num_samples, a.antithetic, a.element_offset, a.sample_offset)
    reference.perturb(a.x, a.displacement, noise, out=a.out)


def perturb(x: Tensor, displacement: Tensor | None, noise: Noise, *, out: Tensor | None = None) -> Tensor:
    """Noisy copies of every input, out[b·m + k] = x[b] + δ[b] + σ[b]·z(b, k); see :func:`reference.perturb`.

    Example:
        >>> import torch
        >>> from moreau_ext.ops.noise import Noise, noise_keys
        >>> from moreau_ext.ops import perturb
        >>> noise = Noise(noise_keys(0, torch.arange(2)), torch.zeros(1, dtype=torch.int64), torch.full((2,), 0.1), 4)
        >>> perturb(torch.zeros(2, 3), None, noise).shape
        torch.Size([8, 3])
    """
    if out is None:
        out = rows_like(x, x.shape[0] * noise.num_samples)
    _perturb(out, x, displacement, *noise_arguments(noise, x))
    return out


_perturb = register(
    "perturb(Tensor(a!) out, Tensor x, Tensor? displacement, Tensor keys, Tensor step, Tensor? sigma, "
    "int num_samples, int element_offset, int sample_offset, bool antithetic) -> ()",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
