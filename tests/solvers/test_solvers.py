"""The loop: the published schedule step for step, convergence, stopping, chunks, and settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Quadratic, bank
from torch import Tensor, nn

from moreau_ext import GroupSparseMoreauGrad, MoreauGrad, ProximalGradient, SmoothGrad, SparseMoreauGrad, Tiles


def small_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 16, 5)
    ).to(dtype).eval()  # fmt: skip


def published_loop(model: nn.Module, x: Tensor, label: int, noise: Tensor, eta: float, tile: int | None) -> Tensor:
    """The published algorithm in plain PyTorch for one image [1, C, H, W], with the noise [T, m, C, H, W] given.

    Constants as its code has them: lambda 1, learning rate 0.1, sigma 0.1 of the image's range, the mean of the last
    101 iterates, thresholds times the learning rate.
    """
    lamb, rate, steps = 1.0, 0.1, noise.shape[0]
    sigma = 0.1 * (x.max() - x.min())
    delta, kept, average = torch.zeros_like(x), 0, torch.zeros_like(x)
    for t in range(steps):
        delta = delta.detach().requires_grad_()
        score = model(x + sigma * noise[t] + delta).mean(0)[label]
        loss = score + 0.5 * delta.square().sum() / lamb
        (gradient,) = torch.autograd.grad(loss, delta)
        moved = delta.detach() - rate * gradient
        threshold = rate * eta
        if tile is None:
            delta = torch.sign(moved) * (moved.abs() - threshold).clamp_min(0)
        else:
            squares = nn.functional.avg_pool2d(moved.square().sum(1, keepdim=True), tile, ceil_mode=True)
            norms = (squares * tile * tile).sqrt()
            factor = torch.where(norms > threshold, 1 - threshold / norms.clamp_min(1e-300), 0.0)
            delta = moved * factor.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        if steps - (t + 1) <= 100:
            kept, average = kept + 1, average + delta
    assert kept == min(steps, 101)
    return average / kept


@pytest.mark.parametrize(("penalty", "eta"), [("l1", 0.0), ("l1", 5e-3), ("tiles", 5e-2)])
def test_paper_reproduces_the_published_loop(penalty: str, eta: float) -> None:
    """Step for step in float64: our noise goes into the transcription; its map is δ̄, ours −δ̄/ρ."""
    model, steps, samples = small_net(), 300, 32
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    ids = torch.tensor([17])
    noise = torch.cat([bank(5, ids, samples, x.shape[1:], step=t) for t in range(steps)])
    expected = published_loop(model, x, 2, noise, eta, 4 if penalty == "tiles" else None)
    solver = ProximalGradient.paper()
    assert (solver.max_steps, solver.num_samples, solver.step_size, solver.tol) == (300, 32, 0.1, 0.0)
    settings: dict[str, Any] = {"noise_level": 0.1, "seed": 5, "solver": solver}
    explainer = {
        ("l1", 0.0): lambda: MoreauGrad(model, **settings),
        ("l1", 5e-3): lambda: SparseMoreauGrad(model, eta=eta, **settings),
        ("tiles", 5e-2): lambda: GroupSparseMoreauGrad(model, eta=eta, groups=Tiles(4), **settings),
    }[(penalty, eta)]()
    solution = explainer.attribute(x, target=2, ids=ids, return_solution=True)
    assert float(expected.abs().max()) > 1e-2
    torch.testing.assert_close(solution.attribution, -expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(solution.displacement, expected, rtol=0, atol=1e-10)
    assert torch.equal(solution.attribution == 0, expected == 0)
    assert int(solution.gradient_evaluations) == 9600


def test_contraction_factor() -> None:
    """Errors shrink by max(|1 − γμ|, |1 − γL|) a step, μ = 1/ρ − λ, L = 1/ρ + β; the best γ = 2/(μ + L)."""
    rho, lam, beta = 0.5, 1.0, 2.0
    f = Quadratic([-lam, 0.3, beta])
    x = torch.randn(1, 3, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + rho * f.q, f.q @ x[0] + f.b)
    mu, smooth = 1 / rho - lam, 1 / rho + beta
    for step_size in (0.1, 2 / (mu + smooth)):
        rate = max(abs(1 - step_size * mu), abs(1 - step_size * smooth))
        errors = []
        for steps in (40, 41):
            solver = ProximalGradient(2, steps, step_size, average_last=1, tol=0.0)
            s = MoreauGrad(f, rho=rho, sigma=0.0, solver=solver).attribute(x, return_solution=True)
            errors.append(float((s.attribution[0] - exact).norm()))
        assert errors[1] / errors[0] == pytest.approx(rate, rel=0.05)


def test_an_input_that_is_done_leaves_and_the_others_go_on() -> None:
    f = Quadratic([0.0, 1.0, 2.0, 0.5])
    x = torch.randn(5, 4, dtype=torch.float64)
    rho = torch.tensor([0.05, 1.0, 0.2, 1.0, 0.05], dtype=torch.float64)
    solver = ProximalGradient(2, 400, 0.05, tol=1e-6, noise="fixed", average_last=1)
    s = MoreauGrad(f, rho=rho, sigma=0.1, solver=solver).attribute(x, return_solution=True)
    assert (s.relative_residual <= 1e-6).all()
    assert len(s.steps.unique()) > 1
    # One look at each answer: as many gradients as its steps took, in blocks of 8, 128 at most.
    looked = (2 * s.steps // 8 * 8).clamp(16, 128)
    assert torch.equal(s.gradient_evaluations, 2 * s.steps + looked)
    for i in range(5):
        alone = MoreauGrad(f, rho=rho[i : i + 1], sigma=0.1, solver=solver)
        one = alone.attribute(x[i : i + 1], ids=torch.tensor([i]), return_solution=True)
        torch.testing.assert_close(one.attribution[0], s.attribution[i], rtol=0, atol=1e-13)
        assert int(one.steps) == int(s.steps[i])


def test_what_did_not_converge_says_so() -> None:
    f = Quadratic([0.0, 1.0])
    x = torch.randn(1, 2, dtype=torch.float64)
    solver = ProximalGradient(2, 3, 0.05, tol=1e-3)
    s = MoreauGrad(f, sigma=0.0, solver=solver).attribute(x, return_solution=True)
    assert not s.converged
    assert float(s.relative_residual) > 1e-3


def test_the_residual_is_that_of_the_last_displacement() -> None:
    """r = ‖δ − y‖ with δ the iterate that came in, computed here by hand."""
    f = Quadratic([0.2, 1.0, 1.5])
    x = torch.randn(1, 3, dtype=torch.float64)
    rho, gamma, eta, steps = 0.7, 0.2, 0.3, 5
    delta = torch.zeros_like(x)
    for t in range(steps):
        p = (x + delta) @ f.q + f.b
        y = -rho * torch.sign(p) * (p.abs() - eta).clamp_min(0)
        residual, last = (delta - y).norm(), delta
        v = (1 - gamma / rho) * delta - gamma * p
        if t < steps - 1:
            delta = torch.sign(v) * (v.abs() - gamma * eta).clamp_min(0)
    solver = ProximalGradient(1, steps, gamma, average_last=1, tol=0.0)
    s = SparseMoreauGrad(f, rho=rho, eta=eta, sigma=0.0, solver=solver).attribute(x, return_solution=True)
    torch.testing.assert_close(s.residual[0], residual)
    floor = 1e-3 * rho * ((x @ f.q) + f.b).norm()
    torch.testing.assert_close(s.relative_residual[0], residual / max(last.norm(), y.norm(), floor))
    torch.testing.assert_close(s.displacement, y)
    value = f(x + last) + last.square().sum() / (2 * rho) + eta * last.abs().sum()
    torch.testing.assert_close(s.envelope, value)


def test_averaging_the_gradient_keeps_zeros_exact_and_lowers_noise() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).double().eval()
    x = torch.randn(4, 16, dtype=torch.float64)
    exact = SparseMoreauGrad(f, eta=0.02, sigma=0.5, rho=0.5, solver=ProximalGradient(512, 100, tol=0.0)).attribute(x)

    def error(average_last: int) -> float:
        solver = ProximalGradient(4, 60, average_last=average_last, tol=0.0)
        a = SparseMoreauGrad(f, eta=0.02, sigma=0.5, rho=0.5, solver=solver).attribute(x)
        return float((a - exact).norm())

    assert error(30) < 0.6 * error(1)


def test_a_fixed_bank_is_solved_to_rounding() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 1)).double().eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    solver = ProximalGradient(8, 600, noise="fixed", average_last=1, tol=1e-13)
    s = SparseMoreauGrad(f, eta=0.02, sigma=0.5, rho=1.0, solver=solver).attribute(x, return_solution=True)
    assert (s.relative_residual <= 1e-13).all()
    assert not s.converged.any()  # eight samples are not the expectation
    assert (s.nnz < 16).any()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 0}, "num_samples: expected a positive integer, got 0"),
        ({"num_samples": 2.0}, "num_samples"),
        ({"max_steps": -1}, "max_steps"),
        ({"average_last": True}, "average_last"),
        ({"step_size": 0.0}, "step_size: expected a positive number"),
        ({"step_size": math.nan}, "step_size"),
        ({"tol": -1e-3}, "tol: expected a number >= 0"),
        ({"tol": math.nan}, "tol"),
        ({"noise": "sobol"}, "noise: expected 'fresh' or 'fixed', got 'sobol'"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ProximalGradient(**settings)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    solver = ProximalGradient(2, 12, progress=True)
    MoreauGrad(Quadratic([1.0, 2.0]), solver=solver).attribute(torch.randn(3, 2, dtype=torch.float64))
    shown = capsys.readouterr().err
    assert "/3 [" in shown, "inputs"
    assert "24 gradients each" in shown


@pytest.mark.parametrize("max_batch", [1, 3, 5])
def test_error_bars_do_not_depend_on_the_rows_of_a_pass(max_batch: int) -> None:
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    settings: dict[str, Any] = {"num_samples": 16, "antithetic": True}
    whole, split = (SmoothGrad(small_net(), max_batch=b, **settings) for b in (None, max_batch))
    a, b = (e.attribute(x, target=2, return_solution=True) for e in (whole, split))
    torch.testing.assert_close(a.standard_error, b.standard_error, rtol=1e-9, atol=1e-9)
