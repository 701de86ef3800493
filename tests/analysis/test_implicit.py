"""The implicit derivative against finite differences of the solve, unrolling, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import bank
from torch import Tensor, nn

from moreau_ext import GroupSparseMoreauGrad, Labels, MoreauGrad, Pixels, ProximalGradient, SparseMoreauGrad, Tiles

F64 = torch.float64
SHAPE, FEATURES = (2, 4, 3), 24
# Solved to rounding on its bank of 8 pairs.
EXACT = ProximalGradient(16, 2000, 0.3, noise="fixed", average_last=1, tol=1e-13)


class Net(nn.Module):
    """w·act(Vx + c)."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = nn.functional.silu, dtype: torch.dtype = F64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.v = nn.Parameter((torch.randn(10, FEATURES, generator=g, dtype=F64) / 3).to(dtype))
        self.c = nn.Parameter(torch.randn(10, generator=g, dtype=F64).to(dtype))
        self.w = nn.Parameter((torch.randn(10, generator=g, dtype=F64) / 2).to(dtype))
        self.activation = activation
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.flatten(1) @ self.v.T + self.c) @ self.w


CASES: dict[str, Callable[..., Any]] = {
    "moreau": lambda f, **k: MoreauGrad(f, sigma=0.4, **k),
    "moreau, default sigma follows": lambda f, **k: MoreauGrad(f, **k),
    "moreau, sigma follows": lambda f, **k: MoreauGrad(f, noise_level=0.15, **k),
    "sparse": lambda f, **k: SparseMoreauGrad(f, sigma=0.4, eta=0.12, **k),
    "sparse, eta per feature": lambda f, **k: SparseMoreauGrad(
        f, sigma=0.4, eta=torch.linspace(0.05, 0.2, FEATURES, dtype=F64).view(1, *SHAPE), **k
    ),
    "sparse, both follow": lambda f, **k: SparseMoreauGrad(f, noise_level=0.15, eta_ratio=0.3, **k),
    "tiles": lambda f, **k: GroupSparseMoreauGrad(f, sigma=0.4, eta=0.8, groups=Tiles(2), **k),
    "tiles, both follow": lambda f, **k: GroupSparseMoreauGrad(
        f, noise_level=0.15, eta_ratio=0.5, groups=Tiles(2, weights="sqrt"), **k
    ),
    "pixels, both follow": lambda f, **k: GroupSparseMoreauGrad(
        f, noise_level=0.15, eta_ratio=0.4, groups=Pixels(), **k
    ),
    "labels per input": lambda f, **k: GroupSparseMoreauGrad(
        f, sigma=0.4, eta=0.8, groups=Labels(torch.arange(3 * FEATURES).view(3, *SHAPE) % 5), **k
    ),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def slope(e: Any, x: Tensor, v: Tensor, u: Tensor, h: float = 1e-5) -> Tensor:
    """vᵀ·DA(x)·u by differences of the whole solve."""
    return ((e.attribute(x + h * u) - e.attribute(x - h * u)) * v).flatten(1).sum(1) / (2 * h)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, "contiguous") for case in CASES] + [(case, "channels_last") for case in CASES if "follow" in case],
)
def test_differences_of_the_solve(case: str, layout: str) -> None:
    x, v = draw(3, *SHAPE), draw(3, *SHAPE, seed=1)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    e = CASES[case](Net(), rho=0.9, seed=3, solver=EXACT)
    s = e.attribute(x, return_solution=True)
    assert (s.relative_residual <= EXACT.tol).all()  # on its bank: `converged` would ask for the expectation
    if "moreau" not in case:
        assert 0 < s.nnz.sum() < x.numel()
    g = e.vjp(x, s, v, hessian="autograd")
    for k in range(3):
        u = draw(3, *SHAPE, seed=2 + k)
        error = (slope(e, x, v, u) - (g * u).flatten(1).sum(1)).abs() / g.flatten(1).norm(dim=1)
        assert (error <= 1e-6).all()  # 1e-10 from the difference of order h², 1e-13/h from the solve
    torch.testing.assert_close(e.vjp(x, s, v), g, rtol=0, atol=0)  # "auto" finds the same
    chunked = replace(e, max_batch=5).vjp(x, s, v)
    torch.testing.assert_close(chunked, g, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.15])
