"""What does a solution cost: gradients and seconds, against the published schedule; and is what converged solved?

    OMP_NUM_THREADS=1 python benchmarks/bench_solver.py --json benchmarks/results/cpu-solver.json

Resumable: a problem whose row is in the JSON file already is not run again. --quick: fewer inputs and samples, the
small nets alone; --only TEXT: problems with TEXT in their name. For every problem, per input:

reference   the adaptive solver with another seed and 102,400 gradients (the two large nets: fewer, stated). Errors are
            ‖A − A_ref‖/‖A_ref‖, uncorrected: they include the reference's own, whose estimate is "reference".
auto        gradients until the default solver's answer is within 1 / 0.5 / 0.2 % of the reference: the first of its
            looks (or of its ends, at budgets of 480, 960 and 1,920) that is.
published   the published schedule as written: 300 steps of 0.1·ρ, 32 independent samples, the mean of the last 101
            iterates, 9,600 gradients; in plain PyTorch, batched. "stopped": the same run stopped at the best moment in
            hindsight, with the better of its last iterate and the mean of its later half.
average     samples that a mean gradient AT the reference solution needs for the same error: no solver can know.
worse       share of inputs where auto (tol 1 % and 0.5 %) ends at a larger objective than the published run, by more
            than 1e-3·|F|; and the same of a second published run. On 4,096 samples that none of them saw.
honest      of the inputs that auto reports converged at 1 %, the share whose residual is ≤ 1 % on 32,768 fresh samples
            (the large nets: 2,048), as it reads and within its standard error.
seconds     of the cheapest of a few settings of auto whose residuals, in the median and at 90 %, are no larger than the
            published run's (on 4,096 fresh samples; the large nets 2,048), and how many times as long the published
            loop takes as written, one input at a time, and batched. One thread.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from published import published
from timing import machine, parser, report
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    Solution,
    SparseMoreauGrad,
    Tiles,
    zoo,
)
from moreau_ext.preparation.prepare import prepare
from moreau_ext.solvers.penalties import L1, GroupL2, Penalty

TARGETS = (0.01, 0.005, 0.002)
BUDGETS = (480, 960, 1920)
RATIO = 0.3  # of eta_max, fixed as an absolute eta for all solvers


@dataclass(frozen=True)
class Case:
    """One problem: a trained net, ρ, the noise level, the map; how many inputs, and samples for reference and judge."""

    net: str
    rho: float
    level: float
    method: str
    inputs: int = 64
    reference: int = 102_400
    judge: int = 1 << 15

    @property
    def name(self) -> str:
        return f"{self.net}, rho {self.rho:g}, noise {self.level:g}, {self.method}"


# Fewer inputs and samples where a gradient takes milliseconds.
LARGE: dict[str, dict[str, Any]] = {
    "digits_vit": {"inputs": 16, "reference": 1 << 16, "judge": 2048},
    "digits32_resnet20": {"inputs": 4, "reference": 1 << 14, "judge": 2048},
}
CASES = [
    *(Case("tabular_mlp", 1.0, 0.1, method) for method in ("moreau", "sparse")),
    Case("digits_cnn", 0.1, 0.1, "sparse"),
    Case("digits_cnn_softplus", 0.1, 0.1, "sparse"),
    Case("digits32_resnet20", 0.015, 0.1, "sparse", **LARGE["digits32_resnet20"]),
    Case("digits_vit", 0.005, 0.1, "moreau", **LARGE["digits_vit"]),
    *(Case("digits_cnn", 0.1, 0.1, method) for method in ("moreau", "group")),
    Case("digits_cnn", 0.1, 0.3, "sparse"),
    Case("digits_cnn_softplus", 0.1, 0.02, "group"),
    Case("digits_cnn", 1.0, 0.1, "moreau"),
    Case("digits_vit", 0.005, 0.1, "group", **LARGE["digits_vit"]),
    Case("digits32_resnet20", 0.015, 0.1, "moreau", **LARGE["digits32_resnet20"]),
]
# Settings of auto, (tol, max_gradients) from cheap to dear, for the comparison at equal residual.
SETTINGS = [(0.02, 2048), (0.01, 2048), *((1e-4, budget) for budget in (2048, 3072, 4096, 6144, 8192, 12288))]


class Recorded(AdaptiveProximalGradient):
    """The adaptive solver, which keeps what it would have returned at each of its looks."""

    looks: list[tuple[Tensor, int, Tensor]]

    def next(self, state: Any, answer: Any) -> Tensor:
        if answer is not None:
            self.looks.append((state.problem.ids, state.evaluations, answer.maps[0]))
        return super().next(state, answer)


class Bench:
    """One case: its model, inputs, η and σ, and the solvers on it."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        data = {"tabular": zoo.breast_cancer, "digits32": zoo.digits32}
        source = next((make for key, make in data.items() if case.net.startswith(key)), zoo.digits)
        self.x = source("test").inputs[: case.inputs].to(device)
        self.plain = zoo.trained(case.net).to(device)
        # A large net's passes are half as long on a prepared copy, for all solvers alike; small ones stay as they are.
        self.model: nn.Module = self.plain
        if case.net == "digits32_resnet20":
            ready = prepare(self.plain, self.x, channels_last=True, max_batch=128)
            self.model = ready.model
        with torch.no_grad():
            self.target = self.model(self.x).argmax(1)
        flat = self.x.flatten(1)
        self.sigma = case.level * (flat.amax(1) - flat.amin(1))
        self.groups = Tiles(2) if case.method == "group" else None
        self.eta: Tensor | None = None
        if case.method != "moreau":
            one = ProximalGradient(1024, 1, 0.1 * case.rho, tol=0.0)
            self.eta = self.solve(one, seed=7, eta_ratio=RATIO).eta

    def solve(self, solver: Any, seed: int = 0, x: Tensor | None = None, **settings: Any) -> Solution:
        case = self.case
        settings = {"rho": case.rho, "sigma": self.sigma, "solver": solver, "seed": seed, "max_batch": 1024} | settings
        if case.method != "moreau" and "eta_ratio" not in settings:
            settings["eta"] = self.eta
        if case.net == "digits32_resnet20":
            settings["max_batch"] = 128
        kinds: dict[str, Any] = {"moreau": MoreauGrad, "sparse": SparseMoreauGrad, "group": GroupSparseMoreauGrad}
        if self.groups is not None:
            settings["groups"] = self.groups
        explainer = kinds[case.method](self.model, **settings)
        found: Solution = explainer.attribute(self.x if x is None else x, target=self.target, return_solution=True)
        return found

    def penalty(self) -> Penalty | None:
        if self.eta is None:
            return None
        if self.groups is None:
            return L1((self.eta,))
        return GroupL2((self.eta,), groups=(self.groups.partition(self.x, torch.float32),))

    def published(self, seed: int, rows: slice = slice(None), steps: int = 300) -> Iterator[tuple[Tensor, Tensor]]:
        """The published loop: (δ_t, what it would return) per step."""
        whole = self.penalty()
        penalty = None if whole is None else whole.take(torch.arange(len(self.x))[rows])
        x, target, sigma = self.x[rows], self.target[rows], self.sigma[rows]
        return published(self.model, x, target, sigma, rho=self.case.rho, penalty=penalty, steps=steps, seed=seed)

    def residual(self, displacement: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """‖y − ȳ‖/max(‖y‖, ‖ȳ‖), ȳ = −ρS_η(p(y)), on samples that nobody saw; and its standard error, from halves."""
        images = []
        for seed in (1001, 1002):
            one = ProximalGradient(samples // 2, 1, 0.1 * self.case.rho, noise="fixed", average_last=1, tol=0.0)
            images.append(self.solve(one, seed, self.x + displacement).envelope_gradient)
        penalty = self.penalty()

        def image(p: Tensor) -> Tensor:
            return -self.case.rho * (p if penalty is None else penalty.prox((p,))[0])

        y, mean = displacement, image((images[0] + images[1]) / 2)
        size = torch.maximum(y.flatten(1).norm(dim=1), mean.flatten(1).norm(dim=1))
        noise = (image(images[0]) - image(images[1])).flatten(1).norm(dim=1) / 2
        return (y - mean).flatten(1).norm(dim=1) / size, noise / size

    def objective(self, displacement: Tensor) -> Tensor:
        """H(δ) on 4,096 samples, the same for every δ of an input."""
        total = torch.zeros(len(self.x), dtype=torch.float64)
        generator = torch.Generator().manual_seed(77)
        one = [1] * (self.x.dim() - 1)
        with torch.no_grad():
            for _ in range(64):
                z = torch.randn(len(self.x), 32, *self.x.shape[1:], generator=generator)
                z = torch.cat([z, -z], 1) * self.sigma.view(-1, 1, *one)
                rows = ((self.x + displacement).unsqueeze(1) + z).flatten(0, 1)
                which = self.target.repeat_interleave(64)[:, None]
                scores = torch.cat(
                    [self.model(r).gather(1, w) for r, w in zip(rows.split(256), which.split(256), strict=True)]
                )
                total += scores.view(-1, 64).double().mean(1)
        value = total / 64 + displacement.flatten(1).double().square().sum(1) / (2 * self.case.rho)
        penalty = self.penalty()
        return value if penalty is None else value + penalty.value((displacement,))


def first_within(looks: dict[int, list[tuple[int, float]]], target: float) -> Tensor:
    """Gradients of each input's first look within the target, infinite where there is none."""
    return torch.tensor(
        [min((n for n, e in seen if e <= target), default=math.inf) for seen in looks.values()], dtype=torch.float64
    )


def quantiles(values: Tensor) -> tuple[float | None, float | None]:
    """(median, 90 %); None where it is not reached."""
    ordered = values.sort().values
    both = [float(ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]) for q in (0.5, 0.9)]
    return tuple(v if math.isfinite(v) else None for v in both)


def run(case: Case, device: str) -> dict[str, Any]:
    bench = Bench(case, device)
    count = len(bench.x)
    row: dict[str, Any] = {"problem": case.name, "inputs": count}
    began = time.perf_counter()
    reference = bench.solve(AdaptiveProximalGradient(1e-9, case.reference), seed=99)
    best = reference.attribution
    norm = best.flatten(1).norm(dim=1)
    row["reference gradients"] = case.reference
    row["reference"] = float((reference.residual / (case.rho * norm)).quantile(0.5))

    def error(maps: Tensor, rows: Tensor | slice = slice(None)) -> list[float]:
        found: list[float] = ((maps - best[rows]).flatten(1).norm(dim=1) / norm[rows]).tolist()
        return found

    # --- gradients to an error ---
    looks: dict[int, list[tuple[int, float]]] = {i: [] for i in range(count)}
    recorder = Recorded(1e-9, 1 << 13)
    object.__setattr__(recorder, "looks", [])
    bench.solve(recorder)
    for ids, spent, maps in recorder.looks:
        for i, e in zip(ids.tolist(), error(maps, ids), strict=True):
            looks[i].append((spent, e))
    for budget in BUDGETS:
        found = bench.solve(AdaptiveProximalGradient(1e-9, budget))
        for i, (n, e) in enumerate(zip(found.gradient_evaluations.tolist(), error(found.attribution), strict=True)):
            looks[i].append((n, e))
        row[f"auto error at {budget}"] = quantiles(torch.tensor(error(found.attribution)))[0]
    stopped: dict[int, list[tuple[int, float]]] = {i: [] for i in range(count)}
    history: list[Tensor] = []
    for t, (delta, mean) in enumerate(bench.published(1)):
        answer = mean
        history = [*history, delta][-150:]
        if t % 5 == 4:
            later = torch.stack(history[-(t // 2 + 1) :]).mean(0)
            pairs = zip(error(-delta / case.rho), error(-later / case.rho), strict=True)
            for i, both in enumerate(pairs):
                stopped[i].append((32 * (t + 1), min(both)))
    for target in TARGETS:
        row[f"auto to {target:.1%}"], row[f"p90 to {target:.1%}"] = quantiles(first_within(looks, target))
        row[f"published stopped, to {target:.1%}"] = quantiles(first_within(stopped, target))[0]
    row["published error at 9600"] = quantiles(torch.tensor(error(-answer / case.rho)))[0]
    one = ProximalGradient(1024, 1, 0.1 * case.rho, noise="fixed", average_last=1, tol=0.0)
    oracle = torch.tensor(error(bench.solve(one, 5, bench.x + reference.displacement).attribution))
    for target in TARGETS:
        row[f"average to {target:.1%}"] = quantiles(1024 * (oracle / target).square())[0]

    # --- objectives, calibration ---
    second = list(bench.published(2))[-1][1]
    auto = bench.solve(AdaptiveProximalGradient(0.01))
    finer = bench.solve(AdaptiveProximalGradient(0.005, 1 << 13))
    published, least = bench.objective(answer), bench.objective(reference.displacement).abs()
    for name, other in (("auto", auto.displacement), ("auto at 0.5%", finer.displacement), ("published again", second)):
        row[f"worse, {name}"] = float((bench.objective(other) > published + 1e-3 * least).double().mean())
    residual, deviation = bench.residual(auto.displacement, case.judge)
    converged = auto.converged
    row["converged"] = float(converged.double().mean())
    row["auto gradients at tol 1%"] = quantiles(auto.gradient_evaluations.double())[0]
    if bool(converged.any()):
        row["honest"] = float((residual <= 0.01)[converged].double().mean())
        row["honest within error"] = float((residual - deviation <= 0.01)[converged].double().mean())

    # --- seconds to equal residual ---
    judge = min(case.judge, 4096)

    def both(displacement: Tensor) -> Tensor:
        return bench.residual(displacement, judge)[0].quantile(torch.tensor([0.5, 0.9]))

    theirs = both(answer)
    row["published residual"], row["published residual p90"] = theirs.tolist()
    for setting in SETTINGS:
        equal = AdaptiveProximalGradient(*setting)
        if bool((both(bench.solve(equal).displacement) <= theirs).all()):
            break
    row["equal residual at tol, budget"] = "{:g}, {}".format(*setting)
    alone = min(count, 2)
    times: dict[str, list[float]] = {"auto": [], "batched": [], "one": []}
    for _ in range(1 if case.inputs <= 4 else 3):
        start = time.perf_counter()
        bench.solve(equal)
        times["auto"].append(time.perf_counter() - start)
        # Every step costs the same: a sixth of them is timed.
        start = time.perf_counter()
        for _ in bench.published(1, steps=50):
            pass
        times["batched"].append(6 * (time.perf_counter() - start))
        start = time.perf_counter()
        for i in range(alone):
            for _ in bench.published(1, slice(i, i + 1), steps=50):
                pass
        times["one"].append(6 * (time.perf_counter() - start) * count / alone)
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    row["auto seconds"] = middle["auto"]
    row["published as written / auto"] = middle["one"] / middle["auto"]
    row["published batched / auto"] = middle["batched"] / middle["auto"]
    row["took"] = time.perf_counter() - began
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="problems with this in their name")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [case for case in CASES if arguments.only in case.name]
    if arguments.quick:
        cases = [replace(case, inputs=16, reference=1 << 14, judge=1 << 13) for case in cases if case.net not in LARGE]
    rows: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    known = {(row["problem"], row["inputs"], row["reference gradients"]) for row in rows}
    for case in cases:
        if (case.name, case.inputs, case.reference) in known:
            continue
        row = run(case, arguments.device)
        print(json.dumps(row), flush=True)
        rows.append(row)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            text = {"benchmark": "solver", "machine": machine(arguments.device), "rows": rows}
            arguments.json.write_text(json.dumps(text, indent=2) + "\n")
    report("solver", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
