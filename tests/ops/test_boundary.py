"""The boundary of the operations: a wrong argument raises an error by name, and no memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moreau_ext import ops
from moreau_ext.ops import reference
from moreau_ext.ops.momentum_step import _OVER_FEATURES
from moreau_ext.ops.noise import noise_keys
from moreau_ext.ops.partition import Partition
from moreau_ext.ops.reference import PRODUCTS, STATISTICS, SUMS

B, D, M = 2, 6, 4


def partition() -> dict[str, Tensor]:
    return {
        "labels": torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32),
        "order": torch.arange(D, dtype=torch.int32)[None],
        "offsets": torch.tensor([[0, 2, 4, 6]], dtype=torch.int32),
        "weights": torch.ones(1, 3),
    }


def noise() -> dict[str, Any]:
    return {
        "keys": noise_keys(0, torch.arange(B)),
        "step": torch.zeros(1, dtype=torch.int64),
        "sigma": torch.full((B,), 0.1),
        "num_samples": M,
        "element_offset": 0,
        "sample_offset": 0,
        "antithetic": False,
    }


def perturb() -> dict[str, Any]:
    return {"out": torch.zeros(B * M, D), "x": torch.randn(B, D), "displacement": torch.randn(B, D), **noise()}


def accumulate() -> dict[str, Any]:
    return {"total": torch.zeros(B, D), "gradients": torch.randn(B * M, D), "carry": True}


def group_norms() -> dict[str, Any]:
    return {"v": torch.randn(B, D), **partition()}


def prox_step() -> dict[str, Any]:
    return {
        "gradients": torch.randn(B * M, D),
        "gradient": torch.zeros(B, D),
        "displacement": torch.zeros(B, D),
        "summed": M,
        "carry": False,
        "rho": torch.ones(B),
        "step_size": torch.full((B,), 0.1),
        "eta": torch.full((B,), 0.01),
        **partition(),
        "total": torch.zeros(B, D),
        "total_of_displacement": False,
        "x": torch.randn(B, D),
        **noise(),
        "out": torch.zeros(B * M, D),
        "arrivals": torch.zeros(B, dtype=torch.int32),
    }


def momentum_step() -> dict[str, Any]:
    return {
        **{name: [torch.randn(B, D)] for name in _OVER_FEATURES},
        "sums": torch.zeros(B, len(SUMS), dtype=torch.float64),
        "statistics": torch.ones(B, len(STATISTICS), dtype=torch.float64),
        "samples": 2,
        "momentum": 0.3,
        "first": False,
        "arrivals": torch.zeros(B, dtype=torch.int32),
    }


OPERATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (perturb, accumulate, group_norms, prox_step, momentum_step)
}
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64)


def call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.moreau_ext, name)(*arguments.values())


def strided(t: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([t, t], -1)[..., 0]


WRONG: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "dtype": lambda t, draw: t.to(draw(st.sampled_from([d for d in DTYPES if d != t.dtype]))),
    "meta": lambda t, draw: t.to("meta"),
    "longer": lambda t, draw: torch.cat([t, t]),
    "shorter": lambda t, draw: t[: len(t) - 1],
    "another axis": lambda t, draw: t[..., None],
    "a column less": lambda t, draw: t[..., : t.shape[-1] - 1].contiguous(),
    "strides": lambda t, draw: strided(t),
    "expanded": lambda t, draw: t.reshape(-1)[:1].expand(t.numel()).view(t.shape) if t.numel() > 1 else t[..., None],
    "sparse": lambda t, draw: t.to_sparse(),
}


def tensors_of(arguments: dict[str, Any]) -> list[str]:
    return [n for n, v in arguments.items() if isinstance(v, (Tensor, list))]


def snapshot(arguments: dict[str, Any]) -> list[Tensor]:
    flat = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    return [t.clone() for t in flat if t.device.type == "cpu" and t.layout == torch.strided]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_arguments_are_right(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.moreau_ext, name).default, tuple(OPERATIONS[name]().values()))


# Other numbers of inputs or samples, and no mistakes.
FINE = {
    ("accumulate", "gradients", "longer"),
    ("accumulate", "total", "longer"),
    ("accumulate", "total", "shorter"),
    ("prox_step", "gradients", "longer"),
    ("group_norms", "v", "another axis"),
    ("group_norms", "v", "longer"),
    ("group_norms", "v", "shorter"),
}
HALVES = {("accumulate", "gradients", torch.float16), ("accumulate", "gradients", torch.bfloat16)}


@given(data=st.data(), name=st.sampled_from(sorted(OPERATIONS)), how=st.sampled_from(sorted(WRONG)))
@settings(max_examples=400, deadline=None)
def test_one_wrong_tensor_is_refused(data: Any, name: str, how: str) -> None:
    """Every tensor argument of every operation, in every way; nothing is written before the error."""
    arguments = OPERATIONS[name]()
    which = data.draw(st.sampled_from(tensors_of(arguments)))
    value = arguments[which]
    one = value[0] if isinstance(value, list) else value
    wrong = WRONG[how](one, data.draw)
    if (name, which, how) in FINE or (name, which, wrong.dtype) in HALVES:
        return
    if name == "group_norms" and which == "v" and how == "dtype" and wrong.dtype == torch.float64:
        wrong = wrong.to(torch.float16)
    if which in ("labels", "order", "offsets", "weights") and how == "longer":
        wrong = torch.cat([one, one, one])  # two rows would be one for each input
    if how == "strides" and one.numel() == 1:
        return
    arguments[which] = [wrong] if isinstance(value, list) else wrong
    before = snapshot(arguments)
    with pytest.raises((TypeError, ValueError)):
        call(name, arguments)
    for a, b in zip(before, snapshot(arguments), strict=True):
        assert torch.equal(a, b)


WRITTEN = {
    "perturb": ["out"],
    "accumulate": ["total"],
    "prox_step": ["gradient", "displacement", "total", "out", "arrivals"],
    "momentum_step": ["y", "y_prev", "x", "x_prev", "last_gradient", "squares", "points", "sums"],
}


@given(data=st.data(), name=st.sampled_from(sorted(WRITTEN)))
@settings(max_examples=200, deadline=None)
def test_memory_that_is_written_overlaps_nothing(data: Any, name: str) -> None:
    """A view of the memory of a written tensor in the place of any other one."""
    arguments = OPERATIONS[name]()
    target = data.draw(st.sampled_from(WRITTEN[name]))
    which = data.draw(st.sampled_from([n for n in tensors_of(arguments) if n != target]))
    first = [v[0] if isinstance(v, list) else v for v in (arguments[target], arguments[which])]
    size = [t.numel() * t.element_size() for t in first]
    # One block of memory; the other tensor begins within the written one.
    block = torch.zeros(size[0] + size[1] + 64, dtype=torch.uint8)
    offset = data.draw(st.integers(0, (size[0] - 1) // 8)) * 8
    views = []
    for t, start in zip(first, (0, offset), strict=True):
        view = block[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        views.append(view.copy_(t))
    for n, view in zip((target, which), views, strict=True):
        arguments[n] = [view] if isinstance(arguments[n], list) else view
    with pytest.raises(ValueError, match="share memory"):
        call(name, arguments)


@pytest.mark.parametrize("penalty", ["l1", "per feature", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("field", ["eta", "rho", "step_size", "gradients", "sigma", "weights"])
def test_nan_comes_through_as_in_the_reference(field: str, dtype: torch.dtype, penalty: str) -> None:
    """A NaN in a setting makes the numbers NaN that depend on it; a shrunk zero would hide it."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {
        "gradients": torch.randn(B * M, 37, generator=generator).to(dtype),
        "rho": torch.ones(B, dtype=dtype),
        "step_size": torch.full((B,), 0.1, dtype=dtype),
        "eta": torch.full((B, 37) if penalty == "per feature" else (B,), 0.05, dtype=dtype),
        "sigma": torch.full((B,), 0.1, dtype=dtype),
        "weights": torch.ones(1, 8, dtype=dtype),
    }
    values[field].view(-1)[0] = torch.nan
    labels = torch.arange(37, dtype=torch.int32)[None] // 5
    offsets = torch.tensor([[0, 5, 10, 15, 20, 25, 30, 35, 37]], dtype=torch.int32)
    order = torch.arange(37, dtype=torch.int32)[None]
    groups = Partition(labels, order, offsets, values["weights"]) if penalty == "group" else None
    found = []
    for step in (ops.prox_step, reference.prox_step):
        gradient, displacement, out = torch.zeros(B, 37, dtype=dtype), torch.ones(B, 37, dtype=dtype), None
        out = torch.zeros(B * M, 37, dtype=dtype)
        draw = ops.noise.Noise(noise_keys(0, torch.arange(B)), torch.zeros(1, dtype=torch.int64), values["sigma"], M)
        kept = {"rho": values["rho"], "step_size": values["step_size"], "eta": values["eta"]}
        x = torch.zeros(B, 37, dtype=dtype)
        step(values["gradients"], gradient, displacement, count=M, groups=groups, x=x, noise=draw, out=out, **kept)
        found.append((gradient, displacement, out))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    if field != "weights" or groups is not None:
        assert any(t.isnan().any() for t in found[0])


def test_a_stray_meta_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="out: expected a tensor on cpu, got one on meta"):
        call("prox_step", prox_step() | {"out": torch.zeros(B * M, D, device="meta")})
    assert PRODUCTS


def test_meta_tensors_alone_are_traced() -> None:
    arguments = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in group_norms().items()}
    assert call("group_norms", arguments).device.type == "meta"
