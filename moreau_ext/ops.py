"""The fused operations on tensors: checks, registration with torch, and the calls into the compiled core.

Each has the name and the signature of its specification in :mod:`moreau_ext.reference`, where arguments and formulas
are described. All work in place on buffers of the caller, allocate next to nothing and never synchronise. On devices
for which there is no kernel (a build without CUDA, or another accelerator) the reference runs.

They are registered with torch.library, so ``torch.compile(fullgraph=True)`` takes them; they carry no autograd rule.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import defaultdict
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _library, reference
from .groups import Partition, in_memory_order, memory_layout, rows_like
from .noise import Noise
from .reference import PRODUCTS, STATISTICS, SUMS, Tensors, per_input, soft_threshold, state_dtype

try:
    from . import _core
except ImportError as error:
    raise ImportError(
        f"moreau_ext's compiled core cannot be loaded ({error}). Likely causes: Python found the source tree in the "
        "current folder instead of the installed package (run from another folder, or pip install -e .), or the "
        "package was built for another Python"
    ) from error

__all__ = [
    "PRODUCTS",
    "STATISTICS",
    "SUMS",
    "Noise",
    "accumulate",
    "build_info",
    "group_norms",
    "has_kernels",
    "momentum_step",
    "perturb",
    "private_stream",
    "prox_step",
    "shrink",
    "soft_threshold",
    "state_dtype",
]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_NO_NOISE = _core.Noise(0, 0, 0, 0, 0, 0, False)
_NO_GROUPS = _core.Groups(0, 0, 0, 0, 0, False)


def has_kernels(device: torch.device) -> bool:
    """Whether the compiled kernels run on a device, rather than the reference in plain PyTorch."""
    return device.type == "cpu" or (device.type == "cuda" and _core.cuda_version is not None)


# Streams of private_stream() that nobody has any more, by device. None is ever destroyed: torch's allocator remembers
# the streams that it gave memory to, and waits for them.
_spare_streams: defaultdict[int, list[int]] = defaultdict(list)


def private_stream(device: torch.device) -> Any:
    """A torch.cuda.Stream that nobody else has, as long as the object lives.

    Those of ``torch.cuda.Stream()`` are 32 per device, dealt out in turn: the 33rd is the first again, and torch lends
    cuBLAS one workspace per stream, in a capture and at once.

    Args:
        device: of the stream.

    Raises:
        RuntimeError: CUDA could not create it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    spare = _spare_streams[index]
    try:
        address = spare.pop()
    except IndexError:
        address = _core.make_stream(index)
    stream: Any = torch.cuda.ExternalStream(address, device=device)  # type: ignore[no-untyped-call]  # torch's
    weakref.finalize(stream, spare.append, address).atexit = False
    return stream


def build_info() -> dict[str, str | None]:
    """What was compiled: compiler, vector instructions that this CPU runs, CUDA version and architectures (or None)."""
    return {
        "compiler": _core.compiler,
        "cpu": _core.cpu_capability,
        "cuda": _core.cuda_version,
        "cuda_architectures": _core.cuda_architectures,
    }


# --- checks --------------------------------------------------------------------------------------------------------


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as the first one is, got one on {tensor.device}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if len(shape) == 1 and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)}; call .contiguous()")


def _layout(name: str, tensor: Tensor, like: tuple[int, int] | None = None) -> tuple[int, int]:
    if like is not None and like[0] == 1 and tensor.is_contiguous():
        return like  # the usual case, cheaply: a call of a small operation costs as much as its checks
    layout = memory_layout(tensor)
    if layout is None:
        raise ValueError(
            f"{name}: expected a contiguous or channels_last tensor, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; call .contiguous() first"
        )
    if like is not None and layout != like and tensor.numel():
        raise ValueError(
            f"{name}: its memory layout differs from the first tensor's; make both contiguous (or both not)"
        )
    return layout


def _storage(name: str, x: Tensor) -> torch.dtype:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
    return state_dtype(x.dtype)


