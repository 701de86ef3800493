"""Certificates against truths in closed form: residual, curvature, what they imply, and what they must not claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Certificate, GroupSparseMoreauGrad, Labels, MoreauGrad, ProximalGradient, SparseMoreauGrad
from moreau_ext.analysis.certificate import BOUND, FAILED, MEASURED
from moreau_ext.analysis.curvature import student_quantile
from moreau_ext.analysis.hessian import Bank, SmoothedHessian, find_methods
from moreau_ext.analysis.krylov import extreme_eigenvalues, lanczos, minimal_residual, tridiagonal
from moreau_ext.model.bind import bind_score
from moreau_ext.model.passes import PassRunner
from moreau_ext.solvers.problem import Problem

D, SIGMA, RHO, ETA = 12, 0.5, 0.8, 0.3
F64 = torch.float64


class Ridge(nn.Module):
    """f(x) = Σ_k c_k·φ(w_k·x + b_k), whose Gaussian smoothing has a closed form for φ = sin and φ = relu."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.kind = kind
        self.w = nn.Parameter(torch.randn(20, D, generator=g, dtype=F64) / 2, requires_grad=False)
        self.b = nn.Parameter(torch.randn(20, generator=g, dtype=F64), requires_grad=False)
        self.c = nn.Parameter(torch.randn(20, generator=g, dtype=F64) / 3, requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        phi = torch.sin if self.kind == "sin" else torch.relu
        return phi(x @ self.w.T + self.b) @ self.c

    def smoothed(self, x: Tensor, sigma: float = SIGMA) -> tuple[Tensor, Tensor]:
        """∇f_σ [B, D] and ∇²f_σ [B, D, D]."""
        t = x @ self.w.T + self.b
        if self.kind == "sin":
            damped = self.c * torch.exp(-(sigma**2) * self.w.square().sum(1) / 2)
            first, second = damped * t.cos(), -damped * t.sin()
        else:
            width = sigma * self.w.norm(dim=1)
            first = self.c * torch.special.ndtr(t / width)
            second = self.c * torch.exp(-(t / width).square() / 2) / (math.sqrt(2 * math.pi) * width)
        return first @ self.w, torch.einsum("bk,ki,kj->bij", second, self.w, self.w)


KINDS = ["sin", "relu"]
LOOSE = ProximalGradient(8, 40, 0.2, average_last=20, tol=0.0)


class Quadratic(nn.Module):
    """½xᵀQx + b·x with eigenvalues from −0.6 to 1.5."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        basis = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=F64))[0]
        q = basis @ torch.diag(torch.linspace(-0.6, 1.5, D, dtype=F64)) @ basis.T
        self.register_buffer("q", (q + q.T) / 2)
        self.register_buffer("b", torch.randn(D, generator=g, dtype=F64))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.q.to(x)) * x).sum(1) / 2 + x @ self.b.to(x)


def problem_of(f: Any, x: Tensor, sigma: float = SIGMA, **settings: Any) -> Problem:
    e = MoreauGrad(f, sigma=sigma, rho=RHO, **settings)
    return e.problem(x)


def points(count: int = 8, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, D, dtype=F64, generator=torch.Generator().manual_seed(5)).to(dtype)


# --- second derivatives ----------------------------------------------------------------------------------------------


def test_hvp_is_the_second_derivative() -> None:
    f, x, v = Quadratic(), points(), torch.randn(8, D, dtype=F64)
    bound, _ = bind_score(f, (x,), None)
    torch.testing.assert_close(bound.hvp((x,), (v,))[0], v @ f.q)
    net = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, 3)).double().eval()
    bound, _ = bind_score(net, (x,), torch.arange(8) % 3, score="log_prob")
    got = bound.hvp((x,), (v,))[0]
    for i in range(8):
        exact = torch.autograd.functional.hessian(lambda row, i=i: net(row[None]).log_softmax(1)[0, i % 3], x[i])
        torch.testing.assert_close(got[i], exact @ v[i])
    assert all(p.grad is None for p in net.parameters())


def test_hvp_of_two_inputs_and_of_what_has_none() -> None:
    x, y, v = points(3), points(3) + 1, torch.randn(3, D, dtype=F64)
    bound, _ = bind_score(lambda a, b: (a * b * b).sum(1), (x, y), None)
    first, second = bound.hvp((x, y), (v, 2 * v))
    torch.testing.assert_close(first, 2 * y * 2 * v)
    torch.testing.assert_close(second, 2 * y * v + 2 * x * 2 * v)
    for f in (lambda a: a.sum(1), lambda a: a.relu().sum(1)):
        bound, _ = bind_score(f, (x,), None)
        assert torch.equal(bound.hvp((x,), (v,))[0], torch.zeros_like(x))


def test_hvp_through_fused_attention() -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.view(-1, 1, 4, 3)
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum((1, 2, 3))

    x, v = points(2, torch.float32), torch.randn(2, D)
    bound, _ = bind_score(attend, (x,), None)
    got = bound.hvp((x,), (v,))[0]
    h = 1e-3
    difference = (bound.gradient((x + h * v,))[1] - bound.gradient((x - h * v,))[1]) / (2 * h)
    torch.testing.assert_close(got, difference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["autograd", "stein"])
@pytest.mark.parametrize("max_batch", [None, 7, 1])
def test_smoothed_products(method: str, max_batch: int | None) -> None:
    """Against the closed form within sampling error; the same however it is cut into passes."""
    f, x = Ridge("sin"), points(2)
    count = 64 if max_batch == 1 else 4096 if method == "stein" else 1024
    problem = problem_of(f, x)
    problem = replace(problem, passes=PassRunner(max_batch))
    hessian = SmoothedHessian(Bank(problem, None, count), method)
    v = torch.randn(2, D, dtype=F64)
    whole = SmoothedHessian(Bank(problem, None, count), method).product(v)
    torch.testing.assert_close(hessian.product(v), whole, rtol=1e-10, atol=1e-12)
    halves = (hessian.product(v, 0) + hessian.product(v, 1)) / 2
    torch.testing.assert_close(halves, whole, rtol=1e-10, atol=1e-12)
    value, error = hessian.quadratic_form(v)
    torch.testing.assert_close(value, (whole * v).sum(1), rtol=1e-10, atol=1e-10)
    exact = torch.einsum("bi,bij,bj->b", v, f.smoothed(x)[1], v)
    assert ((value - exact).abs() <= 5 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stein_on_kinks_and_waves(kind: str) -> None:
    f, x = Ridge(kind), points()
    v = torch.randn(8, D, dtype=F64)
    exact = torch.einsum("bij,bj->bi", f.smoothed(x)[1], v)
    product = SmoothedHessian(Bank(problem_of(f, x), None, 1 << 14), "stein").product(v)
    assert float((product - exact).norm() / exact.norm()) < 0.05
    if kind == "relu":
        zero = SmoothedHessian(Bank(problem_of(f, x), None, 64), "autograd").product(v)
        assert torch.equal(zero, torch.zeros_like(v))  # which means nothing


def test_noise_slope_is_the_derivative_in_sigma() -> None:
    f, x, h = Ridge("sin"), points(4), 1e-4
    w = torch.randn(4, D, dtype=F64)

    def slope(sigma: float, samples: int, method: str) -> Tensor:
        return SmoothedHessian(Bank(problem_of(f, x, sigma), None, samples), method).noise_slope(w)[:, 0]

    def mean_gradient(sigma: float) -> Tensor:
        return (Bank(problem_of(f, x, sigma), None, 64).gradients(0, 64).mean(1) * w).sum(1)

    on_the_bank = (mean_gradient(SIGMA + h) - mean_gradient(SIGMA - h)) / (2 * h)
    torch.testing.assert_close(slope(SIGMA, 64, "autograd"), on_the_bank, rtol=1e-6, atol=1e-8)
    exact = ((f.smoothed(x, SIGMA + h)[0] - f.smoothed(x, SIGMA - h)[0]) * w).sum(1) / (2 * h)
    assert float((slope(SIGMA, 1 << 14, "autograd") - exact).norm() / exact.norm()) < 0.05
    assert float((slope(SIGMA, 1 << 15, "stein") - exact).norm() / exact.norm()) < 0.2


def test_find_methods() -> None:
    x = points(4)
    net = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 3)).double().eval()
    assert find_methods(problem_of(Ridge("sin"), x), (torch.zeros_like(x),)) == ["autograd"] * 4
    assert find_methods(problem_of(Quadratic(), x), (torch.zeros_like(x),)) == ["autograd"] * 4
    assert find_methods(problem_of(Ridge("relu"), x), (torch.zeros_like(x),)) == ["stein"] * 4
    # Second derivatives of the logarithm alone: not zero, and not all there is.
    assert find_methods(problem_of(net, x, score="log_prob"), (torch.zeros_like(x),)) == ["stein"] * 4
    assert find_methods(problem_of(Ridge("relu"), x, 0.0), (torch.zeros_like(x),)) == ["none"] * 4
    assert find_methods(problem_of(Ridge("sin"), x, 0.0), (torch.zeros_like(x),)) == ["autograd"] * 4
    single = problem_of(Quadratic(), points(4, torch.float32))
    single = replace(single, passes=PassRunner(5))
    assert find_methods(single, (torch.zeros(4, D),)) == ["autograd"] * 4


def test_no_second_derivative_means_stein() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().sum(1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g[:, None]

    x = points(2)
    e = MoreauGrad(Square.apply, sigma=0.1, solver=LOOSE)
    c = e.certificate(x, e.attribute(x, return_solution=True), num_samples=256)
    assert c.curvature_method == ("stein", "stein")
    assert ((c.smoothness_low <= 2) & (c.smoothness_high >= 2)).all()


# --- linear algebra --------------------------------------------------------------------------------------------------


def matrices(batch: int, n: int) -> Tensor:
    a = torch.randn(batch, n, n, dtype=F64)
    return (a + a.mT) / 2


def test_lanczos() -> None:
    a = matrices(5, 30)
    start = torch.randn(5, 30, dtype=F64)
    q, diagonal, coupling = lanczos(lambda v: torch.einsum("bij,bj->bi", a, v), start, 30)
    torch.testing.assert_close(q @ q.mT, torch.eye(30, dtype=F64).expand(5, -1, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ a @ q.mT, tridiagonal(diagonal, coupling), rtol=0, atol=1e-11)
    values, vectors, left = extreme_eigenvalues(lambda v: torch.einsum("bij,bj->bi", a, v), start, 18)
    exact = torch.linalg.eigvalsh(a)[:, [0, -1]]
    assert ((values - exact).abs() <= left + 1e-10).all()
    residual = torch.einsum("bij,bkj->bki", a, vectors) - values[:, :, None] * vectors
    torch.testing.assert_close(residual.norm(dim=2), left, rtol=1e-6, atol=1e-9)


def test_lanczos_ends_in_an_invariant_subspace() -> None:
    q, diagonal, coupling = lanczos(lambda v: 3 * v, torch.randn(2, 6, dtype=F64), 4)
    torch.testing.assert_close(diagonal[:, 0], torch.full((2,), 3.0, dtype=F64))
    assert torch.equal(q[:, 1:], torch.zeros(2, 3, 6, dtype=F64))
    assert torch.equal(coupling, torch.zeros(2, 4, dtype=F64))
    q, diagonal, _ = lanczos(lambda v: 3 * v, torch.zeros(1, 6, dtype=F64), 2)
    assert torch.equal(q, torch.zeros(1, 2, 6, dtype=F64))
    assert torch.equal(diagonal, torch.zeros(1, 2, dtype=F64))


def test_minimal_residual_solves_definite_and_indefinite_systems() -> None:
    a, b = matrices(6, 25), torch.randn(6, 25, dtype=F64)
    a[:3] = a[:3] @ a[:3].mT + torch.eye(25)
    b[5] = 0
    x = minimal_residual(lambda v: torch.einsum("bij,bj->bi", a, v), b, 1e-10, 25)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", a, x), b, rtol=0, atol=1e-8)
    assert torch.equal(x[5], torch.zeros(25, dtype=F64))


def test_student_quantile() -> None:
    for freedom, exact in ((5, 2.5706), (15, 2.1314), (31, 2.0395)):
        assert student_quantile(0.95, freedom) == pytest.approx(exact, rel=5e-3)


# --- residual and curvature against the truth ------------------------------------------------------------------------


def explainer(penalty: str, f: Any, **settings: Any) -> Any:
    settings = {"rho": RHO, "sigma": SIGMA, "solver": LOOSE, **settings}
    if penalty == "none":
        return MoreauGrad(f, **settings)
    if penalty == "l1":
        return SparseMoreauGrad(f, eta=ETA, **settings)
    return GroupSparseMoreauGrad(f, eta=ETA, groups=Labels(torch.arange(D) // 3), **settings)


def image(penalty: str, p: Tensor) -> Tensor:
    """−ρS_η(p)."""
    if penalty == "l1":
        p = p.sign() * (p.abs() - ETA).clamp_min(0)
    elif penalty == "groups":
        g = p.view(-1, D // 3, 3)
        p = (g * (1 - ETA / g.norm(dim=2, keepdim=True)).clamp_min(0)).view(-1, D)
    return -RHO * p


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["none", "l1", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residuals_interval_covers(kind: str, penalty: str) -> None:
    """At displacements near and far from a solution: 95 % intervals, of 300 inputs at most 8 % miss the truth."""
    f, x = Ridge(kind), torch.randn(300, D, dtype=F64)
    e = explainer(penalty, f)
    s = e.attribute(x, return_solution=True)
    assert (s.nnz > 0).all()
    c = e.certificate(x, s, num_samples=512, num_hvp_samples=64, lanczos_steps=2)
    r = (s.displacement - image(penalty, f.smoothed(x + s.displacement)[0])).norm(dim=1)
    above, below = (r > c.residual_high).double().mean(), (r < c.residual_low).double().mean()
    assert above <= 0.05
    assert above + below <= 0.08
    # Neither by being wide: the noise is subtracted, in the mean of the squares.
    assert float((c.residual.square().mean() / r.square().mean()).sqrt()) == pytest.approx(1, rel=0.1)
    assert (c.residual_high - c.residual_low <= 5 * c.noise_floor + 1e-12).all()


def test_more_samples_narrow_the_interval() -> None:
    f, x = Ridge("relu"), points(16)
    e = explainer("l1", f)
    s = e.attribute(x, return_solution=True)
    few, many = (e.certificate(x, s, num_samples=m, hessian="stein") for m in (256, 4096))
    for name in ("residual", "smoothness", "weak_convexity"):
        a, b = (getattr(c, f"{name}_high") - getattr(c, f"{name}_low") for c in (few, many))
        assert float(b.mean()) < 0.5 * float(a.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_covers(kind: str) -> None:
    f, x = Ridge(kind), torch.randn(48, D, dtype=F64)
    e = explainer("l1", f)
    s = e.attribute(x, return_solution=True)
    c = e.certificate(x, s, num_samples=2048)
    assert set(c.curvature_method) == {"autograd" if kind == "sin" else "stein"}
    values = torch.linalg.eigvalsh(f.smoothed(x + s.displacement)[1])
    truth = {"weak_convexity": (-values[:, 0]).clamp_min(0), "smoothness": values.abs().amax(1)}
    for name, exact in truth.items():
        low, middle, high = (getattr(c, name + end) for end in ("_low", "", "_high"))
        assert (low <= middle).all()
        assert (middle <= high).all()
        assert float((exact > high).double().mean()) <= 0.05
        assert float((exact < low).double().mean()) <= 0.1
        assert float((middle - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("penalty", ["none", "l1", "groups"])
def test_quadratics_are_certified_exactly(penalty: str) -> None:
    """Pairs of samples leave no noise: the interval is a point, and the bounds hold for the solution."""
    f, x = Quadratic(), points()
    rough = explainer(penalty, f, solver=ProximalGradient(2, 9, 0.4, average_last=1, tol=0.0))
    fine = explainer(penalty, f, solver=ProximalGradient(2, 600, 0.4, average_last=1, tol=0.0))
    s, exact = rough.attribute(x, return_solution=True), fine.attribute(x, return_solution=True).displacement
    c = rough.certificate(x, s, num_samples=64)
    y = image(penalty, (x + s.displacement) @ f.q + f.b)
    r = (s.displacement - y).norm(dim=1)
    for end in ("residual", "residual_low", "residual_high"):
        torch.testing.assert_close(getattr(c, end), r, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(c.weak_convexity, torch.full((8,), 0.6, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(c.smoothness_high, torch.full((8,), 1.5, dtype=F64), rtol=1e-6, atol=0)
    gap = 1 - 0.6 * RHO
    torch.testing.assert_close(c.distance, r * (1 + RHO * 0.9) / gap, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(c.image_distance, r * RHO * 1.5 / gap, rtol=1e-5, atol=1e-10)
    slope = 1.5 / gap if penalty != "none" else min(1.5 / gap, max(1 / RHO, 0.6 / gap))
    torch.testing.assert_close(c.map_lipschitz, torch.full((8,), slope, dtype=F64), rtol=1e-5, atol=0)
    assert ((s.displacement - exact).norm(dim=1) <= c.distance).all()
    assert ((y - exact).norm(dim=1) <= c.image_distance).all()
    assert c.premise.all()
    assert c.status == (MEASURED,) * 8
    at = fine.certificate(x, fine.attribute(x, return_solution=True), num_samples=64)
    assert (at.relative_high < 1e-9).all()


def test_a_linear_score() -> None:
    a, x = points(1), points(3)
    e = explainer("l1", lambda x: (x * a).sum(1), sigma=0.2)
    s = e.attribute(x, return_solution=True)
    wrong = replace(s, displacement=s.displacement + 0.1)
    c = e.certificate(x, wrong, num_samples=64)
    r = (wrong.displacement - image("l1", a)).norm(dim=1)
    torch.testing.assert_close(c.residual_low, r, rtol=1e-9, atol=0)
    torch.testing.assert_close(c.residual_high, r, rtol=1e-9, atol=0)
    assert torch.equal(c.smoothness_high, torch.zeros(3, dtype=F64))
    torch.testing.assert_close(c.distance, r, rtol=1e-9, atol=0)  # a bound that is met
    assert torch.equal(c.map_lipschitz, torch.zeros(3, dtype=F64))
    torch.testing.assert_close(c.relative_residual, r / wrong.displacement.norm(dim=1).maximum(image("l1", a).norm()))


# --- what may be claimed ---------------------------------------------------------------------------------------------


def test_no_bound_without_its_premise() -> None:
    f, x = Quadratic(), points(4)
    rho = torch.tensor([1.0, 1.6, 1.7, 3.0], dtype=F64)  # λ = 0.6
    e = SparseMoreauGrad(f, rho=rho, eta=ETA, sigma=0.1, solver=ProximalGradient(2, 20, 0.2))
    c = e.certificate(x, e.attribute(x, return_solution=True), num_samples=64)
    assert c.status == (MEASURED, MEASURED, FAILED, FAILED)
    assert c.premise.tolist() == [True, True, False, False]
    for name in ("distance", "image_distance", "map_lipschitz"):
        assert getattr(c, name).isfinite().tolist() == [True, True, False, False]
        assert (getattr(c, name)[2:] == math.inf).all()


def test_a_bound_needs_constants_that_hold_everywhere() -> None:
    f, x = Ridge("relu"), points(4)
    lipschitz = float((f.c.abs() * f.w.norm(dim=1)).sum())
    wide = 1.5 * RHO * lipschitz * math.sqrt(2 / math.pi)
    sigma = torch.tensor([wide, wide, SIGMA, SIGMA], dtype=F64)
    e = MoreauGrad(f, rho=RHO, sigma=sigma, solver=LOOSE)
    s = e.attribute(x, return_solution=True)
    c = e.certificate(x, s, num_samples=1024, lipschitz=lipschitz)
    assert c.status[:2] == (BOUND, BOUND)
    assert BOUND not in c.status[2:]
    beta = lipschitz * math.sqrt(2 / math.pi) / wide
    assert beta * RHO == pytest.approx(1 / 1.5)
    torch.testing.assert_close(c.distance[:2], c.residual_high[:2] / (1 - RHO * beta))  # λ = β
    assert (c.smoothness[:2] <= beta).all()  # what is measured stays what is measured
    given = e.certificate(x, s, num_samples=256, moduli=(1.2, torch.full((4,), 2.0)))
    assert given.status == (BOUND,) * 4
    torch.testing.assert_close(given.image_distance, given.residual_high * RHO * 2 / (1 - 1.2 * RHO))
    never = e.certificate(x, s, num_samples=256, moduli=(1 / RHO, 2.0))
    assert BOUND not in never.status


def test_constants_that_the_measurement_contradicts_give_no_bound() -> None:
    x, e = points(3), MoreauGrad(Quadratic(), rho=RHO, sigma=0.1, solver=LOOSE)
    s = e.attribute(x, return_solution=True)
    assert e.certificate(x, s, num_samples=64, moduli=(0.6, 1.5)).status == (BOUND,) * 3
    assert e.certificate(x, s, num_samples=64, moduli=(0.3, 1.5)).status == (MEASURED,) * 3
    assert e.certificate(x, s, num_samples=64, moduli=(0.6, 1.0)).status == (MEASURED,) * 3


def test_kinks_without_noise_are_not_measured() -> None:
    f, x = Ridge("relu"), points(3)
    e = explainer("l1", f, sigma=0.0)
    s = e.attribute(x, return_solution=True)
    c = e.certificate(x, s, num_samples=64)
    assert c.curvature_method == ("none",) * 3
    assert c.status == (FAILED,) * 3
    assert c.weak_convexity.isnan().all()
    assert (c.distance == math.inf).all()
    assert c.residual.isfinite().all()
    with pytest.raises(ValueError, match="'stein' divides by sigma, which is 0 for input id 0"):
        e.certificate(x, s, hessian="stein")


def test_a_zero_map_is_a_solution() -> None:
    x = points(2)
    e = SparseMoreauGrad(Ridge("sin"), sigma=SIGMA, eta_ratio=1.0, solver=LOOSE)
    with pytest.warns(UserWarning, match="zero everywhere"):
        s = e.attribute(x, return_solution=True)
    c = e.certificate(x, s, num_samples=64)
    assert torch.equal(c.relative_high, torch.zeros(2, dtype=F64))


# --- how it is called ------------------------------------------------------------------------------------------------


def numbers(c: Certificate) -> Tensor:
    return torch.stack([v.double() for v in vars(c).values() if isinstance(v, Tensor)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_inputs_certificate_does_not_depend_on_its_batch(kind: str) -> None:
    f, x = Ridge(kind), points(5)
    e = explainer("groups", f)
    s = e.attribute(x, return_solution=True)
    whole = numbers(e.certificate(x, s, num_samples=128, num_hvp_samples=64))
    again = numbers(e.certificate(x, s, num_samples=128, num_hvp_samples=64))
    assert torch.equal(whole, again)
    small = replace(e, max_batch=33)
    torch.testing.assert_close(numbers(small.certificate(x, s, num_samples=128, num_hvp_samples=64)), whole)
    some = torch.tensor([3, 1])
    part = e.certificate(x[some], s.take(some), ids=some, num_samples=128, num_hvp_samples=64)
    torch.testing.assert_close(numbers(part), whole[:, some])
    other = replace(e, seed=1).certificate(x, s, num_samples=128, num_hvp_samples=64)
    assert (numbers(other)[0] != whole[0]).any()


def test_layouts_dtypes_and_tuples() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    e = GroupSparseMoreauGrad(net, eta_ratio=0.3, solver=LOOSE)
    s = e.attribute(x, return_solution=True)
    plain = numbers(e.certificate(x, s, num_samples=64))
    last = numbers(e.certificate(x.to(memory_format=torch.channels_last), s, num_samples=64))
    torch.testing.assert_close(plain, last, rtol=1e-3, atol=1e-4)

    f = Quadratic()
    for dtype in (torch.float16, torch.bfloat16):
        half = points(2, dtype)
        e = MoreauGrad(f, rho=RHO, sigma=SIGMA, solver=LOOSE)
        c = e.certificate(half, e.attribute(half, return_solution=True), num_samples=256)
        assert numbers(c).isfinite().all()
        assert (c.smoothness - 1.5).abs().max() < 0.1

    def two(a: Tensor, b: Tensor) -> Tensor:
        return f(torch.cat([a, b], dim=1))

    e = MoreauGrad(two, rho=RHO, sigma=SIGMA, solver=LOOSE)
    pair = (points()[:, :5], points()[:, 5:])
    both = e.certificate(pair, e.attribute(pair, return_solution=True), num_samples=64)
    torch.testing.assert_close(both.smoothness, torch.full((8,), 1.5, dtype=F64), rtol=1e-6, atol=0)


def test_the_model_and_the_modes_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(D, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double().train()
    x, e = points(2), MoreauGrad(net, sigma=0.1, solver=LOOSE)
    with pytest.warns(UserWarning, match="train mode"):
        s = e.attribute(x, target=1, return_solution=True)
    with torch.inference_mode(), pytest.warns(UserWarning, match="train mode"):
        c = e.certificate(x, s, target=[1, 1], num_samples=64)
    assert net.training
    assert c.curvature_method == ("autograd", "autograd")
    assert not c.residual.requires_grad


def test_an_empty_batch() -> None:
    x = torch.empty(0, D, dtype=F64)
    e = MoreauGrad(Quadratic())
    c = e.certificate(x, e.attribute(x, return_solution=True))
    assert c.residual.shape == (0,)
    assert c.premise.dtype == torch.bool
    assert "0 inputs" in str(c)


def test_the_summary_says_what_kind_of_statement_it_is() -> None:
    f, x = Quadratic(), points(4)
    e = MoreauGrad(f, rho=torch.tensor([1.0, 1.0, 3.0, 3.0]), sigma=0.1, solver=LOOSE)
    s = e.attribute(x, return_solution=True)
    text = str(e.certificate(x, s, num_samples=64))
    assert "measured locally" in text
    assert "not global moduli" in text
    assert "premise not satisfied" in text
    assert "bound:" not in text
    assert "bound:" in str(e.certificate(x, s, num_samples=64, moduli=(0.6, 1.5)))
    assert "... and 2 more" in e.certificate(x, s, num_samples=64).summary(limit=2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 0}, "num_samples: expected a positive integer"),
        ({"num_hvp_samples": 1.5}, "num_hvp_samples"),
        ({"lanczos_steps": True}, "lanczos_steps"),
        ({"hessian": "exact"}, "hessian: expected one of auto, autograd, stein, got 'exact'"),
        ({"confidence": 1.0}, "confidence"),
        ({"lipschitz": -1.0}, "lipschitz"),
        ({"moduli": (1.0, math.nan)}, r"moduli\[1\]"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], match: str) -> None:
    e, x = MoreauGrad(Quadratic(), sigma=0.1, solver=LOOSE), points(2)
    s = e.attribute(x, return_solution=True)
    with pytest.raises(ValueError, match=match):
        e.certificate(x, s, **settings)


def test_a_solution_of_other_inputs_is_refused() -> None:
    e, x = MoreauGrad(Quadratic(), sigma=0.1, solver=LOOSE), points(2)
    s = e.attribute(x, return_solution=True)
    with pytest.raises(ValueError, match="solution: expected displacements shaped as the inputs"):
        e.certificate(points(3), s)
    with pytest.raises(TypeError, match="return_solution=True"):
        e.certificate(x, s.attribution)


@pytest.mark.parametrize("groups", [False, True])
def test_an_eta_that_was_found_is_the_problems(groups: bool) -> None:
    a = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    v = torch.tensor([[1.0, -2.0, 0.5, 1.0, 1.0, 1.0]], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (x * a).sum(1) + 0.05 * x.square().sum(1)

    def make(**settings: Any) -> Any:
        if groups:
            return GroupSparseMoreauGrad(f, sigma=0.1, groups=Labels(torch.tensor([0, 0, 1, 1, 2, 2])), **settings)
        return SparseMoreauGrad(f, sigma=0.1, **settings)

    for found_by, found in (
        (make(support=2), make(support=2).attribute(a, return_solution=True)),
        (make(eta=0.3), make(eta=0.3).eta_path(a, [0.5])[0]),
    ):
        told = make(eta=found.eta)
        proof, expected = found_by.certificate(a, found), told.certificate(a, found)
        assert proof.relative_residual < 1e-2
        torch.testing.assert_close(proof.relative_residual, expected.relative_residual)
        torch.testing.assert_close(found_by.vjp(a, found, v), told.vjp(a, found, v))


def test_a_solution_of_a_tuple_is_not_one_of_a_tensor() -> None:
    two = MoreauGrad(lambda x, y: (x * y).sum(1))
    xs = (torch.rand(2, 3), torch.rand(2, 3))
    found = two.attribute(xs, return_solution=True)
    with pytest.raises(ValueError, match="displacements shaped as the inputs"):
        two.certificate(xs[0], found)


def test_a_solution_of_another_target_is_refused() -> None:
    model = nn.Linear(4, 3).eval()
    x = torch.rand(2, 4)
    explainer = MoreauGrad(model)
    found = explainer.attribute(x, 0, return_solution=True)
    for ask in (lambda **k: explainer.certificate(x, found, **k), lambda **k: explainer.vjp(x, found, x, **k)):
        with pytest.raises(
            ValueError, match=r"target: the solution explains \[0, 0\], and the target given is \[2, 2\]"
        ):
            ask(target=2)
        with pytest.raises(ValueError, match=r"its score of input 0 is .* give the inputs, target"):
            ask(target=lambda output: output[:, 2])
        ask(target=0)
        ask(ids=torch.tensor([7, 2]))  # another independent bank


@pytest.mark.parametrize("equal", [False, True])
def test_a_solution_knows_its_target(equal: bool) -> None:
    """Also where the scores of two classes coincide, so that no score tells them apart; and per input, as predicted."""
    model = nn.Linear(4, 3).eval()
    if equal:
        with torch.no_grad():
            model.bias.zero_()
            model.weight.copy_(torch.eye(3, 4))
    x = torch.ones(2, 4) if equal else torch.randn(2, 4)
    explainer = MoreauGrad(model)
    found = explainer.attribute(x, [0, 1], return_solution=True)
    assert found.target.tolist() == [[0], [1]]
    assert found.ids.tolist() == [0, 1]
    with pytest.raises(ValueError, match="target: the solution explains"):
        explainer.certificate(x, found, target=1)
    assert float(explainer.certificate(x, found).relative_residual.max()) < 0.02
    predicted = explainer.attribute(x, return_solution=True)
    assert torch.equal(predicted.target[:, 0], model(x).argmax(1))
    assert explainer.attribute(x, lambda output: output[:, 0], return_solution=True).target is None


def test_a_solution_of_a_callable_is_not_one_of_the_predicted_class() -> None:
    """Also where its score is that of the predicted class."""
    x = torch.ones(1, 2)
    explainer = MoreauGrad(lambda x: x * 1, rho=1.0, sigma=0.1)

    def second(output: Tensor) -> Tensor:
        return output[:, 1]

    found = explainer.attribute(x, second, return_solution=True)
    for target in (None, 0, 1):
        with pytest.raises(ValueError, match="target: the solution explains a callable"):
            explainer.certificate(x, found, target)
        with pytest.raises(ValueError, match="target: the solution explains a callable"):
            explainer.vjp(x, found, x, target)
    assert float(explainer.certificate(x, found, second).relative_residual) < 0.02
