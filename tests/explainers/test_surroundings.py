"""torch's defaults do not count, Solutions are saved and loaded, and solutions of a path have their own eta."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import (
    Gradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    Pixels,
    ProximalGradient,
    SmoothGrad,
    Solution,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    Tiles,
)

SOLVER = ProximalGradient(4, 5, 0.05)


@contextmanager
def device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def dtype(value: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "meta": lambda: device("meta"),
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "float16": lambda: dtype(torch.float16),
}
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
X = torch.randn(3, 1, 4, 4)
CLASSES, SIZES, PROTOTYPES = torch.tensor([0, 1, 2]), torch.arange(16).view(1, 4, 4) // 4, torch.randn(3, 16)


def certified(x: Tensor) -> Tensor:
    e = SparseMoreauGrad(NET, rho=0.1, solver=SOLVER)
    s = e.attribute(x, return_solution=True)
    proof = e.certificate(x, s, num_samples=64, num_hvp_samples=64, lanczos_steps=2, lipschitz=3.0)
    assert str(proof)
    return proof.residual


def derived(x: Tensor) -> Any:
    e = SparseMoreauGrad(NET, rho=0.1, solver=SOLVER)
    return e.vjp(x, e.attribute(x, return_solution=True), X, num_samples=8)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "gradient": lambda x: Gradient(NET).attribute(x, CLASSES),
    "smoothgrad": lambda x: SmoothGrad(NET, num_samples=4, sigma=0.1).attribute(x, [0, 1, 2], ids=[4, 5, 6]),
    "sparsified": lambda x: SparsifiedSmoothGrad(NET, num_samples=4).attribute(x, (1,)),
    "settings": lambda x: MoreauGrad(NET, rho=[0.1, 0.2, 0.3], noise_level=0.2, solver=SOLVER).attribute(x, 1),
    "adaptive": lambda x: SparseMoreauGrad(NET, rho="auto", support=0.3).attribute(x),
    "radius": lambda x: MoreauGrad(NET, radius=0.3).attribute(x),
    "small": lambda x: MoreauGrad(NET, rho=1e-9, sigma=1e-9, solver=ProximalGradient(2, 1, 1e-10)).attribute(x),
    "tiles": lambda x: GroupSparseMoreauGrad(NET, groups=Tiles(2), solver=SOLVER).attribute(x, 1),
    "pixels": lambda x: GroupSparseMoreauGrad(NET, groups=Pixels(), solver=SOLVER).attribute(x, 1),
    "labels": lambda x: GroupSparseMoreauGrad(NET, groups=Labels(SIZES), solver=SOLVER).attribute(x, 1),
    "path": lambda x: SparseMoreauGrad(NET, rho=0.1, solver=SOLVER).eta_path(x, [0.1, 0.5])[0].attribution,
    "certificate": certified,
    "vjp": derived,
    "callable": lambda x: SmoothGrad(NET, num_samples=4).attribute(x, lambda o: o.gather(1, CLASSES[:, None])),
    "shared": lambda x: SmoothGrad(lambda x, p: x.flatten(1) @ p.T, num_samples=4).attribute(x, 1, PROTOTYPES),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_defaults_do_not_count(name: str, default: str) -> None:
    expected = CALLS[name](X)
    with DEFAULTS[default]():
        found = CALLS[name](X)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("target", [1, lambda o: o[:, 1]])
def test_a_solution_is_saved_and_loaded(target: Any, tmp_path: Path) -> None:
    """At the default of torch.load, also in a process that has used nothing of the package yet."""
    s = SparseMoreauGrad(NET, rho=0.1, solver=SOLVER).attribute(X, target, return_solution=True)
    torch.save({"solution": s, "pair": (s, s.attribution)}, tmp_path / "s.pt")
    loaded = torch.load(tmp_path / "s.pt")["solution"]
    assert isinstance(loaded, Solution)
    assert torch.equal(loaded.attribution, s.attribution)
    SparseMoreauGrad(NET, rho=0.1, solver=SOLVER).certificate(X, loaded, target, num_samples=64)
    script = f"import torch, moreau_ext; print(torch.load({str(tmp_path / 's.pt')!r})['solution'].nnz.tolist())"
    # Elsewhere than in the checkout, whose package is not the one that is installed.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(s.nnz.tolist()), done.stderr


def test_complex_inputs_are_named() -> None:
    with pytest.raises(TypeError, match=r"inputs: expected real numbers, got torch.complex64; .*view_as_real"):
        Gradient(lambda x: x.abs().sum(1)).attribute(torch.randn(2, 3, dtype=torch.complex64))


def test_the_derivative_of_a_solution_of_a_path() -> None:
    """Its eta is a fraction of eta_max of its own, not the explainer's: against central differences of the path."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 1)).double().eval()
    x = torch.randn(1, 5, dtype=torch.float64)
    solver = ProximalGradient(1, 4000, 0.02, average_last=1, tol=1e-13, noise="fixed")
    e = SparseMoreauGrad(net, rho=0.2, sigma=0.0, eta_ratio=0.1, solver=solver)
    v = torch.randn(1, 5, dtype=torch.float64)
    for ratio in (0.1, 0.5):
        s = e.eta_path(x, [ratio])[0]
        found = e.vjp(x, s, v, hessian="autograd", num_samples=1, tol=1e-12)
        want = torch.zeros_like(x)
        for i in range(5):
            step = torch.zeros_like(x)
            step[0, i] = 1e-5
            ends = [e.eta_path(x + sign * step, [ratio])[0].attribution for sign in (1, -1)]
            want[0, i] = ((ends[0] - ends[1]) * v).sum() / 2e-5
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
