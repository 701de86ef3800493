"""Error bars on problems whose limits are known: coverage, false discoveries, forecasts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moreau_ext import (
    AdaptiveProximalGradient,
    Gradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    Solution,
    SparseMoreauGrad,
    Tiles,
)
from moreau_ext.solvers.errors import benjamini_hochberg, normal_of_gamma, normal_of_student, upper_tail
from moreau_ext.solvers.penalties import L1, GroupL2, NoPenalty, Penalty

F64 = torch.float64
INPUTS, FEATURES, SIGMA = 200, 24, 0.3


def kinks(x: Tensor) -> Tensor:
    """Σ_k w_k·relu(a_k·x + b_k): the gradient of its smoothing is known."""
    return torch.relu(x @ A.T + BIAS) @ W


def limit(x: Tensor) -> Tensor:
    return (torch.special.ndtr((x @ A.T + BIAS) / (SIGMA * A.norm(dim=1))) * W) @ A


_generator = torch.Generator().manual_seed(0)
A = torch.randn(40, FEATURES, dtype=F64, generator=_generator) / math.sqrt(FEATURES)
# A quarter of the features have no influence.
A[:, ::4] = 0
BIAS, W = torch.randn(2, 40, dtype=F64, generator=_generator)
X = torch.randn(INPUTS, FEATURES, dtype=F64, generator=_generator)


def solved(explainer: Any) -> Solution:
    found: Solution = explainer.attribute(X, return_solution=True)
    return found


@pytest.mark.parametrize(
    "explainer",
    [
        SmoothGrad(kinks, sigma=SIGMA, num_samples=64),
        SmoothGrad(kinks, sigma=SIGMA, num_samples=64, antithetic=True),
        SmoothGrad(kinks, sigma=SIGMA, num_samples=63, antithetic=True),
        SmoothGrad(kinks, sigma=SIGMA, num_samples=64, max_batch=700),
        MoreauGrad(kinks, sigma=SIGMA, rho=0.01, solver=AdaptiveProximalGradient(1e-9, 512, denoise=False)),
        MoreauGrad(kinks, sigma=SIGMA, rho=0.01, solver=ProximalGradient(16, 60, 0.002)),
    ],
    ids=["smoothgrad", "antithetic", "odd", "chunks", "adaptive", "fixed"],
)
def test_standard_errors_cover_the_limit(explainer: Any) -> None:
    s = solved(explainer)
    exact = limit(X + s.displacement)
    error = (s.attribution - exact).abs()
    active = torch.arange(FEATURES) % 4 != 0
    assert s.standard_error.shape == X.shape
    assert (s.standard_error[:, ~active] <= 1e-9).all()
    inside = (error <= 1.96 * s.standard_error)[:, active].double().mean()
    assert 0.90 <= float(inside) <= 0.995  # an odd number of samples counts pairs as independent: wider


def test_no_noise_has_no_error_and_one_sample_has_an_unknown_one() -> None:
    assert (solved(Gradient(kinks)).standard_error == 0).all()
    assert solved(SmoothGrad(kinks, sigma=SIGMA, num_samples=1)).standard_error.isnan().all()
    s = solved(SmoothGrad(kinks, sigma=SIGMA, num_samples=1))
    assert not s.significant().any()
    assert (s.forecast(0.1) == -1).all()


@pytest.mark.parametrize("budget", [192, 512])
def test_false_discoveries_are_as_rare_as_asked(budget: int) -> None:
    exact = limit(X)
    eta = float(exact.abs().median())
    s = solved(SparseMoreauGrad(kinks, sigma=SIGMA, eta=eta, rho=1e-3, solver=AdaptiveProximalGradient(1e-9, budget)))
    few, many = s.significant(0.05), s.significant(0.1)
    assert (few <= many).all()
    false = (many & (exact.abs() <= eta)).sum(1).double() / many.sum(1).clamp_min(1)
    assert float(false.mean()) <= 0.1
    assert many.any()


def test_groups_are_significant_as_a_whole() -> None:
    groups = Labels(torch.arange(FEATURES) % 4)
    s = solved(GroupSparseMoreauGrad(kinks, sigma=SIGMA, eta=0.05, rho=1e-3, groups=groups))
    marked = s.significant().view(INPUTS, -1, 4)
    assert (marked.all(1) | ~marked.any(1)).all()
    assert not marked[:, :, 0].any()


def test_forecasts_are_what_it_takes() -> None:
    few = solved(SmoothGrad(kinks, sigma=SIGMA, num_samples=64, antithetic=True))
    wanted = few.forecast(0.02).double()
    many = SmoothGrad(kinks, sigma=SIGMA, num_samples=int(wanted.median()), antithetic=True, seed=1)
    ratio = many.attribute(X, return_solution=True).error.sampling / 0.02 * (wanted / wanted.median()).rsqrt()
    assert float(((ratio > 1 / 1.5) & (ratio < 1.5)).double().mean()) > 0.8
    with pytest.raises(ValueError, match="tol: expected a positive number"):
        few.forecast(0.0)
    with pytest.raises(ValueError, match="q: expected a number between 0 and 1"):
        few.significant(1.0)


def test_a_solution_prints_a_line_per_input() -> None:
    s = solved(SmoothGrad(kinks, sigma=SIGMA, num_samples=16))
    lines = str(s).splitlines()
    assert lines[0] == "Solution of 200 inputs: 0 converged, 0 empty"
    assert len(lines) == 11
    assert "of its 18 features beyond noise" in lines[1]  # the others have no influence
    assert repr(s) == str(s)
    assert s._repr_html_().startswith("<pre>Solution of 200")
    assert "0 inputs" in str(SmoothGrad(kinks, sigma=SIGMA).attribute(X[:0], return_solution=True))


# --- distributions ---------------------------------------------------------------------------------------------------


def test_tails_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (5, 12, 60):
        for t in (-1.0, 0.5, 2.0, 4.0):
            z = normal_of_student(torch.tensor(t, dtype=F64), torch.tensor(float(freedom), dtype=F64))
            assert float(upper_tail(z)) == pytest.approx(float(stats.t.sf(t, freedom)), rel=0.04)
    for shape in (3.0, 20.0):
        for value in (0.5, 1.0, 2.0):
            moments = [torch.tensor(v, dtype=F64) for v in (value * shape, shape, 2 * shape / 2)]
            z = normal_of_gamma(*moments)
            assert float(upper_tail(z)) == pytest.approx(
                float(stats.gamma.sf(value * shape, shape)), rel=0.05, abs=1e-3
            )
    p = torch.rand(5, 40, dtype=F64, generator=torch.Generator().manual_seed(0)) ** 3
    for row, marked in zip(p, benjamini_hochberg(p, 0.1, torch.ones_like(p, dtype=torch.bool)), strict=True):
        assert torch.equal(torch.from_numpy(stats.false_discovery_control(row.numpy())) <= 0.1, marked)


# --- denoising -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "l1", "group"])
def test_denoised_maps_are_closer_and_fade_out(name: str) -> None:
    """Against the map of the known mean: never further off in the mean, closer where noise is large, equal without."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(1, 1, 16, 16, dtype=F64, generator=generator)
    p[..., 8:] *= 0.1
    eta = (torch.full((1,), 0.8 if name == "l1" else 2.0, dtype=F64),)
    penalty: Penalty = NoPenalty() if name == "none" else L1(eta)
    if name == "group":
        penalty = GroupL2(eta, groups=(Tiles(4).partition(p, F64),))
    exact = penalty.prox((p,))[0]
    for noise in (1.5, 0.5, 0.1, 0.0):
        variance = torch.full_like(p, noise**2)
        plain, better = 0.0, 0.0
        for _ in range(50):
            mean = p + noise * torch.randn(p.shape, dtype=F64, generator=generator)
            u, after = penalty.denoised((mean,), (variance,))
            plain += float((penalty.prox((mean,))[0] - exact).norm())
            better += float((after[0] * penalty.prox(u)[0] - exact).norm())
        assert better <= 1.02 * plain + 1e-12
        if noise == 1.5:
            assert better < 0.85 * plain
        if noise == 0:
            assert better == plain


def test_denoising_is_switchable_and_says_nothing_at_a_tolerance() -> None:
    solver = AdaptiveProximalGradient(0.01, 2048)
    on = solved(MoreauGrad(kinks, sigma=SIGMA, rho=0.1, solver=solver))
    off = solved(MoreauGrad(kinks, sigma=SIGMA, rho=0.1, solver=AdaptiveProximalGradient(0.01, 2048, denoise=False)))
    assert torch.equal(off.attribution, off.envelope_gradient)
    change = (on.attribution - off.attribution).norm(dim=1) / off.attribution.norm(dim=1)
    assert float(change[off.converged].max()) < 1e-4


def test_rows_of_a_summary_are_named_by_ids_where_these_differ() -> None:
    explainer = SmoothGrad(lambda x: x.square().sum(1), num_samples=4)
    for ids, names in ((torch.tensor([7, 3]), ["input 7", "input 3"]), (5, ["input 0", "input 1"])):
        lines = explainer.attribute(torch.ones(2, 2), ids=ids, return_solution=True).summary().splitlines()[1:3]
        assert [line.split(":")[0].strip() for line in lines] == names
