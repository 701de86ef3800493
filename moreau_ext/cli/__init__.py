"""The command line, ``moreau-ext``: one module per command.

Exit status: 0 done; 2 refused before any work, because the arguments cannot be carried out; 1 failed later, or some
inputs failed; 130 interrupted. An error is one line on stderr; ``--debug`` adds the traceback.

No module here imports torch before :func:`main` has chosen OpenMP's wait policy, which is read when torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__
from .._errors import ConvergenceWarning, SettingError
from . import demo, evaluate, explain, info, show, study
from .common import Refused, place_in_users_code, say


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        argv: the arguments after the program's name; those of the process if None.
    """
    if "torch" not in sys.modules:
        # Spinning threads make a small model's passes 70 times slower where the cores are shared (136 ms for 2).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    commands = _Commands()
    arguments = argparse.Namespace(command=None, debug=False)
    try:
        commands.parse(argv, arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Commands sum up what converged.
            warnings.simplefilter("ignore", ConvergenceWarning)
            run: Callable[[argparse.Namespace], int | None] = arguments.run
            return run(arguments) or 0
    except KeyboardInterrupt:
        return _complain("interrupted", 130, "")
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, SettingError):
            text = f"{commands.option(arguments.command, error.name)}: {error.text}"
        elif isinstance(error, (Refused, ValueError, TypeError, ImportError, OSError)):
            text = str(error) or type(error).__name__
        else:
            text = f"{type(error).__name__}: {error}"
        refused = isinstance(error, (Refused, SettingError)) or hasattr(error, "before_work")
        if getattr(arguments, "model", None):
            text += place_in_users_code(error)
        return _complain(text, 2 if refused else 1)


def _complain(message: str, status: int, kind: str = "error: ") -> int:
    say(f"moreau-ext: {kind}{' '.join(message.split())}", error=True)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    say(f"moreau-ext: warning: {' '.join(str(message).split())}", error=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} ({self.prog} --help shows how to call it)")


class _Commands:
    """The parser, with a parser of its own for every command."""

    def __init__(self) -> None:
        self.parser = _Parser(
            prog="moreau-ext", description="Sparse saliency maps from the gradient of the Moreau envelope."
        )
        self.parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self._commands = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for command in (demo, explain, show, evaluate, study, info):
            command.add_parser(self._commands)
        # Before or after the command; what an option is not given must not undo the other.
        for parser in (self.parser, *self._commands.choices.values()):
            parser.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="print the traceback of an error"
            )

    def parse(self, argv: list[str] | None, arguments: argparse.Namespace) -> None:
        """Parses arguments into a namespace; the hint of an error names the command's own --help."""
        _, rest = self.parser.parse_known_args(argv, arguments)
        if rest:
            self._commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}")

    def option(self, command: str, name: str) -> str:
        """The option of a command that gives a setting of the library; the name itself if there is none."""
        for action in self._commands.choices[command]._actions:  # argparse has no public list
            if action.dest == name:
                return str(action.option_strings[-1] if action.option_strings else action.metavar)
        return name
