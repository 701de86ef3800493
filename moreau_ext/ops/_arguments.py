"""Argument checks shared by the operations, and their conversion for the compiled core."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ._register import _core
from .layout import memory_layout, state_dtype
from .noise import Noise
from .reference import per_input

DTYPES = {
    torch.float32: _core.Dtype.f32,
    torch.float64: _core.Dtype.f64,
    torch.float16: _core.Dtype.f16,
    torch.bfloat16: _core.Dtype.bf16,
}

NO_NOISE = _core.Noise(keys=0, step=0, sigma=0, element_offset=0, sample_offset=0, samples=0, antithetic=False)

NO_GROUPS = _core.Groups(order=0, offsets=0, labels=0, weights=0, count=0, per_input=False)


class NoiseArgs(Protocol):
    """The fields of an operation's arguments that describe noise, and the buffer it is written to."""

    @property
    def keys(self) -> Tensor | None: ...
    @property
    def step(self) -> Tensor | None: ...
    @property
    def sigma(self) -> Tensor | None: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def element_offset(self) -> int: ...
    @property
    def sample_offset(self) -> int: ...
    @property
    def antithetic(self) -> bool: ...
    @property
    def out(self) -> Tensor | None: ...


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as the first one is, got one on {tensor.device}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if len(shape) == 1 and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)}; call .contiguous()")


def layout_of(name: str, tensor: Tensor, like: tuple[int, int] | None = None) -> tuple[int, int]:
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


def state_of(name: str, x: Tensor) -> torch.dtype:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
    return state_dtype(x.dtype)


def check_noise(x: Tensor, state: torch.dtype, layout: tuple[int, int], a: NoiseArgs) -> None:
    if a.keys is None or a.step is None or a.out is None:
        raise ValueError("noise: writing noisy copies needs the keys, the step and `out`")
    expect("noise.keys", a.keys, (x.shape[0],), torch.int64, x.device)
    expect("noise.step", a.step, (1,), torch.int64, x.device)
    if a.sigma is not None:
        expect("noise.sigma", a.sigma, (x.shape[0],), state, x.device)
    if min(a.element_offset, a.sample_offset, a.num_samples) < 0:
        raise ValueError("noise: element_offset, sample_offset and num_samples must not be negative")
    if a.sample_offset + a.num_samples > 1 << 32:
        raise ValueError("noise: the bank numbers samples with 32 bits")
    expect("out", a.out, (x.shape[0] * a.num_samples, *x.shape[1:]), x.dtype, x.device)
    layout_of("out", a.out, layout)


def noise_arguments(noise: Noise, x: Tensor) -> tuple[Any, ...]:
    """A noise record as the schemas take it."""
    sigma = None if noise.sigma is None else per_input(noise.sigma, x)
    offsets = (noise.num_samples, noise.element_offset, noise.sample_offset)
    return (noise.keys, noise.step, sigma, *offsets, noise.antithetic)


def check_disjoint(**tensors: Tensor | None) -> None:
    """Buffers that are written must not share memory with anything else."""
    spans = _spans(tensors)
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise ValueError(f"{first} and {second} share memory; each must be a tensor of its own")


def check_read(read: dict[str, Tensor | None], **written: Tensor | None) -> None:
    """Buffers that are written must not share memory with what is only read, which may overlap among itself."""
    spans = _spans(written)
    for name, t in read.items():
        if t is None or not t.numel():
            continue
        start = t.data_ptr()
        end = start + t.nbytes
        for low, high, other in spans:
            if start < high and low < end:
                raise ValueError(f"{name} and {other} share memory, and {other} is written")


def _spans(tensors: dict[str, Tensor | None]) -> list[tuple[int, int, str]]:
    """The memory of dense tensors, in order."""
    spans = []
    for name, t in tensors.items():
        if t is not None and t.numel():
            start = t.data_ptr()
            spans.append((start, start + t.nbytes, name))
    spans.sort()
    return spans


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(x: Tensor) -> tuple[int, int]:
    """(device index, stream) for the core: -1 for the CPU."""
    if x.device.type == "cpu":
        return -1, 0
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def extents_of(x: Tensor) -> _core.Extents:
    channels, positions = layout_of("x", x)
    return _core.Extents(batch=x.shape[0], channels=channels, positions=positions)


def core_noise(a: NoiseArgs) -> _core.Noise:
    return _core.Noise(
        keys=address(a.keys),
        step=address(a.step),
        sigma=address(a.sigma),
        element_offset=a.element_offset,
        sample_offset=a.sample_offset,
        samples=a.num_samples,
        antithetic=a.antithetic,
    )
