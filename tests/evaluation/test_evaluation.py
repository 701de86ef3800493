"""Metrics against independent formulas and hand-made cases."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from helpers import drawn
from torch import Tensor

from moreau_ext.evaluation import gini, metrics

SIZES = [1, 2, 33, 111, 1023, 4097]


def mean_difference(a: Tensor) -> float:
    """Gini's own definition, half the relative mean absolute difference, without any sorting."""
    a = a.double().abs()
    return float((a[:, None] - a[None, :]).abs().sum() / (2 * len(a) * a.sum()))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gini_is_half_the_relative_mean_difference(n: int, dtype: torch.dtype) -> None:
    maps = drawn(3, n).to(dtype)
    got = gini(maps)
    assert got.dtype == torch.float64
    expected = torch.tensor([mean_difference(row) for row in maps], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", SIZES)
def test_gini_of_uniform_and_one_hot(n: int) -> None:
    one_hot = torch.zeros(n)
    one_hot[n // 2] = -3
    got = gini(torch.stack([torch.full((n,), -0.7), one_hot, torch.zeros(n)]))
    torch.testing.assert_close(got, torch.tensor([0, 1 - 1 / n, 0], dtype=torch.float64), atol=1e-12, rtol=0)


def test_gini_ignores_scale_sign_and_order() -> None:
    maps = drawn(2, 3, 5, 7).double()
    expected = gini(maps)
    for other in (1e300 * maps, 1e-300 * maps, -maps, maps.flip(-1), maps.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(gini(other), expected, atol=1e-12, rtol=0)


def test_gini_grows_when_small_entries_are_removed() -> None:
    maps = drawn(1, 100)
    values = [float(gini(torch.where(maps.abs() > t, maps, 0.0))) for t in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)


def test_gini_does_not_depend_on_the_batch_or_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = drawn(7, 50)
    expected = gini(maps)
    monkeypatch.setattr(metrics, "_CHUNK", 100)
    torch.testing.assert_close(gini(maps), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(gini(maps[3:4]), expected[3:4], atol=1e-14, rtol=0)


def test_gini_leaves_the_maps_alone() -> None:
    maps = drawn(2, 9).double().requires_grad_()
    before = maps.detach().clone()
    assert not gini(maps).requires_grad
    assert torch.equal(maps, before)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_gini_of_nothing(shape: tuple[int, ...]) -> None:
    assert torch.equal(gini(torch.ones(shape)), torch.zeros(shape[0], dtype=torch.float64))


def test_gini_of_one_number_per_input() -> None:
    assert gini(torch.tensor([2.0, 0.0])).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gini_passes_nan_on_for_its_input_only(bad: float) -> None:
    maps = torch.tensor([[1.0, bad], [1.0, 1.0]])
    assert gini(maps).isnan().tolist() == [True, False]


def test_gini_needs_a_batch_axis() -> None:
    with pytest.raises(ValueError, match="maps: expected a batch axis"):
        gini(torch.tensor(1.0))


def test_examples() -> None:
    assert doctest.testmod(metrics).failed == 0