def _check_noise(x: Tensor, state: torch.dtype, a: _PerturbArgs | _StepArgs) -> None:
    if a.keys is None or a.step is None or a.out is None:
        raise ValueError("noise: writing noisy copies needs the keys, the step and `out`")
    _expect("noise.keys", a.keys, (x.shape[0],), torch.int64, x.device)
    _expect("noise.step", a.step, (1,), torch.int64, x.device)
    if a.sigma is not None:
        _expect("noise.sigma", a.sigma, (x.shape[0],), state, x.device)
    if min(a.element_offset, a.sample_offset, a.num_samples) < 0:
        raise ValueError("noise: element_offset, sample_offset and num_samples must not be negative")
    if a.sample_offset + a.num_samples > 1 << 32:
        raise ValueError("noise: the bank numbers samples with 32 bits")
    _expect("out", a.out, (x.shape[0] * a.num_samples, *x.shape[1:]), x.dtype, x.device)
    _layout("out", a.out, _layout("x", x))


def _noise_arguments(noise: Noise, x: Tensor) -> tuple[Any, ...]:
    """A noise record as the schemas take it."""
    sigma = None if noise.sigma is None else per_input(noise.sigma, x)
    offsets = (noise.num_samples, noise.element_offset, noise.sample_offset)
    return (noise.keys, noise.step, sigma, *offsets, noise.antithetic)


