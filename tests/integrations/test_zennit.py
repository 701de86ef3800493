"""Explainers called as zennit's attributors, whose score is the output weighed by attr_output."""

from __future__ import annotations

import pytest
import torch
from helpers import drawn, smooth_net

from moreau_ext import Gradient, MoreauGrad, ProximalGradient
from moreau_ext.integrations.zennit import Attributor

X, WEIGHTS = drawn(3, 24).double(), torch.eye(3, dtype=torch.float64)[[2, 0, 2]]
SOLVER = ProximalGradient(num_samples=8, max_steps=10, tol=0.0)


def test_one_hot_weights_are_targets() -> None:
    explainer = MoreauGrad(smooth_net(), rho=0.1, solver=SOLVER)
    expected = explainer.attribute(X, [2, 0, 2], ids=0)
    with Attributor(explainer, lambda output: WEIGHTS) as attributor:
        for output, maps in (attributor(X), Attributor(explainer)(X, WEIGHTS)):
            torch.testing.assert_close(maps, expected)
            torch.testing.assert_close(output, smooth_net()(X).detach())


def test_fixed_features() -> None:
    fixed = torch.arange(24) < 6
    _, maps = Attributor(Gradient(smooth_net()), lambda output: WEIGHTS, fixed=fixed)(X)
    assert torch.equal(maps, Gradient(smooth_net()).attribute(X, [2, 0, 2]).masked_fill(fixed, 0))


def test_by_default_the_output_weighs_itself() -> None:
    """The vector-Jacobian product of zennit's Gradient without attr_output."""
    x = X.clone().requires_grad_()
    output = smooth_net()(x)
    (expected,) = torch.autograd.grad(output, x, output.detach())
    torch.testing.assert_close(Attributor(Gradient(smooth_net()))(X)[1], expected)


def test_errors_name_the_cure() -> None:
    with pytest.raises(TypeError, match="explainer: expected an explainer such as MoreauGrad"):
        Attributor(smooth_net())  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(ValueError, match="its score is 'prob', but attr_output is the score; leave score out"):
        Attributor(Gradient(smooth_net(), score="prob"))
    with pytest.raises(ValueError, match=r"attr_output: expected the shape of the output, \(3, 3\), got \(3,\)"):
        Attributor(Gradient(smooth_net()))(X, torch.ones(3))
