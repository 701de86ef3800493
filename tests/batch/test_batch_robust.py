"""Jobs that end: readers, locks, small shared memory, damaged shards, folders that are replaced, shadowed packages."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SCRIPT, read_maps

from moreau_ext import Gradient
from moreau_ext.batch import Config, explain_config, explain_dataset, manifest, open_source, read, sink
from moreau_ext.batch.readers import read_batches
from moreau_ext.batch.sources.base import Source

SETTINGS: dict[str, Any] = {"batch": 4, "shard_rows": 8}


def energy(x: torch.Tensor) -> torch.Tensor:
    return x.square().flatten(1).sum(1)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(21, 3, 4, generator=torch.Generator().manual_seed(2))


# --- readers -------------------------------------------------------------------------------------------------------


class Rows(Source):
    """Rows that do something when they are read."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def __len__(self) -> int:
        return 12

    def name(self, row: int) -> str:
        return f"row:{row}"

    def read(self, row: int) -> torch.Tensor:
        self.act(row)
        return torch.full((50_000,), float(row))  # more than a pipe holds

    def describe(self) -> dict[str, Any]:
        return {}


BATCHES = [(at, at + 2) for at in range(0, 12, 2)]


@pytest.mark.parametrize("workers", [0, 1, 2, 5, 64])
def test_batches_come_in_order(workers: int) -> None:
    found = list(read_batches(Rows(lambda row: None), BATCHES, workers, False))
    assert [start for start, _ in found] == list(range(0, 12, 2))
    assert torch.cat([loaded.inputs[:, 0] for _, loaded in found]).tolist() == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_survive_the_pipe(dtype: torch.dtype) -> None:
    values = torch.rand(4, 2, 3).to(dtype)
    (_, loaded), *_ = read_batches(open_source(list(values)), [(0, 4)], 1, False)
    assert torch.equal(loaded.inputs, values)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda row: os.kill(os.getpid(), signal.SIGKILL) if row == 5 else None, r"exit code -9, likely out of memory"),
        (lambda row: os._exit(3) if row == 5 else None, "exit code 3"),
        (lambda row: sys.exit(4) if row == 5 else None, "SystemExit: 4"),
    ],
)
def test_a_reader_that_ends_is_an_error(act: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        list(read_batches(Rows(act), BATCHES, 2, False))


def test_readers_end_with_the_iterator() -> None:
    batches = read_batches(Rows(lambda row: None), BATCHES, 2, False)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


JOB = """
import os, sys, time
import torch
from moreau_ext import Gradient
from moreau_ext.batch import explain_dataset

def slow(x):
    time.sleep(0.2)
    return x.square().flatten(1).sum(1)

explain_dataset(Gradient(slow, max_batch=64), torch.rand(400, 40_000), sys.argv[1], batch=4, shard_rows=4, workers=2)
"""


@pytest.mark.slow
def test_readers_end_with_a_killed_job_and_free_its_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", JOB, str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        until(lambda: list((tmp_path / "out").glob("shard-*")))
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True).stdout
        readers = [int(pid) for pid in listed.split()]
        assert len(readers) == 2
        job.kill()
    began = time.monotonic()
    with sink.Output(tmp_path / "out").locked():
        assert time.monotonic() - began < 3
    until(lambda: not any(alive(pid) for pid in readers), 5)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def until(true: Any, seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last
        time.sleep(0.05)


def test_no_forked_process_keeps_the_lock(tmp_path: Path) -> None:
    """A user's model may start processes that outlive the job."""
    locked = sink.Output(tmp_path).locked()
    locked.__enter__()
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        locked.__exit__(None, None, None)
        # As soon as the child has run at all.
        with sink.Output(tmp_path).locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_a_container_with_little_shared_memory(tmp_path: Path) -> None:
    """Docker gives 64 MiB of /dev/shm; a batch of photographs is more. One MiB here, one batch is 3."""
    private = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    if not shutil.which("unshare") or subprocess.run(private, capture_output=True).returncode:
        pytest.skip("needs the right to mount /dev/shm privately (root)")
    script = tmp_path / "job.py"
    script.write_text(
        "import torch\n"
        "from moreau_ext import Gradient\n"
        "from moreau_ext.batch import explain_dataset\n"
        "print(explain_dataset(Gradient(lambda x: x.square().flatten(1).sum(1)), torch.rand(24, 3, 256, 256), 'out',\n"
        "                      batch=4, workers=2))\n"
    )
    private[-1] += f" && exec timeout 100 {sys.executable} -P {script}"
    done = subprocess.run(private, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "explained=24" in done.stdout


def test_a_loader_whose_workers_need_more_shared_memory(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = torch.utils.data.DataLoader([(row, 1) for row in x], 4, num_workers=2, persistent_workers=True, timeout=9)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=700))  # 16 rows of 48 bytes
    with pytest.warns(UserWarning, match="need 0 MiB of shared memory .*this process reads"):
        found = torch.cat([loaded.inputs for _, loaded in open_source(loader).batches(5)])
    assert torch.equal(found, x)
    assert not multiprocessing.active_children()
    assert loader.num_workers == 2


# --- the output ----------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << 6
    path.write_bytes(data)


def places(path: Path) -> dict[str, int]:
    """A byte in the map's page, in the header of the first page, of the footer's metadata, and in another column."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema.split(".")[0]: group.column(i) for i in range(group.num_columns)}
    starts = {name: column.dictionary_page_offset or column.data_page_offset for name, column in columns.items()}
    where = {name: starts[name] + columns[name].total_compressed_size - 6 for name in ("map", "score", "source")}
    return {**where, "header": starts["id"] + 1, "footer": path.read_bytes().rindex(b'"batch"') + 2}


@pytest.mark.parametrize("place", ["map", "score", "source", "header", "footer"])
def test_turned_bits_are_named_and_made_again(place: str, x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(Gradient(energy), x, tmp_path, **SETTINGS)
    before, shard = read_maps(tmp_path), tmp_path / "shard-000001.parquet"
    flip(shard, places(shard)[place])
    if place != "footer":  # has no checksum; the job compares its schema and manifest
        with pytest.raises(ValueError, match=r"out: .*shard-000001.parquet is damaged"):
            read(tmp_path)
    with pytest.warns(UserWarning, match=r"shard-000001.parquet is damaged and is made again"):
        done = explain_dataset(Gradient(energy), x, tmp_path, **SETTINGS)
    assert (done.explained, done.skipped) == (8, 13)
    np.testing.assert_array_equal(read_maps(tmp_path), before)
    assert explain_dataset(Gradient(energy), x, tmp_path, **SETTINGS).explained == 0


def test_a_shard_of_another_job_is_made_again(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(Gradient(energy), x, tmp_path / "a", **SETTINGS)
    explain_dataset(Gradient(energy), x, tmp_path / "b", map_dtype="float16", **SETTINGS)
    shutil.copy(tmp_path / "b" / "shard-000000.parquet", tmp_path / "a" / "shard-000000.parquet")
    with pytest.warns(UserWarning, match="its columns are not those of this job"):
        assert explain_dataset(Gradient(energy), x, tmp_path / "a", **SETTINGS).explained == 8


@pytest.mark.parametrize("how", ["deleted", "replaced", "one shard", "manifest"])
def test_an_output_that_is_deleted_meanwhile_is_an_error(how: str, x: torch.Tensor, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []

    def model(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            until(lambda: (out / "shard-000000.parquet").exists())
            if how == "one shard":
                (out / "shard-000000.parquet").unlink()
            elif how == "manifest":
                (out / "manifest.json").unlink()
            else:
                out.rename(tmp_path / "moved")
                if how == "replaced":
                    out.mkdir()
        return energy(v)

    with pytest.raises(OSError, match=r"was deleted (or replaced )?while the job ran") as raised:
        explain_dataset(Gradient(model, max_batch=64), x, out, **SETTINGS)
    assert raised.value.filename == str(out)


def test_only_methods_that_solve_speak_of_convergence(x: torch.Tensor, tmp_path: Path, capfd: Any) -> None:
    explain_dataset(Gradient(energy), x, tmp_path / "a", progress=True, **SETTINGS)
    assert "converged" not in capfd.readouterr().err


# --- the current folder --------------------------------------------------------------------------------------------

RAN = 'open("ran", "a").write(__name__ + "\\n")\n'


@pytest.mark.slow
def test_only_the_named_module_and_its_own_are_found(tmp_path: Path) -> None:
    for name in ("torch", "numpy", "PIL", "pyarrow", "tqdm", "typing_extensions", "safetensors", "wandb", "net2"):
        (tmp_path / f"{name}.py").write_text(RAN + "raise ImportError('shadow')\n")
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "__init__.py").write_text("from sizes import WIDTH\n")
    (tmp_path / "sizes.py").write_text("WIDTH = 192\n")
    (tmp_path / "net.py").write_text(
        textwrap.dedent("""
        import torch
        from layers import WIDTH
        def make():
            import lazily
            for name in ("wandb", "net2"):
                try:
                    __import__(name)
                except ImportError as error:
                    assert "No module" in str(error), error
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(WIDTH, 2))
        """)
    )
    (tmp_path / "lazily.py").write_text("")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((3, 3, 8, 8), np.float32))
    given = ["explain", "x.npy", "--model", "net:make", "--method", "gradient", "--prepare", "none"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for number, command in enumerate(([str(SCRIPT)], [sys.executable, "-m", "moreau_ext"])):
        line = [*command, *given, "--out", f"out{number}"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_an_installed_module_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moreau_ext.batch import load_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "moreau_ext.py").write_text(RAN)
    (tmp_path / "torch.py").write_text(RAN)
    load_model("moreau_ext.zoo:digits_cnn")
    load_model("torch.nn:Identity")
    assert not (tmp_path / "ran").exists()
    assert str(tmp_path) not in sys.path


def test_a_refused_job_leaves_no_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    for out in (tmp_path / "new", tmp_path / "new" / "deep"):
        with pytest.raises(ValueError, match="model: "):
            explain_config(Config(model="no_such:net"), tmp_path / "x.npy", out)
        assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="model: "):
        explain_config(Config(model="no_such:net"), tmp_path / "x.npy", tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_the_manifest_keeps_its_configuration_in_every_shard(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(Gradient(energy), x, tmp_path, **SETTINGS)
    about = json.loads(pq.read_schema(tmp_path / "shard-000000.parquet").metadata[b"moreau_ext"])
    assert about["configuration"] == manifest(tmp_path)["configuration"]
