"""``moreau-ext evaluate``: a comparison of methods, with and without attacks, as tables, curves and a report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Refused, need, output_folder, positive, seed, write

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation.plan import Plan, Results
    from ..zoo.data import Dataset

_DIGITS = (0.1, 0.3, 1.0)
_PUBLISHED = (0.3, 1.0, 3.0, 10.0)

# What differs from the defaults of the digits. Superpixels are left out, and passes are small, because every gradient
# costs a thousand times a digit's; 256 gradients are about the fewest with which the solver adapts.
_PHOTOGRAPHS: dict[str, Any] = {
    "budget": 256,
    "rho": 0.1,
    "noise_level": 0.05,
    "sparse_ratio": 0.1,
    "group_ratio": 0.3,
    "tile": 8,
    "attack_samples": 32,
    "block": 6,
    "magnitudes": (3.0,),
    # The adaptive attack explains every input anew in each of its steps: hours.
    "attacks": ("gaussian", "frozen"),
    "baseline": "blur",
}
_DEFAULTS: dict[str, Any] = {
    "budget": 480,
    "rho": 0.1,
    "noise_level": 0.1,
    "sparse_ratio": 0.3,
    "group_ratio": 0.5,
    "tile": 2,
    "attack_samples": 256,
    "block": 100,
    "magnitudes": _PUBLISHED,
    "attacks": ("gaussian", "frozen", "adaptive"),
    "baseline": 0.0,
}


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word for word in text.split(",") if word)
    if not words:
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return words


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in _words(text))
    except (argparse.ArgumentTypeError, ValueError):
        values = ()
    if not values or any(not 0 < v < float("inf") for v in values):
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between, got {text!r}")
    return values


def _number(text: str) -> float:
    try:
        (value,) = _numbers(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}") from None
    return value


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare methods under attacks; write a table, curves and report.html",
        description="Explains inputs with every method at the same budget of gradients, attacks the maps, and writes "
        "results.parquet and results.csv (one row per input, method and test), summary.json, claims.csv and claims.md "
        "(paired differences to every rival), robustness.png and report.html. Finished parts are kept: the same "
        "command resumes an interrupted run.",
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="SPEC",
        help="digits; photographs, 48 crops of six with EfficientNet-Lite0; cifar10:PATH or imagefolder:PATH. "
        "default: %(default)s",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name of moreau_ext.zoo.NAMES for the digits (default: digits_cnn); resnet20 or tiny_vit; or "
        "package.module:factory of an nn.Module, with literal arguments if it takes some",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, or .pt with tensors alone")
    parser.add_argument(
        "--train", type=positive, metavar="EPOCHS", help="without --weights: train on the train split; kept in --out"
    )
    parser.add_argument(
        "--size", type=positive, help="edge of the photographs (default: 128) and of an imagefolder's pictures (224)"
    )
    parser.add_argument("--methods", type=_words, metavar="A,B", help="default: all of the equal budget")
    parser.add_argument(
        "--attack",
        type=_words,
        dest="attacks",
        metavar="A,B",
        help="default: gaussian,frozen,adaptive; photographs: gaussian,frozen",
    )
    parser.add_argument(
        "--magnitudes",
        type=_numbers,
        metavar="R,R",
        help="radii. default: 0.1,0.3,1 for digits, 3 for photographs, else 0.3,1,3,10",
    )
    parser.add_argument("--norm", choices=("l2", "linf"), default="l2", help="of the radii. default: %(default)s")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N inputs. default: 100 of the digits")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also the strong attacks (100 steps, restarts) and the published settings of every method: hours",
    )
    parser.add_argument("--budget", type=positive, help="gradients per map. default: 480; photographs: 256")
    parser.add_argument("--rho", type=_number, help="of MoreauGrad. default: 0.1")
    parser.add_argument("--noise-level", type=_number, help="of every method. default: 0.1; photographs: 0.05")
    parser.add_argument("--sparse-ratio", type=_number, help="eta/eta_max. default: 0.3; photographs: 0.1")
    parser.add_argument("--group-ratio", type=_number, help="eta/eta_max. default: 0.5; photographs: 0.3")
    parser.add_argument("--tile", type=positive, help="edge of the groups. default: 2; photographs: 8")
    parser.add_argument("--segments", type=positive, default=16, help="superpixels per image. default: %(default)s")
    parser.add_argument(
        "--attack-samples", type=positive, help="gradients per derivative. default: 256; photographs: 32"
    )
    parser.add_argument("--block", type=positive, help="inputs per part that is kept. default: 100; photographs: 6")
    parser.add_argument("--no-checks", action="store_true", help="leave out max-sensitivity and the randomised models")
    parser.add_argument(
        "--seed", type=seed, default=0, help="of noise, attacks and the zoo's nets. default: %(default)s"
    )
    parser.add_argument(
        "--gallery", type=positive, default=24, metavar="N", help="inputs in the report. default: %(default)s"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("moreau-evaluation"), metavar="DIR", help="default: %(default)s"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    need("evaluate", "evaluation", "skimage", "pyarrow", "matplotlib", "PIL", "tqdm", "captum")
    import torch

    _check_together(arguments)
    plan = _plan(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch finds no CUDA device here (moreau-ext info shows what it has)")
    with output_folder(arguments.out):
        _run(arguments, plan)


def _run(arguments: argparse.Namespace, plan: Plan) -> None:
    """Evaluates, and writes all files."""
    from ..data.progress import report
    from ..evaluation import data as sources
    from ..evaluation import run
    from ..evaluation.report import figure, png_of, write_report
    from ..evaluation.tables import write_tables

    out: Path = arguments.out
    report(f"loading {arguments.data} and the model", sys.stderr.isatty())
    data = sources.load(arguments.data, "test", arguments.size)
    model = _model(arguments, data, out).to(arguments.device).eval()
    began = time.perf_counter()
    count = min(len(data.inputs), plan.limit or len(data.inputs))
    print(
        f"{count} inputs, {len(plan.methods)} methods, {len(plan.attacks)} attacks, {len(plan.magnitudes)} magnitudes; "
        f"results are kept in {out}, and the same command resumes from there",
        flush=True,
    )
    results = run(
        model,
        data,
        plan,
        out,
        name=arguments.model or ("efficientnet_lite0" if arguments.data == "photographs" else "digits_cnn"),
        source=arguments.data,
        progress=sys.stderr.isatty(),
    )
    tables = write_tables(results, out)
    write(out / "robustness.png", lambda file: file.write(png_of(figure(results), "white")))
    write_report(results, out / "report.html", gallery=arguments.gallery)
    print(_summary(results))
    print(f"wrote report.html, {', '.join(tables)} and robustness.png to {out}")
    print(f"{time.perf_counter() - began:.0f} s")


def _check_together(arguments: argparse.Namespace) -> None:
    """Refuses options that would be ignored."""
    from .. import zoo

    if arguments.size and arguments.data != "photographs" and not arguments.data.startswith("imagefolder:"):
        raise Refused(f"--size: the inputs of {arguments.data} have one size")
    name = arguments.model or {"digits": "digits_cnn", "photographs": "efficientnet_lite0"}.get(arguments.data)
    if name in (*zoo.NAMES, "efficientnet_lite0"):
        for option in ("weights", "train"):
            if getattr(arguments, option):
                raise Refused(f"--{option}: {name} has weights of its own; name another --model")
    if arguments.weights and arguments.train:
        raise Refused("--train: --weights are there already; leave one of the two out")


def _plan(arguments: argparse.Namespace) -> Plan:
    from ..evaluation.attacks import ATTACKS
    from ..evaluation.methods import DEFAULT, PUBLISHED, Settings
    from ..evaluation.plan import Plan

    digits, photographs = arguments.data == "digits", arguments.data == "photographs"
    chosen = dict(_PHOTOGRAPHS if photographs else _DEFAULTS)
    chosen["magnitudes"] = _DIGITS if digits else chosen["magnitudes"]
    chosen |= {name: value for name, value in vars(arguments).items() if name in chosen and value is not None}
    known = tuple(name for name in DEFAULT if name != "group_superpixels" or not photographs)
    if arguments.full and not arguments.attacks:
        chosen["attacks"] = tuple(ATTACKS)
    settings = Settings(
        budget=chosen["budget"],
        rho=chosen["rho"],
        noise_level=chosen["noise_level"],
        sparse_ratio=chosen["sparse_ratio"],
        group_ratio=chosen["group_ratio"],
        tile=chosen["tile"],
        segments=arguments.segments,
        seed=arguments.seed,
        max_batch=8 if photographs else 1024,
    )
    return Plan(
        methods=arguments.methods or (DEFAULT + PUBLISHED if arguments.full else known),
        attacks=chosen["attacks"],
        magnitudes=chosen["magnitudes"],
        norm=arguments.norm,
        limit=arguments.limit or (100 if digits else None),
        settings=settings,
        block=chosen["block"],
        baseline=chosen["baseline"],
        attack_samples=chosen["attack_samples"],
        # Twelve maps more for every input: hours on photographs.
        checks=not arguments.no_checks and not photographs,
    )


def _model(arguments: argparse.Namespace, data: Dataset, out: Path) -> nn.Module:
    import torch

    from .. import zoo
    from ..batch.models import load_model, load_weights
    from ..evaluation import data as sources

    if arguments.data == "photographs" and arguments.model is None:
        # Nothing that is timed decides here, so a run that is resumed has the same network to the bit.
        return _photograph_net(data)
    name = arguments.model or ("digits_cnn" if arguments.data == "digits" else None)
    if name is None:
        raise Refused(f"--data {arguments.data} needs --model")
    if name in zoo.NAMES:
        return zoo.trained(name, arguments.seed)
    if name in ("resnet20", "tiny_vit"):
        model: nn.Module = getattr(zoo, name)(num_classes=len(data.names))
    elif ":" in name:
        model, _ = load_model(name)  # also of a module in the working folder
    else:
        raise Refused(
            f"--model: expected one of {', '.join(zoo.NAMES)}, resnet20, tiny_vit or module:factory, got {name!r}"
        )
    kept = out / "weights.pt"
    if arguments.weights:
        load_weights(model, arguments.weights)
    elif arguments.train and kept.is_file():
        load_weights(model, kept)
    elif arguments.train:
        model = zoo.train(
            model.to(arguments.device), sources.load(arguments.data, "train", arguments.size), arguments.train
        )
        write(kept, lambda file: torch.save(model.state_dict(), file))
    elif ":" not in name:
        raise Refused(f"--model {name} has no weights: give --weights FILE or --train EPOCHS")
    return model


def _photograph_net(data: Dataset) -> nn.Module:
    """EfficientNet-Lite0, prepared."""
    from .. import zoo
    from ..preparation.prepare import prepare

    net: Any = prepare(zoo.efficientnet_lite0(), data.inputs[:4], channels_last=True, probe=False).model
    model: nn.Module = net
    return model


def _summary(results: Results) -> str:
    """A table of means, one line per method: of the maps, and of the top-k intersection at the middle magnitude."""
    from ..evaluation import bootstrap
    from ..evaluation.methods import methods

    plan = results.plan
    middle = sorted(plan.magnitudes)[(len(plan.magnitudes) - 1) // 2]
    lines = [["method", "Gini", "deletion", "insertion", *(f"top-k {a} {middle:g}" for a in plan.attacks)]]
    known = methods(plan.settings)
    for name in plan.methods:
        maps = results.rows(name)
        cells = [bootstrap(maps[metric]) for metric in ("gini", "deletion", "insertion")]
        cells += [bootstrap(results.rows(name, attack, middle)["topk"]) for attack in plan.attacks]
        lines.append([known[name].label, *map(str, cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
