"""The command line: ``moreau-ext demo`` and ``moreau-ext info``. Parses, calls, prints.

Exit status: 0 done; 2 refused before any work, because the arguments cannot be carried out; 1 failed on the way;
130 interrupted. Every error is one line on stderr.

Nothing here imports torch before :func:`main` has chosen OpenMP's wait policy, which is read when torch is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .explainers import Solver
    from .zoo import Dataset

# The demo's problem. At rho = 0.1 a digit moves by 0.2 to 0.4 of its norm, so the maps tell of its neighbourhood; at
# rho = 1 it would move by four times its norm. The step is the published fraction of rho, 0.1.
_NET, _SEED = "digits_cnn", 0
_RHO, _STEP_SIZE, _NOISE_LEVEL = 0.1, 0.01, 0.1
_SPARSE_RATIO, _GROUP_RATIO, _TILE = 0.3, 0.5, 2
# Relative residual. 1 % would look the same and cost three times as many gradients.
_TOL = 0.02
# Inputs per batch: as many as an explainer puts through the model at once with 8 samples each; more would only slow the
# bar.
_BATCH = 128
# The source's first ten are the digits 0 to 9 in order.
_SHOWN = 10
_TITLES = {
    "gradient": "Gradient",
    "smoothgrad": "SmoothGrad",
    "moreau": "MoreauGrad",
    "sparse": "Sparse\nMoreauGrad",
    "group": "Group-Sparse\nMoreauGrad",
}


class _Refused(Exception):
    """Arguments that cannot be carried out."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        argv: the arguments after the program's name; those of the process if None.
    """
    if "torch" not in sys.modules:
        # Spinning threads make a small model's passes 70 times slower where the cores are shared (136 ms for 2).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            run: Callable[[argparse.Namespace], None] = arguments.run
            run(arguments)
    except _Refused as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130, "")
    except (ValueError, TypeError, ImportError, OSError) as error:
        return _complain(str(error), 1)
    except Exception as error:
        return _complain(f"{type(error).__name__}: {error}", 1)
    return 0


def _complain(message: str, status: int, kind: str = "error: ") -> int:
    print(f"moreau-ext: {kind}{' '.join(message.split())}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print(f"moreau-ext: warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Its errors are refusals like all others: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message} (moreau-ext --help shows how to call it)")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moreau-ext", description="Sparse saliency maps from the gradient of the Moreau envelope.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="explain scikit-learn's 1,797 handwritten digits; write digits.png and summary.json",
        description="Trains a small net on scikit-learn's handwritten digits (kept in the user's cache folder), "
        "explains all of them with five methods, and writes digits.png and summary.json. Each map is solved to a "
        "relative residual of 2 %, within 2,048 gradients.",
    )
    demo.add_argument("--limit", type=_positive, metavar="N", help="explain the first N digits only")
    demo.add_argument("--out", type=Path, default=Path("moreau-demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    demo.add_argument(
        "--paper",
        action="store_true",
        help="the published schedule: 300 steps of 32 samples, the mean of the last 101 iterates, 9,600 gradients each",
    )
    demo.set_defaults(run=_demo)
    info = commands.add_parser(
        "info",
        help="versions, what was built, and what will run here",
        description="Prints versions, what was built, and which kernels will run here.",
    )
    info.set_defaults(run=_info)
    return parser


# --- demo ----------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    missing = [name for name in ("sklearn", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise _Refused(f'the demo needs {" and ".join(missing)}: pip install "moreau_ext[demo]"')
    import torch

    from . import zoo

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _Refused("--device cuda: torch finds no CUDA device here (moreau-ext info shows what it has)")
    out: Path = arguments.out
    _check_writable(out)
    data = zoo.digits()
    model = zoo.trained(_NET, _SEED).to(device)
    test_accuracy = zoo.accuracy(model, zoo.digits("test"))
    print(f"{_NET} is right for {test_accuracy:.1%} of the digits it was not trained on", flush=True)

    data = data._replace(inputs=data.inputs[: arguments.limit], targets=data.targets[: arguments.limit])
    solver = _solver(arguments.paper)
    results = _explain(model, data, solver, _smoothgrad_samples(arguments.paper), device)
    maps = {_TITLES[method]: result.pop("maps") for method, result in results.items()}
    settings: dict[str, Any] = {
        "net": _NET,
        "seed": _SEED,
        "inputs": len(data.inputs),
        "device": str(device),
        "schedule": "paper" if arguments.paper else "default",
        "rho": _RHO,
        "noise_level": _NOISE_LEVEL,
        "eta_ratio": {"sparse": _SPARSE_RATIO, "group": _GROUP_RATIO},
        "groups": f"Tiles({_TILE})",
        "solver": {"name": type(solver).__name__, **vars(solver)},
        "smoothgrad_samples": _smoothgrad_samples(arguments.paper),
    }
    summary = {
        "settings": settings,
        "test_accuracy": test_accuracy,
        "methods": results,
        "versions": {**_versions(), "threads": torch.get_num_threads()},
    }
    _write(out / "digits.png", lambda file: _picture(model, data, maps, settings, file))
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    _write(out / "summary.json", lambda file: file.write(text.encode()))
    print(_table(results))
    print(
        "residual: relative distance from the optimality condition, "
        + ("with the noise of the last step's samples" if arguments.paper else "a 95 % bound")
    )
    print(f"wrote {out / 'digits.png'} and {out / 'summary.json'}")


def _solver(paper: bool) -> Solver:
    from dataclasses import replace

    from . import AdaptiveProximalGradient, ProximalGradient

    return replace(ProximalGradient.paper(), step_size=_STEP_SIZE) if paper else AdaptiveProximalGradient(_TOL)


def _smoothgrad_samples(paper: bool) -> int:
    """About as many gradients as the others take."""
    return 9600 if paper else 480


def _explainers(model: torch.nn.Module, solver: Solver, smoothgrad_samples: int) -> Iterator[tuple[str, Any]]:
    """The methods of the demo by their names."""
    from . import Tiles, make_explainer

    shared = {"noise_level": _NOISE_LEVEL, "seed": _SEED}
    moreau = {**shared, "rho": _RHO, "solver": solver}
    yield "gradient", make_explainer("gradient", model)
    yield "smoothgrad", make_explainer("smoothgrad", model, **shared, num_samples=smoothgrad_samples)
    yield "moreau", make_explainer("moreau", model, **moreau)
    yield "sparse", make_explainer("sparse", model, **moreau, eta_ratio=_SPARSE_RATIO)
    yield "group", make_explainer("group", model, **moreau, eta_ratio=_GROUP_RATIO, groups=Tiles(_TILE))


def _explain(
    model: torch.nn.Module, data: Dataset, solver: Solver, smoothgrad_samples: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """What each method found and took, by its name; the maps under "maps"."""
    import torch
    from tqdm import tqdm

    from . import Solution

    results = {}
    # On a terminal only: a log file would fill with bars.
    with tqdm(total=len(data.inputs) * len(_TITLES), unit="image", disable=None) as bar:
        for method, explainer in _explainers(model, solver, smoothgrad_samples):
            bar.set_description(method)
            parts, began = [], time.perf_counter()
            for rows in torch.split(torch.arange(len(data.inputs)), _BATCH):
                found = explainer.attribute(data.inputs[rows].to(device), ids=rows, return_solution=True)
                parts.append(found)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                bar.update(len(rows))
            results[method] = _numbers(Solution.concatenate(parts), data.inputs, time.perf_counter() - began)
    return results


def _numbers(solution: Any, inputs: Tensor, seconds: float) -> dict[str, Any]:
    """One method's line of the summary; None where a number has no meaning for it."""
    from .evaluation import gini

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

    from .plots import gallery

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
    gallery(inputs, shown, titles, caption).savefig(file, format="png", dpi=150)