def _check_disjoint(**tensors: Tensor | None) -> None:
    """Buffers that are written must not share memory with anything else."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name)
        for name, t in tensors.items()
        if t is not None and t.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise ValueError(f"{first} and {second} share memory; each must be a tensor of its own")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _target(x: Tensor) -> tuple[int, int]:
    """(device index, stream) for the core: -1 for the CPU."""
    if x.device.type == "cpu":
        return -1, 0
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def _extents(x: Tensor) -> _core.Extents:
    return _core.Extents(x.shape[0], *_layout("x", x))


def _core_noise(a: _PerturbArgs | _StepArgs) -> _core.Noise:
    return _core.Noise(
        _address(a.keys),
        _address(a.step),
        _address(a.sigma),
        a.element_offset,
        a.sample_offset,
        a.num_samples,
        a.antithetic,
    )


# --- perturb -------------------------------------------------------------------------------------------------------

_library.define(
    "perturb(Tensor(a!) out, Tensor x, Tensor? displacement, Tensor keys, Tensor step, Tensor? sigma, "
    "int num_samples, int element_offset, int sample_offset, bool antithetic) -> ()"
)


class _PerturbArgs(NamedTuple):
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


def _perturb_check(*args: Any) -> _PerturbArgs:
    a = _PerturbArgs(*args)
    state = _storage("x", a.x)
    _check_noise(a.x, state, a)
    if a.displacement is not None:
        _expect("displacement", a.displacement, tuple(a.x.shape), state, a.x.device)
        _layout("displacement", a.displacement, _layout("x", a.x))
    return a


def _perturb_kernel(*args: Any) -> None:
    a = _perturb_check(*args)
    if a.out.numel() == 0:
        return
    _check_disjoint(out=a.out, x=a.x, displacement=a.displacement)
    _core.perturb(
        _DTYPES[a.x.dtype],
        _extents(a.x),
        a.x.data_ptr(),
        _address(a.displacement),
        _core_noise(a),
        a.out.data_ptr(),
        *_target(a.x),
    )


def _perturb_reference(*args: Any) -> None:
    a = _perturb_check(*args)
    noise = Noise(a.keys, a.step, a.sigma, a.num_samples, a.antithetic, a.element_offset, a.sample_offset)
    reference.perturb(a.x, a.displacement, noise, out=a.out)


def perturb(x: Tensor, displacement: Tensor | None, noise: Noise, *, out: Tensor | None = None) -> Tensor:
    """Noisy copies of every input, out[b·m + k] = x[b] + δ[b] + σ[b]·z(b, k); see :func:`reference.perturb`.

    Example:
        >>> import torch
        >>> from moreau_ext.noise import Noise, noise_keys
        >>> from moreau_ext.ops import perturb
        >>> noise = Noise(noise_keys(0, torch.arange(2)), torch.zeros(1, dtype=torch.int64), torch.full((2,), 0.1), 4)
        >>> perturb(torch.zeros(2, 3), None, noise).shape
        torch.Size([8, 3])
    """
    if out is None:
        out = rows_like(x, x.shape[0] * noise.num_samples)
    _perturb(out, x, displacement, *_noise_arguments(noise, x))
    return out


# --- accumulate ----------------------------------------------------------------------------------------------------

_library.define("accumulate(Tensor(a!) total, Tensor gradients, bool carry) -> ()")


def _accumulate_check(total: Tensor, gradients: Tensor, carry: bool) -> None:
    state = _storage("gradients", gradients)
    batch = total.shape[0]
    if gradients.shape[0] % batch if batch else gradients.shape[0]:
        raise ValueError(f"gradients: {gradients.shape[0]} rows are no multiple of the {batch} inputs")
    _expect("total", total, (batch, *gradients.shape[1:]), state, gradients.device)
    _layout("gradients", gradients, _layout("total", total))


def _accumulate_kernel(total: Tensor, gradients: Tensor, carry: bool) -> None:
    _accumulate_check(total, gradients, carry)
    if total.numel() == 0:
        return
    _check_disjoint(total=total, gradients=gradients)
    samples = gradients.shape[0] // total.shape[0]
    dtype = _DTYPES[gradients.dtype]
    _core.accumulate(dtype, _extents(total), gradients.data_ptr(), samples, total.data_ptr(), carry, *_target(total))


def _accumulate_reference(total: Tensor, gradients: Tensor, carry: bool) -> None:
    _accumulate_check(total, gradients, carry)
    if total.numel():
        reference.accumulate(gradients, total, carry=carry)


def accumulate(gradients: Tensor, total: Tensor, *, carry: bool) -> Tensor:
    """Sum over samples in the order of the samples, so that chunking does not change it; see
    :func:`reference.accumulate`."""
    _accumulate(total, gradients, carry)
    return total


# --- group_norms ---------------------------------------------------------------------------------------------------

_library.define("group_norms(Tensor v, Tensor labels, Tensor order, Tensor offsets, Tensor weights) -> Tensor")


def _check_groups(x: Tensor, state: torch.dtype, groups: Partition) -> None:
    features, rows = math.prod(x.shape[1:]), groups.labels.shape[0]
    if rows not in (1, x.shape[0]):
        raise ValueError(f"groups: made for {rows} inputs, got {x.shape[0]}")
    for name, tensor, columns, dtype in (
        ("labels", groups.labels, features, torch.int32),
        ("order", groups.order, features, torch.int32),
        ("offsets", groups.offsets, groups.count + 1, torch.int32),
        ("weights", groups.weights, groups.count, state),
    ):
        _expect(f"groups.{name}", tensor, (rows, columns), dtype, x.device)
        if not tensor.is_contiguous():
            raise ValueError(f"groups.{name}: expected a contiguous tensor")


def _core_groups(groups: Partition) -> _core.Groups:
    return _core.Groups(
        groups.order.data_ptr(),
        groups.offsets.data_ptr(),
        groups.labels.data_ptr(),
        groups.weights.data_ptr(),
        groups.count,
        groups.per_input,
    )


def _group_norms_fake(v: Tensor, *partition: Tensor) -> Tensor:
    if v.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"v: expected float32 or float64, got {v.dtype}")
    _layout("v", v)
    groups = Partition(*partition)
    _check_groups(v, v.dtype, groups)
    return v.new_empty(v.shape[0], groups.count, dtype=torch.float64)


def _group_norms_kernel(v: Tensor, *partition: Tensor) -> Tensor:
    norms = _group_norms_fake(v, *partition)
    if v.numel() == 0:
        return norms.zero_()
    groups = _core_groups(Partition(*partition))
    _core.group_norms(_DTYPES[v.dtype], _extents(v), v.data_ptr(), groups, norms.data_ptr(), *_target(v))
    return norms


def _group_norms_reference(v: Tensor, *partition: Tensor) -> Tensor:
    _group_norms_fake(v, *partition)
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


# --- prox_step -----------------------------------------------------------------------------------------------------

_library.define(
    "prox_step(Tensor? gradients, Tensor(a!) gradient, Tensor(b!) displacement, int summed, bool carry, "
    "Tensor rho, Tensor step_size, Tensor? eta, "
    "Tensor? labels, Tensor? order, Tensor? offsets, Tensor? weights, "
    "Tensor(c!)? total, bool total_of_displacement, "
    "Tensor? x, Tensor? keys, Tensor? step, Tensor? sigma, int num_samples, int element_offset, int sample_offset, "
    "bool antithetic, Tensor(d!)? out, Tensor(e!)? arrivals) -> Tensor"
)


class _StepArgs(NamedTuple):
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

    @property
    def eta_per_feature(self) -> bool:
        return self.eta is not None and self.eta.dim() > 1

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the model's side: gradients and noisy copies."""
        if self.gradients is not None:
            return self.gradients.dtype
        return self.displacement.dtype if self.x is None else self.x.dtype


