"""Errors and warnings of the package."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


class SettingError(ValueError):
    """A setting that cannot be carried out.

    ``str()`` is "name: text". The command line prints the option of that name in its place.

    Args:
        name: the setting's name in Python, such as ``out`` or ``preprocess``.
        text: what was expected and what came.

    Example:
        >>> from moreau_ext._errors import SettingError
        >>> print(SettingError("batch", "expected a positive integer, got 0"))
        batch: expected a positive integer, got 0
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


class SettingFileNotFoundError(SettingError, FileNotFoundError):
    """A setting that names a file or folder which does not exist."""


class MoreauWarning(UserWarning):
    """Base class of the package's warnings."""


class EmptyMapWarning(MoreauWarning):
    """Some maps are zero everywhere."""


class ConvergenceWarning(MoreauWarning):
    """Some maps did not converge to the tolerance; ``Solution.converged`` says which.

    Example:
        >>> import warnings
        >>> from moreau_ext import ConvergenceWarning
        >>> warnings.simplefilter("ignore", ConvergenceWarning)  # where Solution.converged is read anyway
    """


class TrainModeWarning(MoreauWarning):
    """The model is in train mode; it is explained in eval mode and restored afterwards."""


class MemoryWarning(MoreauWarning):
    """A pass ran out of memory and was retried with fewer rows."""


class BatchWarning(MoreauWarning):
    """The model takes its inputs in passes of one size only, or its passes cannot be repeated."""


class OutputRowsError(ValueError):
    """A model's output has not one row per input.

    Args:
        text: what was expected and what came.
        folded: whether the rows may stand one after the other in a single one.
    """

    def __init__(self, text: str, folded: bool) -> None:
        super().__init__(text)
        self.folded = folded


class OutputTypeError(TypeError):
    """A model's output is no tensor."""


class MixingError(ValueError):
    """A model gives the inputs of a batch no outputs of their own."""

    def __init__(self) -> None:
        super().__init__(
            "model: mixes the inputs of a batch: the output of one changes with another, so no input has a map of its "
            "own. Likely causes: batch statistics (BatchNorm in train mode, in a module that was not found), a "
            "contrastive head, or the nodes of a graph given as a batch (explain x[None] with a model of [n, nodes, "
            "features] instead). max_batch=1 explains every input in passes of its own, for a model that runs on one"
        )


@contextlib.contextmanager
def without(*categories: type[Warning]) -> Iterator[None]:
    """Silences warnings whose contents are columns of the results."""
    with warnings.catch_warnings():
        for category in categories:
            warnings.simplefilter("ignore", category)
        yield


@contextlib.contextmanager
def before_work(*but: type[Exception]) -> Iterator[None]:
    """Marks errors that come before any work of a job is done: the command line refuses the call (exit status 2).

    Args:
        but: errors that are failures all the same.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, but):
            error.before_work = True  # type: ignore[attr-defined]  # our mark
        raise


def one_line(error: BaseException) -> str:
    """The class and the text of an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def printable(text: str) -> str:
    """Text with what a terminal would obey (control characters, changes of direction) as escapes.

    Example:
        >>> from moreau_ext._errors import printable
        >>> print(printable("a\\x1b[2Jb"))
        a\\x1b[2Jb
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )
