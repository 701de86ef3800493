"""The adaptive solver: exact answers, its stopping rule and its honesty, budgets, and independence of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Quadratic, smooth_net
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SparseMoreauGrad,
    Tiles,
)


def test_linear_scores_are_exact() -> None:
    a = torch.tensor([3.0, -2.0, 0.1, 0.5], dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)

    def f(rows: Tensor) -> Tensor:
        return rows @ a

    s = MoreauGrad(f, solver="auto").attribute(x, return_solution=True)
    torch.testing.assert_close(s.attribution, a.expand(3, 4), rtol=0, atol=1e-12)
    sparse = SparseMoreauGrad(f, eta=0.3, solver="auto").attribute(x, return_solution=True)
    expected = torch.sign(a) * (a.abs() - 0.3).clamp_min(0)
    torch.testing.assert_close(sparse.attribution, expected.expand(3, 4), rtol=0, atol=1e-12)
    assert sparse.converged.all()
    assert (sparse.nnz == 3).all()


@pytest.mark.parametrize("top", [2.0, 20.0, 200.0])
def test_quadratics_of_any_curvature_are_solved(top: float) -> None:
    """The step follows the curvature that is met: with a fixed step of 0.1 the last two diverge."""
    f = Quadratic([-0.5, 0.2, 1.0, top])
    x = torch.randn(4, 4, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + f.q, (x @ f.q + f.b).T).T
    solver = AdaptiveProximalGradient(tol=1e-3, max_gradients=1 << 16)
    s = MoreauGrad(f, rho=1.0, sigma=0.0, solver=solver).attribute(x, return_solution=True)
    assert s.converged.all()
    error = (s.attribution - exact).norm(dim=1) / exact.norm(dim=1)
    # ‖y − δ*‖ ≤ ρβ r/(1 − ρλ)
    assert (error <= 1e-3 * top / (1 - 0.5) + 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moreau", "sparse", "group"])
def test_converged_means_what_it_says(kind: str) -> None:
    """Of the inputs reported converged at tol, 95 % have a residual ≤ tol on a fresh bank of 32,768 samples."""
    model = smooth_net()
    x = torch.randn(40, 1, 4, 6, dtype=torch.float64)
    flat = nn.Sequential(nn.Flatten(), model).eval()
    sigma, rho, tol = 0.5, 0.5, 1e-2
    eta = 0.0 if kind == "moreau" else 0.02
    explainer = {
        "moreau": lambda s: MoreauGrad(flat, rho=rho, sigma=sigma, solver=s),
        "sparse": lambda s: SparseMoreauGrad(flat, rho=rho, eta=eta, sigma=sigma, solver=s),
        "group": lambda s: GroupSparseMoreauGrad(flat, rho=rho, eta=eta, sigma=sigma, groups=Tiles(2), solver=s),
    }[kind](AdaptiveProximalGradient(tol=tol))
    s = explainer.attribute(x, target=0, return_solution=True)
    assert s.converged.double().mean() > 0.9
    # The residual at the returned displacement: one step from there, with an independent bank.
    one = ProximalGradient(32768, 1, noise="fixed", average_last=1, tol=0.0)
    y = s.displacement
    judge = {
        "moreau": lambda: MoreauGrad(flat, rho=rho, sigma=sigma, seed=99, solver=one),
        "sparse": lambda: SparseMoreauGrad(flat, rho=rho, eta=eta, sigma=sigma, seed=99, solver=one),
        "group": lambda: GroupSparseMoreauGrad(
            flat, rho=rho, eta=eta, sigma=sigma, groups=Tiles(2), seed=99, solver=one
        ),
    }[kind]()
    image = judge.attribute(x + y, target=0, return_solution=True).displacement
    residual = (y - image).flatten(1).norm(dim=1)
    relative = residual / torch.maximum(y.flatten(1).norm(dim=1), image.flatten(1).norm(dim=1))
    assert float((relative[s.converged] <= tol).double().mean()) >= 0.95


LEAST: dict[int, Callable[..., Any]] = {
    192: lambda model, s: MoreauGrad(model, rho=1.0, solver=s),
    224: lambda model, s: SparseMoreauGrad(model, rho=1.0, solver=s),
    336: lambda model, s: SparseMoreauGrad(model, support=3, rho=1.0, solver=s),
    368: lambda model, s: SparseMoreauGrad(model, radius=0.5, solver=s),
}


@pytest.mark.parametrize("least", LEAST)
def test_a_budget_that_the_first_levels_exceed(least: int) -> None:
    """It is refused with the least that is possible, and that much is kept."""
    model, x = smooth_net(), torch.randn(2, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"max_gradients: expected at least {least}, which .* got {least - 1}"):
        LEAST[least](model, AdaptiveProximalGradient(1e-9, least - 1)).attribute(x, 0)
    s = LEAST[least](model, AdaptiveProximalGradient(1e-9, least)).attribute(x, 0, return_solution=True)
    assert s.gradient_evaluations.tolist() == [least] * 2


def test_the_budget_is_kept_and_said() -> None:
    model, x = smooth_net(), torch.randn(6, 24, dtype=torch.float64)
    for budget in (192, 200, 500, 5000):
        solver = AdaptiveProximalGradient(tol=1e-9, max_gradients=budget)
        s = MoreauGrad(model, rho=1.0, sigma=1.0, solver=solver).attribute(x, target=0, return_solution=True)
        assert not s.converged.any()
        assert (s.relative_residual > 1e-9).all()
        assert (s.gradient_evaluations <= budget).all()
        assert (s.gradient_evaluations > 0.8 * budget).all()
    ratio = SparseMoreauGrad(model, sigma=1.0, eta_ratio=0.2, solver=AdaptiveProximalGradient(tol=1e-9))
    counted = 0

    def counting(rows: Tensor) -> Tensor:
        nonlocal counted
        counted += rows.shape[0]
        return model(rows)

    e = SparseMoreauGrad(counting, sigma=1.0, eta_ratio=0.2, solver=ratio.solver, max_batch=1024)
    s = e.attribute(x, target=0, return_solution=True)
    assert int(s.gradient_evaluations.sum()) == counted - 6  # the scores at the inputs are no gradients


def test_inputs_do_not_depend_on_each_other() -> None:
    model, x = smooth_net(), torch.randn(7, 24, dtype=torch.float64) * torch.logspace(-1, 1, 7)[:, None]
    e = SparseMoreauGrad(model, sigma=0.5, eta_ratio=0.2, solver=AdaptiveProximalGradient(tol=5e-3))
    ids = torch.arange(7) + 100
    whole = e.attribute(x, target=1, ids=ids, return_solution=True)
    assert len(whole.steps.unique()) > 1
    for i in range(7):
        one = e.attribute(x[i : i + 1], target=1, ids=ids[i : i + 1], return_solution=True)
        torch.testing.assert_close(one.attribution[0], whole.attribution[i], rtol=0, atol=1e-11)
        assert int(one.steps) == int(whole.steps[i])
    small = SparseMoreauGrad(model, sigma=0.5, eta_ratio=0.2, solver=e.solver, max_batch=5)
    torch.testing.assert_close(small.attribute(x, target=1, ids=ids), whole.attribution, rtol=0, atol=1e-11)
    assert torch.equal(e.attribute(x, target=1, ids=ids), whole.attribution)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_that_part_and_meet_again_keep_their_places(layout: torch.memory_format) -> None:
    """All end at the same level, having taken different numbers of samples a step on the way."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).double().eval()
    x = torch.randn(12, 2, 6, 6, dtype=torch.float64) * torch.logspace(-1, 1, 12)[:, None, None, None]
    x = x.contiguous(memory_format=layout)
    e = SparseMoreauGrad(net, sigma=0.3, eta_ratio=0.2, rho=0.3, solver=AdaptiveProximalGradient(1e-9, 1200))
    whole = e.attribute(x, target=1, return_solution=True)
    assert len(whole.steps.unique()) > 1
    assert len(whole.gradient_evaluations.unique()) == 1
    for i in range(12):
        one = e.attribute(x[i : i + 1], target=1, ids=torch.tensor([i]), return_solution=True)
        torch.testing.assert_close(one.attribution[0], whole.attribution[i], rtol=0, atol=1e-9)
        assert int(one.steps) == int(whole.steps[i])


