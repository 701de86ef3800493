"""The call: forms of input, what a result must not depend on, what is left as it was found, and what bad input says."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import images, in_threads, others, smooth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moreau_ext import (
    Gradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    Pixels,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    Solution,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    Tiles,
)

CLASSES = 4
SHORT = ProximalGradient(num_samples=4, max_steps=6, step_size=0.5, average_last=2, tol=0.0)
# The same sums in another order, through a handful of steps.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}

MOREAU: dict[str, Callable[..., Any]] = {
    "moreau": lambda model, **k: MoreauGrad(model, **{"solver": SHORT, **k}),
    "sparse": lambda model, **k: SparseMoreauGrad(model, **{"solver": SHORT, **k}),
    "tiles": lambda model, **k: GroupSparseMoreauGrad(model, **{"solver": SHORT, "groups": Tiles(2), **k}),
}
ALL: dict[str, Callable[..., Any]] = {
    **MOREAU,
    "gradient": Gradient,
    "smoothgrad": lambda model, **k: SmoothGrad(model, num_samples=4, **k),
    "st_smoothgrad": lambda model, **k: SoftThresholdedSmoothGrad(model, num_samples=4, **k),
    "sparsified_smoothgrad": lambda model, **k: SparsifiedSmoothGrad(model, num_samples=4, keep=0.3, clip=0.1, **k),
}


def cnn(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Everything that has a state or two modes."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(),
        nn.Linear(60, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        model(images(8, torch.float32))  # statistics that are not the initial ones
    return model.to(dtype).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    t = ROUNDING[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=t, atol=t)


class Recorder:
    """A callable model that notes the size of every pass."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model, self.rows, self.seen = model, list[int](), list[Tensor]()

    def __call__(self, x: Tensor, *args: Any) -> Any:
        self.rows.append(len(x))
        self.seen.append(x.detach().clone())
        return self.model(x, *args)


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ALL)
def test_the_call(method: str, dtype: torch.dtype) -> None:
    """attribute(inputs, target, additional_forward_args), positional or by name: a map like the input."""
    model, x = smooth(dtype), images(dtype=dtype)
    e = ALL[method](model)
    a = e.attribute(x, target=1)
    assert (a.shape, a.dtype, a.device) == (x.shape, x.dtype, x.device)
    assert not a.requires_grad
    assert torch.equal(a, e.attribute(x, 1, None))
    s = e.attribute(x, 1, return_solution=True)
    assert isinstance(s, Solution)
    assert torch.equal(s.attribution, a)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "slice of a batch": lambda x: torch.cat([x, x])[: len(x)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ALL)
def test_the_memory_layout_does_not_matter(method: str, layout: str) -> None:
    x = images()
    laid_out = LAYOUTS[layout](x)
    assert torch.equal(laid_out, x)
    e = ALL[method](smooth())
    s, expected = e.attribute(laid_out, 1, return_solution=True), e.attribute(x, 1, return_solution=True)
    close(s.attribution, expected.attribution)
    close(s.envelope_gradient, expected.envelope_gradient)
    assert torch.equal(s.nnz, expected.nnz)


def test_a_broadcast_input() -> None:
    x = images(1).expand(3, -1, -1, -1)
    e = MoreauGrad(smooth(), solver=SHORT)
    assert torch.equal(e.attribute(x, 1), e.attribute(x.contiguous(), 1))


@pytest.mark.parametrize("method", ALL)
def test_one_number_per_input(method: str) -> None:
    """Inputs of rank 1."""
    x = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    settings: dict[str, Any] = {"groups": Labels(torch.tensor(0))} if method == "tiles" else {}
    s = ALL[method](lambda x: x.square(), **settings).attribute(x, return_solution=True)
    assert s.attribution.shape == (4,)
    assert torch.equal(s.sigma, torch.zeros(4, dtype=torch.float64))  # one feature has no range
    if method == "gradient":
        assert torch.equal(s.attribution, 2 * x)


def test_one_number_per_input_with_absolute_noise() -> None:
    x = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    s = MoreauGrad(lambda x: 2 * x, sigma=0.3, solver=SHORT).attribute(x, return_solution=True)
    close(s.attribution, torch.full((4,), 2.0, dtype=torch.float64))


def three_inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch).double(), torch.randn(batch, 5).double(), images(batch)


def of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return 2 * a + a.sin() + b.cos().sum(1) + c.tanh().flatten(1).sum(1)


@pytest.mark.parametrize("method", ALL)
def test_a_tuple_of_tensors(method: str) -> None:
    """Of different ranks; everything over features comes back as a tuple."""
    inputs = three_inputs()
    settings: dict[str, Any] = {"score": "logit"}
    if method == "tiles":
        settings["groups"] = (Labels(torch.tensor(0)), Labels(torch.tensor([0, 0, 1, 1, 1])), Pixels())
    s = ALL[method](of_three, **settings).attribute(inputs, return_solution=True)
    for name in ("attribution", "displacement", "envelope_gradient"):
        assert [t.shape for t in getattr(s, name)] == [x.shape for x in inputs]
    assert len(s.sigma) == 3
    assert s.eta.shape == (3,)
    assert torch.equal(s.nnz, sum((a != 0).reshape(3, -1).sum(1) for a in s.attribution))
    assert isinstance(ALL[method](of_three, **settings).attribute(inputs), tuple)


@pytest.mark.parametrize("method", ["moreau", "sparse"])
def test_a_tuple_of_a_sum_splits(method: str) -> None:
    """Without noise, f(a) + g(b) is explained as f and g are by themselves."""
    inputs = three_inputs()
    eta = {"eta": 0.3} if method == "sparse" else {}
    together = MOREAU[method](of_three, sigma=0.0, **eta).attribute(inputs)
    for i, x in enumerate(inputs):

        def alone(x: Tensor, i: int = i) -> Tensor:
            return of_three(
                *[x if j == i else torch.zeros_like(t)[:1].expand(len(x), *t.shape[1:]) for j, t in enumerate(inputs)]
            )

        close(together[i], MOREAU[method](alone, sigma=0.0, **eta).attribute(x))


def test_a_tuple_shares_eta_max_and_draws_its_own_noise() -> None:
    x = images()
    seen: list[tuple[Tensor, Tensor]] = []

    def model(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.detach().clone(), b.detach().clone()))
        return (3 * a + b).flatten(1).sum(1)

    s = SparseMoreauGrad(model, eta_ratio=0.5, sigma=0.1, solver=SHORT, max_batch=64).attribute(
        (x, x), return_solution=True
    )
    assert torch.equal(s.eta, torch.full((3,), 1.5, dtype=torch.float64))
    assert s.attribution[0].unique().tolist() == [1.5]
    assert s.attribution[1].unique().tolist() == [0.0]
    noisy = seen[1]  # the first pass is without noise
    assert (noisy[0] != noisy[1]).all()


