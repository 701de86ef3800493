"""torch's defaults do not count, Solutions are saved and loaded, and solutions of a path have their own eta."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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


INDICES: dict[str, Any] = {
    "integer": 1,
    "last": -1,
    "slice": slice(1, 3),
    "none": slice(0, 0),
    "list": [2, 0],
    "mask": torch.tensor([True, False, True]),
    "array": np.array([False, True, True]),
}


@pytest.mark.parametrize("index", INDICES)
def test_a_solution_is_sliced(index: str) -> None:
    """As its ids are, but with a batch axis."""
    x = torch.rand(3, *X.shape[1:])
    s = SparseMoreauGrad(NET, rho=0.1, solver=SOLVER).attribute((x,), 1, return_solution=True)
    some = s[INDICES[index]]
    expected = torch.arange(3)[INDICES[index]].reshape(-1)
    assert torch.equal(some.ids, expected)
    assert torch.equal(some.attribution[0], s.attribution[0][expected])
    assert torch.equal(some.error.total, s.error.total[expected])


@pytest.mark.parametrize("index", [3, None, True, (0, 1), "a", torch.tensor([[0]])])
def test_a_solution_is_not_sliced_like_this(index: Any) -> None:
    with pytest.raises(IndexError):
        SmoothGrad(NET, num_samples=2).attribute(X[:1].repeat(3, 1, 1, 1), 1, return_solution=True)[index]


def test_a_solution_moves_to_a_device() -> None:
    s = SmoothGrad(NET, num_samples=4).attribute(X, 1, return_solution=True)
    there = s.to("meta")
    for moved, field in ((there.attribution, s.attribution), (there.error.total, s.error.total), (there.ids, s.ids)):
        assert (moved.device.type, moved.dtype, moved.shape) == ("meta", field.dtype, field.shape)
    assert torch.equal(s.cpu().attribution, s.attribution)


def test_an_explainer_prints_its_settings() -> None:
    """And of the model the name; long settings, such as maps of groups, in short."""
    e = GroupSparseMoreauGrad(NET, groups=Labels(torch.zeros(9, 9, dtype=torch.int64)), solver=SOLVER, rho=0.1)
    text = repr(e)
    assert text.startswith(f"GroupSparseMoreauGrad({type(NET).__name__}, score='logit'")
    assert "Linear" not in text
    assert "\n" not in text
    for shown in ("rho=0.1", f"solver={SOLVER!r}"[:90], "groups=Labels(map=tensor([[0"):
        assert shown in text
    assert len(text) < 600


def test_certificates_are_shown_in_notebooks() -> None:
    e = SparseMoreauGrad(NET, rho=0.1, solver=SOLVER)
    certificate = e.certificate(X, e.attribute(X, 1, return_solution=True), 1, num_samples=64)
    assert repr(certificate) == str(certificate) == certificate.summary()
    assert certificate._repr_html_().startswith("<pre>certificate of ")
    assert "<=" not in certificate._repr_html_()


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
