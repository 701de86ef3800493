"""``moreau-ext explain``: maps of a whole data set."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .._errors import SettingError
from .common import Refused, add_prepare, integer, need, number, positive, say, seed

# Options that are settings of Config under the same name.
_SETTINGS = (
    "model",
    "weights",
    "preprocess",
    "method",
    "rho",
    "radius",
    "eta",
    "eta_ratio",
    "support",
    "sigma",
    "noise_level",
    "score",
    "seed",
    "steps",
    "samples",
    "tol",
    "max_gradients",
    "tile",
    "precision",
    "device",
    "prepare",
)

# Reasons of failed inputs that are printed.
_REASONS = 3


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="explain images, arrays or Parquet files; write Parquet",
        description="Explains every input of SOURCE and writes Parquet shards, one row per input, to --out. The same "
        "command resumes an interrupted run. Inputs that cannot be read or explained are listed in errors.parquet. "
        "Ctrl-C finishes the current shard.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="image files, folders or globs; a .npy or .npz file; Parquet files or a folder of them",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="package.module:factory (with literal arguments, if it takes some: 'timm:create_model(\"resnet18\")'), a "
        ".pt2 file of torch.export, or hf:FOLDER of Hugging Face transformers; it is run, so trust it",
    )
    parser.add_argument("--weights", metavar="FILE", help=".safetensors, or .pt with tensors alone")
    parser.add_argument(
        "--preprocess",
        metavar="FILE",
        help="TOML or JSON with mode, resize, interpolation, crop, scale, mean, std; or torchvision's weights by name "
        "(torchvision.models:ResNet50_Weights.DEFAULT). default: what the model says, or pixels / 255",
    )
    parser.add_argument(
        "--method",
        default="sparse",
        choices=("gradient", "smoothgrad", "moreau", "sparse", "group"),
        help="the explainer. default: %(default)s",
    )
    far = parser.add_mutually_exclusive_group()
    far.add_argument(
        "--rho",
        type=_rho,
        help="how far to look, in units of x²/score, or auto: by the curvature at each input. default: auto, with "
        "--steps 1",
    )
    far.add_argument("--radius", type=number, help="how far to look, as the length of the displacement")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--eta", type=number, help="sparsity, absolute")
    strength.add_argument(
        "--eta-ratio", type=number, help="sparsity, as a fraction of each input's eta_max. default: 0.1"
    )
    strength.add_argument(
        "--support",
        type=_count_or_share,
        metavar="N|SHARE",
        help="sparsity, as how many features or groups are not zero: 20, or 0.05 of them",
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--sigma", type=number, help="noise, absolute")
    noise.add_argument("--noise-level", type=number, help="noise, as a fraction of each input's range. default: 0.05")
    parser.add_argument("--tile", type=positive, metavar="PIXELS", help="edge of group's tiles. default: single pixels")
    parser.add_argument(
        "--score",
        default="logit",
        choices=("logit", "log_prob", "prob", "margin"),
        help="the number that is explained. default: %(default)s",
    )
    parser.add_argument("--seed", type=seed, default=0, help="key of the noise. default: %(default)s")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="T",
        help="take at most T steps of size rho/10, in place of the solver that adapts",
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="noisy copies per step; for smoothgrad, copies in all"
    )
    parser.add_argument(
        "--tol",
        type=number,
        help="an input is done when its relative residual is at most TOL, before the last step or gradient. default: "
        "0.05; 0.01 with --steps",
    )
    parser.add_argument(
        "--max-gradients",
        type=positive,
        metavar="N",
        help="most gradients per input, beside what rho auto takes; at least the first levels, which take 192; "
        "where eta is a ratio 32 more, with --radius or --support 144 more. default: 2048",
    )
    parser.add_argument(
        "--target",
        default="predicted",
        metavar="predicted|INT|COLUMN",
        help="the class to explain; 'class' for the folder of an image. default: %(default)s",
    )
    parser.add_argument("--column", metavar="NAME", help="which column of a .npz or Parquet file is explained")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32", "bfloat16"),
        help="how a float32 model multiplies: exactly, in TF32 on CUDA, or in bfloat16. default: %(default)s",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N. default: %(default)s")
    add_prepare(parser)
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="inputs at a time. default: %(default)s"
    )
    parser.add_argument("--shard-rows", type=positive, metavar="N", help="rows of a file. default: 64 MiB or 256 rows")
    parser.add_argument(
        "--workers",
        type=integer,
        metavar="N",
        help="processes that read images, at most four per core; 0 reads in the process that explains. With --ray, "
        "actors that explain. default: 1, or one per GPU or core",
    )
    parser.add_argument(
        "--map-dtype", default="float32", choices=("float32", "float16"), help="type of the maps. default: %(default)s"
    )
    parser.add_argument(
        "--map-format",
        default="dense",
        choices=("dense", "sparse"),
        help="dense: every value; sparse: indices and values that are not zero. default: %(default)s",
    )
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="on a Ray cluster; without ADDRESS, one of this machine"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new folder, or one to go on with")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    need("explain", "batch", "PIL", "pyarrow", "safetensors", "tqdm")
    if arguments.ray is not None:
        need("explain --ray", "ray", "ray")
    from ..batch import Config, explain_config
    from ..batch.sources.base import in_words

    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    config = Config(**settings, target=_target(arguments.target))
    job: dict[str, Any] = {
        "column": arguments.column,
        "batch": arguments.batch,
        "shard_rows": arguments.shard_rows,
        "map_dtype": arguments.map_dtype,
        "map_format": arguments.map_format,
        "progress": True,
    }
    try:
        if arguments.ray is None:
            workers = 1 if arguments.workers is None else arguments.workers
            done = explain_config(config, arguments.source, arguments.out, workers=workers, **job)
        else:
            from ..batch.ray import explain

            address, actors = arguments.ray or None, arguments.workers
            done = explain(arguments.source, config, arguments.out, address=address, concurrency=actors, **job)
    except SettingError as error:
        # The number of actors and their shares of a cluster.
        name = "workers" if error.name in ("concurrency", "num_cpus", "num_gpus") else error.name
        raise SettingError(name, error.text) from error
    except OSError as error:
        if error.filename != str(arguments.out):
            raise
        text = f"--out {error.filename}: {error.strerror}"
        raise (Refused(text) if hasattr(error, "before_work") else OSError(text)) from error
    say(
        f"{done.inputs} inputs: {done.explained - done.failed} explained now, {done.skipped} before, {done.errors} "
        "with an error" + (f" (see {arguments.out / 'errors.parquet'})" if done.errors else "")
    )
    if done.left_out:
        say(in_words(done.left_out))
    if done.explained:
        say(
            f"{done.explained / done.seconds:.1f} images/s, "
            + (f"{done.converged:.0%} converged, " if config.solves else "")
            + (f"{done.empty} of {done.explained} maps are zero everywhere, " if done.empty else "")
            + f"{done.bytes / done.explained:,.0f} bytes per image, in {arguments.out}"
        )
    if not done.errors:
        return 0
    _first_reasons(arguments.out, done.errors)
    return 1


def _first_reasons(out: Path, count: int) -> None:
    """Prints the first rows of errors.parquet."""
    import pyarrow.parquet as pq

    for row in pq.read_table(out / "errors.parquet").slice(0, _REASONS).to_pylist():
        say(f"moreau-ext: error: {row['source']}: {row['reason']}", error=True)
    if count > _REASONS:
        say(f"moreau-ext: error: and {count - _REASONS} more", error=True)


def _rho(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, or auto, got {text!r}") from None


def _count_or_share(text: str) -> int | float:
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"expected a number of features, such as 20, or a share up to 1, got {text!r}")
    return value


def _target(text: str) -> str | int:
    try:
        return int(text)
    except ValueError:
        return text