def test_a_tuple_of_one_stays_a_tuple() -> None:
    x = images()
    e = MoreauGrad(smooth(), solver=SHORT)
    s = e.attribute((x,), 1, return_solution=True)
    assert isinstance(s.attribution, tuple)
    assert isinstance(s.sigma, tuple)
    assert torch.equal(s.attribution[0], e.attribute(x, 1))


@pytest.mark.parametrize("method", ["moreau", "sparse", "tiles"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float16, torch.float32)], ids=str)
def test_a_tuple_of_different_dtypes(method: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = tuple(images(dtype=d) for d in dtypes)

    def model(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b.double()).flatten(1).sum(1)

    s = MOREAU[method](model).attribute(inputs, return_solution=True)
    assert tuple(a.dtype for a in s.attribution) == dtypes


FROM_VARIANCE = ("standard_error", "p_value", "error")


def tensors_of(solution: Solution) -> list[Tensor]:
    """All fields; those that come from a variance last."""
    names = [f.name for f in fields(Solution) if f.name not in FROM_VARIANCE]
    late = [solution.standard_error, solution.p_value, *vars(solution.error).values()]
    return [*(getattr(solution, name) for name in names), *late]


def of_batch(solution: Solution, name: str) -> tuple[Any, ...]:
    value = getattr(solution, name)
    value = tuple(vars(value).values()) if name == "error" else value
    return tuple((v.dtype, v.device, v.shape[1:]) for v in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_empty_batch(method: str, dtype: torch.dtype) -> None:
    """Nothing comes back, in the form of something; the model is not called."""
    model = smooth(dtype)
    one = ALL[method](model).attribute(images(1, dtype), 1, return_solution=True)

    def never(x: Tensor) -> Tensor:
        raise AssertionError("called")

    none = ALL[method](never).attribute(images(0, dtype), 1, return_solution=True)
    assert none.attribution.shape == (0, 2, 5, 4)
    for f in fields(Solution):
        assert of_batch(none, f.name) == of_batch(one, f.name), f.name
    assert all(len(v) == 0 for v in tensors_of(none))
    pair = ALL[method](never, **({"groups": Pixels()} if method == "tiles" else {})).attribute((images(0), images(0)))
    assert [a.shape for a in pair] == [(0, 2, 5, 4)] * 2


# --- targets and scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        [2, 0, 3],
        torch.tensor([2, 0, 3]),
        torch.tensor([[2], [0], [3]]),
        np.array([2, 0, 3]),
        [(2,), (0,), (3,)],
        lambda output: output.gather(1, torch.tensor([2, 0, 3]).repeat_interleave(len(output) // 3)[:, None]),
    ],
    ids=["list", "tensor", "column", "numpy", "tuples", "callable"],
)
@pytest.mark.parametrize("method", MOREAU)
def test_targets_follow_the_noisy_copies(method: str, target: Any) -> None:
    model, x = smooth(), images()
    e = MOREAU[method](model)
    a = e.attribute(x, target)
    for i, c in enumerate([2, 0, 3]):
        close(a[i], e.attribute(x[i : i + 1], c, ids=torch.tensor([i]))[0])


def test_the_predicted_class_is_the_default_and_stays_fixed() -> None:
    """The class at x, even where noise would change it."""
    model, x = smooth(), images()
    e = MoreauGrad(model, sigma=5.0, solver=SHORT)
    assert torch.equal(e.attribute(x), e.attribute(x, model(x).argmax(1)))


@pytest.mark.parametrize("score", ["logit", "log_prob", "prob", "margin"])
def test_scores_against_autograd(score: Any) -> None:
    model, x, target = smooth(), images(), torch.tensor([2, 0, 3])
    one_step = ProximalGradient(1, 1, 1.0, average_last=1)
    s = MoreauGrad(model, sigma=0.0, score=score, solver=one_step).attribute(x, target, return_solution=True)

    leaf = x.clone().requires_grad_()
    output = model(leaf)
    chosen = output.gather(1, target[:, None]).squeeze(1)
    value = {
        "logit": chosen,
        "prob": output.softmax(1).gather(1, target[:, None]).squeeze(1),
        "log_prob": chosen - output.logsumexp(1),
        "margin": chosen
        - torch.stack([torch.cat([o[:t], o[t + 1 :]]).max() for o, t in zip(output, target, strict=True)]),
    }[score]
    close(s.attribution, torch.autograd.grad(value.sum(), leaf)[0])
    close(s.score, value.detach())


def test_a_segmentation_output() -> None:
    """Higher-rank outputs: one tuple for all, a tuple per input, or a callable."""
    model, x = nn.Conv2d(2, CLASSES, 3, padding=1).double().eval(), images()
    e = MoreauGrad(model, solver=SHORT)
    a = e.attribute(x, (1, 2, 3))
    assert torch.equal(a, e.attribute(x, [(1, 2, 3)] * 3))
    assert torch.equal(a, e.attribute(x, lambda o: o[:, 1, 2, 3]))
    outside = torch.ones_like(x, dtype=torch.bool)
    outside[:, :, 1:4, 2:] = False  # beyond the 3x3 window around position (2, 3)
    assert (a[outside] == 0).all()
    assert (a[~outside] != 0).all()


def test_arguments_per_input_are_repeated_and_others_passed_on() -> None:
    x, gain = images(), torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    seen: list[tuple[Any, ...]] = []

    def model(x: Tensor, gain: Tensor, shared: Tensor, word: str, nothing: None) -> Tensor:
        seen.append((gain, shared, word, nothing))
        return gain * (x * shared).flatten(1).sum(1)

    shared = torch.randn(2, 5, 4, dtype=torch.float64)
    e = MoreauGrad(model, solver=SHORT, max_batch=6)
    a = e.attribute(x, additional_forward_args=(gain, shared, "word", None))
    close(a, gain.view(3, 1, 1, 1) * shared)
    assert all(len(g) <= 6 and torch.equal(s, shared) and (w, n) == ("word", None) for g, s, w, n in seen)


# --- what a result must not depend on --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in ALL if m != "gradient"])
def test_a_split_batch_gives_the_same_maps(method: str) -> None:
    x, ids = images(5), torch.tensor([7, 0, -3, 1 << 40, 12])
    e = ALL[method](smooth(), seed=3)
    whole = e.attribute(x, 1, ids=ids)
    parts = torch.cat([e.attribute(x[:2], 1, ids=ids[:2]), e.attribute(x[2:], 1, ids=ids[2:])])
    close(parts, whole)
    order = torch.tensor([3, 1, 4, 0, 2])
    close(e.attribute(x[order], 1, ids=ids[order]), whole[order])


@pytest.mark.parametrize("method", [m for m in ALL if m != "gradient"])
def test_ids_name_the_noise(method: str) -> None:
    """Positions by default; equal inputs with equal ids get equal maps, with others they do not."""
    x = images(1).expand(3, -1, -1, -1).clone()
    e = ALL[method](smooth())
    assert torch.equal(e.attribute(x, 1), e.attribute(x, 1, ids=torch.arange(3)))
    a = e.attribute(x, 1, ids=torch.tensor([5, 6, 5]))
    close(a[0], a[2])
    assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("method", ALL)
def test_one_id_gives_all_inputs_one_noise(method: str) -> None:
    x = images(1).expand(3, -1, -1, -1).clone()
    e = ALL[method](smooth())
    found = e.attribute(x, 1, ids=7, return_solution=True)
    close(found.attribution[:2], found.attribution[1:])
    assert found.ids.tolist() == [7, 7, 7]
    assert torch.equal(found.attribution, e.attribute(x, 1, ids=torch.full((3,), 7)))


@given(
    method=st.sampled_from([m for m in ALL if m != "gradient"]),
    batch=st.integers(1, 4),
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    first=st.integers(-(1 << 62), 1 << 62),
    max_batch=st.sampled_from([None, 1, 3, 7, 64]),
    noise=st.sampled_from(["fresh", "fixed"]),
    antithetic=st.booleans(),
    samples=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_map_is_its_inputs_own(
    method: str,
    batch: int,
    seed: int,
    first: int,
    max_batch: int | None,
    noise: Any,
    antithetic: bool,
    samples: int,
    data: Any,
) -> None:
    """f(batch)[i] == f(batch[i:i+1]) to rounding, whatever the rest of the batch and the chunks."""
    i = data.draw(st.integers(0, batch - 1))
    generator = torch.Generator().manual_seed(seed % 1000)
    x = torch.randn(batch, 2, 5, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(40, 6, dtype=torch.float64, generator=generator) / 6

    def model(x: Tensor) -> Tensor:
        return nn.functional.softplus(x.flatten(1) @ weight)

    own: dict[str, Any] = {"seed": seed}
    if method in MOREAU:
        own["solver"] = ProximalGradient(samples, 5, 0.5, noise=noise, antithetic=antithetic, average_last=2, tol=0.0)
    ids = first + torch.arange(batch)
    whole = ALL[method](model, max_batch=max_batch, **own).attribute(x, 2, ids=ids, return_solution=True)
    alone = ALL[method](model, **own).attribute(x[i : i + 1], 2, ids=ids[i : i + 1], return_solution=True)
    exact = len(fields(Solution)) - len(FROM_VARIANCE)
    for k, (of_whole, expected) in enumerate(zip(tensors_of(whole), tensors_of(alone), strict=True)):
        got = of_whole[i : i + 1]
        if got.is_floating_point():
            # A variance is the difference of two sums: of the root of one that is 0, √ε of a gradient is left.
            rtol, atol = (1e-10, 1e-12) if k < exact else (1e-5, 1e-7)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_batch", [1, 3, 4, 5, 11, 12, 40])
@pytest.mark.parametrize("method", ALL)
def test_max_batch_caps_the_passes_and_nothing_else(method: str, max_batch: int, dtype: torch.dtype) -> None:
    """Below B, below m, odd with antithetic pairs, and larger than everything: 5 inputs with 4 samples each."""
    model, x = Recorder(smooth(dtype)), images(5, dtype)
    s = ALL[method](model, max_batch=max_batch).attribute(x, 1, return_solution=True)
    assert max(model.rows) <= max_batch
    assert sum(model.rows) == int(s.gradient_evaluations.sum()) + 5  # every gradient counts; 5 scores without one
    expected = ALL[method](model, max_batch=None).attribute(x, 1, return_solution=True)
    close(s.attribution, expected.attribution)
    torch.testing.assert_close(s.envelope, expected.envelope, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("method", ALL)
def test_the_same_bits_each_run(method: str) -> None:
    model, x = cnn(torch.float32), images(dtype=torch.float32)
    first = ALL[method](model).attribute(x, 1)
    torch.manual_seed(99)
    assert torch.equal(first, ALL[method](model).attribute(x, 1))
    if method != "gradient":
        assert not torch.equal(first, ALL[method](model, seed=1).attribute(x, 1))
        assert torch.equal(
            ALL[method](model, seed=np.int64(1)).attribute(x, 1), ALL[method](model, seed=1).attribute(x, 1)
        )


@pytest.mark.parametrize("method", MOREAU)
def test_the_same_bits_for_any_number_of_threads(method: str) -> None:
    """With a model whose own passes do not depend on it (elementwise), on enough work to open a parallel region."""
    x = torch.randn(2, 3, 150, 150)
    weight = torch.randn(1, 3, 150, 150)

    def model(x: Tensor) -> Tensor:
        return (x * weight).tanh().flatten(1).mean(1)

    settings: dict[str, Any] = {"groups": Tiles(7)} if method == "tiles" else {}
    e = MOREAU[method](model, solver=ProximalGradient(4, 3, 0.5, average_last=2), **settings)
    threads, maps = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            maps.append(e.attribute(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


# --- settings ------------------------------------------------------------------------------------------------------


def test_noise_level_is_a_fraction_of_each_inputs_range() -> None:
    x = images()
    x[1] = 0.7  # constant: no range, no noise
    x[2] *= 10
    model = Recorder(smooth())
    s = MoreauGrad(model, noise_level=0.2, solver=SHORT, max_batch=64).attribute(x, 1, return_solution=True)
    flat = x.flatten(1)
    close(s.sigma, 0.2 * (flat.amax(1) - flat.amin(1)))
    copies = model.seen[1].view(3, 4, 2, 5, 4)
    assert torch.equal(copies[1], x[1].expand(4, -1, -1, -1))
    assert (copies[0] != x[0]).all()
    default = MoreauGrad(model, solver=SHORT).attribute(x, 1, return_solution=True)
    close(default.sigma, s.sigma / 4)


def test_noise_is_scaled_by_sigma() -> None:
    x, model = images(), Recorder(smooth())
    MoreauGrad(model, sigma=0.25, solver=SHORT, max_batch=64).attribute(x, 1)
    MoreauGrad(model, sigma=torch.tensor([0.5, 1.0, 0.0]), solver=SHORT, max_batch=64).attribute(x, 1)
    per_call = 1 + SHORT.max_steps
    one, two = (model.seen[1 + k * per_call].view(3, 4, 2, 5, 4) - x[:, None] for k in (0, 1))
    close(two[0], 2 * one[0])
    close(two[1], 4 * one[1])
    assert (two[2] == 0).all()
    assert 0.15 < one.std() < 0.35


# Exact in float32, which a tensor of Python's numbers is.
PER_INPUT = {
    "rho": [2.0, 0.75, 0.5],
    "sigma": [0.5, 0.0, 0.125],
    "noise_level": [0.5, 0.0, 0.125],
    "eta": [2**-8, 2**-9, 0.0],
    "eta_ratio": [0.5, 0.25, 0.0],
}


@pytest.mark.parametrize("method", MOREAU)
@pytest.mark.parametrize("form", [torch.tensor, np.array, list], ids=["tensor", "numpy", "list"])
def test_settings_per_input(method: str, form: Callable[[list[float]], Any]) -> None:
    x, model = images(), smooth()
    for setting, values in PER_INPUT.items():
        if method == "moreau" and setting.startswith("eta"):
            continue
        s = MOREAU[method](model, **{setting: form(values)}).attribute(x, 1, return_solution=True)
        for i, value in enumerate(values):
            e = MOREAU[method](model, **{setting: value})
            alone = e.attribute(x[i : i + 1], 1, ids=torch.tensor([i]), return_solution=True)
            for name in ("attribution", "displacement", "envelope", "residual", "sigma", "eta"):
                close(getattr(s, name)[i], getattr(alone, name)[0])


@pytest.mark.parametrize("form", [float, lambda v: [v] * 3, lambda v: np.full(3, v)], ids=["float", "list", "numpy"])
def test_settings_keep_float64(form: Callable[[float], Any]) -> None:
    """A setting of float64 inputs is not rounded to float32 on its way."""
    x, a = images(), images(1)
    e = SparseMoreauGrad(
        lambda x: (x * a).flatten(1).sum(1), rho=form(0.7), sigma=form(0.1), eta=form(0.3), solver=SHORT
    )
    s = e.attribute(x, return_solution=True)
    assert (s.eta == 0.3).all()
    assert (s.sigma == 0.1).all()
    close(s.displacement, -0.7 * s.attribution)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rows", [1, 3])
def test_eta_per_feature(rows: int, layout: str) -> None:
    """On a linear score: A = S_η(a) with each feature's own η; 0 leaves a feature alone."""
    a, x = images(1), images(3)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    eta = torch.rand(rows, 2, 5, 4, dtype=torch.float64)
    eta[:, 0, 0] = 0
    solver = ProximalGradient(3, 200, 0.5, average_last=1, tol=1e-3)
    e = SparseMoreauGrad(lambda x: (x * a).flatten(1).sum(1), eta=eta, rho=torch.tensor([0.5, 1.0, 5.0]), solver=solver)
    s = e.attribute(x, return_solution=True)
    close(s.attribution, (a.sign() * (a.abs() - eta).clamp(min=0)).expand(3, -1, -1, -1))
    assert torch.equal(s.eta, eta.expand(3, -1, -1, -1))
    assert s.converged.all()
    assert s.steps.unique().numel() > 1  # so that stopped inputs left the batch
    chunked = SparseMoreauGrad(e.model, eta=eta, rho=e.rho, solver=solver, max_batch=2).attribute(x)
    close(chunked, s.attribution)


def test_eta_zero_is_the_plain_map() -> None:
    x, model = images(), smooth()
    plain = MoreauGrad(model, solver=SHORT).attribute(x, 1)
    assert torch.equal(SparseMoreauGrad(model, eta=0.0, solver=SHORT).attribute(x, 1), plain)
    assert torch.equal(GroupSparseMoreauGrad(model, eta=0.0, solver=SHORT).attribute(x, 1), plain)


@pytest.mark.parametrize("method", ["sparse", "tiles", "st_smoothgrad"])
def test_a_ratio_of_one_is_zero_and_says_so_once(method: str) -> None:
    x = images()
    e = ALL[method](smooth(), eta_ratio=torch.tensor([0.2, 1.0, 3.0]))
    with pytest.warns(UserWarning, match=r"2 of 3 maps are zero everywhere.*Solution.empty says which") as record:
        s = e.attribute(x, 1, return_solution=True)
    assert len(others(record)) == 1
    assert record[0].filename == __file__
    assert s.empty.tolist() == [False, True, True]
    assert torch.equal(s.attribution[1:], torch.zeros_like(x[1:]))
    assert s.nnz[1:].tolist() == [0, 0]
    assert (s.envelope_gradient[1:] != 0).any()
    assert torch.isfinite(s.eta).all()


def test_the_fields_of_a_solution() -> None:
    x, model, rho = images(), smooth(), torch.tensor([0.5, 1.0, 2.0])
    s = SparseMoreauGrad(model, rho=rho, eta_ratio=0.3, solver=SHORT).attribute(x, 1, return_solution=True)
    close(s.displacement, -rho.view(3, 1, 1, 1).double() * s.attribution)
    close(s.score, model(x)[:, 1].detach())
    close(
        s.attribution, s.envelope_gradient - s.envelope_gradient.clamp(-s.eta.view(3, 1, 1, 1), s.eta.view(3, 1, 1, 1))
    )
    assert torch.equal(s.nnz, (s.attribution != 0).flatten(1).sum(1))
    assert s.steps.tolist() == [6] * 3
    assert s.gradient_evaluations.tolist() == [24] * 3
    assert not s.converged.any()  # tol = 0
    per_input = ("envelope", "score", "residual", "relative_residual", "steps", "gradient_evaluations", "converged",
                 "nnz", "empty", "eta", "sigma")  # fmt: skip
    assert all(getattr(s, name).shape == (3,) for name in per_input)
    assert (s.residual > 0).all()
    assert not any(t.requires_grad for t in tensors_of(s))


def test_maps_do_not_share_memory_with_the_input() -> None:
    x = images()
    for batch in (x, x[:0]):
        a = MoreauGrad(smooth(), solver=SHORT).attribute(batch, 1)
        assert a.data_ptr() != batch.data_ptr() or a.numel() == 0


# --- early stopping ------------------------------------------------------------------------------------------------

# A linear score contracts by 1 − γ/ρ a step: 0.5, 0.95, 0.995.
STAGES = torch.tensor([0.2, 20.0, 2.0])
STOPPING = ProximalGradient(num_samples=2, max_steps=200, step_size=0.1, average_last=1, tol=1e-2)


@pytest.mark.parametrize("method", MOREAU)
def test_inputs_stop_by_themselves(method: str) -> None:
    x, a = images(), images(1)
    model = Recorder(lambda x: (x * a).flatten(1).sum(1))
    eta: dict[str, Any] = {} if method == "moreau" else {"eta_ratio": 0.5}
    s = MOREAU[method](model, rho=STAGES, solver=STOPPING, max_batch=64, **eta).attribute(x, return_solution=True)
    assert s.steps[0] == 10
    assert 80 <= s.steps[2] <= 110
    assert s.steps[1] == 200
    assert s.converged.tolist() == [True, False, True]
    assert torch.equal(s.converged, s.relative_residual <= STOPPING.tol)
    # A look confirms each answer: as many gradients as its steps took, in blocks of 8, 128 at most.
    looked = torch.where(s.converged, (2 * s.steps // 8 * 8).clamp(16, 128), 0)
    assert torch.equal(s.gradient_evaluations, 2 * s.steps + looked)
    assert sum(model.rows) == 3 + int(s.gradient_evaluations.sum())  # who stopped costs nothing


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
@pytest.mark.parametrize("max_batch", [None, 3, 1])
@pytest.mark.parametrize("method", MOREAU)
def test_stopping_early_is_solving_alone(method: str, max_batch: int | None, noise: Any) -> None:
    """Inputs that go on when others leave keep their noise, groups, strengths and averages."""
    x, model = images(), smooth()
    rho = torch.tensor([0.15, 4.0, 0.5])
    solver = ProximalGradient(4, 40, 0.1, noise=noise, average_last=15, tol=0.02)
    own: dict[str, Any] = {"groups": Labels(torch.randint(0, 6, (3, 1, 5, 4)))} if method == "tiles" else {}
    targets = [2, 0, 3]
    e = MOREAU[method](model, rho=rho, solver=solver, max_batch=max_batch, sigma=0.05, **own)
    s = e.attribute(x, targets, return_solution=True)
    assert s.steps.unique().numel() > 1
    for i in range(3):
        if own:
            own = {"groups": Labels(e.groups.map[i : i + 1])}
        one = MOREAU[method](model, rho=float(rho[i]), solver=solver, sigma=0.05, **own)
        alone = one.attribute(x[i : i + 1], targets[i], ids=torch.tensor([i]), return_solution=True)
        assert alone.steps.item() == s.steps[i]
        assert alone.converged.item() == s.converged[i]
        torch.testing.assert_close(s.attribution[i], alone.attribution[0], rtol=2e-7, atol=1e-12)  # rho is float32's
        torch.testing.assert_close(s.envelope[i], alone.envelope[0], rtol=2e-7, atol=1e-12)


def test_a_flat_score_is_solved_and_empty() -> None:
    with pytest.warns(UserWarning, match="3 of 3 maps are zero everywhere"):
        s = MoreauGrad(lambda x: (x - 100).relu().flatten(1).sum(1)).attribute(images(), return_solution=True)
    assert s.converged.all()
    assert (s.relative_residual == 0).all()
    assert (s.steps == 28).all()  # the burn-in and one level


def test_not_converged_is_said() -> None:
    """A solver that is cut short does not claim success."""
    solver = ProximalGradient(2, 3, 0.1, average_last=1, tol=1e-3)
    s = MoreauGrad(smooth(), solver=solver).attribute(images(), 1, return_solution=True)
    assert not s.converged.any()
    assert (s.relative_residual > 1e-3).all()


# --- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    """The model runs in its own dtype; state, sums and everything reported is float32 or better."""
    model = smooth(dtype)
    x = images(dtype=dtype)
    recorder = Recorder(model)
    s = ALL[method](recorder).attribute(x, 1, return_solution=True)
    assert all(seen.dtype == dtype for seen in recorder.seen)
    assert s.attribution.dtype == dtype
    assert s.displacement.dtype == s.envelope_gradient.dtype == s.eta.dtype == s.sigma.dtype == torch.float32
    assert s.envelope.dtype == s.residual.dtype == torch.float64
    if method == "sparsified_smoothgrad":
        return  # ranks entries, so that a rounding may exchange two
    full = ALL[method](smooth_of(model, torch.float32)).attribute(x.float(), 1, return_solution=True)
    t = 16 * torch.finfo(dtype).eps * float(full.envelope_gradient.abs().max())  # 16 roundings of the largest entry
    torch.testing.assert_close(s.attribution.float(), full.attribution, rtol=0, atol=t)


def smooth_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    copy = smooth(dtype)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("method", ALL)
def test_autocast(method: str) -> None:
    """The caller's autocast does not count, ``precision`` does, and the autocast state stays."""
    model, x = smooth(torch.float32), images(dtype=torch.float32)
    full = ALL[method](model).attribute(x, 1, return_solution=True)
    used: list[torch.dtype] = []
    handle = model[1].register_forward_hook(lambda module, args, output: used.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = ALL[method](model).attribute(x, 1, return_solution=True)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    handle.remove()
    assert set(used) == {torch.float32}
    assert s.attribution.dtype == s.displacement.dtype == torch.float32
    assert torch.equal(s.attribution, full.attribution)


def test_overflow_in_half_precision_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, CLASSES)).half().eval()
    with torch.no_grad():
        model[1].weight.fill_(60000)
    x = images(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"not finite.*overflow in half precision"):
        MoreauGrad(lambda x: model(x) * 4, solver=SHORT).attribute(x, 1)


# --- gradient modes --------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ALL)
def test_gradient_modes(method: str, mode: str) -> None:
    """The same map under each, from inputs, models and arguments that were made there, of frozen parameters."""
    model, x = cnn(), images()
    gain = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    offset = torch.randn(CLASSES, dtype=torch.float64)

    def scaled(net: nn.Module) -> nn.Module:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
                return (self.net(x) * offset).sin() * gain[:, None]

        return Scaled().eval()

    expected = ALL[method](scaled(model)).attribute(x, 1, (gain, offset))
    with MODES[mode]():
        made_here = cnn()
        made_here.load_state_dict(model.state_dict())
        for p in made_here.parameters():
            p.requires_grad_(False)
        e = ALL[method](scaled(made_here))
        a = e.attribute(x * 1, 1, (gain * 1, offset * 1))
        assert torch.is_grad_enabled() == (mode == "grad")
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
    close(a, expected)
    close(e.attribute(x, 1, (gain, offset)), expected)  # and a model made under inference_mode, outside of it
    assert not a.is_inference()


def test_inputs_that_require_grad() -> None:
    x = images().requires_grad_()
    y = x * 2  # no leaf
    e = MoreauGrad(smooth(), solver=SHORT)
    assert torch.equal(e.attribute(y, 1), e.attribute(y.detach(), 1))
    assert not e.attribute(x, 1).requires_grad
    assert x.grad is None
    assert x.requires_grad
    assert e.attribute(nn.Parameter(x.detach()), 1).shape == x.shape


# --- left as found ---------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "flags": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, name)) for m in model.modules() for name in hooks],
        "tensors": {k: (id(t), t.requires_grad, t.grad is None, t._version) for k, t in tensors.items()},
        "values": {k: t.detach().clone() for k, t in tensors.items()},
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def surroundings() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002  the legacy generator is the one that must not move
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "values":
            assert all(torch.equal(v, after[key][k]) for k, v in value.items())
        else:
            assert value == after[key], key


class Failing(nn.Module):
    """Raises in the middle of an explanation."""

    def __init__(self, net: nn.Module, error: BaseException | None, after: int) -> None:
        super().__init__()
        self.net, self.error, self.after = net, error, after

    def forward(self, x: Tensor) -> Tensor:
        self.after -= 1
        if self.after < 0 and self.error is not None:
            raise self.error
        return self.net(x)


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("mode", ["grad", "no_grad", "autocast"])
@pytest.mark.parametrize("training", ["train", "eval", "mixed"])
@pytest.mark.parametrize("outcome", ["success", "error", "interrupt", "error at once"])
@pytest.mark.parametrize("method", ALL)
def test_everything_is_left_as_it_was_found(method: str, outcome: str, training: str, mode: str) -> None:
    net = cnn(torch.float32)
    net.train(training == "train")
    if training == "mixed":
        net[1].train()
    next(net.parameters()).requires_grad_(False)
    seen: list[int] = []
    net.register_forward_hook(lambda *args: seen.append(1))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    error = {"success": None, "interrupt": KeyboardInterrupt()}.get(outcome, RuntimeError("from the model"))
    model = Failing(net, error, 0 if outcome == "error at once" else 1 if method in ALL.keys() - MOREAU.keys() else 3)
    x = images(dtype=torch.float32).requires_grad_()
    values = x.detach().clone()
    e = ALL[method](model)

    context = {"grad": torch.enable_grad(), "no_grad": torch.no_grad(), "autocast": torch.autocast("cpu")}[mode]
    with context:
        before, around = state_of(model), surroundings()
        settings_before = dict(vars(e))
        if error is None:
            e.attribute(x, 1)
        else:
            with pytest.raises(type(error)) as caught:
                e.attribute(x, 1)
            assert caught.value is error  # the model's own
        same(around, surroundings())
        same(before, state_of(model))
    assert vars(e) == settings_before
    assert x.requires_grad
    assert x.grad is None
    assert x._version == 0
    assert torch.equal(x, values)
    assert bool(seen) == (outcome != "error at once")  # the user's own hooks run


def test_train_mode_is_said_once_and_explained_in_eval_mode() -> None:
    model, x = cnn(), images()
    expected = MoreauGrad(model, solver=SHORT).attribute(x, 1)
    model.train()
    with pytest.warns(UserWarning, match="the model is in train mode: it is explained in eval mode") as record:
        a = MoreauGrad(model, solver=SHORT).attribute(x, 1)
    assert len(others(record)) == 1
    assert record[0].filename == __file__
    assert torch.equal(a, expected)
    assert all(m.training for m in model.modules())


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("method", MOREAU)
def test_threads_may_share_an_explainer(method: str) -> None:
    """And a model in train mode: the maps of one thread, and the flags come back."""
    model = cnn()
    batches = [images(2) for _ in range(6)]
    e = MOREAU[method](model)
    expected = [e.attribute(x, 1) for x in batches]
    model.train()
    before = state_of(model)
    results: dict[int, Tensor] = {}

    def work(mine: list[int]) -> None:
        for i in mine:
            results[i] = e.attribute(batches[i], 1)

    in_threads(work, [0, 2, 4], [1, 3, 5])
    assert sorted(results) == list(range(6))
    for i, x in enumerate(expected):
        assert torch.equal(results[i], x)
    same(before, state_of(model))


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_passes_leave_nothing_behind(method: str) -> None:
    """No pass's input survives to the next one, so 300 steps hold what 3 hold; nothing survives the call."""
    net = smooth()
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def model(x: Tensor) -> Tensor:
        alive.append(sum(r() is not None for r in refs))
        refs.append(weakref.ref(x))
        return net(x)

    settings: dict[str, Any] = {"max_batch": 3}
    if method in MOREAU:
        settings["solver"] = ProximalGradient(2, 60, 0.1, average_last=50, tol=0.0)
    e = ALL[method](model, **settings)
    x = images()
    gc.collect()
    gc.disable()  # reference counts must do it alone
    try:
        for _ in range(3):
            e.attribute(x, 1)
        assert max(alive) <= 1
        assert all(r() is None for r in refs)
    finally:
        gc.enable()


def test_a_kept_graph_would_be_seen() -> None:
    """The instrument of the test above: a score that keeps its graph keeps the input alive."""
    net, x = smooth(), images().requires_grad_()
    ref = weakref.ref(x)
    score = net(x).sum()
    del x
    assert ref() is not None
    del score
    assert ref() is None


def test_many_steps_hold_no_more_memory_than_few() -> None:
    """300 steps whose graphs hold 4 MiB each: kept, they would be 1.2 GiB."""
    resource = pytest.importorskip("resource", reason="reads the peak of memory, on Unix alone")
    x = torch.randn(1, 1 << 17)

    def peak(steps: int) -> float:
        solver = ProximalGradient(2, steps, 0.1, average_last=100, tol=0.0)
        MoreauGrad(lambda x: x.tanh().square().sum(1), solver=solver).attribute(x)
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    unit = 1024 if resource.getpagesize() and __import__("sys").platform != "darwin" else 1
    few = peak(3)
    assert (peak(300) - few) * unit < 100 * 2**20


# --- models that make trouble ----------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(1).mul_(2)
        return nn.functional.relu_(self.linear(y.flatten(1))) * 3


@pytest.mark.parametrize("method", ALL)
def test_in_place_operations(method: str) -> None:
    model, x = InPlace().double().eval(), images()

    def out_of_place(x: Tensor) -> Tensor:
        return torch.relu(model.linear((x.clone() + 1).mul(2).flatten(1))) * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # relu may be off everywhere
        assert torch.equal(ALL[method](model).attribute(x, 1), ALL[method](out_of_place).attribute(x, 1))


@pytest.mark.parametrize("method", ALL)
def test_a_nan_gradient_names_the_input(method: str) -> None:
    x = images(4)
    x[2, 0, 0, 0] = -50.0  # so that its square root is NaN, noise or not
    x[:, 0, 0, 0] += 25.0

    def model(x: Tensor) -> Tensor:
        return x[:, 0, 0, 0].sqrt() + x.flatten(1).sum(1)

    e = ALL[method](model, **({} if method == "gradient" else {"sigma": 0.01}))
    with pytest.raises(ValueError, match=r"model: the gradient or the score for input id 13 is not finite"):
        e.attribute(x, ids=torch.tensor([11, 12, 13, 14]))


def test_a_nan_gradient_late_in_the_loop() -> None:
    """The square root is fine at x, and not where the displacement goes."""
    x = torch.tensor([[1.0, 2.0], [1e6, 1e6]], dtype=torch.float64)
    solver = ProximalGradient(2, 30, 1.0, average_last=5)
    with pytest.raises(ValueError, match=r"input id 0 is not finite \(seen at step 10\).*a square root"):
        MoreauGrad(lambda x: 10 * x.sqrt().sum(1), sigma=0.0, rho=5.0, solver=solver).attribute(x)


def test_a_step_that_explodes_is_named() -> None:
    solver = ProximalGradient(2, 300, 1.9)
    with pytest.raises(ValueError, match=r"not finite .* a step_size too large for this rho"):
        MoreauGrad(lambda x: 50 * x.square().sum(1), solver=solver).attribute(torch.ones(1, 3))


@pytest.mark.parametrize("method", ALL)
def test_a_score_that_ignores_its_input(method: str) -> None:
    x, linear = images(), nn.Linear(2, CLASSES)

    def model(x: Tensor) -> Tensor:
        return linear(torch.ones(len(x), 2))

    with pytest.raises(ValueError, match=r"model: the score does not depend on inputs\. Likely causes"):
        ALL[method](model).attribute(x, 1)
    with pytest.warns(UserWarning, match="3 of 3 maps are zero everywhere"):
        s = ALL[method](model, unused_inputs="zero").attribute(x, 1, return_solution=True)
    assert torch.equal(s.attribution, torch.zeros_like(x))
    assert s.empty.all()


def test_one_ignored_tensor_of_a_tuple() -> None:
    x = images()
    e = MoreauGrad(lambda a, b: a.flatten(1).sum(1), solver=SHORT, unused_inputs="zero")
    a, b = e.attribute((x, x))
    assert (a != 0).all()
    assert (b == 0).all()


# --- bad settings ----------------------------------------------------------------------------------------------------

SETTINGS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (MoreauGrad, {"rho": 0}, ValueError, r"rho: expected a positive finite number, got 0"),
    (MoreauGrad, {"rho": -1.0}, ValueError, r"rho: expected a positive finite number, got -1.0"),
    (MoreauGrad, {"rho": float("nan")}, ValueError, r"rho: expected a positive finite number, got nan"),
    (MoreauGrad, {"rho": float("inf")}, ValueError, r"rho: expected a positive finite number, got inf"),
    (MoreauGrad, {"rho": torch.tensor([1.0, 0.0])}, ValueError, r"rho: expected a positive finite number, got tensor"),
    (MoreauGrad, {"rho": "1"}, TypeError, r"rho: expected a number, got '1'"),
    (MoreauGrad, {"rho": [1.0, None]}, TypeError, r"rho: expected a number, got \[1.0, None\]"),
    (MoreauGrad, {"rho": 1j}, TypeError, r"rho: expected a number, got 1j"),
    (
        MoreauGrad,
        {"rho": 0.05, "solver": ProximalGradient()},
        ValueError,
        r"step_size: 0.1 diverges for rho = 0.05; expected less than 2·rho",
    ),
    (MoreauGrad, {"sigma": -0.1}, ValueError, r"sigma: expected a non-negative finite number, got -0.1"),
    (MoreauGrad, {"noise_level": -0.1}, ValueError, r"noise_level: expected a non-negative finite number, got -0.1"),
    (MoreauGrad, {"sigma": 0.1, "noise_level": 0.1}, ValueError, r"give noise_level .* or sigma .*, not both"),
    (MoreauGrad, {"seed": 1.0}, TypeError, r"seed: expected an integer, got 1.0"),
    (MoreauGrad, {"seed": None}, TypeError, r"seed: expected an integer, got None"),
    (MoreauGrad, {"solver": 100}, TypeError, r"solver: expected a ProximalGradient, .*got 100"),
    (MoreauGrad, {"max_batch": 0}, ValueError, r"max_batch: expected a positive integer, got 0"),
    (MoreauGrad, {"max_batch": 2.5}, ValueError, r"max_batch: expected a positive integer, got 2.5"),
    (MoreauGrad, {"score": "logits"}, ValueError, r"score: expected one of logit, .*, got 'logits'"),
    (MoreauGrad, {"unused_inputs": "ignore"}, ValueError, r"unused_inputs: expected 'raise' or 'zero', got 'ignore'"),
    (SparseMoreauGrad, {"eta": -1}, ValueError, r"eta: expected a non-negative finite number, got -1"),
    (SparseMoreauGrad, {"eta_ratio": -0.5}, ValueError, r"eta_ratio: expected a non-negative finite number, got -0.5"),
    (SparseMoreauGrad, {"eta": 0.1, "eta_ratio": 0.1}, ValueError, r"give one of eta .*, eta_ratio .* and support"),
    (GroupSparseMoreauGrad, {"eta": float("nan")}, ValueError, r"eta: expected a non-negative finite number, got nan"),
    (GroupSparseMoreauGrad, {"groups": 4}, TypeError, r"groups: expected Pixels, Tiles, Labels or a tuple .*, got 4"),
    (GroupSparseMoreauGrad, {"groups": ()}, TypeError, r"groups: expected Pixels, Tiles, Labels or a tuple"),
    (GroupSparseMoreauGrad, {"groups": Tiles}, TypeError, r"groups: expected Pixels, Tiles, Labels or a tuple"),
]


@pytest.mark.parametrize(("make", "bad", "error", "message"), SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings(make: Any, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(smooth(), **bad)


def test_a_model_is_called() -> None:
    with pytest.raises(TypeError, match="model: expected a callable, got NoneType"):
        MoreauGrad(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": torch.ones(2)}, r"rho: expected a number or one per input, \[3\], got shape \(2,\)"),
        (
            {"sigma": torch.ones(4)},
            r"sigma: expected a number or one per input, \[3\], got shape \(4,\)",
        ),
        ({"noise_level": torch.ones(3, 1)}, r"noise_level: expected a number or one per input, \[3\], got .*\(3, 1\)"),
        ({"eta": torch.ones(4)}, r"eta: expected a number or one per input, \[3\], got shape \(4,\)"),
        ({"eta": torch.ones(2, 2, 5, 4)}, r"eta: expected .* one per feature \(1, 2, 5, 4\) or \(3, 2, 5, 4\), got"),
        ({"eta": torch.ones(2, 5, 4)}, r"eta: expected .* one per feature \(1, 2, 5, 4\) or \(3, 2, 5, 4\), got"),
        ({"eta_ratio": torch.ones(3, 2, 5, 4)}, r"eta_ratio: expected a number or one per input, \[3\], got"),
    ],
)
def test_settings_that_do_not_fit_the_batch(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMoreauGrad(smooth(), solver=SHORT, **settings).attribute(images(), 1)


@pytest.mark.parametrize(
    ("groups", "shape", "message"),
    [
        (Pixels(), (3, 7), r"Pixels needs a channel axis .* got an input of shape \(3, 7\)"),
        (Tiles(2), (3, 7), r"Tiles needs a channel axis .* got an input of shape \(3, 7\)"),
        (Tiles((2, 2, 2)), (3, 2, 5, 4), r"Tiles: size \(2, 2, 2\) has 3 entries, \(3, 2, 5, 4\) has 2 position axes"),
        (Labels(torch.arange(6)), (3, 7), r"Labels: a map of shape \(6,\) does not fit inputs of shape \(3, 7\)"),
        (Labels(torch.zeros(2, 7).long()), (3, 7), r"Labels: a map of shape \(2, 7\) does not fit"),
        ((Pixels(), Pixels()), (3, 2, 5, 4), r"groups: expected one per input tensor, 1, got 2"),
    ],
)
def test_groups_that_do_not_fit(groups: Any, shape: tuple[int, ...], message: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    e = GroupSparseMoreauGrad(lambda x: x.flatten(1).sum(1), groups=groups, solver=SHORT)
    with pytest.raises(ValueError, match=message):
        e.attribute(x)


def test_eta_per_feature_is_for_one_tensor() -> None:
    x = images()
    e = SparseMoreauGrad(lambda a, b: (a + b).flatten(1).sum(1), eta=torch.ones_like(x), solver=SHORT)
    with pytest.raises(ValueError, match="eta: one per feature is for a single input tensor, not for a tuple"):
        e.attribute((x, x))
    group = GroupSparseMoreauGrad(smooth(), eta=torch.ones_like(x), solver=SHORT)
    with pytest.raises(ValueError, match=r"eta: expected a number or one per input, \[3\], got shape \(3, 2, 5, 4\)"):
        group.attribute(x, 1)


# --- bad inputs ------------------------------------------------------------------------------------------------------


def spoiled(value: float) -> Tensor:
    x = images()
    x[1, 0, 0, 0] = value
    return x


INPUTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: spoiled(float("nan")), ValueError, r"inputs: input 1 holds NaN or infinity"),
    (lambda: spoiled(float("inf")), ValueError, r"inputs: input 1 holds NaN or infinity"),
    (lambda: (images(), spoiled(-float("inf"))), ValueError, r"inputs\[1\]: input 1 holds NaN or infinity"),
    (lambda: images().long(), TypeError, r"inputs: expected floating point, got torch.int64. Token ids .* embeddings"),
    (lambda: images() > 0, TypeError, r"inputs: expected floating point, got torch.bool"),
    (lambda: images() + 0j, TypeError, r"inputs: expected real numbers, got torch.complex128"),
    (lambda: images().to(torch.float8_e4m3fn), TypeError, r"inputs: expected float32, .* got torch.float8_e4m3fn"),
    (lambda: images().to_sparse(), TypeError, r"inputs: expected a dense tensor, got torch.sparse_coo"),
    (lambda: (images(), images().int()), TypeError, r"inputs\[1\]: expected floating point, got torch.int32"),
    (lambda: images().numpy(), TypeError, r"inputs: expected a tensor, or a tuple or dict of tensors, got ndarray"),
    (lambda: [images()], TypeError, r"inputs: expected .*, got a list of tensors; torch.stack\(x\)"),
    (lambda: (), TypeError, r"inputs: expected .*, got a tuple of nothing"),
    (lambda: (images(), None), TypeError, r"inputs: expected .*, got a tuple of NoneType, Tensor"),
    (lambda: None, TypeError, r"inputs: expected a tensor, or a tuple or dict of tensors, got NoneType"),
    (lambda: torch.tensor(1.0), ValueError, r"inputs: expected a batch axis, got a tensor without axes"),
    (lambda: (images(3), images(2)), ValueError, r"inputs\[1\]: expected 3 inputs, as in inputs\[0\], got 2"),
    (lambda: torch.zeros(3, 0), ValueError, r"inputs: has no features, shape \(3, 0\)"),
    (
        lambda: (images(), images().to("meta")),
        ValueError,
        r"inputs\[1\]: expected a tensor on cpu, as inputs\[0\], got .*meta",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), INPUTS, ids=[m[2][:40] for m in INPUTS])
@pytest.mark.parametrize("method", ["moreau", "tiles", "gradient", "sparsified_smoothgrad"])
def test_bad_inputs(method: str, make: Callable[[], Any], error: type[Exception], message: str) -> None:
    def never(*args: Any) -> Tensor:
        raise AssertionError("the model was called before the inputs were checked")

    with pytest.raises(error, match=message):
        ALL[method](never).attribute(make())


def test_a_model_elsewhere() -> None:
    with pytest.raises(ValueError, match="inputs: are on cpu, but the model is on meta"):
        MoreauGrad(nn.Linear(4, 2, device="meta")).attribute(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.arange(2), ValueError, r"ids: expected one per input, \[3\], or one integer, got shape \(2,\)"),
        (
            torch.arange(3)[:, None],
            ValueError,
            r"ids: expected one per input, \[3\], or one integer, got shape \(3, 1\)",
        ),
        (torch.rand(3), TypeError, r"ids: expected int64, got torch.float32"),
        (torch.ones(3) > 0, TypeError, r"ids: expected int64, got torch.bool"),
        (["a", "b", "c"], TypeError, r"ids: expected int64, one per input or one for all, got \['a', 'b', 'c'\]"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoreauGrad(smooth(), solver=SHORT).attribute(images(), 1, ids=ids)


@pytest.mark.parametrize("ids", [[4, 5, 6], np.array([4, 5, 6]), torch.tensor([4, 5, 6], dtype=torch.int32)])
def test_ids_in_other_forms(ids: Any) -> None:
    x, e = images(), MoreauGrad(smooth(), solver=SHORT)
    assert torch.equal(e.attribute(x, 1, ids=ids), e.attribute(x, 1, ids=torch.tensor([4, 5, 6])))


def test_an_explainer_is_frozen() -> None:
    e = MoreauGrad(smooth())
    with pytest.raises(AttributeError):
        e.rho = 2.0


def test_settings_can_be_replaced() -> None:
    first = MoreauGrad(lambda x: x.sum(1))
    second = replace(first, radius=0.1)
    assert (second.radius, second.rho) == (0.1, None)
    assert replace(first, rho="auto").rho == "auto"
    assert bool((first.attribute(torch.ones(1, 3), return_solution=True).rho == 1).all())
