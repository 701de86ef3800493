"""The exact facts of the method, for every penalty: closed forms and certificates.

Expected values are computed here in float64 with plain loops, from the noise bank's specification; none of the
package's proximal maps is used to judge itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import TOLERANCE, close
from helpers import bank as noise_bank
from torch import Tensor, nn

from moreau_ext import (
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    Pixels,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    SparseMoreauGrad,
    Tiles,
)

B, C, H, W = 3, 2, 5, 4
FEATURES = C * H * W
SAMPLES = 6
SEED = 11

DTYPES = [torch.float64, torch.float32]


class Kind(NamedTuple):
    """A penalty, with its groups written down a second time."""

    groups: Any = None  # as the explainer takes them
    labels: Tensor | None = None  # [B, H, W]
    sqrt: bool = False
    sparse: bool = True

    def weight(self, size: int) -> float:
        return math.sqrt(size) if self.sqrt else 1.0

    def blocks(self, b: int) -> list[Tensor]:
        """Flat feature numbers of every group of an input."""
        if self.labels is None:
            return list(torch.arange(FEATURES).view(-1, 1))
        flat = self.labels[b].expand(C, H, W).flatten()
        return [(flat == g).nonzero().squeeze(1) for g in flat.unique()]

    def shrink(self, v: Tensor, eta: Tensor) -> Tensor:
        """S_η(v) by the formula, group by group; v [B, ...], eta [B]."""
        if not self.sparse:
            return v.clone()
        out = torch.zeros_like(v)
        for b in range(v.shape[0]):
            for block in self.blocks(b):
                part = v[b].flatten()[block]
                norm = float(part.norm())
                t = float(eta[b]) * self.weight(len(block))
                if norm > t:
                    out[b].view(-1)[block] = part * (1 - t / norm)
        return out

    def value(self, v: Tensor, eta: Tensor) -> Tensor:
        """η·Ω(v), [B]."""
        if not self.sparse:
            return torch.zeros(v.shape[0], dtype=v.dtype)
        omega = [
            sum(self.weight(len(g)) * float(v[b].flatten()[g].norm()) for g in self.blocks(b))
            for b in range(v.shape[0])
        ]
        return eta * torch.tensor(omega, dtype=v.dtype)

    def strengths(self, p: Tensor, where: float) -> Tensor:
        """η [B] between the least ‖p_g‖/w_g (where = 0) and the largest, which is η_max (where = 1)."""
        limits = []
        for b in range(p.shape[0]):
            each = [float(p[b].flatten()[g].norm()) / self.weight(len(g)) for g in self.blocks(b)]
            limits.append(min(each) + where * (max(each) - min(each)))
        return torch.tensor(limits, dtype=p.dtype)

    def eta_max(self, p: Tensor) -> Tensor:
        return self.strengths(p, 1.0)


_TILES = ((torch.arange(H) // 3)[:, None] * 2 + (torch.arange(W) // 3)).expand(B, H, W)
_PIXELS = torch.arange(H * W).view(H, W).expand(B, H, W)
_MAP = (torch.arange(H * W).view(H, W) * 7) % 5
_MAPS = torch.stack([_MAP, _MAP // 2, _MAP.flip(0)])

KINDS = {
    "moreau": Kind(sparse=False),
    "sparse": Kind(),
    "tiles": Kind(Tiles(3), _TILES),
    "tiles-sqrt": Kind(Tiles(3, weights="sqrt"), _TILES, sqrt=True),
    "pixels": Kind(Pixels(), _PIXELS),
    "pixels-sqrt": Kind(Pixels(weights="sqrt"), _PIXELS, sqrt=True),
    "labels": Kind(Labels(_MAP), _MAP.expand(B, H, W)),
    "labels-each-sqrt": Kind(Labels(_MAPS[:, None], weights="sqrt"), _MAPS, sqrt=True),
}
SPARSE = [name for name in KINDS if name != "moreau"]


def explainer(kind: str, model: Callable[..., Any], **settings: Any) -> Any:
    settings = {"seed": SEED, **settings}
    if kind == "moreau":
        return MoreauGrad(model, **{k: v for k, v in settings.items() if not k.startswith("eta")})
    if kind == "sparse":
        return SparseMoreauGrad(model, **settings)
    return GroupSparseMoreauGrad(model, groups=KINDS[kind].groups, **settings)


def fixed(max_steps: int, step_size: float, **settings: Any) -> ProximalGradient:
    """A deterministic problem, solved for a given number of steps, with the last p as the answer."""
    settings = {"num_samples": SAMPLES, "antithetic": False, "average_last": 1, "tol": 0.0, **settings}
    return ProximalGradient(max_steps=max_steps, step_size=step_size, noise="fixed", **settings)


def bank(antithetic: bool = False, ids: Tensor | None = None, samples: int = SAMPLES) -> Tensor:
    """z [B, m, C, H, W], float64, of step 0."""
    ids = torch.arange(B) if ids is None else ids
    return noise_bank(SEED, ids, samples, (C, H, W), antithetic)


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def squares(v: Tensor) -> Tensor:
    return v.flatten(1).square().sum(1)


def per_row(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


class SmoothNet(nn.Module):
    """f = w·act(Vx + c), with continuous gradients and a known Lipschitz constant."""

    def __init__(self, dtype: torch.dtype, activation: Callable[[Tensor], Tensor] = nn.functional.silu) -> None:
        super().__init__()
        self.v = nn.Parameter(draw(dtype, 10, FEATURES) / 8)
        self.c = nn.Parameter(draw(dtype, 10))
        self.w = nn.Parameter(draw(dtype, 10) / 3)
        self.activation = activation
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.flatten(1) @ self.v.T + self.c) @ self.w

    @property
    def lipschitz(self) -> float:
        # The slope of SiLU is at most 1.0999, that of softplus 1.
        return 1.1 * float(torch.linalg.matrix_norm(self.v.detach(), 2) * self.w.detach().norm())


ACTIVATIONS = {"silu": nn.functional.silu, "softplus": nn.functional.softplus}


# --- linear --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("antithetic", [False, True], ids=["independent", "antithetic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.3, 7.0])
def test_linear(kind: str, rho: float, antithetic: bool, dtype: torch.dtype) -> None:
    """f = a·x: A = S_η(a), ∇F = a, F = a·(x + σz̄) − (ρ/2)‖S_η(a)‖², for any ρ."""
    a, x = draw(dtype, 1, C, H, W), draw(dtype, B, C, H, W)
    eta, sigma = torch.tensor([0.2, 0.5, 0.9], dtype=dtype), 0.5

    solver = fixed(45, 0.5 * rho, antithetic=antithetic)
    settings: dict[str, Any] = {"rho": rho, "sigma": sigma, "eta": eta, "solver": solver}
    s = explainer(kind, lambda x: (x * a).flatten(1).sum(1), **settings).attribute(x, return_solution=True)

    gradient = a.double().expand(B, -1, -1, -1)
    expected = KINDS[kind].shrink(gradient, eta)
    shifted = x.double() + sigma * bank(antithetic).mean(1)
    close(s.attribution, expected, dtype)
    close(s.displacement, -rho * expected, dtype)
    close(s.envelope_gradient, gradient, dtype)
    close(s.envelope, (gradient * shifted).flatten(1).sum(1) - rho / 2 * squares(expected), dtype)
    close(s.score, (gradient * x.double()).flatten(1).sum(1), dtype)
    assert torch.equal(s.attribution == 0, expected == 0)
    assert torch.equal(s.nnz, (expected != 0).flatten(1).sum(1))


def test_the_mean_of_an_antithetic_bank_is_zero() -> None:
    z = bank(antithetic=True)
    assert torch.equal(z[:, 0::2], -z[:, 1::2])
    assert bank(antithetic=False).mean(1).abs().max() > 0.1


# --- quadratic -----------------------------------------------------------------------------------------------------

BETA, LAMBDA, RHO = 1.5, 0.8, 0.7  # ρλ = 0.56
BEST_STEP = 2 / ((1 / RHO - LAMBDA) + (1 / RHO + BETA))  # contracts by (β + λ)/(2/ρ + β − λ) = 0.65 a step
STEPS = 75  # 0.65^75 = 9e-15


def dense_quadratic(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Q with eigenvalues from −λ to β, and b."""
    basis = torch.linalg.qr(draw(torch.float64, FEATURES, FEATURES))[0]
    q = basis @ torch.diag(torch.linspace(-LAMBDA, BETA, FEATURES, dtype=torch.float64)) @ basis.T
    return ((q + q.T) / 2).to(dtype), draw(dtype, FEATURES)


