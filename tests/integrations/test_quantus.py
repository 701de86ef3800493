"""The calls of Quantus's metrics; with Quantus itself where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import drawn
from torch import nn

from moreau_ext import METHODS, MoreauGrad, SparseMoreauGrad
from moreau_ext._errors import EmptyMapWarning
from moreau_ext.evaluation.metrics import gini
from moreau_ext.integrations.quantus import explain_func

QUICK: dict[str, Any] = {"rho": 0.1, "noise_level": 0.1}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


X, Y = drawn(4, 1, 8, 8).double().numpy(), np.array([0, 2, 1, 1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_quantus_call(method: str) -> None:
    """float64 arrays and its keywords; the maps are those of the explainer with one noise."""
    maps = explain_func(model=net(), inputs=X, targets=Y, device="cpu", method=method)
    assert (type(maps), maps.dtype, maps.shape) == (np.ndarray, X.dtype, X.shape)
    expected = METHODS[method](net()).attribute(torch.tensor(X).float(), Y, ids=0)
    np.testing.assert_array_equal(maps, expected.double().numpy())


def test_other_dtypes() -> None:
    assert explain_func(net(), (X > 0).astype(np.uint8), Y).dtype == np.float32
    in_double = explain_func(net().double(), X, Y, **QUICK)
    np.testing.assert_array_equal(in_double, MoreauGrad(net().double(), **QUICK).attribute(torch.tensor(X), Y, ids=0))


def test_fixed_features() -> None:
    fixed = torch.arange(64).view(8, 8) < 20
    assert not explain_func(net(), X, Y, method="gradient", fixed=fixed)[..., fixed.numpy()].any()


def test_empty_maps_do_not_reach_quantus() -> None:
    message = r"inputs \[0, 1, 2, 3\] of 4 are zero everywhere.*give support=0.05.* empty='keep'"
    with pytest.warns(EmptyMapWarning), pytest.raises(ValueError, match=message):
        explain_func(net(), X, Y, method="sparse", eta=1e6)
    with pytest.warns(EmptyMapWarning):
        assert not explain_func(net(), X, Y, method="sparse", eta=1e6, empty="keep").any()
    with pytest.raises(ValueError, match="empty: expected 'raise' or 'keep', got 'drop'"):
        explain_func(net(), X, Y, empty="drop")  # type: ignore[arg-type]  # the error is the test


@pytest.mark.filterwarnings("ignore")
def test_quantus_metrics() -> None:
    quantus = pytest.importorskip("quantus", reason="Quantus is installed by hand: pip install --no-deps quantus")
    common: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False}
    call: dict[str, Any] = {"model": net(), "x_batch": X, "y_batch": Y, "device": "cpu", "explain_func": explain_func}
    call["explain_func_kwargs"] = {"method": "sparse", "eta_ratio": 0.2, **QUICK}
    scores = quantus.Sparseness(**common)(**call)
    maps = SparseMoreauGrad(net(), eta_ratio=0.2, **QUICK).attribute(torch.tensor(X).float(), Y, ids=0)
    np.testing.assert_allclose(scores, gini(maps), atol=1e-5)
    still = quantus.MaxSensitivity(nr_samples=2, lower_bound=0.0, upper_bound=1e-12, **common)(**call)
    np.testing.assert_allclose(still, 0, atol=1e-6)