def _prox_step_check(*args: Any) -> _StepArgs:
    a = _StepArgs(*args)
    state, device, shape = a.displacement.dtype, a.displacement.device, tuple(a.displacement.shape)
    if state not in (torch.float32, torch.float64):
        raise TypeError(f"displacement: expected float32 or float64, got {state}")
    if not shape:
        raise ValueError("displacement: expected a batch axis, got a tensor without axes")
    batch, layout = shape[0], _layout("displacement", a.displacement)
    if a.gradients is None and not a.carry:
        raise ValueError("gradients: give the gradients of this step, or their sum in `gradient` with carry=True")
    if a.summed < 1:
        raise ValueError(f"count: expected the number of gradients summed, at least 1, got {a.summed}")
    for name, tensor in (("gradient", a.gradient), ("total", a.total)):
        if tensor is not None:
            _expect(name, tensor, shape, state, device)
            _layout(name, tensor, layout)
    if a.gradients is not None:
        if _storage("gradients", a.gradients) != state:
            expected = state_dtype(a.gradients.dtype)
            raise TypeError(f"gradients: {a.gradients.dtype} goes with a displacement of {expected}, got {state}")
        rows = a.gradients.shape[0] // batch if batch else 0
        _expect("gradients", a.gradients, (batch * rows, *shape[1:]), a.storage, device)
        _layout("gradients", a.gradients, layout)
    for name, scalar in (("rho", a.rho), ("step_size", a.step_size)):
        _expect(name, scalar, (batch,), state, device)
    if a.eta is not None and a.eta_per_feature:
        if a.labels is not None:
            raise ValueError("eta: the group penalty takes one per input, [B]")
        _expect("eta", a.eta, (1 if a.eta.shape[0] == 1 else batch, *shape[1:]), state, device)
        _layout("eta", a.eta, layout)
    elif a.eta is not None:
        _expect("eta", a.eta, (batch,), state, device)
    if a.labels is not None:
        if a.eta is None or a.groups is None:
            raise ValueError("groups: need eta and a whole partition")
        _check_groups(a.displacement, state, a.groups)
    if a.num_samples:
        if a.x is None:
            raise ValueError("noise: writing noisy copies needs x")
        if _storage("x", a.x) != state or a.x.dtype != a.storage:
            raise TypeError(f"x: expected the dtype of the gradients, {a.storage}, got {a.x.dtype}")
        _expect("x", a.x, shape, a.x.dtype, device)
        _layout("x", a.x, layout)
        _check_noise(a.x, state, a)
    if a.arrivals is not None:
        _expect("arrivals", a.arrivals, (batch,), torch.int32, device)
    return a


def _empty_statistics(a: _StepArgs) -> Tensor:
    return a.displacement.new_empty(a.displacement.shape[0], len(STATISTICS), dtype=torch.float64)


def _prox_step_fake(*args: Any) -> Tensor:
    return _empty_statistics(_prox_step_check(*args))


