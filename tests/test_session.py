"""The suite leaves the user's files alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moreau_ext import zoo
from moreau_ext.zoo.training import _cache_file


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_net_is_cached() -> None:
    """In the session's folder; the test below runs this one again."""
    zoo.trained("tabular_mlp")
    assert _cache_file("tabular_mlp", 0).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "cache"), [([], ".cache"), (["-n", "1"], "other")], ids=["alone", "xdist"])
def test_a_session_leaves_the_users_files_alone(workers: list[str], cache: str, tmp_path: Path) -> None:
    """A session that trains a net in a home whose cache holds a damaged file of that net, which it would replace."""
    home = tmp_path / "home"
    user = home / cache / "moreau_ext" / _cache_file("tabular_mlp", 0).name
    user.parent.mkdir(parents=True)
    user.write_bytes(b"the user's")
    before = contents(home)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": "" if cache == ".cache" else str(home / cache)}
    test = f"{__file__}::{test_a_net_is_cached.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    done = subprocess.run([*command, *workers, test], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert contents(home) == before
