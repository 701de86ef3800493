"""A whole job: rows, resume, refusals, failures."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import read_maps, same_results
from torch import nn

from moreau_ext import Gradient, MoreauGrad, ProximalGradient, SmoothGrad, SparseMoreauGrad, zoo
from moreau_ext._errors import EmptyMapWarning, SettingError
from moreau_ext.batch import Config, Differs, dense, explain_config, explain_dataset, manifest, read, sink
from moreau_ext.batch.job import describe_explainer, shard_size

SETTINGS: dict[str, Any] = {"batch": 4, "shard_rows": 8}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(), nn.Linear(16, 5)).eval()


def sparse(model: nn.Module | None = None, **more: Any) -> SparseMoreauGrad:
    return SparseMoreauGrad(model or net(), solver=ProximalGradient(4, 10, tol=0.0), rho=0.5, **more)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(21, 3, 4, generator=torch.Generator().manual_seed(2))


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_explainer_says(x: torch.Tensor, tmp_path: Path) -> None:
    done = explain_dataset(sparse(seed=3), x, tmp_path / "out", **SETTINGS)
    assert (done.inputs, done.explained, done.skipped, done.errors) == (21, 21, 0, 0)
    table = read(tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        "errors.parquet",
        "manifest.json",
        *(f"shard-00000{k}.parquet" for k in range(3)),
    ]
    found = sparse(seed=3).attribute(x, ids=torch.arange(21), return_solution=True)
    np.testing.assert_allclose(read_maps(tmp_path / "out"), found.attribution.numpy(), rtol=1e-4, atol=1e-6)
    assert table["id"].to_pylist() == list(range(21))
    assert table["predicted"].to_pylist() == table["target"].to_pylist() == net()(x).argmax(1).tolist()
    for name in ("score", "residual", "relative_residual", "eta", "sigma"):
        np.testing.assert_allclose(table[name].to_numpy(), getattr(found, name).numpy(), rtol=1e-3)
    assert set(table["gradient_evaluations"].to_pylist()) == {40}
    assert set(table["seed"].to_pylist()) == {3}
    assert table["error"].null_count == 21
    assert table["map"].type == pa.fixed_shape_tensor(pa.float32(), (3, 4))


def test_yielding_is_the_same_as_writing(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path, **SETTINGS)
    rows = list(explain_dataset(sparse(), x, batch=4))
    np.testing.assert_array_equal(np.stack([r["map"] for r in rows]), read_maps(tmp_path))
    assert [r["score"] for r in rows] == read(tmp_path)["score"].to_pylist()


def test_noise_is_keyed_by_the_id_alone(x: torch.Tensor) -> None:
    small, large = (np.stack([r["map"] for r in explain_dataset(sparse(), x, batch=b)]) for b in (1, 21))
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(workers: int, x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path / "a", workers=workers, **SETTINGS)
    explain_dataset(sparse(), x, tmp_path / "b", **SETTINGS)
    same_results(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "moreau", "sparse", "group"])
def test_every_method_by_name(method: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", zoo.digits().inputs[:6].numpy())
    config = Config(
        model="moreau_ext.zoo:digits_cnn", method=method, **({} if method == "gradient" else {"samples": 4})
    )
    explain_config(config, tmp_path / "x.npy", tmp_path / "out", workers=0)
    table = read(tmp_path / "out")
    assert table["converged"].null_count == 0
    assert np.isfinite(read_maps(tmp_path / "out")).all()
    assert (table["residual"].null_count == 6) == (method in ("gradient", "smoothgrad"))


def test_targets(x: torch.Tensor, tmp_path: Path) -> None:
    pairs = [(row, i % 5) for i, row in enumerate(x)]
    explain_dataset(Gradient(net()), pairs, tmp_path / "given", target="label", **SETTINGS)
    assert read(tmp_path / "given")["target"].to_pylist() == [i % 5 for i in range(21)]
    np.testing.assert_allclose(
        read_maps(tmp_path / "given"), Gradient(net()).attribute(x, torch.arange(21) % 5).numpy(), rtol=1e-4, atol=1e-6
    )
    explain_dataset(Gradient(net()), x, tmp_path / "fixed", target=2, **SETTINGS)
    assert set(read(tmp_path / "fixed")["target"].to_pylist()) == {2}


@pytest.mark.parametrize(("target", "more"), [("predicted", 0), (2, 1)])
def test_the_predicted_class_costs_a_pass_only_beside_a_given_target(
    target: str | int, more: int, x: torch.Tensor
) -> None:
    passes = []
    model = net()
    model.register_forward_hook(lambda *_: passes.append(1))
    explainer = Gradient(model, max_batch=8)
    explainer.attribute(x[:4])
    alone = len(passes)
    passes.clear()
    rows = list(explain_dataset(explainer, x[:12], target=target, batch=4))
    assert len(passes) == 3 * (alone + more)
    assert [row["predicted"] for row in rows] == net()(x[:12]).argmax(1).tolist()
    assert [row["target"] for row in rows] == ([2] * 12 if target == 2 else [row["predicted"] for row in rows])


def test_warnings_of_explainers_are_columns(x: torch.Tensor, tmp_path: Path) -> None:
    explainer = sparse(eta=1e6)
    with pytest.warns(EmptyMapWarning):
        explainer.attribute(x)
    assert explain_dataset(explainer, x, tmp_path).empty == len(x)
    assert set(read(tmp_path)["nnz"].to_pylist()) == {0}


def test_one_output_has_no_class(x: torch.Tensor) -> None:
    (row, *_) = explain_dataset(Gradient(lambda v: v.flatten(1).square().sum(1)), x)
    assert row["target"] is row["predicted"] is None
    np.testing.assert_allclose(row["map"], 2 * x[0].numpy())


def test_streams(x: torch.Tensor, tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(x, batch_size=5)
    explain_dataset(sparse(), loader, tmp_path / "stream", **SETTINGS)
    explain_dataset(sparse(), x, tmp_path / "array", **SETTINGS)
    np.testing.assert_array_equal(read_maps(tmp_path / "stream"), read_maps(tmp_path / "array"))
    (tmp_path / "stream" / "shard-000001.parquet").unlink()
    done = explain_dataset(sparse(), loader, tmp_path / "stream", **SETTINGS)
    assert (done.explained, done.skipped) == (8, 13)
    np.testing.assert_array_equal(read_maps(tmp_path / "stream"), read_maps(tmp_path / "array"))


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_formats(form: str, dtype: str, x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(eta_ratio=0.5), x, tmp_path, map_dtype=dtype, map_format=form, **SETTINGS)
    expected = np.stack([r["map"] for r in explain_dataset(sparse(eta_ratio=0.5), x, batch=4)])
    found = np.stack([dense(row, (3, 4)) for row in read(tmp_path).to_pylist()])
    np.testing.assert_allclose(found, expected, rtol=1e-3 if dtype == "float16" else 0)
    np.testing.assert_array_equal(found != 0, expected != 0)


def test_a_map_too_large_for_float16_is_an_error_row(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 1.0], [1e5, 1.0]])
    explain_dataset(Gradient(lambda v: v.square().sum(1)), x, tmp_path, map_dtype="float16")
    assert read(tmp_path)["error"].to_pylist() == [None, "the map has values above float16's 65504"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pandas_and_duckdb_read_a_shard(dtype: str, x: torch.Tensor, tmp_path: Path) -> None:
    x[3, 0, 0] = torch.nan
    explain_dataset(sparse(), x, tmp_path, map_dtype=dtype, **SETTINGS)
    path = tmp_path / "shard-000000.parquet"
    expected = read_maps(tmp_path)[:8].reshape(8, 12)
    about = json.loads(pq.read_schema(path).metadata[b"moreau_ext"])
    assert about["map_shape"] == [3, 4]
    assert about["configuration"]["versions"]["torch"] == torch.__version__
    frame = pd.read_parquet(path)
    assert frame["id"].tolist() == list(range(8))
    np.testing.assert_array_equal(np.stack(frame["map"]), expected)
    rows = duckdb.sql(f"select id, map, error from '{path}' order by id").fetchall()
    np.testing.assert_array_equal(np.array([r[1] for r in rows], np.float32), expected.astype(np.float32))
    assert rows[3][2] == "holds NaN or infinity"


# --- errors --------------------------------------------------------------------------------------------------------


def test_bad_inputs_are_rows_with_reasons(x: torch.Tensor, tmp_path: Path) -> None:
    x[5, 1, 2] = torch.inf
    done = explain_dataset(sparse(), x, tmp_path, **SETTINGS)
    assert done.errors == 1
    table = read(tmp_path)
    assert table.num_rows == 21
    assert table["error"].to_pylist()[5] == "holds NaN or infinity"
    assert np.isnan(read_maps(tmp_path)[5]).all()
    assert np.isfinite(np.delete(read_maps(tmp_path), 5, 0)).all()
    assert pq.read_table(tmp_path / "errors.parquet").to_pylist() == [
        {"id": 5, "source": "array:5", "reason": "holds NaN or infinity"}
    ]


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        if bool((v > 50).any()):
            raise RuntimeError("cannot do that")
        return self.inner(v)


def test_an_input_that_the_model_fails_on_is_isolated(x: torch.Tensor, tmp_path: Path) -> None:
    x[[2, 9]] = 100.0
    assert explain_dataset(sparse(Picky()), x, tmp_path, **SETTINGS).errors == 2
    assert [e for e in read(tmp_path)["error"].to_pylist() if e] == ["RuntimeError: cannot do that"] * 2
    assert np.isfinite(np.delete(read_maps(tmp_path), [2, 9], 0)).all()


def test_a_model_that_fails_on_everything_is_the_jobs_error(x: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot do that"):
        explain_dataset(sparse(Picky()), x + 100, tmp_path, **SETTINGS)
    assert not list(tmp_path.glob("shard*"))


def test_a_target_out_of_range_is_the_rows(x: torch.Tensor, tmp_path: Path) -> None:
    pairs = [(row, 99 if i == 6 else 1) for i, row in enumerate(x)]
    explain_dataset(Gradient(net()), pairs, tmp_path, target="label", **SETTINGS)
    (error,) = [e for e in read(tmp_path)["error"].to_pylist() if e]
    assert "99 of input 0 is out of range" in error


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"junk")
    with pytest.raises(Exception, match="none of the inputs can be read"):
        explain_dataset(sparse(), tmp_path / "in", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "errors.parquet").num_rows == 3


# --- resume --------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_done_again(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS)
    explain_dataset(sparse(), x, tmp_path / "b", **SETTINGS)
    (tmp_path / "a" / "shard-000000.parquet").unlink()
    done = explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS)
    assert (done.explained, done.skipped) == (8, 13)
    same_results(tmp_path / "a", tmp_path / "b")
    assert explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS).explained == 0


def test_a_damaged_shard_is_made_again(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path, **SETTINGS)
    shard = tmp_path / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="is damaged and is made again"):
        assert explain_dataset(sparse(), x, tmp_path, **SETTINGS).explained == 8
    assert read(tmp_path).num_rows == 21


def test_left_overs_of_a_killed_run_are_removed(x: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / ".shard-000000.parquet.0123.tmp").write_bytes(b"half")
    explain_dataset(sparse(), x, tmp_path, **SETTINGS)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"eta_ratio": 0.2}, "eta_ratio was null and is 0.2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"model": "else"}, "model.weights was"),
        ({"batch": 2}, "batch was 4 and is 2"),
        ({"map_dtype": "float16"}, "map_dtype was"),
        ({"target": 1}, 'target was "predicted" and is 1'),
        ({"rows": 20}, "source.inputs was 21 and is 20"),
    ],
)
def test_another_configuration_is_refused(other: dict[str, Any], words: str, x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path, **SETTINGS)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    x = x[: other.pop("rows", 21)]
    if other.pop("model", None):
        other["model"] = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    explainer = sparse(**{n: other.pop(n) for n in ("eta_ratio", "seed", "model") if n in other})
    with pytest.raises(Differs, match=words):
        explain_dataset(explainer, x, tmp_path, **{**SETTINGS, **other})
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_a_folder_with_other_things_is_refused(x: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out: .* holds thesis.tex, which is none of ours"):
        explain_dataset(sparse(), x, tmp_path)


def test_two_processes_are_refused(x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "_PATIENCE", 0.2)
    words = f"out: another process is writing to {tmp_path}"
    with sink.Output(tmp_path).locked(), pytest.raises(ValueError, match=words):
        explain_dataset(sparse(), x, tmp_path)


def test_a_lock_that_opens_soon_is_waited_for(tmp_path: Path) -> None:
    """Readers of a killed job hold it for some seconds."""
    script = "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
    script += "print(flush=True); time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with sink.Output(tmp_path).locked():
            pass


def test_a_job_that_came_to_nothing_leaves_the_folder_free(x: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target"):
        explain_dataset(sparse(), x, tmp_path, target=99, **SETTINGS)
    assert not list(tmp_path.glob("shard-*"))
    assert explain_dataset(sparse(), x, tmp_path, target=1, **SETTINGS).explained == len(x)


@pytest.mark.slow
def test_what_the_clock_chose_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", torch.rand(12, 3, 8, 8).numpy())
    config = Config(model="moreau_ext.zoo:resnet20", method="sparse", samples=2, steps=2)
    explain_config(config, tmp_path / "x.npy", tmp_path / "out", workers=0, **SETTINGS)
    chosen = manifest(tmp_path / "out")["prepared"]
    assert "fold_batchnorm" in chosen["levers"]
    before = read_maps(tmp_path / "out")
    (tmp_path / "out" / "shard-000000.parquet").unlink()
    explain_config(config, tmp_path / "x.npy", tmp_path / "out", workers=0, **SETTINGS)
    np.testing.assert_array_equal(read_maps(tmp_path / "out"), before)


def test_rows_per_pass_are_those_of_the_first_run(
    x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the memory that is free when the run goes on."""
    np.save(tmp_path / "x.npy", torch.rand(12, 3, 8, 8).numpy())
    config = Config(model="moreau_ext.zoo:resnet20", method="sparse", samples=2, steps=2, prepare="none")
    runs: list[tuple[str, Any]] = [
        ("config", lambda out: explain_config(config, tmp_path / "x.npy", out, workers=0, **SETTINGS)),
        ("dataset", lambda out: explain_dataset(sparse(), x, out, **SETTINGS)),
    ]
    for name, run in runs:
        out = tmp_path / name
        monkeypatch.setattr("moreau_ext.model.memory.budget", lambda device: 6 << 20)
        run(out)
        chosen = manifest(out)["prepared"]
        assert 1 <= chosen["max_batch"] <= 1024
        before = read_maps(out)
        (out / "shard-000000.parquet").unlink()
        monkeypatch.setattr("moreau_ext.model.memory.budget", lambda device: 1)
        run(out)
        np.testing.assert_array_equal(read_maps(out), before)
    assert explain_dataset(sparse(max_batch=7), x, tmp_path / "number", **SETTINGS).explained == len(x)
    assert manifest(tmp_path / "number")["prepared"] is None