def _prox_step_kernel(*args: Any) -> Tensor:
    a = _prox_step_check(*args)
    statistics = _empty_statistics(a)
    if a.displacement.numel() == 0:
        return statistics.zero_()
    _check_disjoint(
        gradients=a.gradients, gradient=a.gradient, displacement=a.displacement, total=a.total, x=a.x, out=a.out
    )
    batch, extents, groups = a.displacement.shape[0], _extents(a.displacement), a.groups
    on_cuda = a.displacement.device.type == "cuda"
    penalty = 0 if a.eta is None else 1 if groups is None else 2
    factors = None if groups is None else a.displacement.new_empty(batch, groups.count, 2)
    eta_input, eta_feature = 1, 0
    if a.eta is not None and a.eta_per_feature:
        eta_input, eta_feature = (0 if a.eta.shape[0] == 1 else a.displacement[0].numel()), 1
    pieces = _core.prox_step_partials(extents, on_cuda)
    partials = statistics.new_empty(batch, pieces, len(STATISTICS))
    arrivals = a.arrivals
    if on_cuda and arrivals is None:
        arrivals = torch.zeros(batch, dtype=torch.int32, device=statistics.device)
    _core.prox_step(
        _DTYPES[a.storage],
        extents,
        _address(a.gradients),
        0 if a.gradients is None else a.gradients.shape[0] // batch,
        a.summed,
        a.carry,
        a.gradient.data_ptr(),
        a.displacement.data_ptr(),
        _address(a.total),
        0 if a.total is None else 2 if a.total_of_displacement else 1,
        a.rho.data_ptr(),
        a.step_size.data_ptr(),
        penalty,
        _address(a.eta),
        eta_input,
        eta_feature,
        _NO_GROUPS if groups is None else _core_groups(groups),
        _address(a.x),
        _core_noise(a) if a.num_samples else _NO_NOISE,
        _address(a.out),
        statistics.data_ptr(),
        partials.data_ptr(),
        _address(factors),
        _address(arrivals),
        *_target(a.displacement),
    )
    return statistics


def _prox_step_reference(*args: Any) -> Tensor:
    a = _prox_step_check(*args)
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
        *(no_noise if noise is None else _noise_arguments(noise, displacement)),
        out,
        arrivals,
    )
    return statistics


# --- momentum_step ------------------------------------------------------------------------------------------------

_library.define(
    "momentum_step(Tensor(a!)[] point, Tensor(b!)[] previous, Tensor(c!)[] here, Tensor(d!)[] before, "
    "Tensor[] gradient, Tensor(e!)[] last_gradient, Tensor(f!)[] change, "
    "Tensor(g!)[] squares, Tensor(h!)[] points, Tensor(i!)[] gradients, "
    "Tensor(j!) sums, Tensor statistics, int samples, float momentum, bool first, Tensor(k!)? arrivals) -> Tensor"
)


class _MomentumArgs(NamedTuple):
    point: list[Tensor]
    previous: list[Tensor]
    here: list[Tensor]
    before: list[Tensor]
    gradient: list[Tensor]
    last_gradient: list[Tensor]
    change: list[Tensor]
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


# Phases of the core's momentum, which tensors of a tuple need apart: what is multiplied is summed over all of them.
_PRODUCTS, _UPDATE = 1, 2
# Those before `squares` are needed.
_OVER_FEATURES = _MomentumArgs._fields[:10]
_NEEDED = _OVER_FEATURES.index("squares")


def _momentum_check(*args: Any) -> _MomentumArgs:
    a = _MomentumArgs(*args)
    count = len(a.point)
    if count == 0:
        raise ValueError("point: expected at least one tensor")
    for i, name in enumerate(_OVER_FEATURES):
        if len(args[i]) != count and (i < _NEEDED or args[i]):
            raise ValueError(f"{name}: expected {count} tensors, as in point, got {len(args[i])}")
    if bool(a.points) != bool(a.gradients):
        raise ValueError("points, gradients: give both or neither")
    if a.first and a.squares:
        raise ValueError("squares: a first step has no change of the gradient")
    if a.samples < 1:
        raise ValueError(f"samples: expected at least 1, got {a.samples}")
    device = a.sums.device
    batch = a.sums.shape[0]
    for i, point in enumerate(a.point):
        if point.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"point: expected float32 or float64, got {point.dtype}")
        if not point.dim():
            raise ValueError("point: expected a batch axis, got a tensor without axes")
        shape, layout = (batch, *point.shape[1:]), _layout("point", point)
        for name, tensor in zip(_OVER_FEATURES, a.of_tensor(i), strict=True):
            if tensor is not None:
                _expect(name, tensor, shape, point.dtype, device)
                _layout(name, tensor, layout)
    _expect("sums", a.sums, (batch, len(SUMS)), torch.float64, device)
    _expect("statistics", a.statistics, (batch, len(STATISTICS)), torch.float64, device)
    if not a.sums.is_contiguous() or not a.statistics.is_contiguous():
        raise ValueError("sums, statistics: expected contiguous tensors")
    if a.arrivals is not None:
        _expect("arrivals", a.arrivals, (batch,), torch.int32, device)
    return a


def _empty_products(a: _MomentumArgs) -> Tensor:
    return a.sums.new_empty(a.sums.shape[0], len(PRODUCTS))