def test_unrolling(eta: float) -> None:
    """Against backpropagation through 400 proximal steps on the bank."""
    f, x, v, sigma, rho, samples, rate = Net(), draw(2, *SHAPE), draw(2, *SHAPE, seed=1), 0.4, 0.9, 6, 0.5
    z = bank(3, torch.arange(2), samples, SHAPE, antithetic=True)

    def gradient(at: Tensor) -> Tensor:
        rows = (at.unsqueeze(1) + sigma * z).flatten(0, 1)
        (g,) = torch.autograd.grad(f(rows).sum(), rows, create_graph=True)
        return g.view(2, samples, *SHAPE).mean(1)

    leaf = x.clone().requires_grad_()
    delta = torch.zeros_like(x)
    for _ in range(400):
        moved = (1 - rate / rho) * delta - rate * gradient(leaf + delta)
        delta = moved - moved.clamp(-rate * eta, rate * eta)
    (unrolled,) = torch.autograd.grad((-delta / rho * v).sum(), leaf)

    solver = ProximalGradient(samples, 2000, rate, noise="fixed", average_last=1, tol=1e-13)
    e = SparseMoreauGrad(f, rho=rho, sigma=sigma, eta=eta, seed=3, solver=solver)
    s = e.attribute(x, return_solution=True)
    if eta:
        assert (s.nnz < FEATURES).all()
    torch.testing.assert_close(e.vjp(x, s, v), unrolled, rtol=1e-7, atol=1e-9)


