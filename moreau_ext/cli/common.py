"""Shared by the commands: refusals, types of arguments, checks of packages and folders, versions."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import tempfile
from pathlib import Path

from .._files import write as write


class Refused(Exception):
    """Arguments that cannot be carried out; exit status 2."""


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Adds ``--prepare``."""
    parser.add_argument(
        "--prepare",
        choices=("auto", "none"),
        default="auto",
        help="auto: explain with a faster copy of the model, each change checked (BatchNorm folded, channels_last, "
        "frozen, the best rows per pass); maps differ by rounding. none: with the model as it is. default: %(default)s",
    )


def need(command: str, extra: str, *modules: str) -> None:
    """Refuses a command whose packages are not all installed; the error names the extra that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f'{command} needs {" and ".join(missing)}: pip install "moreau_ext[{extra}]"')


def check_writable(folder: Path) -> None:
    """Creates a folder, and refuses one to which no file can be written, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"--out {folder}: cannot write there ({error.strerror or error})") from error


def versions() -> dict[str, str]:
    """The versions of this package and of those it runs on."""
    import numpy
    import torch

    from .. import __version__

    return {
        "moreau_ext": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
