"""The manifest of an output folder: the configuration that its results belong to, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import SettingError, one_line
from .._files import write

NAME = "manifest.json"

# Differences that an error lists.
_LISTED = 4


class Differs(SettingError):
    """The output folder holds the results of another configuration."""


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if there is none.

    Raises:
        SettingError: it is damaged.
    """
    path = out / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict):
            raise TypeError(f"expected an object, got {type(manifest).__name__}")
    except (ValueError, TypeError) as error:
        raise SettingError("out", f"{path} is damaged ({one_line(error)}); give a new folder") from error
    return manifest


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a folder atomically, and returns it as a reader gets it."""
    text = json.dumps(manifest, indent=2) + "\n"
    write(out / NAME, lambda file: file.write(text.encode()))
    written: dict[str, Any] = json.loads(text)
    return written


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as "name was A and is B".

    Args:
        before: as it was read from a manifest.
        now: likewise, or before it is written: tuples count as lists.
        prefix: of the names.
    """
    now = json.loads(json.dumps(now))
    found = []
    for name in [*before, *(n for n in now if n not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {_short(old)} and is {_short(new)}")
    return found


def check_same(out: Path, found: list[str]) -> None:
    """Refuses to go on with the results of another configuration.

    Args:
        out: the folder, for the message.
        found: the :func:`differences`.

    Raises:
        Differs: there are some.
    """
    if found:
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise Differs(
            "out",
            f"{out} belongs to another configuration: {'; '.join(found[:_LISTED])}{more}. Repeat the first one, or "
            "give a new folder",
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
