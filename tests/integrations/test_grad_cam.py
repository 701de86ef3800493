"""Explainers called as pytorch-grad-cam's objects; its targets are classes of this form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import drawn
from torch import Tensor, nn

from moreau_ext import MoreauGrad, ProximalGradient, SparseMoreauGrad
from moreau_ext._errors import EmptyMapWarning
from moreau_ext.integrations.grad_cam import Cam

SOLVER = ProximalGradient(num_samples=8, max_steps=10, tol=0.0)


class ClassifierOutputTarget:
    """As in pytorch_grad_cam.utils.model_targets, which needs torchvision."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, output: Tensor) -> Tensor:
        return output[self.category]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()


def test_maps_are_lengths_over_channels_in_0_to_1() -> None:
    x, explainer = drawn(2, 3, 6, 6), MoreauGrad(net(), rho=0.1, solver=SOLVER)
    found = Cam(explainer)(input_tensor=x, targets=[ClassifierOutputTarget(2), ClassifierOutputTarget(0)])
    expected = explainer.attribute(x, [2, 0], ids=0).norm(dim=1).numpy()
    np.testing.assert_allclose(found, expected / expected.max((1, 2), keepdims=True), rtol=1e-6)
    assert found.dtype == np.float32
    rows = [lambda row: row[2], lambda row: row[0]]
    np.testing.assert_allclose(Cam(explainer)(x, rows), found, atol=1e-6)
    predicted = net()(x).argmax(1).tolist()
    np.testing.assert_array_equal(Cam(explainer)(x), Cam(explainer)(x, [ClassifierOutputTarget(c) for c in predicted]))


def test_a_fixed_background_has_no_heat() -> None:
    background = torch.arange(36).view(6, 6) < 12
    heat = Cam(MoreauGrad(net(), rho=0.1, solver=SOLVER))(drawn(2, 3, 6, 6), fixed=background)
    assert not heat[:, background.numpy()].any()
    assert heat.max() == 1


def test_a_blank_map_stays_blank() -> None:
    with pytest.warns(EmptyMapWarning):
        found = Cam(SparseMoreauGrad(net(), rho=0.1, eta=1e6, solver=SOLVER))(drawn(2, 3, 6, 6))
    assert not found.any()


def test_errors_name_the_cure() -> None:
    cam = Cam(MoreauGrad(net(), rho=0.1, solver=SOLVER))
    with pytest.raises(TypeError, match="target layers are not needed"):
        Cam(net())  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(ValueError, match=r"input_tensor: expected images \[B, C, H, W\], got \(3, 6, 6\)"):
        cam(drawn(3, 6, 6))
    with pytest.raises(ValueError, match="targets: expected one per image, 2, got 1"):
        cam(drawn(2, 3, 6, 6), [ClassifierOutputTarget(0)])
