"""Hashes of every field of many Solutions: a change of structure must not change a bit.

    python tests/golden.py record FILE    before a change
    python tests/golden.py check FILE     after it; prints what differs and exits 1

Hashes hold on one machine with one version of torch: another processor may multiply in another order. The file names
the machine, and ``check`` refuses another one's.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    Gradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    Tiles,
)

COMMITTED = Path(__file__).with_name("golden.json")


def machine() -> dict[str, str]:
    """What the hashes depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


class _TwoInputs(nn.Module):
    """A model of an image and a vector."""

    def __init__(self, image: nn.Module) -> None:
        super().__init__()
        self.image, self.row = image, nn.Linear(6, 10)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.image(x) * torch.tanh(self.row(row))


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 10),
    ).eval()  # fmt: skip


SOLVERS = {
    "adaptive": AdaptiveProximalGradient(tol=0.05, max_gradients=700),
    "fresh": ProximalGradient(num_samples=8, max_steps=25, tol=0.2),
    "fixed": ProximalGradient(num_samples=6, max_steps=32, noise="fixed", tol=3e-2, average_last=1),
    "paper": ProximalGradient.paper(num_samples=4, max_steps=110),
}
EXPLAINERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "moreau": (MoreauGrad, {}),
    "sparse": (SparseMoreauGrad, {"eta_ratio": 0.2}),
    "group": (GroupSparseMoreauGrad, {"groups": Tiles(2), "eta_ratio": 0.3}),
}


def _cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    torch.manual_seed(7)
    net, both = _net(), _TwoInputs(_net()).eval()
    x, row = torch.rand(5, 3, 8, 8), torch.rand(5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    inputs: dict[str, tuple[nn.Module, Any, int | None]] = {
        "contiguous": (net, x, None),
        "channels_last": (net, last, None),
        "tuple": (both, (x, row), None),
        "chunked": (net, x, 5),
    }
    for name, (kind, settings) in EXPLAINERS.items():
        for solver_name, solver in SOLVERS.items():
            for layout, (model, given, rows) in inputs.items():
                own = dict(settings)
                if layout == "tuple" and name == "group":
                    continue  # a row has no tiles
                explainer = kind(model, solver=solver, max_batch=rows, **own)
                yield (
                    f"{name} {solver_name} {layout}",
                    lambda e=explainer, g=given: e.attribute(g, return_solution=True),
                )
    yield "support", lambda: SparseMoreauGrad(net, support=20, max_batch=40).attribute(x, return_solution=True)
    yield (
        "support group",
        lambda: GroupSparseMoreauGrad(net, groups=Tiles(2), support=0.3).attribute(x, return_solution=True),
    )
    yield "radius", lambda: SparseMoreauGrad(net, radius=0.5).attribute(x, return_solution=True)
    yield "radius plain", lambda: MoreauGrad(net, radius_ratio=0.3).attribute(x, return_solution=True)
    yield "rho auto", lambda: MoreauGrad(net, rho="auto", score="margin").attribute(x, return_solution=True)
    yield "float64", lambda: SparseMoreauGrad(_net().double()).attribute(x.double(), return_solution=True)
    yield (
        "ids",
        lambda: SparseMoreauGrad(net, seed=3).attribute(
            x, target=2, ids=torch.tensor([9, 1, 7, 7, 0]), return_solution=True
        ),
    )
    yield "path", lambda: SparseMoreauGrad(net).eta_path(x, [0.5, 0.1, 1.0])
    for name, kind, settings in (
        ("gradient", Gradient, {}),
        ("smoothgrad", SmoothGrad, {"num_samples": 12}),
        ("st_smoothgrad", SoftThresholdedSmoothGrad, {"num_samples": 12}),
        ("sparsified", SparsifiedSmoothGrad, {"num_samples": 12}),
    ):
        yield name, lambda k=kind, s=settings: k(net, max_batch=11, **s).attribute(x, return_solution=True)
    for name in ("moreau", "sparse", "group"):
        kind, settings = EXPLAINERS[name]
        explainer = kind(net, **settings)
        solution = explainer.attribute(x, return_solution=True)
        yield (
            f"certificate {name}",
            lambda e=explainer, s=solution: e.certificate(x, s, num_samples=128, num_hvp_samples=64, lanczos_steps=4),
        )
        yield (
            f"vjp {name}",
            lambda e=explainer, s=solution: e.vjp(x, s, torch.ones_like(x), num_samples=64, max_steps=8, tol=1e-3),
        )


def _hash(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Zeros are hashed without their sign, which no one reads.
        data = (value.detach().contiguous() + 0 if value.is_floating_point() else value.contiguous()).cpu()
        return hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode() + data.numpy().tobytes()).hexdigest()[:16]
    if is_dataclass(value):
        return {f.name: _hash(getattr(value, f.name)) for f in fields(value) if not f.name.startswith("_")}
    if isinstance(value, (tuple, list)):
        return [_hash(v) for v in value]
    return repr(value)


def hashes() -> dict[str, Any]:
    """Hashes of every field, by case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: _hash(run()) for name, run in _cases()}


def differences(known: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the fields of ``known`` that differ; fields and cases that are new do not count."""
    found = []
    for name, value in known.items():
        if isinstance(value, dict):
            other = now.get(name, {})
            found += [f"{name}: {field}" for field, digest in value.items() if other.get(field) != digest]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                found += [
                    f"{name}[{i}]: {field}" for field, digest in item.items() if now[name][i].get(field) != digest
                ]
        elif now.get(name) != value:
            found.append(name)
    return found


def main(argv: list[str]) -> int:
    mode, file = argv[0], Path(argv[1]) if len(argv) > 1 else COMMITTED
    torch.set_num_threads(1)
    if mode == "record":
        file.write_text(json.dumps({"machine": machine(), "hashes": hashes()}, indent=1) + "\n")
        return 0
    known = json.loads(file.read_text())
    if known["machine"] != machine():
        print(f"recorded on {known['machine']}, this is {machine()}")
        return 2
    changed = differences(known["hashes"], hashes())
    print("\n".join(changed) or f"{len(known['hashes'])} cases: no bit differs")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
