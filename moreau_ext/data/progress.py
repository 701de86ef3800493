"""The progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .._errors import printable

Advance = Callable[..., None]


def report(text: str, show: bool) -> None:
    """Says on stderr what comes next and may take a while."""
    if show:
        print(f"moreau-ext: {printable(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(total: float | None, *, show: bool, extra: str, **settings: Any) -> Iterator[Advance]:
    """A bar on stderr, advanced by calls of ``advance(amount, text="")``; the text stands behind the bar.

    Args:
        total: the sum of all amounts; None if it is not known.
        show: False draws nothing and needs no tqdm.
        extra: the extra of this package that installs tqdm, for the error.
        settings: tqdm's; ``disable=None`` draws on a terminal only, so that a log does not fill with bars.

    Raises:
        ImportError: tqdm is missing.
    """
    if not show:
        yield lambda amount, text="": None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f'the progress bar needs tqdm ({error}): pip install "moreau_ext[{extra}]"') from error
    with tqdm(total=total, **settings) as bar:

        def advance(amount: float, text: str = "") -> None:
            bar.update(amount)
            if text:
                bar.set_postfix_str(text)

        yield advance
