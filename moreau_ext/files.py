"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A whole file or none: a reader never sees half of one, and an interruption leaves the old.

    Args:
        path: in a folder that exists.
        fill: writes the contents to the open binary file.

    Raises:
        OSError: it cannot be written: no space, no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
