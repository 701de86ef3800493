"""What does a whole explanation cost beside the bare forward and backward passes of its model?

    OMP_NUM_THREADS=1 python benchmarks/bench_explainers.py [--device cuda]

First table: 60 steps (20 with --quick, 10 of more than 256 inputs) of 8 samples against "bare", which runs the model
forward and backward on prepared noisy inputs of the same batch as many times and does nothing else; on a GPU as a
replayed CUDA graph. "eager ratio" is the explanation with cuda_graphs=False. The last row of each model is the default
solver, whose passes differ in size: its "bare" makes passes of the same sizes, as many of each.

Second table: explanations per second of the published schedule, 32 samples a step, at equal steps and samples: as
written (noise made on the host, one image at a time), with its noise on the device, batched, on a GPU and without
--quick also compiled by torch.compile, and ours; and of the default solver, at its own accuracy, with the share that it
reports converged. A loop of 300 steps is timed by 30 (10 with --quick) of them.

ResNet-20-like at 3 x 32 x 32 and the digits CNN; on a GPU also torchvision's ResNet-50 and ViT-B/16 at 3 x 224 x 224
with random weights, where torchvision is installed.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nets import resnet50, vit
from published import published
from timing import interleaved, parser, replayed, report, save
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SparseMoreauGrad,
    Tiles,
    zoo,
)
from moreau_ext.model.precision import Precision, autocast, flags

SAMPLES, STEPS = 8, 60


@dataclass(frozen=True)
class Case:
    """A model, the size of its inputs, how many at once, the tiles of its groups."""

    name: str
    make: Callable[[], nn.Module]
    features: tuple[int, ...]
    batch: int
    tile: int


def cases(device: str, quick: bool) -> list[Case]:
    def resnet(batch: int) -> Case:
        return Case("ResNet-20-like 3x32x32", zoo.resnet20, (3, 32, 32), batch, 8)

    def digits(batch: int) -> Case:
        return Case("digits CNN 1x8x8", lambda: zoo.trained("digits_cnn"), (1, 8, 8), batch, 2)

    if device == "cpu":
        return [resnet(4), digits(64), digits(1)]
    found = [resnet(b) for b in ((4, 64, 1024) if quick else (4, 16, 64, 256, 1024))] + [digits(64), digits(1)]
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed: no ResNet-50, no ViT-B/16")
        return found
    large = (("ResNet-50 3x224x224", resnet50), ("ViT-B/16 3x224x224", vit))
    return found + [Case(name, make, (3, 224, 224), b, 14) for name, make in large for b in (1, 8)]


def bare(
    model: Callable[..., Any], rows: Tensor, target: Tensor, passes: dict[int, int], precision: Precision = "float32"
) -> Callable[[], None]:
    """Forward and backward: of so many rows, so many times."""
    pool = torch.cuda.graph_pool_handle() if rows.is_cuda else None

    def of(size: int) -> Callable[[], None]:
        leaf = rows.repeat(-(-size // len(rows)), *[1] * (rows.dim() - 1))[:size]
        if not rows.is_contiguous():
            # Which repeat loses.
            leaf = leaf.contiguous(memory_format=torch.channels_last)
        leaf.requires_grad_()
        index = target[:1, None].expand(size, 1)

        def once() -> None:
            with flags(precision, leaf.device, False):
                with autocast(precision, leaf.device):
                    score = model(leaf).gather(1, index)
                torch.autograd.grad(score, leaf, torch.ones_like(score))

        return replayed(once, pool) if rows.is_cuda else once

    runs = [(of(size), times) for size, times in passes.items()]

    def loop() -> None:
        for run, times in runs:
            for _ in range(times):
                run()

    return loop


def passes_of(
    model: Callable[..., Any], x: Tensor, target: Tensor, kind: Any = SparseMoreauGrad, **settings: Any
) -> dict[int, int]:
    """How many passes of how many rows an explainer makes."""
    sizes: Counter[int] = Counter()

    def watched(rows: Tensor) -> Tensor:
        sizes[len(rows)] += torch.is_grad_enabled()
        found: Tensor = model(rows)
        return found

    kind(watched, **settings).attribute(x, target)
    return {size: times for size, times in sizes.items() if times}


def beside_the_passes(case: Case, device: str, quick: bool, x: Tensor, target: Tensor) -> list[dict[str, Any]]:
    model = case.make().eval().to(device)
    # Of a thousand inputs a step takes a tenth of a second: fewer steps, and one penalty stands for all.
    many = case.batch > 256
    steps = STEPS // 6 if many else STEPS // 3 if quick else STEPS
    fixed: dict[str, Any] = {"solver": ProximalGradient(SAMPLES, steps, tol=0.0), "max_batch": None}
    # Where nobody converges, every input takes all that it is given; the first levels take 224.
    solver = AdaptiveProximalGradient(0.01, max(SAMPLES * steps, 224))
    adaptive: dict[str, Any] = {"rho": 1.0, "solver": solver, "max_batch": 1024}
    noisy = x.repeat_interleave(SAMPLES, 0)
    noisy = noisy + 0.1 * torch.randn(noisy.shape, device=device)
    kinds: dict[str, Callable[..., Any]] = {
        "moreau": partial(MoreauGrad, **fixed),
        "sparse": partial(SparseMoreauGrad, **fixed),
        "group": partial(GroupSparseMoreauGrad, groups=Tiles(case.tile), **fixed),
        "sparse, default solver": partial(SparseMoreauGrad, **adaptive),
    }
    if many:
        kinds = {name: kind for name, kind in kinds.items() if name.startswith("sparse")}
    runs: dict[str, Callable[[], Any]] = {}
    for method, make in kinds.items():
        runs[method] = partial(make(model, cuda_graphs="auto").attribute, x, target)
        if device == "cuda":
            for _ in range(1 if many else 4):
                runs[method]()  # what comes once in an explanation is captured at its fourth time
            runs[f"{method} eager"] = partial(make(model, cuda_graphs=False).attribute, x, target)
    passes = passes_of(model, x, target, **adaptive)
    runs["bare"] = bare(model, noisy, target, {len(noisy): steps})
    runs["bare, default solver"] = bare(model, noisy, target, passes)
    rounds = 9 if not quick else 1 if many else 3
    seconds = interleaved(runs, device, rounds, each=0.0)
    rows = []
    for method in kinds:
        default = "default" in method
        alone = seconds["bare, default solver" if default else "bare"]
        row = {
            "model": case.name,
            "method": method,
            "B x m x steps": f"{sum(n * k for n, k in passes.items())} rows in {sum(passes.values())} passes"
            if default
            else f"{case.batch} x {SAMPLES} x {steps}",
            "seconds": seconds[method],
            "bare seconds": alone,
            "ratio": seconds[method] / alone,
            "explanations/s": case.batch / seconds[method],
        }
        if device == "cuda":
            row["eager ratio"] = seconds[f"{method} eager"] / alone
        rows.append(row)
    return rows


def beside_the_published(case: Case, device: str, quick: bool, x: Tensor, target: Tensor) -> dict[str, Any]:
    model = case.make().eval().to(device)
    few, whole, count = (10 if quick else 30), 300, len(x)
    sigma = 0.1 * (x.flatten(1).amax(1) - x.flatten(1).amin(1))

    def loop(rows: slice, net: Any = model, **settings: Any) -> Callable[[], None]:
        def run() -> None:
            settings_ = {"rho": 1.0, "steps": few, "average": False, **settings}
            for _ in published(net, x[rows], target[rows], sigma[rows], **settings_):
                pass

        return run

    paper = ProximalGradient.paper(max_steps=few)
    ours = MoreauGrad(model, noise_level=0.1, solver=paper, max_batch=None, cuda_graphs="auto")
    auto = MoreauGrad(model, rho=1.0, noise_level=0.1, solver=AdaptiveProximalGradient(0.01), cuda_graphs="auto")
    for explainer in (ours, auto) * (4 if device == "cuda" else 0):
        explainer.attribute(x, target)
    runs: dict[str, Callable[[], Any]] = {
        "as written": loop(slice(0, 1)),
        "noise on the device": loop(slice(0, 1), host_noise=False),
        "batched": loop(slice(None), host_noise=False),
        "ours": partial(ours.attribute, x, target),
        "default": partial(auto.attribute, x, target),
    }
    if device == "cuda" and not quick:
        runs["batched, compiled"] = loop(slice(None), torch.compile(model), host_noise=False)
    seconds = interleaved(runs, device, 3 if quick else 5, each=0.0)
    speed = {name: (1 if name in ("as written", "noise on the device") else count) / s for name, s in seconds.items()}
    row: dict[str, Any] = {"model": case.name, "B": count}
    for name in runs:
        # The default solver ran to its own end; the others a part of the schedule.
        row[f"{name}, explanations/s"] = speed[name] * (1 if name == "default" else few / whole)
    row["ours / as written"] = speed["ours"] / speed["as written"]
    row["default / as written"] = speed["default"] / (speed["as written"] * few / whole)
    row["default converged"] = float(auto.attribute(x, target, return_solution=True).converged.double().mean())
    return row


def measured(case: Case, arguments: Any) -> list[dict[str, Any]]:
    device, quick = arguments.device, arguments.quick
    torch.manual_seed(0)
    x = torch.rand(case.batch, *case.features, device=device)
    target = torch.zeros(case.batch, dtype=torch.int64, device=device)
    rows = beside_the_passes(case, device, quick, x, target)
    # The published loop on 64 at once at most: 32 samples each.
    if case.batch <= 64:
        save("explainers", device, rows, arguments.json)
        rows.append(beside_the_published(case, device, quick, x, target))
    return rows


def apart(number: int, case: Case, arguments: Any, rows: list[dict[str, Any]]) -> None:
    """Adds the rows of a case that is measured in a process of its own, which leaves nothing to the next case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        options = ["--device", arguments.device, "--threads", str(arguments.threads), "--json", str(path)]
        options += ["--quick"] * arguments.quick + ["--case", str(number)]
        status = -signal.SIGINT
        try:
            status = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.DEVNULL).returncode
        finally:
            # What was measured stays if the rest is cut off.
            rows += json.loads(path.read_text())["rows"] if path.exists() else []
            if status:
                rows.append({"model": case.name, "B": case.batch, "failed with": status})
            report("explainers", arguments.device, rows, arguments.json)


def main() -> None:
    parse = parser(__doc__)
    parse.add_argument("--only", default="", help="models with this in their name")
    parse.add_argument("--case", type=int, help="this one alone, in this process")
    arguments = parse.parse_args()
    torch.set_num_threads(arguments.threads)
    every = cases(arguments.device, arguments.quick)
    if arguments.case is not None:
        report("explainers", arguments.device, measured(every[arguments.case], arguments), arguments.json)
        return
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(every):
        if arguments.only in case.name:
            apart(number, case, arguments, rows)
    sys.exit(any("failed with" in row for row in rows))


if __name__ == "__main__":
    main()
