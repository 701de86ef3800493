"""Sources of image files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..._errors import SettingError
from ...data.images import SUFFIXES
from ..preprocess import Preprocess
from .base import Source, Unreadable, image_input, in_words, path_id, stamp_of
from .paths import find


class Files(Source):
    """Image files.

    The name of a file is its path relative to the folder, or to the part of the glob without wildcards, in which it was
    found. A file that is given by itself has its file name. The id is :func:`path_id` of the name.

    Args:
        paths: files, folders and globs; see :func:`moreau_ext.batch.sources.paths.find`. A folder yields the files with
            the suffix of an image; a file that is named or matches is read whatever its suffix.
        target: "class" for the number of a file's topmost folder among all of them sorted, as in ImageFolder. Folders
            without images count.

    Raises:
        ValueError: no files, two files with one id, or ``target`` without folders.
        FileNotFoundError: no such path.
    """

    def __init__(self, paths: Iterable[str | Path], preprocess: Preprocess | None = None, target: str | None = None):
        self.preprocess, self.target = preprocess, target
        found: dict[str, Path] = {}
        folders: set[str] = set()
        left_out: Counter[str] = Counter()
        for given in paths:
            part = find(Path(given), SUFFIXES)
            folders |= part.folders
            left_out += part.left_out
            for name, path in part.files:
                if name in found and found[name] != path:
                    raise SettingError(
                        "source",
                        f"{found[name]} and {path} are both called {name}, which makes their ids equal; give the "
                        "folder that holds both",
                    )
                found[name] = path
        self.left_out = left_out
        if not found:
            why = f" ({in_words(self.left_out)})" if self.left_out else ""
            raise SettingError("source", f"no image files in {', '.join(map(str, paths))}{why}")
        # All together, so that the order of the arguments does not matter.
        self._names = sorted(found)
        self._paths = [found[name] for name in self._names]
        ids = {path_id(name): name for name in self._names}
        if len(ids) < len(self._names):
            twice = next(name for name in self._names if ids[path_id(name)] != name)
            raise SettingError("source", f"{twice} and {ids[path_id(twice)]} have the same id; rename one of them")
        self.classes: list[str] = []
        if target is not None:
            if target != "class":
                raise SettingError("target", f"image files have only the column 'class' (their folder), got {target!r}")
            if not any("/" in name for name in self._names):
                raise SettingError("target", "'class' is the folder of a file, but no file lies in a folder")
            self.classes = sorted(folders)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        # File systems allow names that are not valid Unicode; Parquet does not.
        return self._names[row].encode("utf-8", "backslashreplace").decode()

    def id(self, row: int) -> int:
        return path_id(self._names[row])

    def target_of(self, row: int) -> int | None:
        folder = PurePosixPath(self._names[row]).parts[0] if "/" in self._names[row] else None
        return None if folder is None else self.classes.index(folder)

    def read(self, row: int) -> Tensor:
        path = self._paths[row]
        if not path.is_file():  # a pipe or a device would block
            raise Unreadable("is no file" if path.exists() else "is not there")
        return image_input(path, self.preprocess)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for name, path in zip(self._names, self._paths, strict=True):
            digest.update(f"{name}\0{stamp_of(path)}\n".encode("utf-8", "surrogateescape"))
        described: dict[str, Any] = {"kind": "images", "inputs": len(self), "digest": digest.hexdigest()}
        return {**described, "classes": self.classes} if self.classes else described
