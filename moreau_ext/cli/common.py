"""Shared by the commands: refusals, types of arguments, checks of packages and folders, printing, versions."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import platform
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from .._errors import printable
from .._files import write as write

# The maps of the demo, over their columns.
TITLES = {
    "gradient": "Gradient",
    "smoothgrad": "SmoothGrad",
    "moreau": "MoreauGrad",
    "sparse": "Sparse\nMoreauGrad",
    "group": "Group-Sparse\nMoreauGrad",
}


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


def integer(text: str) -> int:
    """An integer, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def seed(text: str) -> int:
    """A key of the noise, an integer of 64 bits, for argparse."""
    value = integer(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {text!r}")
    return value


def number(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
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


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """A folder for the files of a command, which is created; refuses one to which no file can be written.

    What is still empty at the end of the block is removed, so that a command that is refused within it leaves nothing.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise Refused(f"--out {folder}: cannot write there ({error.strerror or error})") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def say(text: str, error: bool = False) -> None:
    """Prints text, which may hold names of files, on stdout or stderr."""
    stream = sys.stderr if error else sys.stdout
    line = printable(text)
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def place_in_users_code(error: BaseException) -> str:
    """The file and line of the user's own code that an error came through, as " (net.py, line 12)"; "" if none."""
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    ours = str(Path(__file__).resolve().parents[1])
    found = ""
    cause: BaseException | None = error
    while cause is not None:
        for frame in traceback.extract_tb(cause.__traceback__):
            name = os.path.realpath(frame.filename)
            foreign = "site-packages" in name or "dist-packages" in name or frame.filename.startswith("<")
            if not foreign and not name.startswith((ours, *(os.path.realpath(path) + os.sep for path in installed))):
                found = f" ({frame.filename}, line {frame.lineno})"
        cause = cause.__cause__ or cause.__context__
    return found


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
