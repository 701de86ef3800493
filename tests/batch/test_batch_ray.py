"""The same rows from a Ray cluster of two workers, also with one of them killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_maps, same_results

from moreau_ext.batch import Config, explain_config
from moreau_ext.batch.ray import explain, share

SETTINGS: dict[str, Any] = {"batch": 4, "shard_rows": 4}
# A job that waits for ever must fail the tests, not hold them.
LIMIT = 120

NETS = """
import os, pathlib, signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(), nn.Linear(16, 5))

    def forward(self, x):
        order = pathlib.Path(__file__).with_name("die")
        if "RAY_WORKER" in os.environ or os.environ.get("MOREAU_TEST_DRIVER") != str(os.getpid()):
            try:
                order.unlink()
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Config]]:
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "nets_for_ray.py").write_text(NETS)
    np.save(folder / "x.npy", torch.randn(42, 3, 4, generator=torch.Generator().manual_seed(2)).numpy())
    patch = pytest.MonkeyPatch()
    # Away from the source tree: Ray gives its workers the folder that this runs in.
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", str(folder))
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("MOREAU_TEST_DRIVER", str(os.getpid()))
    patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield folder, Config(model="nets_for_ray:Net", method="sparse", samples=4, steps=10, prepare="none")
    ray.shutdown()
    patch.undo()


def limited(run: Any) -> Any:
    """Its result, or a failure after a while."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert found, f"not done after {LIMIT} s"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.fixture(scope="module")
def alone(job: tuple[Path, Config]) -> Path:
    folder, config = job
    explain_config(config, folder / "x.npy", folder / "alone", workers=0, **SETTINGS)
    return folder / "alone"


# Ray's own code leaves sockets and files to the collector, and warns of what is to come in it.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_two_workers_give_the_same_rows(job: tuple[Path, Config], alone: Path) -> None:
    folder, config = job
    done = limited(lambda: explain(folder / "x.npy", config, folder / "two", concurrency=2, **SETTINGS))
    assert (done.inputs, done.explained, done.errors) == (42, 42, 0)
    same_results(folder / "two", alone)


def test_a_killed_worker_costs_no_rows(job: tuple[Path, Config], alone: Path) -> None:
    folder, config = job
    (folder / "die").touch()
    limited(lambda: explain(folder / "x.npy", config, folder / "killed", concurrency=2, **SETTINGS))
    assert not (folder / "die").exists()
    same_results(folder / "killed", alone)
    assert not list((folder / "killed").glob(".*"))


def test_a_job_goes_on_from_one_machine_to_many(job: tuple[Path, Config], alone: Path) -> None:
    folder, config = job
    explain_config(config, folder / "x.npy", folder / "moved", workers=0, **SETTINGS)
    for k in (1, 5):
        (folder / "moved" / f"shard-00000{k}.parquet").unlink()
    done = limited(lambda: explain(folder / "x.npy", config, folder / "moved", **SETTINGS))
    assert (done.explained, done.skipped) == (8, 34)
    same_results(folder / "moved", alone)
    assert limited(lambda: explain(folder / "x.npy", config, folder / "moved", **SETTINGS)).explained == 0


def test_ray_reads_the_shards(job: tuple[Path, Config], alone: Path) -> None:
    import ray

    paths = [str(p) for p in sorted(alone.glob("shard-*"))]
    rows = limited(lambda: ray.data.read_parquet(paths).take_all())
    found = np.stack([row["map"] for row in sorted(rows, key=lambda r: r["id"])])
    np.testing.assert_array_equal(found, read_maps(alone))


def test_actors_that_do_not_fit_are_refused() -> None:
    two = {"CPU": 2.0}
    assert share(two, "cpu", 100, None, None, None) == (2, 0.0, 0.75)
    assert share(two, "cpu", 1, 8, None, None) == (1, 0.0, 1.0)
    assert share({"CPU": 64.0, "GPU": 8.0}, "cuda", 100, None, None, None) == (8, 1.0, 1.0)
    with pytest.raises(ValueError, match="would wait for ever"):
        share(two, "cpu", 100, 2, None, 1.0)
    with pytest.raises(ValueError, match="do not fit the cluster's 0"):
        share(two, "cuda", 100, 2, None, None)
    with pytest.raises(ValueError, match="concurrency"):
        share(two, "cpu", 100, 0, None, None)


def test_streams_are_refused(job: tuple[Path, Config]) -> None:
    folder, config = job
    with pytest.raises(TypeError, match="a stream has one order"):
        explain(iter(torch.zeros(3, 3, 4)), config, folder / "stream")
    import ray

    with pytest.raises(TypeError, match="give the paths it reads"):
        explain(ray.data.from_items([{"x": 1}]), config, folder / "stream")
