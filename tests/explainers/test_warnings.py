"""One warning a call where inputs did not converge, of the methods that claim convergence alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import images, smooth

from moreau_ext import (
    AdaptiveProximalGradient,
    ConvergenceWarning,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    SparseMoreauGrad,
)

SHORT = AdaptiveProximalGradient(tol=1e-6, max_gradients=224)


def test_inputs_that_did_not_converge() -> None:
    """The count, the residuals and the remedy are those of the solution, in one line at the caller's."""
    with pytest.warns(ConvergenceWarning) as record:
        s = SparseMoreauGrad(smooth(), solver=SHORT, sigma=0.3).attribute(images(), 1, return_solution=True)
    (said,) = record
    assert said.filename == __file__
    text = str(said.message)
    assert "\n" not in text
    assert len(text) < 250
    worst, median = float(s.relative_residual.max()), float(s.relative_residual.median())
    assert f"3 of 3 maps did not converge to tol=1e-06: relative residual {worst:.2g} at worst, {median:.2g} in" in text
    assert re.search(
        f"raise max_gradients .*about {int(s.forecast(1e-6).median()):,} gradients, see Solution.forec", text
    )


def test_one_warning_for_a_path() -> None:
    with pytest.warns(ConvergenceWarning, match="6 of 6 maps did not converge") as record:
        SparseMoreauGrad(smooth(), solver=SHORT, sigma=0.3).eta_path(images(), [0.1, 0.3], 1)
    assert [w.filename for w in record] == [__file__]


CLAIMLESS: dict[str, Callable[..., Any]] = {
    "smoothgrad": lambda m: SmoothGrad(m, num_samples=4),
    "fixed steps": lambda m: MoreauGrad(m, solver=ProximalGradient(4, 5, tol=0.0)),
    "published": lambda m: MoreauGrad(m, solver=ProximalGradient.paper(4, 101)),
    "converged": lambda m: MoreauGrad(m, sigma=0.0, solver=ProximalGradient(2, 60, 0.5, tol=10.0)),
}


@pytest.mark.parametrize("method", CLAIMLESS)
def test_without_a_claim_no_warning(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLAIMLESS[method](smooth()).attribute(images(), 1)
        MoreauGrad(smooth(), solver=SHORT).attribute(images()[:0], 1)


def test_a_solver_names_its_own_setting() -> None:
    e = MoreauGrad(smooth(), sigma=torch.tensor([0.3, 0.3, 0.3]), solver=ProximalGradient(4, 20, tol=1e-3))
    with pytest.warns(ConvergenceWarning, match=r"tol=0\.001: .* raise max_steps"):
        e.attribute(images(), 1)