def test_precision_is_a_part_of_the_job(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", torch.rand(4, 3, 8, 8).numpy())
    found = {}
    for precision in ("float32", "bfloat16"):
        config = Config(model="moreau_ext.zoo:resnet20", samples=2, steps=2, precision=precision, prepare="none")
        explain_config(config, tmp_path / "x.npy", tmp_path / precision, workers=0)
        found[precision] = read_maps(tmp_path / precision)
        assert manifest(tmp_path / precision)["configuration"]["precision"] == precision
    assert np.abs(found["float32"] - found["bfloat16"]).max() > 0
    config = Config(model="moreau_ext.zoo:resnet20", samples=2, steps=2, prepare="none")
    with pytest.raises(Differs, match='precision was "bfloat16" and is "float32"'):
        explain_config(config, tmp_path / "x.npy", tmp_path / "bfloat16", workers=0)


# --- the disk, signals, death --------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pq.write_table

    def full(table: Any, where: Any, **how: Any) -> None:
        if table.num_rows == 8 and table["id"][0].as_py() == 8:
            where.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(table, where, **how)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="the disk is full; finished shards are kept"):
        explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS)
    assert (tmp_path / "a" / "shard-000000.parquet").exists()
    assert not list((tmp_path / "a").glob(".*"))
    monkeypatch.undo()
    explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS)
    explain_dataset(sparse(), x, tmp_path / "b", **SETTINGS)
    same_results(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_real_full_disk(x: torch.Tensor, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse to write more, as a full disk does (EFBIG)."""
    code = (
        "import resource, signal, sys, torch\n"
        "from moreau_ext import Gradient\n"
        "from moreau_ext.batch import explain_dataset\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "explain_dataset(Gradient(lambda v: v.square().sum(1)), torch.randn(64, 4096), sys.argv[1], batch=8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json"]


def test_an_output_that_cannot_be_made(x: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    with pytest.raises(NotADirectoryError, match="Not a directory") as raised:
        explain_dataset(sparse(), x, out)
    assert raised.value.filename == str(out)


def test_the_first_interruption_finishes_the_shard(x: torch.Tensor, tmp_path: Path, capfd: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = threading.Event()

    class Slow(Picky):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            seen.set()
            time.sleep(0.01)
            return self.inner(v)

    def press() -> None:
        seen.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            explain_dataset(sparse(Slow(), max_batch=64), x, tmp_path, **SETTINGS)
    finally:
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, before)
    assert read(tmp_path).num_rows == 8
    assert "finishing the shard" in capfd.readouterr().err


def _job(folder: str, passes: float = math.inf, reached: Any = None) -> None:
    """A job whose model hangs after so many passes, and says so."""

    class Hanging(Picky):
        done = 0

        def forward(self, v: torch.Tensor) -> torch.Tensor:
            self.done += 1
            if self.done > passes:
                reached.set()
                time.sleep(600)
            return self.inner(v)

    x = torch.randn(21, 3, 4, generator=torch.Generator().manual_seed(2))
    explain_dataset(sparse(Hanging()), x, folder, batch=4, shard_rows=4)


def test_kill_9_again_and_again(x: torch.Tensor, tmp_path: Path) -> None:
    """Killed in a batch, while the writer may be anywhere with the one before. benchmarks/kill_resume.py is the larger
    test, of the command line at random moments."""
    context = multiprocessing.get_context("fork")
    for passes, written in ((1, False), (5, False), (30, True), (7, False)):
        reached = context.Event()
        process = context.Process(target=_job, args=(str(tmp_path / "a"), passes, reached))
        process.start()
        assert reached.wait(60)
        while written and not list((tmp_path / "a").glob("shard-*")):
            assert process.is_alive()  # it hangs in its third batch, so the first one's shard is to come
            time.sleep(0.01)
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "a").glob("shard-*"))) < 6
    _job(str(tmp_path / "a"))
    _job(str(tmp_path / "b"))
    same_results(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "a").glob(".*"))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "lime"}, "method: expected one of"),
        ({"method": "gradient", "rho": 1.0}, "rho: gradient has none"),
        ({"method": "moreau", "eta": 1.0}, "eta: moreau has none"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"steps": 5, "max_gradients": 100}, "max_gradients"),
        ({"tile": 2}, "tile: sparse has none"),
        ({"prepare": "maybe"}, "prepare: expected"),
    ],
)
def test_settings_that_do_not_belong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(model="m:n", **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 4, "shard_rows": 6}, "shard_rows: expected a multiple of batch"),
        ({"map_dtype": "int8"}, "map_dtype"),
        ({"map_format": "csv"}, "map_format"),
        ({"workers": -1}, "workers"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str, x: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        explain_dataset(sparse(), x, tmp_path, **options)


def test_shard_size() -> None:
    assert shard_size(None, 32, (3, 224, 224)) == 96
    assert shard_size(None, 32, (1, 8, 8)) == 256
    assert shard_size(None, 32, (3, 2000, 2000)) == 32
    assert shard_size(64, 32, (3, 224, 224)) == 64


def test_other_explainers(x: torch.Tensor, tmp_path: Path) -> None:
    for explainer in (SmoothGrad(net(), num_samples=4), MoreauGrad(net())):
        out = tmp_path / type(explainer).__name__
        explain_dataset(explainer, x, out, **SETTINGS)
        assert np.isfinite(read_maps(out)).all()


def test_float64_arrays_suit_float32_models(x: torch.Tensor, tmp_path: Path) -> None:
    explain_dataset(sparse(), x, tmp_path / "a", **SETTINGS)
    explain_dataset(sparse(), x.double(), tmp_path / "b", **SETTINGS)
    np.testing.assert_array_equal(read_maps(tmp_path / "a"), read_maps(tmp_path / "b"))


def test_settings_that_are_functions_and_layers(tmp_path: Path) -> None:
    """A function is named in the manifest, not its address; maps of a layer have no place in a job."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Identity()).eval()
    described = describe_explainer(Gradient(net, output_fn=lambda output: output))
    assert described["output_fn"].endswith("test_settings_that_are_functions_and_layers.<locals>.<lambda>")
    with pytest.raises(SettingError, match="explainer: has a layer, and the maps of a job are those of its inputs"):
        explain_dataset(Gradient(net, layer="0"), torch.rand(4, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
