"""What does an explanation of a net with ImageNet weights cost, beside its bare passes and beside captum?

    OMP_NUM_THREADS=1 python benchmarks/bench_imagenet.py

EfficientNet-Lite0 on photographs of 3 x 224 x 224. First table: forward and backward passes of the same rows by the
model as given, in passes of 32, of 8 and of the number that `prepare` chose, and by the prepared model; with --compile
also by `prepare(compile=True)`, which takes minutes. Second table: explanations of one photograph by the default
solver, all with the same budget of gradients (ratios are per gradient), against bare passes of the same sizes by the
same prepared model, and against captum's SmoothGrad, `NoiseTunnel(Saliency)`, in passes of 8. The relative error of a
map is `Solution.error.total`; that of captum's is the sampling error of SmoothGrad with as many samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_explainers import bare, passes_of
from bench_prepare import in_format, passes
from captum.attr import NoiseTunnel, Saliency
from timing import interleaved, parser, report

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    SmoothGrad,
    SparseMoreauGrad,
    Tiles,
    zoo,
)
from moreau_ext._errors import ConvergenceWarning, without
from moreau_ext.preparation.prepare import prepare

ROWS, NOISE_LEVEL = 32, 0.05


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--compile", action="store_true", help="torch.compile too")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 3 if arguments.quick else 7
    gradients = 256
    model, data = zoo.efficientnet_lite0().to(device), zoo.photographs()
    images = data.inputs.to(device)

    start = time.perf_counter()
    ready = prepare(model, images)
    spent = time.perf_counter() - start
    x = images.repeat(6, 1, 1, 1)[:ROWS]
    x = x + NOISE_LEVEL * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    runs: dict[str, Callable[[], Any]] = {
        f"given, {ROWS} rows": passes(model, x),
        "given, 8 rows": passes(model, x, 8),
        "given, chosen rows": passes(model, x, ready.max_batch),
        "prepared, chosen rows": passes(ready.model, in_format(ready, x), ready.max_batch),
    }
    compile_seconds = None
    if arguments.compile:
        start = time.perf_counter()
        compiled = prepare(model, images, compile=True)
        compile_seconds = time.perf_counter() - start
        lever = next(part for part in compiled.report if part.name == "compile")
        print(lever)
        if lever.applied:
            runs["compiled, chosen rows"] = passes(compiled.model, in_format(compiled, x), compiled.max_batch)
    seconds = interleaved(runs, device, rounds, each=0.0)
    first = f"given, {ROWS} rows"
    rows: list[dict[str, Any]] = [
        {
            "passes": name,
            "rows in a pass": ready.max_batch if "chosen" in name else int(name.split()[1]),
            "milliseconds a gradient": 1e3 * value / ROWS,
            "of the given": value / seconds[first],
            "seconds to prepare": {"prepared, chosen rows": spent, "compiled, chosen rows": compile_seconds}.get(name),
        }
        for name, value in seconds.items()
    ]

    cat, target = images[1:2], data.targets[1:2].to(device)
    settings: dict[str, Any] = {
        "rho": 1.0,
        "noise_level": NOISE_LEVEL,
        "solver": AdaptiveProximalGradient(0.01, gradients),
    }
    sigma = NOISE_LEVEL * float(cat.max() - cat.min())
    made = {
        "MoreauGrad": MoreauGrad(ready, **settings),
        "SparseMoreauGrad": SparseMoreauGrad(ready, **settings),
        "GroupSparseMoreauGrad, tiles of 14": GroupSparseMoreauGrad(ready, groups=Tiles(14), **settings),
    }
    # A solver may end a few gradients before its budget, so times are compared per gradient.
    with without(ConvergenceWarning):
        found = {name: e.attribute(cat, target, return_solution=True) for name, e in made.items()}
        smooth = SmoothGrad(ready, noise_level=NOISE_LEVEL, num_samples=gradients)
        sampled = float(smooth.attribute(cat, target, return_solution=True).error.total[0])
    counts = {name: int(solution.gradient_evaluations[0]) for name, solution in found.items()}
    errors = {name: float(solution.error.total[0]) for name, solution in found.items()}
    # The explainer's own passes, by their sizes.
    sizes = passes_of(ready.model, cat, target, **settings, max_batch=ready.max_batch)
    noisy = in_format(ready, x[: ready.max_batch])
    runs = {name: partial(explainer.attribute, cat, target) for name, explainer in made.items()}
    runs["bare passes"] = bare(ready.model, noisy, target, sizes)
    counts["bare passes"] = sum(size * times for size, times in sizes.items())
    for name, net in (("as given", model), ("prepared", ready.model)):
        errors[f"captum, {name}"] = sampled
        tunnel = NoiseTunnel(Saliency(net))
        counts[f"captum, {name}"] = gradients
        runs[f"captum, {name}"] = partial(
            tunnel.attribute,
            cat,
            nt_samples=gradients,
            nt_samples_batch_size=8,
            stdevs=sigma,
            target=target,
            abs=False,
        )
    with without(ConvergenceWarning):
        seconds = interleaved(runs, device, rounds, each=0.0)
    each = {name: value / counts[name] for name, value in seconds.items()}
    rows += [
        {
            "explanation": name,
            "gradients": counts[name],
            "seconds": seconds[name],
            "of bare passes": value / each["bare passes"],
            "of captum, as given": value / each["captum, as given"],
            "relative error": errors.get(name),
        }
        for name, value in each.items()
    ]
    report("imagenet", device, rows, arguments.json)


if __name__ == "__main__":
    main()
