"""Momentum and running sums after a proximal step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._arguments import DTYPES, address, check_disjoint, expect, layout_of, stream_of
from ._register import _core, register
from .layout import Tensors
from .reference import PRODUCTS, STATISTICS, SUMS


class _Args(NamedTuple):
    y: list[Tensor]
    y_prev: list[Tensor]
    x: list[Tensor]
    x_prev: list[Tensor]
    gradient: list[Tensor]
    last_gradient: list[Tensor]
    last_step: list[Tensor]
    squares: list[Tensor]
    points: list[Tensor]
    gradients: list[Tensor]
    sums: Tensor
    statistics: Tensor
    samples: int
    momentum: float
    first: bool
    arrivals: Tensor | None

    def of_tensor(self, i: int) -> list[Tensor | None]:
        """Everything over the features of the i-th tensor, in the order of _OVER_FEATURES."""
        lists: Any = self[: len(_OVER_FEATURES)]
        return [tensors[i] if tensors else None for tensors in lists]


# Members of the core's enumeration, looked up once. A tuple's tensors run the phases apart, since the update of each
# needs products summed over all of them.
_PRODUCTS, _UPDATE, _BOTH = _core.Phases.products, _core.Phases.update, _core.Phases.both

# Those before `squares` are needed.
_OVER_FEATURES = _Args._fields[:10]

_NEEDED = _OVER_FEATURES.index("squares")


def _check(*args: Any) -> _Args:
    a = _Args(*args)
    count = len(a.y)
    if count == 0:
        raise ValueError("y: expected at least one tensor")
    for i, name in enumerate(_OVER_FEATURES):
        if len(args[i]) != count and (i < _NEEDED or args[i]):
            raise ValueError(f"{name}: expected {count} tensors, as in y, got {len(args[i])}")
    if bool(a.points) != bool(a.gradients):
        raise ValueError("points, gradients: give both or neither")
    if a.first and a.squares:
        raise ValueError("squares: a first step has no change of the gradient")
    if a.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {a.samples}")
    device = a.sums.device
    batch = a.sums.shape[0]
    for i, y in enumerate(a.y):
        if y.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"y: expected float32 or float64, got {y.dtype}")
        if not y.dim():
            raise ValueError("y: expected a batch axis, got a tensor without axes")
        shape, layout = (batch, *y.shape[1:]), layout_of("y", y)
        for name, tensor in zip(_OVER_FEATURES, a.of_tensor(i), strict=True):
            if tensor is not None:
                expect(name, tensor, shape, y.dtype, device)
                layout_of(name, tensor, layout)
    expect("sums", a.sums, (batch, len(SUMS)), torch.float64, device)
    expect("statistics", a.statistics, (batch, len(STATISTICS)), torch.float64, device)
    if not a.sums.is_contiguous() or not a.statistics.is_contiguous():
        raise ValueError("sums, statistics: expected contiguous tensors")
    if a.arrivals is not None:
        expect("arrivals", a.arrivals, (batch,), torch.int32, device)
    return a


def _fake(*args: Any) -> Tensor:
    a = _check(*args)
    return a.sums.new_empty(a.sums.shape[0], len(PRODUCTS))


def _kernel(*args: Any) -> Tensor:
    a = _check(*args)
    if min([y.numel() for y in a.y]) == 0:
        return _reference(*args)  # an empty tensor's address is that of one which is not there
    batch, count = a.sums.shape[0], len(a.y)
    on_cuda = a.sums.device.type == "cuda"
    arrivals = a.arrivals
    if on_cuda and arrivals is None:
        arrivals = torch.zeros(batch, dtype=torch.int32, device=a.sums.device)
    device, stream = stream_of(a.sums)

    def run(i: int, phases: _core.Phases, products: Tensor) -> None:
        y = a.y[i]
        features = math.prod(y.shape[1:])
        partials = None
        if phases is not _UPDATE:
            named = dict(zip(_OVER_FEATURES, a.of_tensor(i), strict=True))
            check_disjoint(**named, sums=a.sums, statistics=a.statistics, arrivals=a.arrivals)
            partials = a.sums.new_empty(
                batch, _core.momentum_step_partials(features=features, cuda=on_cuda), len(PRODUCTS)
            )
        _core.momentum_step(
            phases=phases,
            dtype=DTYPES[y.dtype],
            batch=batch,
            features=features,
            y=y.data_ptr(),
            y_prev=a.y_prev[i].data_ptr(),
            x=a.x[i].data_ptr(),
            x_prev=a.x_prev[i].data_ptr(),
            gradient=a.gradient[i].data_ptr(),
            last_gradient=a.last_gradient[i].data_ptr(),
            last_step=a.last_step[i].data_ptr(),
            squares=a.squares[i].data_ptr() if a.squares else 0,
            points=a.points[i].data_ptr() if a.points else 0,
            gradients=a.gradients[i].data_ptr() if a.gradients else 0,
            products=products.data_ptr(),
            sums=a.sums.data_ptr() if i == 0 else 0,
            statistics=a.statistics.data_ptr(),
            samples=a.samples,
            momentum=a.momentum,
            first=a.first,
            partials=address(partials),
            arrivals=address(arrivals),
            device=device,
            stream=stream,
        )

    products = a.sums.new_empty(batch, len(PRODUCTS))
    if count == 1:
        run(0, _BOTH, products)
    else:
        parts = a.sums.new_empty(count, batch, len(PRODUCTS))
        for i in range(count):
            run(i, _PRODUCTS, parts[i])
        torch.sum(parts, 0, out=products)
        for i in range(count):
            run(i, _UPDATE, products)
    written = (a.y, a.y_prev, a.x, a.x_prev, a.last_gradient, a.last_step, a.squares, a.points, a.gradients, [a.sums])
    for tensors in written:
        increment_version(tensors)
    return products


def _reference(*args: Any) -> Tensor:
    a = _check(*args)
    return reference.momentum_step(
        *(tuple(t) for t in a[:7]),
        squares=tuple(a.squares),
        points=tuple(a.points),
        gradients=tuple(a.gradients),
        sums=a.sums,
        statistics=a.statistics,
        samples=a.samples,
        momentum=a.momentum,
        first=a.first,
    )


def momentum_step(
    y: Tensors,
    y_prev: Tensors,
    x: Tensors,
    x_prev: Tensors,
    gradient: Tensors,
    last_gradient: Tensors,
    last_step: Tensors,
    *,
    sums: Tensor,
    statistics: Tensor,
    samples: int,
    momentum: float,
    squares: Tensors = (),
    points: Tensors = (),
    gradients: Tensors = (),
    first: bool = False,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Momentum after a proximal step with restart, in place, and running sums; two launches on CUDA. Formula, arguments
    and result: :func:`reference.momentum_step`. Deterministic as :func:`prox_step` is."""
    products: Tensor = _momentum_step(
        y,
        y_prev,
        x,
        x_prev,
        gradient,
        last_gradient,
        last_step,
        squares,
        points,
        gradients,
        sums,
        statistics,
        samples,
        momentum,
        first,
        arrivals,
    )
    return products


_momentum_step = register(
    "momentum_step(Tensor(a!)[] y, Tensor(b!)[] y_prev, Tensor(c!)[] x, Tensor(d!)[] x_prev, "
    "Tensor[] gradient, Tensor(e!)[] last_gradient, Tensor(f!)[] last_step, "
    "Tensor(g!)[] squares, Tensor(h!)[] points, Tensor(i!)[] gradients, "
    "Tensor(j!) sums, Tensor statistics, int samples, float momentum, bool first, Tensor(k!)? arrivals) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
