"""The command line, ``moreau-ext``: one module per command, each of which parses, calls, prints.

Exit status: 0 done; 2 refused before any work, because the arguments cannot be carried out; 1 failed on the way;
130 interrupted. Every error is one line on stderr.

Nothing here imports torch before :func:`main` has chosen OpenMP's wait policy, which is read when torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__
from . import demo, evaluate, explain, info, show, study
from .common import Refused


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
    except Refused as error:
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
        raise Refused(f"{message} (moreau-ext --help shows how to call it)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moreau-ext", description="Sparse saliency maps from the gradient of the Moreau envelope.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, explain, show, evaluate, study, info):
        command.add_parser(commands)
    return parser
