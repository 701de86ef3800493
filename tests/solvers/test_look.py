"""Looks at answers: what the solver must not call converged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moreau_ext import AdaptiveProximalGradient, MoreauGrad, ProximalGradient, SparseMoreauGrad, ops
from moreau_ext.capture.runner import Runner
from moreau_ext.solvers.look import SCORES, keep_scores, look, steps_kept, unexplained2, upper_residual2
from moreau_ext.solvers.problem import Problem
from moreau_ext.solvers.samples import NoisyCopies

F64 = torch.float64


def posed(f: Any, x: Tensor, sigma: float = 0.1) -> Problem:
    return MoreauGrad(f, sigma=sigma).problem(x)


def direction(features: int) -> Tensor:
    a = torch.randn(features, dtype=F64, generator=torch.Generator().manual_seed(3))
    return a / a.norm()


@pytest.mark.parametrize("samples", [4, 8, 32, 256, 512])
def test_scores_are_kept_where_they_are_read(samples: int) -> None:
    kept, length = torch.zeros(2, SCORES), 7
    for step in range(length):
        keep_scores(kept, torch.full((2, samples), float(step)), torch.tensor([step]))
    for step in steps_kept(length, samples):
        at = step * samples % SCORES
        assert (kept[:, at : at + min(samples, SCORES)] == step).all()


@pytest.mark.parametrize("features", [1, 8, 200])
def test_scores_show_a_step_that_no_gradient_met(features: int) -> None:
    """The mean gradient misses the step, and the variance too; the scores of the samples say by how much."""
    a = direction(features)

    def f(x: Tensor) -> Tensor:
        u = x @ a
        return u + 0.1 * (u > 0) * (u.detach() > 0)  # the gradient is that of u alone

    x = (0.05 * a).repeat(4, 1)
    problem = posed(f, x)
    copies = NoisyCopies(problem, 64, True, step=5)
    scores, _ = copies.gradient(0, copies.draw(0, None))
    nothing, sums = torch.zeros(4, features, dtype=F64), torch.zeros(4, 8, dtype=F64)
    seen = unexplained2(problem, (a.repeat(4, 1),), (nothing,), sums, scores, 64, range(1), 5)
    # E f'(x + σz) gains 0.1·φ(0.5)/0.1 along a: what the scores say is at least about that, and of its order.
    missed = math.exp(-0.125) / math.sqrt(2 * math.pi)
    assert ((seen.sqrt() > 0.7 * missed) & (seen.sqrt() < 2 * missed)).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0])
def test_scores_of_what_the_gradients_show_are_no_news(sigma: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(12, 40), act, torch.nn.Linear(40, 1)).to(dtype).eval()
        for act in (torch.nn.ReLU(), torch.nn.Softplus(), torch.nn.Tanh())
    ]
    x = torch.randn(16, 12, dtype=dtype)
    for net in nets:
        problem = posed(net, x, sigma)
        seen = look(problem, (torch.zeros_like(x),), 256, 9, Runner())
        variance = tuple([s / seen.sums[:, 2, None].to(s.dtype) for s in seen.squares])
        found = unexplained2(problem, seen.gradient, variance, seen.sums, seen.scores, 8, range(32), 9)
        assert float((found.sqrt() / seen.gradient[0].norm(dim=1)).max()) < 0.01


def test_a_look_measures_the_residual_without_its_noise() -> None:
    a = direction(16)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 16, dtype=F64, generator=generator)

    def f(x: Tensor) -> Tensor:
        return torch.relu(x @ w.T).sum(1)

    x = torch.randn(400, 16, dtype=F64, generator=generator)
    problem = posed(f, x, 0.3)
    exact = torch.special.ndtr((x @ w.T) / (0.3 * w.norm(dim=1))) @ w
    # An answer whose gradient at δ = 0 is off by a known vector: y itself is 0 here, its residual ‖ρ(p − p̄)‖.
    claimed = exact + 0.2 * a
    seen = look(problem, (torch.zeros_like(x),), 64, 3, Runner())
    found = upper_residual2(problem, (claimed,), seen, seen.squares, seen.sums, 0.0)
    assert float(found.mean()) == pytest.approx(0.04, abs=4 * float(found.std()) / 20)
    bound = upper_residual2(problem, (claimed,), seen, seen.squares, seen.sums, 1.0)
    assert float((bound >= 0.04).double().mean()) > 0.9
    assert seen.sums.shape == (400, len(ops.SUMS))


# --- what is called converged ----------------------------------------------------------------------------------------


def shrunk(p: Tensor, eta: Tensor) -> Tensor:
    return p.sign() * (p.abs() - eta[:, None]).clamp_min(0)


def true_residual(s: Any, gradient: Tensor) -> Tensor:
    image = -s.rho[:, None] * shrunk(gradient, s.eta)
    size = torch.maximum(s.displacement.norm(dim=1), image.norm(dim=1)).clamp_min(1e-12)
    return (s.displacement - image).norm(dim=1) / size


@pytest.mark.parametrize("kind", [MoreauGrad, SparseMoreauGrad])
@pytest.mark.parametrize(("width", "tol"), [(0.1, 0.01), (0.01, 0.01), (0.001, 0.01), (0.003, 0.05), (0.001, 0.05)])
def test_rare_gradients_are_not_called_converged(kind: Any, width: float, tol: float) -> None:
    """A slope of 1 beside a step of height σ, of which a share ``width`` of the samples sees the slope."""
    sigma, rho = 0.1, 0.1

    def f(x: Tensor) -> Tensor:
        return (x + 0.1 * torch.special.ndtr(x / (width * sigma))).sum(1)

    x = 0.1 + 0.05 * torch.randn(200, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    s = kind(f, rho=rho, sigma=sigma, solver=AdaptiveProximalGradient(tol)).attribute(x, return_solution=True)
    spread = sigma * math.sqrt(1 + width**2)
    at = x + s.displacement
    gradient = 1 + 0.1 * torch.exp(-0.5 * (at / spread).square()) / (math.sqrt(2 * math.pi) * spread)
    false = s.converged & (true_residual(s, gradient) > 2 * tol)
    assert int(false.sum()) <= 2
    assert not (s.converged & (true_residual(s, gradient) > 0.1)).any()


@pytest.mark.filterwarnings("ignore::moreau_ext._errors.EmptyMapWarning")
@pytest.mark.parametrize("rho", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", [MoreauGrad, SparseMoreauGrad])
def test_exponentials_that_look_flat_far_away(kind: Any, rho: float) -> None:
    x = torch.randn(100, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    explainer = kind(lambda x: x.exp().sum(1), rho=rho, noise_level=0.1, solver=AdaptiveProximalGradient(0.01))
    s = explainer.attribute(x, return_solution=True)
    gradient = (x + s.displacement + s.sigma[:, None].square() / 2).exp()
    wrong = true_residual(s, gradient)[s.converged]
    if len(wrong):
        assert float((wrong > 0.02).double().mean()) <= 0.01
        assert float(wrong.max()) < 0.1
    # The easy ones are still solved.
    assert kind is SparseMoreauGrad or float(s.converged.double().mean()) > 0.8


@pytest.mark.parametrize("dimensions", [1, 5])
def test_a_ramp_whose_kink_is_the_answer(dimensions: int) -> None:
    a = torch.ones(1, dtype=F64) if dimensions == 1 else direction(dimensions)

    def f(x: Tensor) -> Tensor:
        u = x @ a
        return u + 99 * torch.relu(u + 90) - 99 * torch.relu(u + 0.2)

    x = 0.01 * torch.rand(50, dimensions, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = MoreauGrad(f, rho=1.0, sigma=0.05, solver=AdaptiveProximalGradient(0.01)).attribute(x, return_solution=True)
    u = (x + s.displacement) @ a
    slope = 1 + 99 * torch.special.ndtr((u + 90) / 0.05) - 99 * torch.special.ndtr((u + 0.2) / 0.05)
    assert not (s.converged & (true_residual(s, slope[:, None] * a) > 0.02)).any()


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_fixed_steps_do_not_stop_on_luck(noise: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(32, 2, dtype=F64, generator=generator), torch.randn(32, dtype=F64, generator=generator)
    weight = torch.randn(32, dtype=F64, generator=generator) / 5
    x = torch.randn(200, 2, dtype=F64, generator=generator)
    solver = ProximalGradient(8, 200, 0.03, tol=0.01, noise=noise)
    s = MoreauGrad(lambda x: torch.relu(x @ w.T + b) @ weight, rho=0.3, sigma=0.3, solver=solver).attribute(
        x, return_solution=True
    )
    gradient = (torch.special.ndtr(((x + s.displacement) @ w.T + b) / (0.3 * w.norm(dim=1))) * weight) @ w
    assert int((s.converged & (true_residual(s, gradient) > 0.02)).sum()) <= 1


def test_looks_are_counted_and_stay_within_the_budget() -> None:
    rows = 0

    def f(x: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x) * torch.is_grad_enabled()
        return x.exp().sum(1)

    x = torch.randn(1, 4, dtype=F64)
    for budget in (192, 300, 1000, 2048):
        rows = 0
        e = MoreauGrad(f, rho=10.0, solver=AdaptiveProximalGradient(max_gradients=budget), max_batch=512)
        s = e.attribute(x, return_solution=True)
        assert rows == 1 + int(s.gradient_evaluations) <= 1 + max(budget, 192)  # and one pass for f(x)


def test_inputs_do_not_depend_on_their_batch() -> None:
    x = torch.randn(12, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    e = SparseMoreauGrad(lambda x: x.exp().sum(1), rho=10.0, eta_ratio=0.1)
    whole = e.attribute(x, return_solution=True)
    for row in (0, 5, 11):
        alone = e.attribute(x[row : row + 1], ids=torch.tensor([row]), return_solution=True)
        torch.testing.assert_close(alone.attribution[0], whole.attribution[row], rtol=1e-9, atol=1e-12)
        assert int(alone.gradient_evaluations) == int(whole.gradient_evaluations[row])


@pytest.mark.parametrize("solver", [AdaptiveProximalGradient(), ProximalGradient(8, 60, 0.1, tol=0.05)])
def test_inputs_without_feature_axes_are_looked_at(solver: Any) -> None:
    x = torch.rand(5, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = MoreauGrad(lambda x: x.exp(), sigma=0.1, solver=solver).attribute(x, return_solution=True)
    assert s.converged.any()
    assert s.standard_error.shape == s.significant().shape == (5,)
    u, v = torch.rand(3, 2, dtype=F64), torch.rand(3, dtype=F64)
    both = MoreauGrad(lambda u, v: u.exp().sum(1) + v.exp(), sigma=0.1, solver=solver).attribute(
        (u, v), return_solution=True
    )
    assert [t.shape for t in both.standard_error] == [(3, 2), (3,)]
