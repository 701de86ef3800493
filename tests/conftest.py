"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Set before torch is imported: with two threads on a busy machine, OpenMP's spinning makes tiny calls 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Gives the session a home and a cache folder of its own, removed at its end: no test touches the user's files.

    This is a hook because a fixture would come too late: modules are imported before it, and the workers of
    pytest-xdist inherit the environment of the process that starts them. The workers share the cache without a lock.
    A file appears there complete or not at all, and two workers that train the same net write the same bits; waiting
    for each other would save no time.
    """
    if hasattr(config, "workerinput"):
        return
    folder = tempfile.TemporaryDirectory(prefix="moreau-ext-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    environment = pytest.MonkeyPatch()
    config.add_cleanup(environment.undo)
    # Wheels are built with packages from the user's index.
    pip = Path.home() / ".config/pip/pip.conf"
    if pip.is_file() and not {"PIP_CONFIG_FILE", "XDG_CONFIG_HOME"} & {*os.environ}:
        environment.setenv("PIP_CONFIG_FILE", str(pip))
    # With more threads than cores, the workers take half as much CPU time again.
    workers = getattr(config.option, "numprocesses", None)
    if workers and "OMP_NUM_THREADS" not in os.environ:
        environment.setenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    environment.setenv("HOME", folder.name)
    environment.setenv("XDG_CACHE_HOME", f"{folder.name}/.cache")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Not at the top: the process that starts pytest-xdist's workers needs no torch.
    import torch

    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, for tests that replace the training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