def quadratic(eigenvalues: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    n = len(eigenvalues)
    basis = torch.linalg.qr(draw(n, n, seed=9))[0]
    q = basis @ torch.diag(eigenvalues) @ basis.T
    q = (q + q.T) / 2
    return lambda x: ((x @ q.to(x)) * x).sum(1) / 2 + x.sum(1), q


@pytest.mark.parametrize("method", ["auto", "autograd"])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_quadratic(method: Any, sigma: float) -> None:
    """vᵀDA = vᵀQ(I + ρQ)⁻¹, also where ρλ > 1 and the system is indefinite."""
    for least in (-0.6, -3.0):
        f, q = quadratic(torch.linspace(least, 1.5, 8, dtype=F64))
        x, v, rho = draw(3, 8), draw(3, 8, seed=1), 0.8
        e = MoreauGrad(f, rho=rho, sigma=sigma, solver=ProximalGradient(2, 5, 0.1))
        s = e.attribute(x, return_solution=True)
        exact = torch.linalg.solve(torch.eye(8, dtype=F64) + rho * q, q @ v.T).T
        torch.testing.assert_close(e.vjp(x, s, v, hessian=method), exact, rtol=1e-8, atol=1e-10)


def relu_map(f: Net, x: Tensor, sigma: float, rho: float, eta: float) -> tuple[Tensor, Tensor]:
    """(δ*, DA) for the expectation of a one-layer ReLU net: closed forms, and steps until nothing moves."""
    width = sigma * f.v.norm(dim=1)
    delta = torch.zeros_like(x)
    for _ in range(3000):
        p = (f.w * torch.special.ndtr(((x + delta) @ f.v.T + f.c) / width)) @ f.v
        moved = (1 - 0.3 / rho) * delta - 0.3 * p
        delta = moved - moved.clamp(-0.3 * eta, 0.3 * eta)
    t = ((x + delta) @ f.v.T + f.c) / width
    h = torch.einsum("bk,ki,kj->bij", f.w * torch.exp(-t.square() / 2) / (math.sqrt(2 * math.pi) * width), f.v, f.v)
    derivative = torch.zeros_like(h)
    for b in range(len(x)):
        on = (delta[b] != 0).nonzero().squeeze(1)
        system = torch.eye(len(on), dtype=F64) + rho * h[b][on][:, on]
        derivative[b, on] = torch.linalg.solve(system, h[b, on])
    return delta, derivative


@pytest.mark.parametrize("eta", [0.0, 0.1])
@torch.no_grad()
def test_kinks_by_steins_identity(eta: float) -> None:
    """A ReLU net: second derivatives give exactly 0; 65,536 gradients the closed form within 5 %, and 4 times as many
    halve the error."""
    f, x, v, sigma, rho = Net(torch.relu), draw(4, FEATURES), draw(4, FEATURES, seed=1), 0.5, 0.9
    delta, derivative = relu_map(f, x, sigma, rho, eta)
    exact = torch.einsum("bi,bij->bj", v, derivative)
    e = SparseMoreauGrad(f, rho=rho, sigma=sigma, eta=eta, solver=ProximalGradient(8, 10))
    s = replace(e.attribute(x, return_solution=True), displacement=delta)
    errors = [float((e.vjp(x, s, v, num_samples=m) - exact).norm() / exact.norm()) for m in (1 << 12, 1 << 16)]
    assert errors[0] < 0.2
    assert errors[1] < 0.05
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(e.vjp(x, s, v, hessian="autograd"), torch.zeros_like(x))


def test_stein_follows_sigma_and_eta() -> None:
    """The smooth net's derivative through noise_level and eta_ratio, estimated without second derivatives."""
    f, x, v = Net(), draw(2, *SHAPE), draw(2, *SHAPE, seed=1)
    solver = ProximalGradient(512, 300, 0.5, noise="fixed", average_last=1, tol=1e-9)
    e = SparseMoreauGrad(f, rho=0.9, noise_level=0.15, eta_ratio=0.3, solver=solver)
    s = e.attribute(x, return_solution=True)
    exact = e.vjp(x, s, v, hessian="autograd")
    stein = e.vjp(x, s, v, hessian="stein", num_samples=1 << 16)
    held = e.vjp(x, s, v, hessian="autograd", hold_settings=True)
    error = float((stein - exact).norm() / exact.norm())
    assert error < 0.1
    assert float((held - exact).norm() / exact.norm()) > 3 * error  # so what follows matters, and is there


def test_off_the_support_nothing_moves() -> None:
    x = draw(2, *SHAPE)
    e = SparseMoreauGrad(Net(), sigma=0.4, eta_ratio=0.5, rho=0.9, solver=EXACT)
    s = e.attribute(x, return_solution=True)
    off = (s.attribution == 0).double()
    assert off.sum() > 0
    assert torch.equal(e.vjp(x, s, off), torch.zeros_like(x))
    with pytest.warns(UserWarning, match="zero everywhere"):
        zero = replace(e, eta_ratio=1.0).attribute(x, return_solution=True)
    assert torch.equal(replace(e, eta_ratio=1.0).vjp(x, zero, torch.ones_like(x)), torch.zeros_like(x))


# --- how it is called ------------------------------------------------------------------------------------------------


def test_tuples_dtypes_and_batches() -> None:
    f = Net()
    x, v = draw(3, FEATURES), draw(3, FEATURES, seed=1)
    settings: dict[str, Any] = {"rho": 0.9, "sigma": 0.4, "eta": 0.12, "solver": EXACT}
    e = SparseMoreauGrad(f, **settings)
    s = e.attribute(x, return_solution=True)
    whole = e.vjp(x, s, v)
    pair = SparseMoreauGrad(lambda a, b: f(torch.cat([a, b], 1)), **settings)
    parts, directions = (x[:, :7], x[:, 7:]), (v[:, :7], v[:, 7:])
    found = pair.vjp(parts, pair.attribute(parts, return_solution=True), directions)
    assert [g.shape for g in found] == [(3, 7), (3, 17)]
    # The bank numbers the tensors of a tuple one after the other, so it is the same problem.
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-8, atol=1e-10)

    some = torch.tensor([2, 0])
    part = e.vjp(x[some], s.take(some), v[some], ids=some)
    torch.testing.assert_close(part, whole[some], rtol=1e-8, atol=1e-10)

    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        solver = ProximalGradient(16, 300, 0.3, noise="fixed", average_last=1, tol=0.0)
        low = SparseMoreauGrad(Net(dtype=dtype), **{**settings, "solver": solver})
        got = low.vjp(x.to(dtype), low.attribute(x.to(dtype), return_solution=True), v.to(dtype), tol=1e-4)
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), whole, rtol=tolerance, atol=tolerance)
        assert got.isfinite().all()