def test_tuples_and_empty_maps() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1) / 4 + b.flatten(1).sum(1)

    a, b = torch.randn(3, 5), torch.randn(3, 2, 2, dtype=torch.float64)
    s = MoreauGrad(f, rho=1.0, sigma=0.1, solver="auto").attribute((a, b), return_solution=True)
    torch.testing.assert_close(s.attribution[0], a / 2 / 1.5, rtol=0.05, atol=0.05)
    torch.testing.assert_close(s.attribution[1], torch.ones_like(b), rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="3 of 3 maps are zero"):
        s = SparseMoreauGrad(f, sigma=0.1, eta_ratio=1.0, solver="auto").attribute((a, b), return_solution=True)
    assert s.converged.all()
    assert float(s.relative_residual.max()) == 0.0


def test_a_gradient_that_is_not_finite_names_the_input() -> None:
    x = torch.ones(3, 4)
    x[1] = -1
    e = MoreauGrad(lambda rows: rows.sum(1).sqrt(), sigma=0.0, rho=0.1, solver="auto")
    with pytest.raises(ValueError, match="input id 8 is not finite"):
        e.attribute(x, ids=torch.tensor([7, 8, 9]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tol": 0.0}, "tol: expected a positive number, got 0.0"),
        ({"tol": math.nan}, "tol"),
        ({"max_gradients": 0}, "max_gradients: expected a positive integer, got 0"),
        ({"max_gradients": 1.5}, "max_gradients"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaptiveProximalGradient(**settings)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    solver = AdaptiveProximalGradient(progress=True)
    MoreauGrad(smooth_net(), solver=solver).attribute(torch.randn(2, 24, dtype=torch.float64))
    assert "input" in capsys.readouterr().err
