"""The baselines against plain transcriptions, and the registry that names every method."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, bank, close, images, smooth
from torch import Tensor, nn

import moreau_ext
from moreau_ext import (
    METHODS,
    Gradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    Solution,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    make_explainer,
)

B, SHAPE = 3, (2, 5, 4)
FEATURES = math.prod(SHAPE)
DTYPES = [torch.float64, torch.float32]


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)[0]


def sample_gradients(
    model: nn.Module, x: Tensor, target: Tensor, sigma: float, samples: int, seed: int, antithetic: bool = False
) -> Tensor:
    """∇f(x + σz_i), [B, m, *SHAPE] in float64, with z from the bank's specification, one pass per sample."""
    exact = smooth()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    z = bank(seed, torch.arange(B), samples, SHAPE, antithetic)
    return torch.stack([gradient(exact, x.double() + sigma * z[:, i], target) for i in range(samples)], dim=1)


TARGET = torch.tensor([2, 0, 3])


# --- each against its definition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    model, x = smooth(dtype), images(dtype=dtype)
    close(Gradient(model).attribute(x, TARGET), gradient(model, x, TARGET))


def test_gradient_of_a_tuple() -> None:
    x, y = images(), torch.randn(B, 3, dtype=torch.float64)
    a, b = Gradient(lambda x, y: x.square().flatten(1).sum(1) * y.sum(1)).attribute((x, y))
    close(a, 2 * x * y.sum(1).view(B, 1, 1, 1))
    close(b, x.square().flatten(1).sum(1, keepdim=True).expand(B, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("antithetic", [False, True], ids=["independent", "antithetic"])
@pytest.mark.parametrize("samples", [1, 6, 7])
def test_smoothgrad(samples: int, antithetic: bool, dtype: torch.dtype) -> None:
    model, x = smooth(dtype), images(dtype=dtype)
    e = SmoothGrad(model, sigma=0.4, num_samples=samples, antithetic=antithetic, seed=5)
    expected = sample_gradients(model, x, TARGET, 0.4, samples, 5, antithetic).mean(1)
    s = e.attribute(x, TARGET, return_solution=True)
    close(s.attribution, expected)
    assert torch.equal(s.envelope_gradient, s.attribution)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    model, x = smooth(), images()
    close(SmoothGrad(model, sigma=0.0, num_samples=3).attribute(x, TARGET), gradient(model, x, TARGET))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_thresholded_smoothgrad(dtype: torch.dtype) -> None:
    """S_η(SmoothGrad), η absolute, as a fraction of the largest entry, per input and per feature."""
    model, x = smooth(dtype), images(dtype=dtype)
    p = sample_gradients(model, x, TARGET, 0.4, 6, 5).mean(1)
    largest = p.abs().flatten(1).amax(1).view(B, 1, 1, 1)
    per_feature = torch.rand(1, *SHAPE) * 0.05
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"eta": 2**-9}, torch.tensor(2**-9)),
        ({"eta": torch.tensor([0.0, 2**-9, 2**-8])}, torch.tensor([0.0, 2**-9, 2**-8]).view(B, 1, 1, 1)),
        ({"eta": per_feature}, per_feature.double()),
        ({"eta_ratio": 0.25}, 0.25 * largest),
        ({}, 0.1 * largest),
    ]
    for settings, eta in cases:
        e = SoftThresholdedSmoothGrad(model, sigma=0.4, num_samples=6, seed=5, **settings)
        s = e.attribute(x, TARGET, return_solution=True)
        close(s.attribution, p.sign() * (p.abs() - eta).clamp(min=0))
        close(s.envelope_gradient, p)
        assert 0 < s.nnz.sum() < x.numel()


