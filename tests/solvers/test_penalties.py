"""Laws that a proximal map must obey, by hypothesis, for every penalty and group structure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moreau_ext import Labels, Pixels, Tiles
from moreau_ext.solvers.penalties import L1, GroupL2, Penalty

SHAPE = (1, 3, 5, 4)
STRUCTURES = {
    "tiles": Tiles(2),
    "tiles sqrt": Tiles((2, 3), "sqrt"),
    "pixels": Pixels(),
    "labels": Labels(torch.arange(60).view(3, 5, 4) % 7),
    "whole": Labels(torch.zeros(3, 5, 4, dtype=torch.int64), "sqrt"),
}
KINDS = ["l1", *STRUCTURES]

tensors = st.integers(0, 2**31).flatmap(
    lambda seed: st.sampled_from([0.0, 1e-12, 1.0, 1e6]).map(lambda scale: (seed, scale))
)
strengths = st.sampled_from([0.0, 1e-9, 0.1, 1.0, 7.5])


def tensor(drawn: tuple[int, float]) -> Tensor:
    seed, scale = drawn
    generator = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return v * (torch.rand(SHAPE, generator=generator) > 0.3)


def penalty(kind: str, eta: float) -> Penalty:
    strength = (torch.tensor([eta], dtype=torch.float64),)
    if kind == "l1":
        return L1(strength)
    return GroupL2(strength, groups=(STRUCTURES[kind].partition(torch.zeros(SHAPE), torch.float64),))


def prox(kind: str, eta: float) -> Callable[[Tensor], Tensor]:
    p = penalty(kind, eta)
    return lambda v: p.prox((v,))[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(u=tensors, v=tensors, eta=strengths)
def test_firmly_non_expansive(kind: str, u: tuple[int, float], v: tuple[int, float], eta: float) -> None:
    a, b, shrink = tensor(u), tensor(v), prox(kind, eta)
    gap = shrink(a) - shrink(b)
    assert float((gap * gap).sum()) <= float((gap * (a - b)).sum()) * (1 + 1e-12) + 1e-24


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(v=tensors, w=tensors, eta=strengths)
def test_minimises(kind: str, v: tuple[int, float], w: tuple[int, float], eta: float) -> None:
    """prox(v) beats every other point of ½‖u − v‖² + ηΩ(u)."""
    a, other, p = tensor(v), tensor(w), penalty(kind, eta)

    def objective(u: Tensor) -> float:
        return float((u - a).square().sum() / 2 + p.value((u,)))

    best = objective(p.prox((a,))[0])
    for rival in (a, torch.zeros_like(a), other, p.prox((a,))[0] + 1e-3 * other):
        assert best <= objective(rival) * (1 + 1e-12) + 1e-24


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(v=tensors, eta=strengths)
def test_moreau_identity(kind: str, v: tuple[int, float], eta: float) -> None:
    """v − prox(v) is the projection on the dual ball: within it always, and prox is zero where v is."""
    a, p = tensor(v), penalty(kind, eta)
    shrunk = p.prox((a,))[0]
    dual = p.eta_max((a - shrunk,))
    assert float(dual) <= eta * (1 + 1e-12) + 1e-12 * float(a.abs().max())
    # ⟨v − prox, prox⟩ = η·Ω(prox): the subgradient is active.
    inner = float(((a - shrunk) * shrunk).sum())
    assert inner == pytest.approx(float(p.value((shrunk,))), rel=1e-9, abs=1e-12 * float(a.square().sum()))
    if eta >= float(p.eta_max((a,))) * (1 + 1e-12):
        assert not shrunk.any()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(v=tensors)
def test_fixed_points(kind: str, v: tuple[int, float]) -> None:
    a = tensor(v)
    assert torch.equal(prox(kind, 0.0)(a), a)
    assert torch.equal(prox(kind, 3.0)(torch.zeros_like(a)), torch.zeros_like(a))
    shrunk = prox(kind, 1.0)(a)
    assert not bool((shrunk.signbit() & (shrunk == 0) & (a > 0)).any())  # zeros that are made are +0


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(kind: str) -> None:
    v = torch.randn(SHAPE, dtype=torch.float64)
    v[0, 1, 2, 3] = float("nan")
    assert prox(kind, 0.1)(v)[0, 1, 2, 3].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_of_one_is_zero_by_definition(kind: str) -> None:
    for seed in range(20):
        p0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for ratio, empty in ((1.0, True), (1.5, True), (0.999, False)):
            relative = penalty(kind, ratio)
            resolved, reported = type(relative)(**{**vars(relative), "relative": True}).resolve((p0,))
            assert float(reported[0]) == pytest.approx(ratio * float(relative.eta_max((p0,))), rel=1e-15)
            assert bool((resolved.prox((p0,))[0] == 0).all()) == empty
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    assert float(resolved.value((zero,))) == 0.0


def test_group_values_by_hand() -> None:
    v = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    v[0, 0] = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    groups = Labels(torch.tensor([[0, 1], [0, 1]]), "sqrt")
    p = GroupL2((torch.tensor([2.0], dtype=torch.float64),), groups=(groups.partition(v, torch.float64),))
    assert float(p.value((v,))) == pytest.approx(2 * 2**0.5 * (5 + 1))
    assert float(p.eta_max((v,))) == pytest.approx(5 / 2**0.5)
    expected = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64) * (1 - 2 * 2**0.5 / 5)
    torch.testing.assert_close(p.prox((v,))[0][0, 0], expected)
