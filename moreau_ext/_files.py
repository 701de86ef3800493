"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes a file atomically: temporary file, fsync, rename, fsync of the folder.

    A reader sees the old file or the new one, never a part of it. An interruption leaves the old file. After the call
    the file survives a power cut. The temporary file is called ``.NAME.*.tmp``.

    Args:
        path: the file, in a folder that exists.
        fill: writes the contents to the open binary file.

    Raises:
        OSError: disk full, read-only, no permission, ...; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