def sparsified(gradients: Tensor, keep: float, clip: float) -> Tensor:
    """Levine et al., as the paper's comparison runs it: per sample, sort, drop, clip, scale, then average."""
    maps = []
    for each in gradients:  # one input
        total = np.zeros(FEATURES)
        for sample in each:
            values = sample.flatten().abs().numpy()
            order = np.argsort(-values)
            level = values[order[math.ceil(clip * FEATURES) - 1]]
            kept = np.zeros(FEATURES)
            for feature in order[: math.ceil(keep * FEATURES)]:
                kept[feature] = min(values[feature], level) / level
            total += kept
        maps.append(torch.from_numpy(total / len(each)).view(SHAPE))
    return torch.stack(maps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keep", "clip"), [(0.1, 0.01), (0.3, 0.1), (0.5, 0.5), (1.0, 0.01), (0.01, 0.01)])
def test_sparsified_smoothgrad(keep: float, clip: float, dtype: torch.dtype) -> None:
    model, x = smooth(dtype), images(dtype=dtype)
    e = SparsifiedSmoothGrad(model, sigma=0.4, num_samples=6, keep=keep, clip=clip, seed=5)
    s = e.attribute(x, TARGET, return_solution=True)
    gradients = sample_gradients(model, x, TARGET, 0.4, 6, 5)
    close(s.attribution, sparsified(gradients, keep, clip))
    close(s.envelope_gradient, gradients.mean(1))
    assert (s.attribution >= 0).all()
    assert (s.attribution <= 1).all()
    fewest = math.ceil(keep * FEATURES)
    assert (s.nnz >= fewest).all()
    assert (s.nnz <= 6 * fewest).all()
    for max_batch in (1, 4, 7):
        chunked = SparsifiedSmoothGrad(
            model, sigma=0.4, num_samples=6, keep=keep, clip=clip, seed=5, max_batch=max_batch
        )
        close(chunked.attribute(x, TARGET), s.attribution)


def test_sparsified_smoothgrad_ranks_a_tuple_as_one_input() -> None:
    x = images()
    e = SparsifiedSmoothGrad(lambda a, b: (3 * a + b).flatten(1).sum(1), keep=0.5, clip=0.5, num_samples=2)
    a, b = e.attribute((x, x))
    assert torch.equal(a, torch.ones_like(x))
    assert torch.equal(b, torch.zeros_like(x))


def test_sparsified_smoothgrad_of_a_flat_score() -> None:
    """No 0/0: a gradient of zeros has an empty map."""
    e = SparsifiedSmoothGrad(lambda x: (x - 100).relu().flatten(1).sum(1), num_samples=2)
    with pytest.warns(UserWarning, match="3 of 3 maps are zero everywhere"):
        s = e.attribute(images(), return_solution=True)
    assert torch.equal(s.attribution, torch.zeros_like(s.attribution))
    assert s.empty.all()


def test_sparsified_smoothgrad_with_fewer_nonzeros_than_kept() -> None:
    """Where the clip level itself is zero, the sample counts as flat rather than dividing by it."""
    e = SparsifiedSmoothGrad(lambda x: x[:, 0, 0, 0], keep=0.5, clip=0.01, num_samples=2)
    a = e.attribute(images())
    assert (a != 0).flatten(1).sum(1).tolist() == [1, 1, 1]
    assert (a[:, 0, 0, 0] == 1).all()


# --- what their Solution says --------------------------------------------------------------------------------------

BASELINES: dict[str, tuple[Callable[..., Any], int]] = {
    "gradient": (Gradient, 1),
    "smoothgrad": (lambda model: SmoothGrad(model, sigma=0.4, num_samples=6, seed=5), 6),
    "st_smoothgrad": (lambda model: SoftThresholdedSmoothGrad(model, sigma=0.4, num_samples=6, seed=5), 6),
    "sparsified_smoothgrad": (lambda model: SparsifiedSmoothGrad(model, sigma=0.4, num_samples=6, seed=5), 6),
    "integrated_gradients": (lambda model: make_explainer("integrated_gradients", model, n_steps=9), 9),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_a_solution_of_a_baseline_is_at_zero(name: str, dtype: torch.dtype) -> None:
    """Nothing is solved: no displacement, no residual, never converged; the envelope is f_σ(x)."""
    make, gradients = BASELINES[name]
    model, x = smooth(dtype), images(dtype=dtype)
    s = make(model).attribute(x, TARGET, return_solution=True)
    assert isinstance(s, Solution)
    assert torch.equal(s.displacement, torch.zeros_like(x))
    assert s.residual.isnan().all()
    assert s.relative_residual.isnan().all()
    assert not s.converged.any()
    assert s.steps.tolist() == [1] * B
    assert s.gradient_evaluations.tolist() == [gradients] * B
    assert torch.equal(s.nnz, (s.attribution != 0).flatten(1).sum(1))
    assert not s.empty.any()
    value = model(x).gather(1, TARGET[:, None]).squeeze(1).detach()
    close(s.score, value)
    if name == "gradient":
        close(s.envelope, value)
        close(s.envelope_gradient, s.attribution)
    elif name != "integrated_gradients":
        noisy = x.double().unsqueeze(1) + 0.4 * bank(5, torch.arange(B), 6, SHAPE)
        exact = smooth()
        exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        scores = exact(noisy.flatten(0, 1)).gather(1, TARGET.repeat_interleave(6)[:, None]).view(B, 6)
        t = TOLERANCE[dtype]
        torch.testing.assert_close(s.envelope, scores.mean(1).detach(), rtol=t, atol=t)
        assert torch.equal(s.sigma, torch.full_like(s.sigma, 0.4))
    assert torch.equal(s.eta, torch.zeros_like(s.eta)) == (name != "st_smoothgrad")


@pytest.mark.parametrize(
    ("make", "bad", "message"),
    [
        (SmoothGrad, {"num_samples": 0}, r"num_samples: expected a positive integer, got 0"),
        (SmoothGrad, {"num_samples": 2.0}, r"num_samples: expected a positive integer, got 2.0"),
        (SparsifiedSmoothGrad, {"num_samples": -1}, r"num_samples: expected a positive integer, got -1"),
        (SparsifiedSmoothGrad, {"keep": 0.0}, r"keep, clip: expected 0 < clip <= keep <= 1, got keep=0.0, clip=0.01"),
        (SparsifiedSmoothGrad, {"keep": 1.5}, r"keep, clip: expected 0 < clip <= keep <= 1, got keep=1.5"),
        (SparsifiedSmoothGrad, {"clip": 0.2}, r"keep, clip: expected 0 < clip <= keep <= 1, got keep=0.1, clip=0.2"),
        (SoftThresholdedSmoothGrad, {"eta": -1.0}, r"eta: expected a non-negative finite number, got -1.0"),
    ],
)
def test_bad_settings(make: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(smooth(), **bad)


def test_numpy_counts() -> None:
    model, x = smooth(), images()
    a = SmoothGrad(model, num_samples=np.int64(3)).attribute(x, TARGET)
    assert torch.equal(a, SmoothGrad(model, num_samples=3).attribute(x, TARGET))


# --- Integrated Gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"n_steps": 7}, {"baselines": 0.5}], ids=str)
def test_integrated_gradients_are_captums(settings: dict[str, Any], dtype: torch.dtype) -> None:
    captum = pytest.importorskip("captum.attr", reason="Integrated Gradients are captum's")
    model, x = smooth(dtype), images(dtype=dtype)
    a = make_explainer("integrated_gradients", model, **settings).attribute(x, TARGET)
    assert a.dtype == dtype
    assert not a.requires_grad
    expected = captum.IntegratedGradients(model).attribute(x, target=TARGET, **settings)
    close(a, expected.detach())
    chunked = make_explainer("integrated_gradients", model, max_batch=4, **settings).attribute(x, TARGET)
    close(chunked, expected.detach())


@pytest.mark.parametrize("score", ["log_prob", "prob", "margin"])
def test_integrated_gradients_of_other_scores(score: Any) -> None:
    """Complete: the map sums to f(x) − f(0)."""
    pytest.importorskip("captum", reason="Integrated Gradients are captum's")
    model, x = smooth(), images()
    e = make_explainer("integrated_gradients", model, score=score, n_steps=200)
    s = e.attribute(x, TARGET, return_solution=True)
    at_zero = Gradient(model, score=score).attribute(torch.zeros_like(x), TARGET, return_solution=True).score
    torch.testing.assert_close(s.attribution.flatten(1).sum(1), s.score - at_zero, rtol=1e-3, atol=1e-3)


def test_integrated_gradients_take_tuples_arguments_and_train_mode() -> None:
    captum = pytest.importorskip("captum.attr", reason="Integrated Gradients are captum's")
    x, y, gain = images(), torch.randn(B, 3, dtype=torch.float64), torch.tensor([1.0, 2.0, -3.0]).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout()

        def forward(self, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
            return self.dropout(gain * x.square().flatten(1).sum(1) * y.sum(1))

    model = Model().eval()
    expected = captum.IntegratedGradients(model).attribute((x, y), additional_forward_args=(gain,))
    model.train()
    with pytest.warns(UserWarning, match="train mode"):
        maps = make_explainer("integrated_gradients", model).attribute((x, y), None, gain)
    assert model.training
    assert model.dropout.training
    close(maps[0], expected[0].detach())
    close(maps[1], expected[1].detach())


# --- the registry --------------------------------------------------------------------------------------------------

NAMES = [
    "gradient", "smoothgrad", "st_smoothgrad", "sparsified_smoothgrad", "integrated_gradients",
    "moreau", "sparse", "group",
]  # fmt: skip


def test_the_names() -> None:
    assert list(METHODS) == NAMES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gradient", Gradient),
        ("smoothgrad", SmoothGrad),
        ("st_smoothgrad", SoftThresholdedSmoothGrad),
        ("sparsified_smoothgrad", SparsifiedSmoothGrad),
        ("moreau", MoreauGrad),
        ("sparse", SparseMoreauGrad),
        ("group", GroupSparseMoreauGrad),
    ],
)
def test_make_explainer(name: str, kind: type) -> None:
    model = smooth()
    e = make_explainer(name, model, score="prob", max_batch=7)
    assert type(e) is kind
    assert (e.model, e.score, e.max_batch) == (model, "prob", 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_the_same_call(name: str) -> None:
    model, x = smooth(), images()
    settings: dict[str, Any] = {}
    if name in ("moreau", "sparse", "group"):
        settings["solver"] = ProximalGradient(num_samples=2, max_steps=3)
    e = make_explainer(name, model, **settings)
    ids = torch.tensor([4, 5, 6])
    s = e.attribute(x, TARGET, None, ids=ids, return_solution=True)
    assert s.attribution.shape == x.shape
    assert torch.equal(e.attribute(x, target=TARGET, ids=ids), s.attribution)


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"method: expected one of gradient, smoothgrad, .*, group, got 'grad_cam'"):
        make_explainer("grad_cam", smooth())


def test_a_setting_that_a_method_lacks() -> None:
    with pytest.raises(TypeError, match="rho"):
        make_explainer("smoothgrad", smooth(), rho=1.0)


def test_captum_is_only_needed_for_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moreau_ext.explainers.integrated.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"integrated_gradients is captum's: pip install captum"):
        make_explainer("integrated_gradients", smooth())


def test_the_package_offers_them_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in moreau_ext.__all__:
            assert hasattr(moreau_ext, name), name
    with pytest.raises(AttributeError, match="has no attribute 'IntegratedGradient'"):
        _ = moreau_ext.IntegratedGradient
