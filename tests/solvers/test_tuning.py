"""Settings that are found: the support, the displacement's length, rho from the curvature, and the path over eta."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Quadratic, smooth_net
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    ProximalGradient,
    SoftThresholdedSmoothGrad,
    SparseMoreauGrad,
    Tiles,
)
from moreau_ext.solvers.penalties import L1, GroupL2


def linear(weights: Tensor) -> Any:
    return lambda rows: (rows * weights).flatten(1).sum(1)


# --- the threshold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "support", "eta", "found"),
    [
        ([4.0, 3.0, 2.0, 1.0], 1, 3.5, 1),
        ([4.0, 3.0, 2.0, 1.0], 3, 1.5, 3),
        ([4.0, 3.0, 2.0, 1.0], 4, 0.0, 4),
        ([4.0, 3.0, 2.0, 1.0], 9, 0.0, 4),
        ([4.0, 3.0, 3.0, 1.0], 2, 3.5, 1),  # a tie: one and three are as near, the sparser is taken
        ([4.0, 3.0, 3.0, 3.0], 3, 0.0, 4),
        ([4.0, 3.0, 3.0, 3.0], 2, 3.5, 1),
        ([4.0, 4.0, 0.0, 0.0], 1, 8.0, 0),
        ([4.0, 4.0, 0.0, 0.0], 3, 2.0, 2),  # the score depends on two
        ([0.0, 0.0, 0.0, 0.0], 2, 0.0, 0),
    ],
)
def test_threshold(values: list[float], support: int, eta: float, found: int) -> None:
    p = (torch.tensor([values, values[::-1]], dtype=torch.float64) * torch.tensor([1.0, -1.0, 1.0, -1.0]),)
    penalty = L1((torch.zeros(2, dtype=torch.float64),))
    threshold = penalty.threshold(p, torch.tensor([support, support]))
    got = (L1((threshold,)).prox(p)[0] != 0).sum(1)
    assert got.tolist() == [found, found]
    if found and values[0] != values[-1]:
        torch.testing.assert_close(threshold, torch.full_like(threshold, eta))


def test_threshold_of_groups_counts_groups_with_their_weights() -> None:
    p = torch.tensor([[3.0, 4.0, 1.0, 0.1, 0.1, 6.0]], dtype=torch.float64)  # norms 5, 1, 6.0017 over 1.41, 1, 1.73
    groups = Labels(torch.tensor([0, 0, 1, 2, 2, 2]), "sqrt").partition(p, torch.float64)
    penalty = GroupL2((torch.zeros(1, dtype=torch.float64),), groups=(groups,))
    assert penalty.count(torch.tensor([[6]])).tolist() == [3]
    for support, mask in ((1, [1, 1, 0, 0, 0, 0]), (2, [1, 1, 0, 1, 1, 1]), (3, [1] * 6)):
        eta = penalty.threshold((p,), torch.tensor([support]))
        maps = GroupL2((eta,), groups=(groups,)).prox((p,))[0]
        assert (maps != 0).int().tolist() == [mask]


@pytest.mark.parametrize("kind", ["l1", "tiles"])
def test_gain_is_the_square_of_the_jacobian(kind: str) -> None:
    p = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    eta = (torch.tensor([1.0], dtype=torch.float64),)
    groups = Tiles(2).partition(p, torch.float64)
    penalty = L1(eta) if kind == "l1" else GroupL2(eta, groups=(groups,))
    columns = []
    for i in range(p.numel()):
        step = torch.zeros_like(p).view(-1)
        step[i] = 1e-6
        ahead, behind = (penalty.prox((p + s * step.view_as(p),))[0] for s in (1, -1))
        columns.append((ahead - behind).view(-1) / 2e-6)
    jacobian = torch.stack(columns, dim=1)
    on = penalty.prox((p,))[0] != 0
    gain = penalty.gain((p,), penalty.prox((p,)), (torch.full_like(p, 1e-12),))[0]
    torch.testing.assert_close(gain.view(-1), (jacobian.T @ jacobian).diagonal(), rtol=1e-5, atol=1e-8)
    assert torch.equal(gain != 0, on)
    # Off the support: what noise of a standard deviation of 1 lifts over the threshold.
    gain = penalty.gain((p,), penalty.prox((p,)), (torch.ones_like(p),))[0]
    if kind == "l1":
        below = (1 - p.abs())[~on]
        z = torch.randn(1 << 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        lifted = torch.stack([(z - b).clamp_min(0).square().mean() for b in below])
        torch.testing.assert_close(gain[~on], lifted, rtol=0.05, atol=1e-3)
    else:
        assert ((gain >= 0) & (gain <= 1)).all()


# --- support -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", ProximalGradient(), ProximalGradient(32, 200, noise="fixed", tol=1e-6)])
def test_support_is_what_was_asked_for(solver: Any) -> None:
    """And it is a solution: solving again with the eta that was found gives the same features."""
    model, x = smooth_net(), torch.randn(12, 24, dtype=torch.float64)
    asked = torch.arange(1, 13)
    s = SparseMoreauGrad(model, rho=0.5, sigma=0.3, support=asked, solver=solver).attribute(
        x, target=0, return_solution=True
    )
    assert torch.equal(s.support, asked)
    assert torch.equal(s.nnz, asked)
    again = SparseMoreauGrad(
        model, rho=0.5, sigma=0.3, eta=s.eta, seed=9, solver=AdaptiveProximalGradient(1e-3, 1 << 14)
    )
    found = again.attribute(x, target=0, return_solution=True)
    assert ((found.support - asked).abs() <= 1).all()
    assert (found.support == asked).double().mean() > 0.8
    error = (found.attribution - s.attribution).norm(dim=1) / found.attribution.norm(dim=1)
    assert float(error.median()) < 0.05


def test_support_of_groups_and_of_fractions() -> None:
    net = nn.Sequential(nn.Flatten(), smooth_net()).eval()
    x = torch.randn(5, 1, 4, 6, dtype=torch.float64)
    s = GroupSparseMoreauGrad(net, rho=0.5, groups=Tiles(2), support=0.5).attribute(x, 1, return_solution=True)
    assert s.support.tolist() == [3] * 5  # of six tiles
    assert s.nnz.tolist() == [12] * 5
    s = SparseMoreauGrad(net, rho=0.5, support=0.01).attribute(x, 1, return_solution=True)
    assert s.support.tolist() == [1] * 5
    s = SparseMoreauGrad(net, rho=0.5, support=1.0).attribute(x, 1, return_solution=True)
    assert s.support.tolist() == [24] * 5
    assert (s.eta == 0).all()


def test_ties_are_told() -> None:
    """Four equal features: no eta gives two of them."""
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    for solver in ("auto", ProximalGradient()):
        s = SparseMoreauGrad(linear(weights), support=2, sigma=0.0, solver=solver).attribute(x, return_solution=True)
        assert s.support.tolist() == [1, 1]
        s = SparseMoreauGrad(linear(weights), support=4, sigma=0.0, solver=solver).attribute(x, return_solution=True)
        assert s.support.tolist() == [5, 5]
        assert s.converged.all()


def test_rivals_have_the_same_support() -> None:
    model, x = smooth_net(), torch.randn(3, 24, dtype=torch.float64)
    s = SoftThresholdedSmoothGrad(model, support=7, num_samples=32).attribute(x, 0, return_solution=True)
    assert s.support.tolist() == [7] * 3


# --- radius --------------------------------------------------------------------------------------------------------


def test_radius_finds_the_rho_of_a_quadratic() -> None:
    f = Quadratic([0.2, 1.0, 3.0, 8.0])
    x = torch.randn(4, 4, dtype=torch.float64)
    solver = AdaptiveProximalGradient(tol=1e-3, max_gradients=1 << 14)
    for rho in (0.02, 0.1, 0.5):
        exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + rho * f.q, (x @ f.q + f.b).T).T
        radius = rho * exact.norm(dim=1)
        s = MoreauGrad(f, sigma=0.0, radius=radius, solver=solver).attribute(x, return_solution=True)
        torch.testing.assert_close(s.displacement.norm(dim=1), radius, rtol=1e-12, atol=0)
        assert s.converged.all()
        torch.testing.assert_close(s.rho, torch.full_like(s.rho, rho), rtol=0.01, atol=0)
        torch.testing.assert_close(s.attribution, exact, rtol=0, atol=0.01 * float(exact.abs().max()))


def test_radius_does_not_depend_on_the_scale_of_the_score() -> None:
    model, x = smooth_net(), torch.randn(5, 24, dtype=torch.float64)
    ranges = x.amax(1) - x.amin(1)
    found = []
    for scale in (1.0, 1000.0):
        e = SparseMoreauGrad(lambda rows, c=scale: c * model(rows), radius_ratio=0.1, support=6, sigma=0.3)
        s = e.attribute(x, target=0, return_solution=True)
        torch.testing.assert_close(s.displacement.norm(dim=1), 0.1 * ranges)
        assert s.support.tolist() == [6] * 5
        found.append(s)
    torch.testing.assert_close(found[1].displacement, found[0].displacement, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1].rho * 1000, found[0].rho)


def test_a_flat_score_has_no_radius() -> None:
    with pytest.warns(UserWarning, match="1 of 1 maps are zero"):
        s = MoreauGrad(lambda rows: (rows * 0).sum(1), radius=1.0).attribute(torch.ones(1, 3), return_solution=True)
    assert s.displacement.abs().max() == 0
    assert torch.isfinite(s.rho).all()


# --- rho="auto" ----------------------------------------------------------------------------------------------------


def test_auto_rho_is_half_of_what_keeps_a_quadratic_convex() -> None:
    f = Quadratic([-2.0, 0.5, 1.0])
    x = torch.randn(3, 3, dtype=torch.float64)
    s = MoreauGrad(f, rho="auto", sigma=0.0).attribute(x, return_solution=True)
    torch.testing.assert_close(s.rho, torch.full_like(s.rho, 0.25), rtol=1e-6, atol=0)
    noisy = MoreauGrad(f, rho="auto", sigma=1.0).attribute(x, return_solution=True)
    torch.testing.assert_close(noisy.rho, s.rho, rtol=1e-6, atol=0)  # differences of linear gradients are exact
    convex = MoreauGrad(Quadratic([1.0, 4.0]), rho="auto", sigma=0.0)
    assert float(convex.attribute(x[:, :2], return_solution=True).rho[0]) == pytest.approx(0.5 / 0.4)
    flat = MoreauGrad(linear(torch.ones(3, dtype=torch.float64)), rho="auto", sigma=0.1)
    assert flat.attribute(x, return_solution=True).rho.tolist() == [1.0] * 3
    # Measuring is part of the cost, and the certificate is of the rho that was found.
    fixed = MoreauGrad(f, rho=s.rho, sigma=0.0).attribute(x, return_solution=True)
    assert (s.gradient_evaluations > fixed.gradient_evaluations).all()
    fixed = MoreauGrad(f, rho=noisy.rho, sigma=1.0).attribute(x, return_solution=True)
    assert (noisy.gradient_evaluations - fixed.gradient_evaluations == 3 * 8).all()  # products in three dimensions
    auto = MoreauGrad(f, rho="auto", sigma=0.0)
    proof = auto.certificate(x, s)
    torch.testing.assert_close(proof.rho, s.rho)
    assert proof.premise.all()
    v = torch.randn_like(x)
    exact = v @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) + 0.25 * f.q) @ f.q
    torch.testing.assert_close(auto.vjp(x, s, v), exact, rtol=1e-6, atol=1e-8)


def test_auto_rho_needs_a_curvature() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(ValueError, match=r"rho: 'auto' measures the curvature .* input id 7 has no noise"):
        MoreauGrad(model, rho="auto").attribute(torch.ones(1, 3), target=0, ids=torch.tensor([7]))


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"support": 5, "rho": 0.5}, {"radius": 0.3}, {"radius": 0.3, "support": 5}, {"rho": "auto", "eta_ratio": 0.2}],
)
def test_found_settings_do_not_depend_on_the_batch(settings: dict[str, Any]) -> None:
    model, x = smooth_net(), torch.randn(7, 24, dtype=torch.float64) * torch.logspace(-1, 1, 7)[:, None]
    e = SparseMoreauGrad(model, sigma=0.5, **settings)
    ids = torch.arange(7) + 100
    whole = e.attribute(x, target=1, ids=ids, return_solution=True)
    for i in (0, 3, 6):
        one = e.attribute(x[i : i + 1], target=1, ids=ids[i : i + 1], return_solution=True)
        torch.testing.assert_close(one.attribution[0], whole.attribution[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(one.rho[0], whole.rho[i])
        torch.testing.assert_close(one.eta[0], whole.eta[i])
        assert int(one.gradient_evaluations) == int(whole.gradient_evaluations[i])
    chunked = SparseMoreauGrad(model, sigma=0.5, max_batch=5, **settings)
    torch.testing.assert_close(chunked.attribute(x, target=1, ids=ids), whole.attribution, rtol=0, atol=1e-9)


def test_tuples_share_support_and_radius() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 2, 2, dtype=torch.float64)

    def f(u: Tensor, v: Tensor) -> Tensor:
        return (u * torch.tensor([5.0, 0.1, 0.1, 0.1, 4.0])).sum(1) + 3 * v[:, 0, 0] + 0.2 * v.flatten(1).sum(1)

    s = SparseMoreauGrad(f, support=3, radius=0.7, sigma=0.1).attribute((a, b), return_solution=True)
    assert s.support.tolist() == [3] * 3
    length = s.displacement[0].square().sum(1) + s.displacement[1].square().sum((1, 2))
    torch.testing.assert_close(length.sqrt(), torch.full_like(length, 0.7), rtol=1e-6, atol=0)


# --- the path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", ProximalGradient(32, 300, noise="fixed", tol=1e-9)])
def test_the_path_is_the_solutions_at_its_ratios(solver: Any) -> None:
    model, x = smooth_net(), torch.randn(6, 24, dtype=torch.float64)
    e = SparseMoreauGrad(model, rho=0.5, sigma=0.3, solver=solver)
    ratios = [0.05, 0.8, 0.2, 1.5]
    path = e.eta_path(x, ratios, target=0)
    assert all((s.nnz[:] == 0).all() for s in path[3:])
    assert (path[0].nnz >= path[2].nnz).all()
    assert (path[2].nnz >= path[1].nnz).all()
    largest = (path[0].eta / 0.05, path[1].eta / 0.8, path[3].eta / 1.5)
    torch.testing.assert_close(largest[0], largest[1])
    torch.testing.assert_close(largest[0], largest[2])
    for ratio, s in zip(ratios[:3], path, strict=False):
        alone = SparseMoreauGrad(model, rho=0.5, sigma=0.3, eta=s.eta, solver=solver)
        cold = alone.attribute(x, target=0, return_solution=True)
        error = (cold.attribution - s.attribution).norm(dim=1) / cold.attribution.norm(dim=1)
        assert float(error.max()) < (0.1 if solver == "auto" else 1e-6), ratio
        if solver != "auto":
            # A start near by is what the path is for.
            assert int(s.steps.sum()) <= int(cold.steps.sum())


def test_paths_of_groups_tuples_and_nothing() -> None:
    net = nn.Sequential(nn.Flatten(), smooth_net()).eval()
    x = torch.randn(3, 1, 4, 6, dtype=torch.float64)
    path = GroupSparseMoreauGrad(net, rho="auto", groups=Tiles(2)).eta_path(x, (0.9, 0.1), target=0)
    assert (path[0].support <= path[1].support).all()
    assert int(path[0].gradient_evaluations.min()) >= 64 + 64
    assert len(SparseMoreauGrad(net).eta_path(x[:0], [0.5, 0.1])) == 2
    a, b = torch.randn(2, 3), torch.randn(2, 2)
    both = SparseMoreauGrad(lambda u, v: u.sum(1) * 2 + v.sum(1)).eta_path((a, b), [0.6])
    assert both[0].nnz.tolist() == [3, 3]
    assert isinstance(both[0].attribution, tuple)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: SparseMoreauGrad(m, eta=0.1, support=3), "give one of eta"),
        (lambda m: SparseMoreauGrad(m, support=0), "support: expected a positive finite number, got 0"),
        (lambda m: SparseMoreauGrad(m, support=1.5), r"support: expected a count \(an integer\) or a fraction"),
        (lambda m: SparseMoreauGrad(m, support=3, solver=ProximalGradient.paper()), "the union of their supports"),
        (lambda m: MoreauGrad(m, rho=1.0, radius=1.0), "give one of rho, radius"),
        (lambda m: MoreauGrad(m, radius=-1.0), "radius: expected a positive finite number"),
        (lambda m: MoreauGrad(m, radius_ratio=math.inf), "radius_ratio: expected a positive finite number"),
        (lambda m: MoreauGrad(m, radius=1.0, solver=ProximalGradient()), "one step size for all inputs"),
        (lambda m: MoreauGrad(m, rho="auto", solver=ProximalGradient()), "one step size for all inputs"),
        (lambda m: SparseMoreauGrad(m, support=torch.tensor([1, 2])).attribute(torch.ones(3, 4)), "support: expected"),
        (lambda m: MoreauGrad(m, radius_ratio=0.1).attribute(torch.ones(1, 4)), "input 0 is constant"),
        (lambda m: SparseMoreauGrad(m).eta_path(torch.ones(1, 4), []), "ratios: expected numbers >= 0, at least one"),
        (lambda m: SparseMoreauGrad(m).eta_path(torch.ones(1, 4), [-0.1]), "ratios: expected numbers >= 0"),
        (lambda m: SparseMoreauGrad(m, radius=1.0).eta_path(torch.ones(1, 4), [0.1]), "radius leads to another rho"),
    ],
)
def test_settings_are_checked(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(nn.Linear(4, 2).eval())


@pytest.mark.parametrize("settings", [{"support": True}, {"support": "many"}, {"radius": "far"}, {"rho": "Auto"}])
def test_settings_are_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"expected a number"):
        SparseMoreauGrad(nn.Linear(4, 2), **settings)
