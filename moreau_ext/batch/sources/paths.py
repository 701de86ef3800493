"""The files of folders and globs. A file that is not taken is counted, with the reason."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..._errors import SettingError, SettingFileNotFoundError


@dataclass
class Found:
    """The files of a path.

    Args:
        files: (name, path); a name is relative to the folder, or to the part of the glob without wildcards.
        folders: names of the topmost folders, also of those without files.
        left_out: number of the entries that are not taken, by the reason.
    """

    files: list[tuple[str, Path]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)


def find(given: Path, suffixes: tuple[str, ...]) -> Found:
    """The files of a file, folder or glob, sorted by name.

    A folder is searched recursively for the suffixes, in any case. Links to folders are followed, but each real folder
    is read once, under its own name if it has one there. Of hidden files and folders none is taken. A glob yields all
    files that match, whatever their suffix. A path that exists is no glob, whatever its letters.

    Raises:
        SettingError: a glob that matches no file.
        SettingFileNotFoundError: no such path.
    """
    found = Found()
    if given.is_dir():
        for name, path in walk(given, found.left_out):
            if path.suffix.lower() in suffixes:
                found.files.append((name, path))
            else:
                found.left_out[f"suffix {path.suffix or '(none)'}"] += 1
        found.folders = _folders(given)
    elif os.path.lexists(given):
        found.files.append((given.name, given))
    elif glob.has_magic(str(given)):
        _match(given, found)
        if not found.files:
            raise SettingError("source", f"{given} matches no file")
    else:
        raise SettingFileNotFoundError("source", f"{given} is not there")
    found.files.sort()
    return found


def walk(top: Path, left_out: Counter[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(name relative to ``top``, path) of all files below a folder but for hidden ones; others are counted."""
    left_out = Counter() if left_out is None else left_out
    folders, links = [top], list[Path]()
    seen = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            left_out[f"folder that cannot be read ({error.strerror})"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["link to a folder that is read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            else:
                path = Path(entry.path)
                yield path.relative_to(top).as_posix(), path


def _folders(top: Path) -> set[str]:
    return {entry.name for entry in os.scandir(top) if os.path.isdir(entry.path) and not entry.name.startswith(".")}


def _match(given: Path, found: Found) -> None:
    fixed = Path(given.anchor)
    rest = list(given.parts[1:] if given.anchor else given.parts)
    while rest and (not glob.has_magic(rest[0]) or (fixed / rest[0]).exists()):
        fixed /= rest.pop(0)
    if "**" in rest:
        # Python's glob follows links in circles, for ever.
        for name, path in walk(fixed, found.left_out):
            if _matches(name.split("/"), rest):
                found.files.append((name, path))
    else:
        by_place: dict[tuple[str, str], Path] = {}
        for match in sorted(glob.iglob(os.path.join(glob.escape(str(fixed)), *rest))):
            path = Path(match)
            if path.is_dir():
                found.left_out["folder that matches, whose files do not"] += 1
                continue
            parent = os.path.realpath(path.parent)
            before = by_place.setdefault((parent, path.name), path)
            if before != path:
                found.left_out["link to a folder that is read already"] += 1
                if os.path.abspath(path.parent) == parent:
                    by_place[parent, path.name] = path
        found.files += [(path.relative_to(fixed).as_posix(), path) for path in by_place.values()]
    found.folders = _folders(fixed) if fixed.is_dir() else set()


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a name match those of a glob, of which ** stands for any number."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        # A last ** stands for all files below.
        rest = pattern[1:] or ["*"]
        return any(_matches(parts[start:], rest) for start in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