def test_the_model_and_the_modes_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double().train()
    x = draw(2, 6)
    e = MoreauGrad(net, sigma=0.1, solver=ProximalGradient(4, 20))
    with pytest.warns(UserWarning, match="train mode"):
        s = e.attribute(x, target=[0, 2], return_solution=True)
    with torch.inference_mode(), pytest.warns(UserWarning, match="train mode"):
        g = e.vjp(x, s, torch.ones_like(x), target=[0, 2])
    with torch.enable_grad(), pytest.warns(UserWarning, match="train mode"):
        again = e.vjp(x, s, torch.ones_like(x), target=torch.tensor([0, 2]))
    assert net.training
    assert not again.requires_grad
    assert torch.equal(g, again)
    assert all(p.grad is None for p in net.parameters())


def test_what_cannot_be_measured_is_said() -> None:
    x = draw(2, FEATURES)
    e = MoreauGrad(Net(torch.relu), sigma=0.0, solver=ProximalGradient(1, 10))
    s = e.attribute(x, return_solution=True)
    with pytest.warns(UserWarning, match="derivative of 2 maps cannot be measured"):
        assert torch.equal(e.vjp(x, s, torch.ones_like(x)), torch.zeros_like(x))
    with pytest.raises(ValueError, match="'stein' divides by sigma"):
        e.vjp(x, s, torch.ones_like(x), hessian="stein")


def test_a_system_that_is_not_solved_is_said() -> None:
    f, _ = quadratic(torch.linspace(-0.6, 1.5, 8, dtype=F64))
    x = draw(1, 8)
    e = MoreauGrad(f, sigma=0.1, solver=ProximalGradient(2, 10))
    s = e.attribute(x, return_solution=True)
    with pytest.warns(UserWarning, match=r"relative residual of \d"):
        e.vjp(x, s, torch.ones_like(x), max_steps=1)


def test_an_empty_batch() -> None:
    x = torch.empty(0, FEATURES, dtype=F64)
    e = MoreauGrad(Net(), sigma=0.1)
    assert e.vjp(x, e.attribute(x, return_solution=True), x).shape == (0, FEATURES)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vectors": torch.ones(2, 3)}, "vectors: expected the form and shape"),
        ({"vectors": (torch.ones(2, FEATURES),) * 2}, "vectors: expected the form and shape"),
        ({"hessian": "exact"}, "hessian: expected one of"),
        ({"tol": 0.0}, "tol: expected a number between 0 and 1"),
        ({"max_steps": 0}, "max_steps"),
        ({"num_samples": -1}, "num_samples"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], match: str) -> None:
    e, x = MoreauGrad(Net(), sigma=0.1, solver=ProximalGradient(2, 10)), draw(2, FEATURES)
    s = e.attribute(x, return_solution=True)
    with pytest.raises(ValueError, match=match):
        e.vjp(x, s, **{"vectors": torch.ones_like(x), **settings})
