"""Is what converged solved? Of the inputs that the default solver calls converged: how many are not, by how much.

    OMP_NUM_THREADS=1 python benchmarks/bench_calibration.py --json benchmarks/results/cpu-calibration.json

Resumable: a problem whose row is in the JSON file already is not run again. --quick: 64 inputs and fewer samples;
--only TEXT: problems with TEXT in their name. Two kinds of problems, 200 inputs each:

known   scores made of ridges, whose smoothed gradient has a closed form: the true residual is exact. Ramps and kinks,
        wells, plateaus, saddles, steps so steep that few samples see their slope, and sums of exponentials.
nets    trained networks; the residual is measured on 16,384 samples that the solver did not see, and an input counts
        as worse than a multiple of the tolerance where the lower end of its 95 % interval is.

over 1, 2, 10   share of the converged whose residual is larger than that multiple of the tolerance.
gradients       of one input, median.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timing import parser, report, save
from torch import Tensor

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    ProximalGradient,
    Solution,
    SparseMoreauGrad,
    Tiles,
    zoo,
)
from moreau_ext.analysis.certificate import absolute, measure_residual

EXPLAINERS: dict[str, Any] = {"dense": MoreauGrad, "sparse": SparseMoreauGrad, "group": GroupSparseMoreauGrad}
TOL = 0.01
SHARES = (1, 2, 10)


@dataclass(frozen=True)
class Ridge:
    """w·φ(a·x + b), φ of one of four kinds, and the gradient of its Gaussian smoothing."""

    kind: str  # "relu", "step" (a normal distribution function of the given width), "well" (minus a Gaussian), "square"
    a: Tensor
    b: float
    weight: float
    width: float = 1.0

    def value(self, x: Tensor) -> Tensor:
        u = x @ self.a + self.b
        if self.kind == "relu":
            return self.weight * u.clamp_min(0)
        if self.kind == "step":
            return self.weight * torch.special.ndtr(u / self.width)
        if self.kind == "well":
            return -self.weight * torch.exp(-0.5 * (u / self.width).square())
        return self.weight * u.square() / 2

    def gradient(self, x: Tensor, sigma: Tensor) -> Tensor:
        """∇E φ(a·(x + σz) + b); [B, D] for x [B, D] and σ [B]."""
        u, spread = x @ self.a + self.b, sigma * self.a.norm()
        if self.kind == "relu":
            slope = torch.special.ndtr(u / spread)
        elif self.kind == "step":
            s = (self.width**2 + spread.square()).sqrt()
            slope = torch.exp(-0.5 * (u / s).square()) / (math.sqrt(2 * math.pi) * s)
        elif self.kind == "well":
            s = (self.width**2 + spread.square()).sqrt()
            slope = self.width * u / s**3 * torch.exp(-0.5 * (u / s).square())
        else:
            slope = u
        return self.weight * slope[:, None] * self.a


@dataclass(frozen=True)
class Known:
    """A score with a closed form of its smoothed gradient, and its inputs."""

    score: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    x: Tensor


@dataclass(frozen=True)
class Case:
    """One problem."""

    name: str
    method: str
    make: Callable[[int], Known] | str  # or the name of a net
    settings: dict[str, Any] = field(default_factory=dict)
    solver: Any = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.method}"


def ridges(parts: list[Ridge], spread: float, centre: Tensor) -> Callable[[int], Known]:
    """Inputs spread around a centre."""

    def make(count: int) -> Known:
        noise = torch.randn(count, len(centre), generator=torch.Generator().manual_seed(1)).double()
        x = centre + spread * noise

        def score(x: Tensor) -> Tensor:
            return torch.stack([part.value(x) for part in parts]).sum(0)

        def gradient(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.stack([part.gradient(x, sigma) for part in parts]).sum(0)

        return Known(score, gradient, x)

    return make


def exponentials(count: int) -> Known:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0)).double()
    return Known(lambda x: x.exp().sum(1), lambda x, s: (x + s[:, None].square() / 2).exp(), x)


def direction(dimensions: int, seed: int = 0) -> Tensor:
    """A unit vector; the first axis in one dimension."""
    if dimensions == 1:
        return torch.ones(1, dtype=torch.float64)
    a = torch.randn(dimensions, generator=torch.Generator().manual_seed(seed)).double()
    return a / a.norm()


def ramp(dimensions: int) -> Callable[[int], Known]:
    """Slope 1, then 100 from 0.2 to 90 further down, then 1 again; the solution is at the lower kink."""
    a = direction(dimensions)
    parts = [Ridge("square", a, 1e6, 1e-6), Ridge("relu", a, 90.0, 99.0), Ridge("relu", a, -0.2, -99.0)]
    return ridges(parts, 0.01, torch.zeros(dimensions, dtype=torch.float64))


def steep_step(width: float, dimensions: int) -> Callable[[int], Known]:
    """A slope of 1 and a step of the height σ = 0.1: of 1/width samples one sees how steep it is."""
    a = direction(dimensions)
    line = Ridge("square", a, 1e6, 1e-6)
    return ridges([line, Ridge("step", a, 0.0, 0.1, 0.1 * width)], 0.05, 0.1 * a)


def random_relus(dimensions: int, count: int) -> Callable[[int], Known]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, dimensions, generator=generator).double() / math.sqrt(dimensions)
    b, w = torch.randn(2, count, generator=generator).double().tolist()
    parts = [Ridge("relu", a[k], b[k], w[k] / 5) for k in range(count)]
    return ridges(parts, 1.0, torch.zeros(dimensions, dtype=torch.float64))


def well(dimensions: int) -> Callable[[int], Known]:
    """A narrow well beside a slope."""
    a = direction(dimensions)
    parts = [Ridge("square", a, 1e6, 1e-6), Ridge("well", a, 0.5, 2.0, 0.1)]
    return ridges(parts, 0.1, torch.zeros(dimensions, dtype=torch.float64))


def plateau(dimensions: int) -> Callable[[int], Known]:
    """A sigmoid that is flat a few σ away."""
    a = direction(dimensions)
    return ridges([Ridge("step", a, 0.0, 5.0, 0.5)], 0.5, 0.3 * a)


def saddle(dimensions: int) -> Callable[[int], Known]:
    """Curved up along one direction, down along another, with kinks in between."""
    a, b = direction(dimensions, 1), direction(dimensions, 2)
    parts = [Ridge("square", a, 0.3, 1.0), Ridge("square", b, 0.2, -0.6), Ridge("relu", a - b, 0.1, 0.5)]
    return ridges(parts, 0.5, torch.zeros(dimensions, dtype=torch.float64))


def known_cases(tol: float) -> list[Case]:
    cases = []
    for d in (1, 2, 64):
        for method in ("dense", "sparse"):
            cases.append(Case(f"ramp in {d}-D, rho 1", method, ramp(d), {"sigma": 0.05}))
            cases.append(Case(f"well in {d}-D, rho 1", method, well(d), {"sigma": 0.1}))
            cases.append(Case(f"plateau in {d}-D, rho 10", method, plateau(d), {"sigma": 0.2, "rho": 10.0}))
            for width in (0.1, 0.01, 0.001):
                settings = {"sigma": 0.1, "rho": 0.1}
                cases.append(Case(f"step of width {width:g} sigma in {d}-D", method, steep_step(width, d), settings))
    for d in (2, 64):
        for rho in (0.3, 10.0):
            for method in ("dense", "sparse"):
                settings = {"sigma": 0.3, "rho": rho}
                cases.append(Case(f"32 kinks in {d}-D, rho {rho:g}", method, random_relus(d, 32), settings))
                cases.append(Case(f"saddle in {d}-D, rho {rho:g}", method, saddle(d), settings))
    for rho in (1.0, 10.0, 100.0):
        for method, settings in (("dense", {}), ("sparse", {}), ("sparse", {"support": 3})):
            name = f"exponentials, rho {rho:g}" + (", support 3" if settings else "")
            cases.append(Case(name, method, exponentials, {"rho": rho, **settings}))
    cases.append(
        Case("32 kinks in 64-D, support 20, rho 10", "sparse", random_relus(64, 32), {"support": 20, "rho": 10.0})
    )
    for noise in ("fresh", "fixed"):
        for m in (1, 8, 32):
            solver = ProximalGradient(m, 200, 0.03, tol=tol, noise=noise)
            name = f"32 kinks in 2-D, 200 steps, {m} samples, {noise} noise"
            cases.append(Case(name, "dense", random_relus(2, 32), {"sigma": 0.3, "rho": 0.3}, solver))
    return cases


def net_cases() -> list[Case]:
    cases = []

    def add(net: str, method: str, rho: float | None = None, **settings: Any) -> None:
        told = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
        name = ", ".join(filter(None, [net, told, "" if rho is None else f"rho {rho:g}"]))
        cases.append(Case(name, method, net, settings if rho is None else {"rho": rho, **settings}))

    for rho in (0.1, 1.0, 10.0, 100.0):
        for method in ("dense", "sparse", "group"):
            add("digits_cnn", method, rho)
        add("tabular_mlp", "sparse", rho)
        add("digits_cnn", "dense", rho, score="prob")
        add("digits_cnn", "sparse", rho, score="log_prob")
        add("digits_cnn_softplus", "dense", rho, score="margin")
        add("digits_cnn", "sparse", rho, support=8)
    add("digits_cnn", "sparse", 100.0, score="prob")
    add("digits_cnn", "dense", 1.0, noise_level=0.02)
    add("digits_cnn", "group", radius_ratio=0.1)
    add("digits_cnn", "sparse", radius_ratio=0.3, support=0.2)
    add("digits_vit", "dense", 0.005)
    add("digits_vit", "sparse", 0.1)
    return cases


def exact_residual(known: Known, solution: Solution) -> Tensor:
    """‖y + ρS_η(p(y))‖ over the larger of both lengths and of 10⁻³·ρ‖p(0)‖."""
    x, y, sigma = known.x, solution.displacement, solution.sigma
    p, eta = known.gradient(x + y, sigma), solution.eta[:, None]
    image = -solution.rho[:, None] * p.sign() * (p.abs() - eta).clamp_min(0)
    floor = 1e-3 * solution.rho * known.gradient(x, sigma).norm(dim=1)
    size = torch.stack([y.norm(dim=1), image.norm(dim=1), floor]).amax(0)
    gap = (y - image).norm(dim=1)
    return torch.where(gap == 0, 0.0, gap / size)


def measured_residual(explainer: Any, x: Tensor, target: Tensor, solution: Solution, samples: int) -> Tensor:
    """The lower end of the 95 % interval of the relative residual."""
    problem = explainer.problem(x, target, ids=solution.ids)
    eta = (solution.eta.to(problem.rho[0].dtype),)
    problem = replace(problem, rho=(solution.rho,), penalty=absolute(problem.penalty, eta), tuning=None)
    found = []
    for rows in torch.arange(len(x)).split(16):
        part = measure_residual(problem.take(rows), (solution.displacement[rows],), samples, 0.95)
        found.append(part["residual_low"] / part["size"].clamp_min(1e-300))
    return torch.cat(found)


def run(case: Case, count: int, samples: int, tol: float = TOL, max_gradients: int = 2048) -> dict[str, Any]:
    settings: dict[str, Any] = {"rho": 1.0, "noise_level": 0.1} | case.settings
    if "radius_ratio" in settings:
        del settings["rho"]
    if "sigma" in settings:
        del settings["noise_level"]
    if case.method != "dense" and "support" not in settings:
        settings["eta_ratio"] = 0.3
    solver = case.solver or AdaptiveProximalGradient(tol, max_gradients)
    known = target = None
    if isinstance(case.make, str):
        model: Any = zoo.trained(case.make)
        x = (zoo.breast_cancer if case.make.startswith("tabular") else zoo.digits)("test").inputs[:count]
        with torch.no_grad():
            target = model(x).argmax(1)
        if case.method == "group":
            settings["groups"] = Tiles(2)
    else:
        known = case.make(count)
        model, x = known.score, known.x
        if case.method == "group":
            settings["groups"] = Labels(torch.zeros(x.shape[1], dtype=torch.int64))
    explainer = EXPLAINERS[case.method](model, solver=solver, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = explainer.attribute(x, target=target, return_solution=True)
        claimed = found.converged.nonzero().squeeze(1)
        if known is not None:
            residual = exact_residual(known, found)[claimed]
        elif len(claimed):
            assert target is not None
            residual = measured_residual(explainer, x[claimed], target[claimed], found.take(claimed), samples)
        else:
            residual = torch.zeros(0, dtype=torch.float64)
    row: dict[str, Any] = {"problem": case.title, "inputs": len(x), "converged": len(claimed)}
    for share in SHARES:
        over = float((residual > share * tol).double().mean()) if len(claimed) else None
        row[f"over {share}"] = over
    row["largest"] = float(residual.max()) if len(claimed) else None
    row["gradients"] = float(found.gradient_evaluations.double().quantile(0.5))
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="problems with this in their name")
    options.add_argument("--tol", type=float, default=TOL)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    count, samples = (64, 4096) if arguments.quick else (200, 1 << 14)
    rows: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    done = {row["problem"] for row in rows}
    for case in [*known_cases(arguments.tol), *net_cases()]:
        if arguments.only in case.title and case.title not in done:
            try:
                rows.append(run(case, count, samples, arguments.tol))
            except ValueError as error:  # a problem without a solution that numbers hold
                rows.append({"problem": case.title, "inputs": count, "error": str(error)[:90]})
            print(json.dumps(rows[-1]), flush=True)
            save("calibration", arguments.device, rows, arguments.json)
    report("calibration", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
