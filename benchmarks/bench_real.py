"""How fast and how exact are explanations of networks of published sizes, on a GPU or a CPU?

    OMP_NUM_THREADS=1 python benchmarks/bench_real.py --device cuda --nets resnet50 --json FILE

ResNet-50 and ViT-B/16 of torchvision, ConvNeXt-T of timm (random weights) and EfficientNet-Lite0 (ImageNet's), each
prepared for every precision, on photographs of 3 x 224 x 224. Noise 0.05, one rho for all, which rho="auto" finds for
the first photograph, and a budget of 512 gradients for every input, which no tolerance ends early.

maps: explanations and gradients per second of SmoothGrad and the three MoreauGrads, captured (on a GPU) and eager, with
the error that each Solution states; beside "bare passes" of the same sizes at the same precision (on a GPU captured),
beside captum's NoiseTunnel(Saliency) in its fastest passes (as it is, and without TF32, which torch lets cuDNN use),
and beside the published loop as written (published.py: one input, noise from the host) and its schedule by us.

errors: ‖A − A*‖/‖A*‖ of one input's maps at every precision, A* of 16 times the gradients in float32 with other noise.
Then the published loop with all of its 300 steps, and ours with budgets from 256 gradients on: seconds and error.

A run is a list of slices, the ones of most worth first. Before each slice its time is estimated, and the run ends
before --seconds are over, with status 75. Rows of earlier runs in the JSON are kept and their slices are not measured
again: repeat the command until it says "complete". Seconds are interleaved medians. --quick: one round, 256 gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from bench_explainers import bare, passes_of
from bench_prepare import in_format
from nets import NETS, Net
from published import published
from timing import interleaved, parser, report, save
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    ConvergenceWarning,
    GroupSparseMoreauGrad,
    MoreauGrad,
    Prepared,
    ProximalGradient,
    SmoothGrad,
    Solution,
    SparseMoreauGrad,
    Tiles,
    zoo,
)
from moreau_ext.model.precision import PRECISIONS, Precision, flags
from moreau_ext.preparation.prepare import prepare

Run = Callable[[], Any]

NOISE_LEVEL = 0.05
# So small that every input takes its whole budget.
TOLERANCE = 1e-4
# Of the published loop, which always takes 32; its whole schedule is 300 steps.
SAMPLES, SCHEDULE = 32, 300
# Gradients of a reference over those of the maps that are held against it.
FINER = 16
CAPTUM_ROWS = (8, 32, 128, 512)

# (what, precision, inputs), the ones of most worth first. "core" is SmoothGrad, sparse and captum, "rest" the others,
# "all" both: at one input everything is cheap.
PLAN: tuple[tuple[str, Precision, int], ...] = (
    ("all", "float32", 1),
    ("all", "bfloat16", 1),
    ("core", "bfloat16", 8),
    ("core", "float32", 8),
    ("errors", "float32", 1),
    ("all", "tf32", 1),
    ("core", "bfloat16", 32),
    ("core", "tf32", 8),
    ("core", "tf32", 32),
    ("rest", "bfloat16", 8),
    ("rest", "tf32", 8),
    ("rest", "float32", 8),
    ("rest", "bfloat16", 32),
    ("core", "float32", 32),
    ("rest", "tf32", 32),
    ("rest", "float32", 32),
)
# Candidates of a slice, to estimate its time, and calls of each before the first round.
CANDIDATES = {"all": 11, "core": 5, "rest": 6}
WARM_UP = 2
# Seconds of preparing a network, about.
PREPARING = 6.0


@dataclass
class Setting:
    """One network on one device, and what was made of it so far."""

    name: str
    net: Net
    device: str
    gradients: int
    model: nn.Module
    images: Tensor
    target: Tensor
    rho: float
    ready: dict[Precision, Prepared] = field(default_factory=dict)
    # Seconds of a gradient by precision, of the last slice.
    pace: dict[Precision, float] = field(default_factory=dict)

    def prepared(self, precision: Precision) -> Prepared:
        if precision not in self.ready:
            # Captured passes of several explainers lie side by side.
            budget = torch.cuda.get_device_properties(0).total_memory // 8 if self.device == "cuda" else None
            example = self.images[:8]
            self.ready[precision] = prepare(self.model, example, precision=precision, memory_budget=budget)
            print(f"{self.name}, {precision}: {self.ready[precision]!r}", flush=True)
        return self.ready[precision]

    def settings(self, gradients: int | None = None) -> dict[str, Any]:
        solver = AdaptiveProximalGradient(TOLERANCE, gradients or self.gradients)
        return {"rho": self.rho, "noise_level": NOISE_LEVEL, "solver": solver}

    def methods(self, precision: Precision, gradients: int | None = None, **more: Any) -> dict[str, Callable[..., Any]]:
        """Explainers by name; each takes ``cuda_graphs`` but SmoothGrad, which makes one step."""
        ready, settings = self.prepared(precision), self.settings(gradients) | {"precision": precision} | more
        eta = settings.pop("eta", {})
        smooth = {"num_samples": gradients or self.gradients, "noise_level": NOISE_LEVEL, "precision": precision}
        seed = {"seed": settings["seed"]} if "seed" in settings else {}
        tiles = Tiles(self.net.tile)
        return {
            "SmoothGrad": partial(SmoothGrad, ready, **smooth, **seed),
            "MoreauGrad": partial(MoreauGrad, ready, **settings),
            "sparse": partial(SparseMoreauGrad, ready, eta=eta.get("sparse"), **settings),
            "group": partial(GroupSparseMoreauGrad, ready, groups=tiles, eta=eta.get("group"), **settings),
        }


def variants(what: str, cuda: bool) -> Iterator[tuple[str, bool]]:
    """(method, whether captured) of a slice. SmoothGrad makes one step, which is never captured."""
    for name in ("SmoothGrad", "MoreauGrad", "sparse", "group"):
        for captured in (True, False) if cuda and name != "SmoothGrad" else (False,):
            core = name == "SmoothGrad" or (name == "sparse" and captured == cuda)
            if what == "all" or core == (what == "core"):
                yield name, captured


def set_up(name: str, device: str, gradients: int, most: int) -> Setting:
    net = NETS[name]
    model = net.made().to(device)
    try:
        images = zoo.photographs(net.edge, crops=min(8, -(-most // 6))).inputs[:most]
    except ImportError as error:
        print(f"random inputs: {error}")
        images = torch.rand(most, 3, net.edge, net.edge, generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    with torch.no_grad():
        target = torch.cat([model(rows).argmax(1) for rows in images.split(8)])
    short = AdaptiveProximalGradient(0.5, 192)
    first = MoreauGrad(model, noise_level=NOISE_LEVEL, solver=short).attribute(
        images[:1], target[:1], return_solution=True
    )
    return Setting(name, net, device, gradients, model, images, target, float(first.rho[0]))


def sigma_of(x: Tensor) -> Tensor:
    return NOISE_LEVEL * (x.flatten(1).amax(1) - x.flatten(1).amin(1))


def captum(setting: Setting, x: Tensor, target: Tensor, tf32: bool) -> tuple[Run, int] | None:
    """captum's SmoothGrad in its fastest passes, and their rows; None where captum is not installed."""
    try:
        from captum.attr import NoiseTunnel, Saliency
    except ImportError:
        return None
    tunnel, sigma = NoiseTunnel(Saliency(setting.model)), float(sigma_of(x).mean())

    def run(samples: int, each: int) -> None:
        with nullcontext() if tf32 else flags("float32", x.device, False):
            tunnel.attribute(x, nt_samples=samples, nt_samples_batch_size=each, stdevs=sigma, target=target, abs=False)

    seconds = {}
    for rows in CAPTUM_ROWS if setting.device == "cuda" else CAPTUM_ROWS[:2]:
        each = max(1, rows // len(x))
        trial = partial(run, min(setting.gradients, 4 * each), each)
        try:
            trial()
            # Of a sample.
            seconds[each] = interleaved({"": trial}, setting.device, 1, 0.0)[""] / min(setting.gradients, 4 * each)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    best = min(seconds, key=seconds.__getitem__)
    return partial(run, setting.gradients, best), best * len(x)


def as_written(setting: Setting, steps: int) -> Run:
    """The published loop on the first input."""
    x, target = setting.images[:1], setting.target[:1]

    def run() -> None:
        for _ in published(setting.model, x, target, sigma_of(x), rho=setting.rho, steps=steps):
            pass

    return run


def speeds(setting: Setting, what: str, precision: Precision, batch: int, left: float, rounds: int) -> list[Any] | None:
    """The rows of a slice; None where the time that is left is too short for it."""
    x, target = setting.images[:batch], setting.target[:batch]
    ready, cuda = setting.prepared(precision), setting.device == "cuda"
    start = time.perf_counter()
    settings = setting.settings() | {"precision": precision, "max_batch": ready.max_batch}
    sizes = passes_of(ready.model, x, target, **settings)
    once = time.perf_counter() - start
    setting.pace[precision] = once / (setting.gradients * batch)
    possible = (left - once) / (once * CANDIDATES[what]) - WARM_UP
    if possible < 1:
        return None
    rounds = int(min(rounds, possible))

    runs: dict[str, Run] = {}
    about: dict[str, dict[str, Any]] = {}

    def add(name: str, run: Run, gradients: float, captured: bool, inputs: int = batch, **more: Any) -> None:
        runs[name] = run
        about[name] = {"captured": captured, "gradients": gradients, "inputs": inputs, **more}

    methods = setting.methods(precision)
    for name, captured in variants(what, cuda):
        explainer = (
            methods[name]() if name == "SmoothGrad" else methods[name](cuda_graphs="auto" if captured else False)
        )
        # What comes once in an explanation is captured at its fourth time; long explanations have less of it.
        for _ in range(3 if captured and once < 1 else 0):
            explainer.attribute(x, target)
        found: Solution = explainer.attribute(x, target, return_solution=True)
        spent = float(found.gradient_evaluations.double().mean())
        title = f"{name}, eager" if cuda and not captured and name != "SmoothGrad" else name
        stated = float(found.error.total.median())
        add(title, partial(explainer.attribute, x, target), spent, captured, **{"stated error": stated})
    noisy = in_format(ready, x.repeat_interleave(SAMPLES, 0))
    noisy = noisy + float(sigma_of(x).mean()) * torch.randn_like(noisy)
    rows_of = sum(size * times for size, times in sizes.items())
    add("bare passes", bare(ready.model, noisy, target, sizes, precision), rows_of / batch, cuda)
    if what == "all":
        smooth = passes_of(
            ready.model,
            x,
            target,
            SmoothGrad,
            num_samples=setting.gradients,
            precision=precision,
            max_batch=ready.max_batch,
        )
        rows_of = sum(size * times for size, times in smooth.items())
        add("bare passes of SmoothGrad", bare(ready.model, noisy, target, smooth, precision), rows_of / batch, cuda)
    if precision == "float32" and what != "rest":
        for tf32 in (True, False) if cuda else (True,):
            rival = captum(setting, x, target, tf32)
            if rival is not None:
                # Its sampling error is that of our SmoothGrad with as many samples.
                stated = {"stated error": about["SmoothGrad"]["stated error"]}
                name = "captum" if tf32 else "captum, without TF32"
                add(name, rival[0], setting.gradients, False, rows=rival[1], **stated)
    if precision == "float32" and batch == 1:
        steps = setting.gradients // SAMPLES
        add("published loop", as_written(setting, steps), steps * SAMPLES, False, 1)
        schedule = replace(ProximalGradient.paper(SAMPLES, steps), step_size=0.1 * setting.rho)
        ours = MoreauGrad(ready, rho=setting.rho, noise_level=NOISE_LEVEL, solver=schedule, cuda_graphs="auto")
        add("published schedule by us", partial(ours.attribute, x, target), steps * SAMPLES, cuda)
    seconds = interleaved(runs, setting.device, rounds, 0.0)

    each = {name: s / (about[name]["gradients"] * about[name]["inputs"]) for name, s in seconds.items()}
    # The first explanation took longer.
    setting.pace[precision] = each["bare passes"]
    return [
        {
            "net": setting.net.title,
            "precision": precision,
            "B": batch,
            "rho": setting.rho,
            "method": name,
            "captured": about[name]["captured"],
            "gradients": about[name]["gradients"],
            "seconds": s,
            "explanations/s": about[name]["inputs"] / s,
            "gradients/s": 1 / each[name],
            "of bare passes": each[name]
            / each["bare passes of SmoothGrad" if name == "SmoothGrad" and what == "all" else "bare passes"],
            "stated error": about[name].get("stated error"),
            "rows in a pass": about[name].get("rows", ready.max_batch if "published" not in name else SAMPLES),
            "rounds": rounds,
            "channels_last": ready.memory_format == torch.channels_last,
        }
        for name, s in seconds.items()
    ]


def difference(a: Tensor, reference: Tensor) -> float:
    a, reference = a.double().flatten(), reference.double().flatten()
    return float((a - reference).norm() / reference.norm())


def errors(setting: Setting, precisions: list[Precision]) -> Iterator[dict[str, Any]]:
    """Errors of one input's maps, then error and seconds of the published loop and of ours."""
    x, target = setting.images[:1], setting.target[:1]
    common = {"net": setting.net.title, "B": 1, "rho": setting.rho}
    # The same η for all: as a ratio it would depend on the noise.
    eta = {
        name: float(setting.methods("float32")[name]().attribute(x, target, return_solution=True).eta[0])
        for name in ("sparse", "group")
    }
    finer = setting.methods("float32", FINER * setting.gradients, seed=1000, eta=eta)
    references: dict[str, Solution] = {
        name: make().attribute(x, target, return_solution=True) for name, make in finer.items()
    }
    for precision in precisions:
        for name, make in setting.methods(precision, eta=eta).items():
            found = make().attribute(x, target, return_solution=True)
            yield {
                **common,
                "precision": precision,
                "error of": name,
                "gradients": int(found.gradient_evaluations[0]),
                "error": difference(found.attribution, references[name].attribution),
                "stated error": float(found.error.total[0]),
                "reference's stated error": float(references[name].error.total[0]),
            }

    reference = references["MoreauGrad"].attribution
    steps = SCHEDULE if setting.gradients >= 512 else 20
    start, spent = time.perf_counter(), 0.0
    last, at = torch.zeros_like(x), {steps // 20, steps // 4, steps}
    loop = published(setting.model, x, target, sigma_of(x), rho=setting.rho, steps=steps)
    for step, (_, last) in enumerate(loop, start=1):
        if step in at:
            error = difference(-last / setting.rho, reference)  # waits for the device
            spent = time.perf_counter() - start
            row = {"convergence of": "published loop", "gradients": step * SAMPLES, "seconds": spent, "error": error}
            yield {**common, **row}
    budget = 256
    while budget <= FINER * setting.gradients // 4:
        explainer = setting.methods("float32", budget)["MoreauGrad"](cuda_graphs="auto")
        explainer.attribute(x, target)
        explainer.attribute(x, target)  # captured now
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            maps = explainer.attribute(x, target)
            error = difference(maps, reference)
            seconds.append(time.perf_counter() - start)
        row = {"convergence of": "MoreauGrad", "gradients": budget, "seconds": statistics.median(seconds)}
        yield {**common, **row, "error": error}
        budget *= 2


def estimate(setting: Setting, what: str, precision: Precision, batch: int, precisions: list[Precision]) -> float:
    """Seconds of a slice, from what a gradient took; those of preparing alone before anything was measured."""
    pace = setting.pace.get(precision, max(setting.pace.values(), default=0.0))
    once = pace * setting.gradients * batch
    needed = {precision, *(precisions if what == "errors" else ())}
    preparing = PREPARING * len(needed - set(setting.ready))
    if what == "errors":
        # The references, the maps, ours by budgets, and the published schedule, whose noise from the host takes as long
        # as its passes.
        return preparing + once * (4 * FINER + 4 * len(precisions) + 5 * FINER // 2) + 2 * pace * SAMPLES * SCHEDULE
    return preparing + once * (1 + (WARM_UP + 1) * CANDIDATES[what])


def main() -> None:
    options = parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--nets", nargs="+", choices=sorted(NETS), default=["resnet50", "vit", "efficientnet"])
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options.add_argument("--only", nargs="+", choices=["all", "core", "errors", "rest"], help="slices of these kinds")
    options.add_argument("--gradients", type=int, help="of an input. default: 512")
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin no slice that may last longer")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    # Every map takes its budget and converges to no tolerance.
    warnings.simplefilter("ignore", ConvergenceWarning)
    device, end = arguments.device, time.perf_counter() + arguments.seconds
    gradients = arguments.gradients or (256 if arguments.quick else 512)
    known = arguments.json is not None and arguments.json.exists()
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["rows"] if known else []
    left_out: list[str] = []
    lacking: list[str] = []

    for name in arguments.nets:
        if NETS[name].missing():
            lacking += NETS[name].missing()
            continue
        plan = [
            (what, precision, batch)
            for what, precision, batch in PLAN
            if batch in arguments.batches
            and precision in arguments.precisions
            and (arguments.only is None or what in arguments.only)
        ]
        if not plan:
            options.error("no slice has such a kind, precision and batch: see PLAN")
        slices = {f"{what}, {precision}, {batch}": (what, precision, batch) for what, precision, batch in plan}
        done = {row["slice"] for row in rows if row["net"] == NETS[name].title}
        setting: Setting | None = None
        for title, (what, precision, batch) in slices.items():
            if title in done:
                continue
            if setting is None:
                setting = set_up(name, device, gradients, max(arguments.batches))
            left = end - time.perf_counter()
            found: list[Any] | None = None
            if left > estimate(setting, what, precision, batch, arguments.precisions):
                if what == "errors":
                    found = list(errors(setting, arguments.precisions))
                else:
                    found = speeds(setting, what, precision, batch, left, 1 if arguments.quick else 3)
            if found is None:
                left_out.append(f"{name}: {title}")
                continue
            rows += [{**row, "slice": title} for row in found]
            # After each, so that what was measured stays if the rest is cut off.
            save("real", device, rows, arguments.json)
            print(f"{title}: {len(found)} rows, {end - time.perf_counter():.0f} s left", flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    report("real", device, rows, arguments.json)
    if lacking:
        sys.exit(f"not installed: {', '.join(lacking)}")
    print(f"no time for: {'; '.join(left_out)}" if left_out else "complete")
    sys.exit(75 if left_out else 0)


if __name__ == "__main__":
    main()