def quadratic(q: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return ((flat @ q) * flat).sum(1) / 2 + flat @ b

    return f


def objective(
    f: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor, z: Tensor, kind: Kind, eta: Tensor, sigma: float = 0.5
) -> Tensor:
    """H(δ) by its definition, [B]."""
    noisy = (x + delta).unsqueeze(1) + sigma * z
    smoothed = f(noisy.flatten(0, 1)).view(B, -1).mean(1)
    return smoothed + squares(delta) / (2 * RHO) + kind.value(delta, eta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("antithetic", [False, True], ids=["independent", "antithetic"])
def test_quadratic(antithetic: bool, dtype: torch.dtype) -> None:
    """f = ½xᵀQx + b·x with ρ < 1/λ: A = ∇F = (I + ρQ)⁻¹(Q(x + σz̄) + b)."""
    q, b = dense_quadratic(dtype)
    x = draw(dtype, B, C, H, W)
    solver = fixed(STEPS, BEST_STEP, antithetic=antithetic)
    e = MoreauGrad(quadratic(q, b), rho=RHO, sigma=0.5, seed=SEED, solver=solver)
    s = e.attribute(x, return_solution=True)

    z, q64, b64 = bank(antithetic), q.double(), b.double()
    shifted = (x.double() + 0.5 * z.mean(1)).flatten(1)
    expected = torch.linalg.solve(torch.eye(FEATURES) + RHO * q64, (shifted @ q64 + b64).T).T.view(B, C, H, W)
    close(s.attribution, expected, dtype)
    close(s.envelope_gradient, expected, dtype)
    value = objective(quadratic(q64, b64), x.double(), -RHO * expected, z, KINDS["moreau"], torch.zeros(B))
    close(s.envelope, value, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("antithetic", [False, True], ids=["independent", "antithetic"])
@pytest.mark.parametrize("kind", SPARSE)
def test_separable_quadratic(kind: str, antithetic: bool, dtype: torch.dtype) -> None:
    """With curvature q_g in a group the problem splits: A_g = S_η(p₀)_g/(1 + ρq_g), p₀ = q(x + σz̄) + b."""
    k = KINDS[kind]
    q = torch.empty(B, C, H, W, dtype=torch.float64)
    for row in range(B):
        blocks = k.blocks(row)
        for block, value in zip(blocks, torch.linspace(-LAMBDA, BETA, len(blocks)).tolist(), strict=True):
            q[row].view(-1)[block] = value
    q = q.to(dtype)
    b, x, z = draw(dtype, 1, C, H, W), draw(dtype, B, C, H, W), bank(antithetic)
    p0 = q.double() * (x.double() + 0.5 * z.mean(1)) + b.double()
    eta = k.strengths(p0, 0.4).to(dtype)

    def f(x: Tensor, q: Tensor) -> Tensor:
        return (q * x.square() / 2 + b.to(x.dtype) * x).flatten(1).sum(1)

    solver = fixed(STEPS, BEST_STEP, antithetic=antithetic)
    e = explainer(kind, f, rho=RHO, sigma=0.5, eta=eta, solver=solver)
    s = e.attribute(x, additional_forward_args=q, return_solution=True)

    q64 = q.double()
    expected = k.shrink(p0, eta) / (1 + RHO * q64)
    close(s.attribution, expected, dtype)
    close(s.displacement, -RHO * expected, dtype)
    close(s.envelope_gradient, p0 - RHO * q64 * expected, dtype)
    assert torch.equal(s.attribution == 0, expected == 0)
    assert s.nnz.sum() not in (0, s.attribution.numel())  # neither trivial case

    def f64(noisy: Tensor) -> Tensor:
        return f(noisy, q64.repeat_interleave(SAMPLES, 0))

    close(s.envelope, objective(f64, x.double(), -RHO * expected, z, k, eta.double()), dtype)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_bounds_by_the_residual(steps: int) -> None:
    """‖δ − δ*‖ ≤ r(1 + ρ(β − λ))/(1 − ρλ) and ‖y − δ*‖ ≤ ρβr/(1 − ρλ): the residual certifies, and y is the closer."""
    q, b = dense_quadratic(torch.float64)
    x = draw(torch.float64, B, C, H, W)
    e = MoreauGrad(quadratic(q, b), rho=RHO, sigma=0.5, seed=SEED, solver=fixed(steps, BEST_STEP))
    s = e.attribute(x, return_solution=True)

    base = (x + 0.5 * bank().mean(1)).flatten(1)
    solution = -RHO * torch.linalg.solve(torch.eye(FEATURES) + RHO * q, (base @ q + b).T).T
    delta = torch.zeros_like(base)  # the displacement that the last step started from
    for _ in range(steps - 1):
        delta = (1 - BEST_STEP / RHO) * delta - BEST_STEP * ((base + delta) @ q + b)
    image = -RHO * ((base + delta) @ q + b)

    close(s.displacement.flatten(1), image, torch.float64)
    r = (delta - image).norm(dim=1)
    close(s.residual, r, torch.float64)
    slack = 1 + 1e-12
    assert ((delta - solution).norm(dim=1) <= slack * r * (1 + RHO * (BETA - LAMBDA)) / (1 - RHO * LAMBDA)).all()
    assert ((image - solution).norm(dim=1) <= slack * RHO * BETA * r / (1 - RHO * LAMBDA)).all()
    floor = 1e-3 * RHO * (base @ q + b).norm(dim=1)
    largest = torch.stack([delta.norm(dim=1), image.norm(dim=1), floor]).amax(0)
    close(s.relative_residual, r / largest, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_lipschitz(kind: str) -> None:
    """‖A(x) − A(x')‖ ≤ β/(1 − ρλ)·‖x − x'‖ for every convex penalty; 1/min(ρ, 1/λ − ρ) for the vanilla map."""
    q, b = dense_quadratic(torch.float64)
    x = draw(torch.float64, B, C, H, W)
    moved = x + 0.3 * draw(torch.float64, B, C, H, W)
    e = explainer(kind, quadratic(q, b), rho=RHO, sigma=0.5, eta=0.4, solver=fixed(STEPS, BEST_STEP))
    bound = BETA / (1 - RHO * LAMBDA)
    if kind == "moreau":
        bound = min(bound, 1 / min(RHO, 1 / LAMBDA - RHO))
    distance = (e.attribute(x) - e.attribute(moved)).flatten(1).norm(dim=1)
    assert (distance <= bound * (x - moved).flatten(1).norm(dim=1)).all()
    assert (distance > 0).all()


# --- Gaussian-smoothed |x| -----------------------------------------------------------------------------------------


def smoothed_abs(x: Tensor, width: float = 0.5) -> Tensor:
    """E|x + width·z|, summed over features; its gradient is erf(x/(width·√2))."""
    t = x / (width * math.sqrt(2))
    each = x * torch.erf(t) + width * math.sqrt(2 / math.pi) * torch.exp(-t.square())
    return each.flatten(1).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["moreau", "sparse", "groups-of-one"])
def test_smoothed_absolute_value(kind: str, dtype: torch.dtype) -> None:
    """f = E|x + wz|: δ* solves δ = −ρS_η(erf((x + δ)/(w√2))), and Huber ≤ F ≤ Huber + w√(2/π) per feature."""
    width, rho, eta = 0.5, 1.3, 0.0 if kind == "moreau" else 0.25
    x = torch.linspace(-3, 3, B * 12, dtype=torch.float64).view(B, 12).to(dtype)
    settings: dict[str, Any] = {"rho": rho, "sigma": 0.0, "solver": fixed(60, 2 / (2 / rho + 1.6), num_samples=1)}
    if kind == "moreau":
        e: Any = MoreauGrad(smoothed_abs, **settings)
    elif kind == "sparse":
        e = SparseMoreauGrad(smoothed_abs, eta=eta, **settings)
    else:
        e = GroupSparseMoreauGrad(smoothed_abs, eta=eta, groups=Labels(torch.arange(12)), **settings)
    s = e.attribute(x, return_solution=True)

    def image(u: Tensor) -> Tensor:
        p = torch.erf((x.double() + u) / (width * math.sqrt(2)))
        return -rho * p.sign() * (p.abs() - eta).clamp(min=0)

    low, high = torch.full((B, 12), -2 * rho).double(), torch.full((B, 12), 2 * rho).double()
    for _ in range(60):  # u − image(u) rises with u
        middle = (low + high) / 2
        above = middle > image(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    expected = -image((low + high) / 2) / rho
    close(s.attribution, expected, dtype)
    if kind == "moreau":
        wide = x.double().abs() > rho
        huber = torch.where(wide, x.double().abs() - rho / 2, x.double().square() / (2 * rho)).sum(1)
        assert (s.envelope >= huber - TOLERANCE[dtype]).all()
        assert (s.envelope <= huber + 12 * width * math.sqrt(2 / math.pi)).all()
        assert (s.attribution.abs() <= 1).all()


def strength(kind: str, net: nn.Module, x: Tensor, where: float = 0.4) -> Tensor:
    """An absolute η, [B], for which some groups are in the map and some are not."""
    p0 = SmoothGrad(net, sigma=0.4, seed=SEED, num_samples=SAMPLES).attribute(x)
    return KINDS[kind].strengths(p0.double(), where).to(x.dtype)


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["independent", "antithetic"])
@pytest.mark.parametrize("rho", [0.25, 1.0, 2.0, 0.3])
def test_one_step_is_smoothgrad(rho: float, antithetic: bool, noise: Any, dtype: torch.dtype) -> None:
    """γ = ρ and one step from 0: SmoothGrad on the same bank, and its soft-thresholding; bit for bit."""
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    shared: dict[str, Any] = {"noise_level": 0.2, "seed": SEED}
    solver = ProximalGradient(SAMPLES, 1, rho, noise=noise, antithetic=antithetic, average_last=1)
    smooth = SmoothGrad(net, num_samples=SAMPLES, antithetic=antithetic, **shared).attribute(x)

    assert torch.equal(MoreauGrad(net, rho=rho, solver=solver, **shared).attribute(x), smooth)

    soft = SoftThresholdedSmoothGrad(net, eta_ratio=0.4, num_samples=SAMPLES, antithetic=antithetic, **shared)
    soft_map = soft.attribute(x)
    one = SparseMoreauGrad(net, rho=rho, eta_ratio=0.4, solver=solver, **shared).attribute(x, return_solution=True)
    assert torch.equal(one.attribution, soft_map)
    assert torch.equal(one.attribution, smooth - smooth.clamp(-per_row(one.eta), per_row(one.eta)))
    assert 0 < one.nnz.sum() < smooth.numel()

    for kind in SPARSE:
        s = explainer(kind, net, rho=rho, eta_ratio=0.4, solver=solver, **shared).attribute(x, return_solution=True)
        close(s.attribution, KINDS[kind].shrink(smooth.double(), s.eta), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.25, 2.0, 0.3])
def test_one_step_of_the_iterate_is_smoothgrad(kind: str, rho: float, dtype: torch.dtype) -> None:
    """The same through the displacement, −δ/ρ with δ = S_{γη}(−γp): exact where ρ is a power of two."""
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    solver = ProximalGradient(SAMPLES, 1, rho, antithetic=False, average_last=2)
    eta = strength(kind, net, x)
    by_gradient = explainer(kind, net, rho=rho, eta=eta, sigma=0.4, solver=solver).attribute(x)
    solver = ProximalGradient(SAMPLES, 1, rho, antithetic=False, average_last=2, average_of="displacement")
    by_iterate = explainer(kind, net, rho=rho, eta=eta, sigma=0.4, solver=solver).attribute(x)
    close(by_iterate, by_gradient.double(), dtype)
    if rho != 0.3 and kind in ("moreau", "sparse"):
        assert torch.equal(by_iterate, by_gradient)


# --- eta_max -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_eta_max(kind: str, dtype: torch.dtype) -> None:
    """η_max = max_g ‖p_g(0)‖/w_g: at a ratio of 1 the map is exactly zero, just below the largest group is left."""
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    k = KINDS[kind]
    solver = fixed(20, 0.5)
    p0 = SmoothGrad(net, sigma=0.3, seed=SEED, num_samples=SAMPLES).attribute(x)
    limit = k.eta_max(p0.double())

    for ratio in (1.0, 1.5, torch.tensor([1.0, 2.0, 1e6])):
        e = explainer(kind, net, sigma=0.3, eta_ratio=ratio, solver=solver)
        with pytest.warns(UserWarning, match="3 of 3 maps are zero everywhere"):
            s = e.attribute(x, return_solution=True)
        assert torch.equal(s.attribution, torch.zeros_like(x))
        assert torch.equal(s.displacement, torch.zeros_like(x))
        assert s.empty.all()
        assert (s.nnz == 0).all()
        close(s.eta, ratio * limit, dtype)
        close(s.envelope_gradient, p0.double(), dtype)
        assert (s.residual == 0).all()
        assert s.converged.all()

    with pytest.warns(UserWarning, match="3 of 3 maps are zero everywhere"):
        above = explainer(kind, net, sigma=0.3, eta=(limit * (1 + 1e-5)).to(dtype), solver=solver).attribute(x)
    assert torch.equal(above, torch.zeros_like(x))

    s = explainer(kind, net, sigma=0.3, eta_ratio=0.999, solver=fixed(1, 1.0)).attribute(x, return_solution=True)
    close(s.eta, 0.999 * limit, dtype)
    for row in range(B):
        active = [g for g in k.blocks(row) if s.attribution[row].flatten()[g].abs().sum() > 0]
        assert len(active) == 1
        norm = float(p0[row].double().flatten()[active[0]].norm())
        assert norm / k.weight(len(active[0])) == pytest.approx(float(limit[row]), rel=TOLERANCE[dtype])


# --- certificates on a smooth net ------------------------------------------------------------------------------------


def solved(kind: str, net: nn.Module, x: Tensor, eta: Tensor) -> Any:
    e = explainer(kind, net, rho=0.9, sigma=0.4, eta=eta, solver=fixed(200, 0.6))
    return e.attribute(x, return_solution=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kkt_certificate(kind: str, activation: str, dtype: torch.dtype) -> None:
    """δ* = −ρS_η(p(δ*)), with p by plain autograd on the bank's specification."""
    net, x = SmoothNet(dtype, ACTIVATIONS[activation]), draw(dtype, B, C, H, W)
    eta = strength(kind, net, x)
    s = solved(kind, net, x, eta)

    exact = SmoothNet(torch.float64, ACTIVATIONS[activation])
    exact.load_state_dict(net.double().state_dict())
    noisy = (x.double() + s.displacement.double()).unsqueeze(1) + 0.4 * bank()
    noisy = noisy.flatten(0, 1).requires_grad_()
    p = torch.autograd.grad(exact(noisy).sum(), noisy)[0].view(B, SAMPLES, C, H, W).mean(1)

    image = KINDS[kind].shrink(p, eta)
    close(s.attribution, image, dtype)
    close(s.displacement, -0.9 * image, dtype)
    close(s.envelope_gradient, p, dtype)
    assert torch.equal(s.attribution == 0, image == 0)
    assert (s.relative_residual <= TOLERANCE[dtype]).all()
    if kind != "moreau":
        assert 0 < s.nnz.sum() < x.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_envelope_by_differences(kind: str) -> None:
    """∇F(x)·v against a fourth-order difference of F along v."""
    dtype, h = torch.float64, 2e-3
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    eta = strength(kind, net, x)
    v = draw(dtype, B, C, H, W)
    v /= per_row(v.flatten(1).norm(dim=1))

    def envelope(t: float) -> Tensor:
        return solved(kind, net, x + t * v, eta).envelope

    slope = (8 * (envelope(h) - envelope(-h)) - (envelope(2 * h) - envelope(-2 * h))) / (12 * h)
    s = solved(kind, net, x, eta)
    close((s.envelope_gradient * v).flatten(1).sum(1), slope, dtype)
    if kind != "moreau":
        assert (s.attribution != s.envelope_gradient).any()  # two different things


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_envelopes_are_ordered(dtype: torch.dtype) -> None:
    """f_σ − ρL²/2 ≤ F_vanilla ≤ F_sparse ≤ f_σ, and ‖δ*‖ ≤ ρL."""
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    smooth = SmoothGrad(net, sigma=0.4, seed=SEED, num_samples=SAMPLES).attribute(x, return_solution=True).envelope
    vanilla = solved("moreau", net, x, torch.zeros(B))
    slack = TOLERANCE[dtype] * (1 + smooth.abs())
    assert (smooth - 0.45 * net.lipschitz**2 <= vanilla.envelope + slack).all()
    for kind in SPARSE:
        s = solved(kind, net, x, strength(kind, net, x))
        assert (vanilla.envelope <= s.envelope + slack).all()
        assert (s.envelope <= smooth + slack).all()
        assert (s.displacement.flatten(1).norm(dim=1) <= 0.9 * net.lipschitz).all()
    assert (vanilla.displacement.flatten(1).norm(dim=1) <= 0.9 * net.lipschitz).all()


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("where", [0.1, 0.4, 0.8])
def test_support_bounds(kind: str, where: float) -> None:
    """Σ over active groups of w_g² ≤ ‖p(δ*)‖²/η²; for L1 the left side is the number of non-zeros."""
    dtype = torch.float64
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)
    eta = strength(kind, net, x, where)
    s = solved(kind, net, x, eta)
    k = KINDS[kind]
    for row in range(B):
        parts = [(g, s.attribution[row].flatten()[g]) for g in k.blocks(row)]
        active = sum(k.weight(len(g)) ** 2 for g, part in parts if part.abs().sum() > 0)
        assert active <= float(s.envelope_gradient[row].square().sum()) / float(eta[row]) ** 2
        for _, part in parts:  # a group is in the map or out of it
            assert (part == 0).all() or kind == "sparse" or (part != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scaling(kind: str, dtype: torch.dtype) -> None:
    """A(cf; ρ/c, cη) = c·A(f; ρ, η): bit for bit for c = 4, where all scaling is exact."""
    net, x = SmoothNet(dtype), draw(dtype, B, C, H, W)

    def run(c: float, **eta: Any) -> Tensor:
        e = explainer(kind, lambda x: c * net(x), rho=0.8 / c, sigma=0.4, solver=fixed(12, 0.4 / c), **eta)
        return e.attribute(x)

    eta = strength(kind, net, x)
    plain = run(1.0, eta=eta)
    assert torch.equal(run(4.0, eta=4 * eta), 4 * plain)
    close(run(3.0, eta=3 * eta) / 3, plain.double(), dtype)
    assert torch.equal(run(4.0, eta_ratio=0.4), 4 * run(1.0, eta_ratio=0.4))
