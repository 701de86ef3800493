"""The fused step of the proximal gradient method."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._arguments import (
    DTYPES,
    NO_GROUPS,
    NO_NOISE,
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
from .group_norms import check_groups, core_groups
from .layout import state_dtype
from .noise import Noise
from .partition import Partition
from .reference import STATISTICS, per_input

# Members of the core's enumerations, looked up once.
_NO_PENALTY, _L1, _GROUP = _core.Penalty.none, _core.Penalty.l1, _core.Penalty.group
_NO_TOTAL, _OF_GRADIENT, _OF_DISPLACEMENT = _core.Total.none, _core.Total.gradient, _core.Total.displacement


class _Args(NamedTuple):
    gradients: Tensor | None
    gradient: Tensor
    displacement: Tensor
    summed: int
    carry: bool
    rho: Tensor
    step_size: Tensor
    eta: Tensor | None
    labels: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    weights: Tensor | None
    total: Tensor | None
    total_of_displacement: bool
    x: Tensor | None
    keys: Tensor | None
    step: Tensor | None
    sigma: Tensor | None
    num_samples: int
    element_offset: int
    sample_offset: int
    antithetic: bool
    out: Tensor | None
    arrivals: Tensor | None

    @property
    def groups(self) -> Partition | None:
        if self.labels is None or self.order is None or self.offsets is None or self.weights is None:
            return None
        return Partition(self.labels, self.order, self.offsets, self.weights)


def _check(*args: Any) -> _Args:
    a = _Args(*args)
    state, device, shape = a.displacement.dtype, a.displacement.device, tuple(a.displacement.shape)
    if state not in (torch.float32, torch.float64):
        raise TypeError(f"displacement: expected float32 or float64, got {state}")
    if not shape:
        raise ValueError("displacement: expected a batch axis, got a tensor without axes")
    batch, layout = shape[0], layout_of("displacement", a.displacement)
    if a.gradients is None and not a.carry:
        raise ValueError("gradients: give the gradients of this step, or their sum in `gradient` with carry=True")
    if a.summed < 1:
        raise ValueError(f"count: expected the number of gradients summed, at least 1, got {a.summed}")
    for name, tensor in (("gradient", a.gradient), ("total", a.total)):
        if tensor is not None:
            expect(name, tensor, shape, state, device)
            layout_of(name, tensor, layout)
    if a.gradients is not None:
        if state_of("gradients", a.gradients) != state:
            expected = state_dtype(a.gradients.dtype)
            raise TypeError(f"gradients: {a.gradients.dtype} goes with a displacement of {expected}, got {state}")
        rows = a.gradients.shape[0] // batch if batch else 0
        expect("gradients", a.gradients, (batch * rows, *shape[1:]), a.gradients.dtype, device)
        layout_of("gradients", a.gradients, layout)
    for name, scalar in (("rho", a.rho), ("step_size", a.step_size)):
        expect(name, scalar, (batch,), state, device)
    if a.eta is not None and a.eta.dim() > 1:
        if a.labels is not None:
            raise ValueError("eta: the group penalty takes one per input, [B]")
        expect("eta", a.eta, (1 if a.eta.shape[0] == 1 else batch, *shape[1:]), state, device)
        layout_of("eta", a.eta, layout)
    elif a.eta is not None:
        expect("eta", a.eta, (batch,), state, device)
    if a.labels is not None:
        if a.eta is None or a.groups is None:
            raise ValueError("groups: need eta and a whole partition")
        check_groups(a.displacement, state, a.groups)
    if a.x is not None:  # without noise too: the kernel's type is that of x where there are no gradients
        if state_of("x", a.x) != state:
            raise TypeError(f"x: {a.x.dtype} goes with a displacement of {state_dtype(a.x.dtype)}, got {state}")
        if a.gradients is not None and a.x.dtype != a.gradients.dtype:
            raise TypeError(f"x: expected the dtype of the gradients, {a.gradients.dtype}, got {a.x.dtype}")
        expect("x", a.x, shape, a.x.dtype, device)
        layout_of("x", a.x, layout)
    if a.num_samples:
        if a.x is None:
            raise ValueError("noise: writing noisy copies needs x")
        check_noise(a.x, state, layout, a)
    if a.out is not None and not a.num_samples:
        raise ValueError("out: is written with noise only; give noise, or leave it out")
    if a.arrivals is not None:
        expect("arrivals", a.arrivals, (batch,), torch.int32, device)
    return a


def _fake(*args: Any) -> Tensor:
    a = _check(*args)
    return a.displacement.new_empty(a.displacement.shape[0], len(STATISTICS), dtype=torch.float64)


def _kernel(*args: Any) -> Tensor:
    a = _check(*args)
    statistics = a.displacement.new_empty(a.displacement.shape[0], len(STATISTICS), dtype=torch.float64)
    if a.displacement.numel() == 0:
        return statistics.zero_()
    written = {"gradient": a.gradient, "displacement": a.displacement, "total": a.total, "out": a.out}
    written["arrivals"] = a.arrivals
    check_disjoint(gradients=a.gradients, x=a.x, **written)
    read = {"rho": a.rho, "step_size": a.step_size, "eta": a.eta}
    if a.labels is not None:
        read |= {"labels": a.labels, "order": a.order, "offsets": a.offsets, "weights": a.weights}
    if a.num_samples:
        read |= {"noise.keys": a.keys, "noise.step": a.step, "noise.sigma": a.sigma}
    check_read(read, **written)
    batch, extents, groups = a.displacement.shape[0], extents_of(a.displacement), a.groups
    on_cuda = a.displacement.device.type == "cuda"
    penalty = _NO_PENALTY if a.eta is None else _L1 if groups is None else _GROUP
    total_of = _NO_TOTAL if a.total is None else _OF_DISPLACEMENT if a.total_of_displacement else _OF_GRADIENT
    factors = None if groups is None else a.displacement.new_empty(batch, groups.count, 2)
    eta_input, eta_feature = 1, 0
    if a.eta is not None and a.eta.dim() > 1:
        eta_input, eta_feature = (0 if a.eta.shape[0] == 1 else a.displacement[0].numel()), 1
    pieces = _core.prox_step_partials(extents=extents, cuda=on_cuda)
    partials = statistics.new_empty(batch, pieces, len(STATISTICS))
    arrivals = a.arrivals
    if on_cuda and arrivals is None:
        arrivals = torch.zeros(batch, dtype=torch.int32, device=statistics.device)
    device, stream = stream_of(a.displacement)
    # Gradients and noisy copies are of the model's dtype.
    model_side = a.x if a.gradients is None else a.gradients
    storage = a.displacement.dtype if model_side is None else model_side.dtype
    _core.prox_step(
        dtype=DTYPES[storage],
        extents=extents,
        gradients=address(a.gradients),
        samples=0 if a.gradients is None else a.gradients.shape[0] // batch,
        count=a.summed,
        carry=a.carry,
        gradient=a.gradient.data_ptr(),
        displacement=a.displacement.data_ptr(),
        total=address(a.total),
        total_of=total_of,
        rho=a.rho.data_ptr(),
        step_size=a.step_size.data_ptr(),
        penalty=penalty,
        eta=address(a.eta),
        eta_input=eta_input,
        eta_feature=eta_feature,
        groups=NO_GROUPS if groups is None else core_groups(groups),
        x=address(a.x),
        noise=core_noise(a) if a.num_samples else NO_NOISE,
        noisy=address(a.out),
        statistics=statistics.data_ptr(),
        partials=partials.data_ptr(),
        factors=address(factors),
        arrivals=address(arrivals),
        device=device,
        stream=stream,
    )
    increment_version([t for t in (a.gradient, a.displacement, a.total, a.out) if t is not None])
    return statistics


def _reference(*args: Any) -> Tensor:
    a = _check(*args)
    noise = None
    if a.num_samples and a.keys is not None and a.step is not None:
        noise = Noise(a.keys, a.step, a.sigma, a.num_samples, a.antithetic, a.element_offset, a.sample_offset)
    return reference.prox_step(
        a.gradients,
        a.gradient,
        a.displacement,
        count=a.summed,
        carry=a.carry,
        rho=a.rho,
        step_size=a.step_size,
        eta=a.eta,
        groups=a.groups,
        total=a.total,
        total_of="displacement" if a.total_of_displacement else "gradient",
        x=a.x,
        noise=noise,
        out=a.out,
    )


def prox_step(
    gradients: Tensor | None,
    gradient: Tensor,
    displacement: Tensor,
    *,
    count: int,
    rho: Tensor | float,
    step_size: Tensor | float,
    carry: bool = False,
    eta: Tensor | float | None = None,
    groups: Partition | None = None,
    total: Tensor | None = None,
    total_of: Literal["gradient", "displacement"] = "gradient",
    x: Tensor | None = None,
    noise: Noise | None = None,
    out: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """One fused step of the proximal gradient method, in place: one pass over memory on the CPU, one launch on CUDA.
    Formula, arguments and result: :func:`reference.prox_step`.

    Deterministic: the same bits for any number of threads and on any CPU of one build; on CUDA no float atomics.
    """
    no_groups, no_noise = (None,) * 4, (None, None, None, 0, 0, 0, False)
    statistics: Tensor = _prox_step(
        gradients,
        gradient,
        displacement,
        count,
        carry,
        per_input(rho, displacement),
        per_input(step_size, displacement),
        None if eta is None else per_input(eta, displacement),
        *(no_groups if groups is None else (groups.labels, groups.order, groups.offsets, groups.weights)),
        total,
        total_of == "displacement",
        x,
        *(no_noise if noise is None else noise_arguments(noise, displacement)),
        out,
        arrivals,
    )
    return statistics


_prox_step = register(
    "prox_step(Tensor? gradients, Tensor(a!) gradient, Tensor(b!) displacement, int summed, bool carry, "
    "Tensor rho, Tensor step_size, Tensor? eta, "
    "Tensor? labels, Tensor? order, Tensor? offsets, Tensor? weights, "
    "Tensor(c!)? total, bool total_of_displacement, "
    "Tensor? x, Tensor? keys, Tensor? step, Tensor? sigma, int num_samples, int element_offset, int sample_offset, "
    "bool antithetic, Tensor(d!)? out, Tensor(e!)? arrivals) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