def _momentum_fake(*args: Any) -> Tensor:
    return _empty_products(_momentum_check(*args))


def _momentum_kernel(*args: Any) -> Tensor:
    a = _momentum_check(*args)
    if not all(point.numel() for point in a.point):
        return _momentum_reference(*args)  # an empty tensor's address is that of one which is not there
    batch, count = a.sums.shape[0], len(a.point)
    on_cuda = a.sums.device.type == "cuda"
    arrivals = a.arrivals
    if on_cuda and arrivals is None:
        arrivals = torch.zeros(batch, dtype=torch.int32, device=a.sums.device)
    target = _target(a.sums)

    def run(i: int, phases: int, products: Tensor) -> None:
        point = a.point[i]
        features = math.prod(point.shape[1:])
        partials = None
        if phases & _PRODUCTS:
            _check_disjoint(**dict(zip(_OVER_FEATURES, a.of_tensor(i), strict=True)))
            partials = a.sums.new_empty(batch, _core.momentum_partials(features, on_cuda), len(PRODUCTS))
        _core.momentum(
            phases,
            _DTYPES[point.dtype],
            batch,
            features,
            *map(_address, a.of_tensor(i)),
            products.data_ptr(),
            a.sums.data_ptr() if i == 0 else 0,
            a.statistics.data_ptr(),
            a.samples,
            a.momentum,
            a.first,
            _address(partials),
            _address(arrivals),
            *target,
        )

    if count == 1:
        products = _empty_products(a)
        run(0, _PRODUCTS | _UPDATE, products)
        return products
    parts = a.sums.new_empty(count, batch, len(PRODUCTS))
    for i in range(count):
        run(i, _PRODUCTS, parts[i])
    products = parts.sum(0)
    for i in range(count):
        run(i, _UPDATE, products)
    return products


def _momentum_reference(*args: Any) -> Tensor:
    a = _momentum_check(*args)
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
    point: Tensors,
    previous: Tensors,
    here: Tensors,
    before: Tensors,
    gradient: Tensors,
    last_gradient: Tensors,
    change: Tensors,
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
    """Momentum after a proximal step, in place, and what is kept of the step; two launches on CUDA. Formula, arguments
    and result: :func:`reference.momentum_step`. Deterministic as :func:`prox_step` is."""
    products: Tensor = _momentum_step(
        point,
        previous,
        here,
        before,
        gradient,
        last_gradient,
        change,
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


# --- registration --------------------------------------------------------------------------------------------------


def _writes(check: Any) -> Any:
    """The shape function of an operation that returns nothing."""

    def shape_function(*args: Any) -> None:
        check(*args)

    return shape_function


def _said_once(function: Any) -> Any:
    """The reference as a fallback, with one word that no kernel ran."""
    said = False

    def fallback(*args: Any) -> Any:
        nonlocal said
        if not said:
            said = True
            tensors = (t for a in args for t in (a if isinstance(a, list) else [a]))
            device = next(t.device for t in tensors if isinstance(t, Tensor))
            warnings.warn(
                f"moreau_ext has no compiled kernels for {device.type}; the much slower reference runs. For CUDA, "
                "reinstall where nvcc is found (moreau-ext info shows what was built).",
                stacklevel=2,
            )
        return function(*args)

    return fallback


for _name, _kernel, _reference, _fake in (
    ("perturb", _perturb_kernel, _perturb_reference, _writes(_perturb_check)),
    ("accumulate", _accumulate_kernel, _accumulate_reference, _writes(_accumulate_check)),
    ("group_norms", _group_norms_kernel, _group_norms_reference, _group_norms_fake),
    ("prox_step", _prox_step_kernel, _prox_step_reference, _prox_step_fake),
    ("momentum_step", _momentum_kernel, _momentum_reference, _momentum_fake),
):
    _library.implement(_name, "CPU", _kernel)
    if _core.cuda_version is not None:
        _library.implement(_name, "CUDA", _kernel)
    _library.implement(_name, "CompositeExplicitAutograd", _said_once(_reference))
    _library.fake(_name, _fake)

_perturb = _library.operation("perturb")
_accumulate = _library.operation("accumulate")
_group_norms = _library.operation("group_norms")
_prox_step = _library.operation("prox_step")
_momentum_step = _library.operation("momentum_step")
