"""Score, target and gradient come from one function, whatever the model does with grad mode, its input and autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Gradient, MoreauGrad, ProximalGradient, SmoothGrad, SparseMoreauGrad

SOLVER = ProximalGradient(num_samples=2, max_steps=3, step_size=1e-7)


class TwoFaced(nn.Module):
    """Computes something else where no gradient is asked for."""

    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.linear, self.asks = nn.Linear(6, 3), asks

    def forward(self, x: Tensor) -> Any:
        return self.linear(x).tanh() if self.asks(x) else -self.linear(x)


FACES: dict[str, Callable[[Tensor], bool]] = {
    "grad mode": lambda x: torch.is_grad_enabled(),
    "requires_grad": lambda x: x.requires_grad,
}


@pytest.mark.parametrize("face", FACES)
def test_values_come_from_the_function_that_is_differentiated(face: str) -> None:
    model, x = TwoFaced(FACES[face]).eval(), torch.randn(4, 6)
    y = x.clone().requires_grad_()
    output = model(y)
    for e in (
        Gradient(model),
        SmoothGrad(model, sigma=0.0, num_samples=4),
        SparseMoreauGrad(model, eta=0.0, sigma=0.0, rho=1e-6, solver=SOLVER),
    ):
        s = e.attribute(x, return_solution=True)
        assert torch.equal(s.target.squeeze(1), output.argmax(1))
        torch.testing.assert_close(s.score, output.amax(1).detach())
        want = torch.autograd.grad(output.amax(1).sum(), y, retain_graph=True)[0]
        torch.testing.assert_close(s.attribution, want, rtol=1e-4, atol=1e-5)


def test_an_encoder_with_padding() -> None:
    """nn.TransformerEncoder leaves padded positions out under no_grad, and only there."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(6, 5, 8), torch.arange(5).expand(6, 5) >= 3

    def model(x: Tensor, pad: Tensor) -> Any:
        return encoder(x, src_key_padding_mask=pad).mean(1)

    y = x.clone().requires_grad_()
    output = model(y, pad)
    s = Gradient(model).attribute(x, 1, pad, return_solution=True)
    torch.testing.assert_close(s.score, output[:, 1].detach())
    torch.testing.assert_close(s.attribution, torch.autograd.grad(output[:, 1].sum(), y)[0])


def forces(x: Tensor) -> Any:
    return -torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]


def forces_of_a_leaf(x: Tensor) -> Any:
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0]


def under_enable_grad(x: Tensor) -> Any:
    with torch.enable_grad():
        return torch.autograd.grad((x * x.exp()).sum(), x, create_graph=True)[0]


def by_func(x: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(lambda row: row.pow(4).sum()))(x)


@pytest.mark.parametrize("model", [forces, forces_of_a_leaf, under_enable_grad, by_func])
def test_models_that_differentiate(model: Any) -> None:
    x = torch.randn(3, 6)
    y = x.clone().requires_grad_()
    want = torch.autograd.grad(model(y)[:, 2].sum(), y)[0]
    for e in (Gradient(model), MoreauGrad(model, rho=1e-6, sigma=0.0, solver=SOLVER)):
        torch.testing.assert_close(e.attribute(x, 2), want, rtol=1e-4, atol=1e-5)
    e = MoreauGrad(model, rho=0.01, sigma=0.1, solver=SOLVER)
    s = e.attribute(x, 2, return_solution=True)
    e.certificate(x, s, num_samples=64, num_hvp_samples=64, lanczos_steps=2, hessian="autograd")


LINEAR = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def subtracted(x: Tensor) -> Any:
    x -= 0.5
    x /= 0.25
    return x @ LINEAR


def masked(x: Tensor) -> Any:
    x[:, 0] = 0
    return x @ LINEAR


def flattened(x: Tensor) -> Any:
    x.view(-1).mul_(2)
    return x @ LINEAR


def filled(x: Tensor) -> Any:
    return x.masked_fill_(x > 1, 0) @ LINEAR


def inplace_module(x: Tensor) -> Any:
    return nn.ReLU(inplace=True)(x) @ LINEAR


def unnoticed(x: Tensor) -> Any:
    """A change that autograd does not see."""
    with torch.no_grad():
        x.mul_(2)
    return x @ LINEAR


@pytest.mark.parametrize("model", [subtracted, masked, flattened, filled, inplace_module, unnoticed])
def test_models_that_change_their_input(model: Any) -> None:
    x = torch.randn(3, 6)
    y = x.clone().requires_grad_()
    want = torch.autograd.grad(model(y * 1)[:, 1].sum(), y)[0]
    before = x.clone()
    for e in (
        Gradient(model),
        SmoothGrad(model, sigma=0.0, num_samples=4, max_batch=3),
        MoreauGrad(model, rho=1e-6, sigma=0.0, solver=SOLVER),
    ):
        s = e.attribute(x, 1, return_solution=True)
        torch.testing.assert_close(s.attribution, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s.score, model(x.clone())[:, 1])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precision_is_what_it_says_under_autocast(precision: Any, dtype: torch.dtype) -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).eval(), torch.randn(3, 64)
    e = SparseMoreauGrad(net, rho=0.1, precision=precision, solver=SOLVER)
    want = e.attribute(x, 1, return_solution=True)
    with torch.autocast("cpu", dtype):
        found = e.attribute(x, 1, return_solution=True)
        path = e.eta_path(x, [0.5], 1)[0]
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
    assert torch.equal(found.attribution, want.attribution)
    assert torch.equal(path.attribution, e.eta_path(x, [0.5], 1)[0].attribution)


def test_an_autocast_of_the_model_itself_counts() -> None:
    net, x = nn.Linear(64, 4).eval(), torch.randn(3, 64)

    def model(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    assert Gradient(model).attribute(x, 1, return_solution=True).score.dtype == torch.bfloat16