def _table(results: dict[str, dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Gini": lambda r: f"{r['gini_mean']:.3f}",
        "non-zero": lambda r: f"{r['nonzero_fraction_mean']:.1%}",
        "residual median": lambda r: _number(r["relative_residual_median"], ".1%"),
        "p90": lambda r: _number(r["relative_residual_p90"], ".1%"),
        "converged": lambda r: _number(r["converged_share"], ".0%"),
        "gradients/image": lambda r: f"{r['gradient_evaluations_per_input']:.0f}",
        "seconds": lambda r: f"{r['seconds']:.1f}",
        "images/s": lambda r: f"{r['images_per_second']:.0f}",
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


def _check_writable(folder: Path) -> None:
    """Makes the folder, and refuses one that no file can be written to, before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _Refused(f"--out {folder}: cannot write there ({error.strerror or error})") from error


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A whole file or none: a reader never sees half of one, and an interruption leaves the old."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- info ----------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    import numpy
    import torch

    from . import __version__

    return {
        "moreau_ext": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _info(_: argparse.Namespace) -> None:
    import torch

    from . import ops, zoo

    build = ops.build_info()
    cuda = "none"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    built = "not built"
    if build["cuda"] is not None:
        built = f"built with nvcc {build['cuda']} for architectures {build['cuda_architectures']}"
    try:
        cache = str(zoo.cache_folder())
    except RuntimeError as error:
        cache = f"none ({error})"
    versions = _versions()
    lines = {
        "moreau_ext": versions["moreau_ext"],
        "torch": f"{versions['torch']} (CUDA {torch.version.cuda or 'no'})",
        "numpy": versions["numpy"],
        "Python": f"{versions['python']}, {platform.system()} {platform.machine()}",
        "CPU kernels": f"built with {build['compiler']}, running as {build['cpu']}",
        "CUDA kernels": built,
        "CUDA device": cuda,
        "runs on cpu": _runner(torch.device("cpu")),
        "runs on cuda": _runner(torch.device("cuda"))
        if torch.cuda.is_available()
        else "nothing: torch finds no device",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "cache": cache,
    }
    width = max(map(len, lines))
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items()))


def _runner(device: torch.device) -> str:
    from . import ops

    return "compiled kernels" if ops.has_kernels(device) else "the reference in plain PyTorch (slow)"


if __name__ == "__main__":
    sys.exit(main())
