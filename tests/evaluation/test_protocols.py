"""Runs that can be interrupted and resumed, their tables, the data they read, and the command that drives them."""

from __future__ import annotations

import csv
import doctest
import json
import pickle
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import SCRIPT, Malicious, start
from PIL import Image
from torch import Tensor

from moreau_ext import cli, zoo
from moreau_ext.evaluation import (
    METRICS,
    Plan,
    Results,
    bootstrap,
    compare,
    data,
    methods,
    run,
    runner,
    studies,
    summarise,
)
from moreau_ext.evaluation.statistics import claims
from moreau_ext.evaluation.tables import write_tables

pytestmark = pytest.mark.slow

SMALL = Plan(
    methods=("gradient", "sparse", "group_superpixels", "random"),
    attacks=("gaussian", "adaptive"),
    magnitudes=(0.3,),
    limit=6,
    settings=methods.Settings(budget=224),
    block=4,
    attack_samples=16,
    draws=2,
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return zoo.trained("digits_cnn")


@pytest.fixture(scope="module")
def results(model, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(model, zoo.digits("test"), SMALL, tmp_path_factory.mktemp("run"))


def same(a: Results, b: Results) -> None:
    assert list(a.table) == list(b.table)
    for name, column in a.table.items():
        if column.dtype == object:
            assert (column == b.table[name]).all()
        else:
            np.testing.assert_allclose(column, b.table[name], rtol=1e-5, atol=1e-6, err_msg=name)


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_tidy(results: Results) -> None:
    t = results.table
    # Each method's maps, and for those that can be attacked two attacks.
    assert len(t["id"]) == 6 * (4 + 3 * 2)
    keys = set(zip(t["id"], t["method"], t["attack"], t["magnitude"], strict=True))
    assert len(keys) == len(t["id"])
    assert set(METRICS) < set(t)
    for method in SMALL.methods:
        maps = results.rows(method)
        assert (maps["id"] == np.arange(6)).all()
        assert not np.isnan(maps["gini"]).any()
        assert np.isnan(maps["topk"]).all()
        assert ((maps["deletion"] > 0) & (maps["deletion"] < 1)).all()
        assert not np.isnan(maps["max_sensitivity"]).any()
        assert np.isnan(maps["seed_cosine"]).any() == (method == "random")
        assert np.isnan(maps["seed_jaccard"]).all() == (method in ("gradient", "random"))
        attacked = results.rows(method, "adaptive", 0.3)
        assert len(attacked["id"]) == (0 if method == "random" else 6)
        assert np.isnan(attacked["gini"]).all()
        assert (attacked["kept"] == 1).all()
        assert (attacked["distance_l2"] <= 0.3 + 1e-5).all()
    # A map that ignores the model does not see that its parameters were shuffled.
    np.testing.assert_allclose(results.rows("random")["randomised_all"], 1)


def test_maps_of_a_run_can_be_read(results: Results, model) -> None:
    maps, x = results.maps("gradient", 5)
    assert maps.shape == x.shape == (5, 1, 8, 8)
    attacked, moved = results.maps("sparse", 6, "adaptive", 0.3)
    assert attacked.shape == moved.shape == (6, 1, 8, 8)
    assert torch.equal(model(moved).argmax(1), model(results.data.inputs[:6]).argmax(1))


def test_summary_and_comparison(results: Results) -> None:
    records = summarise(results)
    (record,) = [r for r in records if r["method"] == "sparse" and r["metric"] == "gini"]
    assert record["low"] <= record["mean"] <= record["high"]
    assert record["mean"] == pytest.approx(results.rows("sparse")["gini"].mean())
    difference, verdict = compare(results, "sparse", "gradient", "gini")
    assert (difference.mean > 0.1, verdict) == (True, "better")
    assert compare(results, "gradient", "sparse", "gini")[1] == "worse"
    assert compare(results, "sparse", "sparse", "gini")[1] == "undecided"
    assert compare(results, "sparse", "random", "topk", "adaptive", 0.3)[1] == "undecided"


def test_bootstrap_covers_the_mean() -> None:
    generator = np.random.default_rng(0)
    found = [bootstrap(generator.exponential(size=40)) for _ in range(200)]
    assert 0.88 < np.mean([f.low <= 1 <= f.high for f in found]) < 0.99
    assert bootstrap([np.nan, 2.0]).count == 1
    assert str(bootstrap([np.nan])) == "-"
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])


def test_files_hold_the_same_rows(results: Results) -> None:
    write_tables(results, results.folder)
    table = pyarrow.parquet.read_table(results.folder / "results.parquet")
    with open(results.folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert table.num_rows == len(rows) == len(results.table["id"])
    assert table.column("topk").null_count == 24
    for mine, theirs in zip(table.to_pylist(), rows, strict=True):
        assert mine["method"] == theirs["method"]
        assert theirs["gini"] == "" if mine["gini"] is None else float(theirs["gini"]) == mine["gini"]
    summary = json.loads((results.folder / "summary.json").read_text())
    assert summary["inputs"] == 6
    assert summary["hessian"] == "stein"


def test_every_claim_has_its_row(results: Results) -> None:
    found = claims(results)
    # Two of ours against one rival: three metrics of the map, and three under each of two attacks.
    assert len(found) == 2 * (3 + 3 * 2)
    for claim in found:
        test = (claim["metric"], claim["attack"], claim["magnitude"])
        interval, verdict = compare(results, claim["method"], claim["rival"], *test)
        assert {**claim, **vars(interval), "verdict": verdict} == claim
    assert write_tables(results, results.folder)[-2:] == ["claims.csv", "claims.md"]
    with open(results.folder / "claims.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [claim["mean"] for claim in found]
    lines = (results.folder / "claims.md").read_text().splitlines()
    assert lines[0] == "| method minus rival | Gradient |"
    assert len(lines) == 2 + len(found)
    words = "+{mean:.3f} [+{low:.3f}, +{high:.3f}] **better**".format(**found[0])
    assert lines[2] == f"| Sparse MoreauGrad: Gini | {words} |"
    assert "| Group-Sparse, superpixels: SSIM, adaptive 0.3 | " in lines[-2]


# --- interrupted and resumed ---------------------------------------------------------------------------------------


def test_interrupted_and_resumed_is_the_same(results: Results, model, tmp_path: Path, monkeypatch) -> None:
    made, make = [], runner._Runner.make

    def stop(runner, unit):
        made.append(unit.file)
        if len(made) in (3, 9):
            raise KeyboardInterrupt
        return make(runner, unit)

    monkeypatch.setattr(runner._Runner, "make", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, zoo.digits("test"), SMALL, tmp_path)
    # A part that is damaged is made again.
    (tmp_path / "parts" / made[0]).write_bytes(b"half")
    resumed = run(model, zoo.digits("test"), SMALL, tmp_path)
    same(resumed, results)
    assert sorted(p.name for p in (tmp_path / "parts").rglob("*.tmp")) == []
    # What was done is not done again but for the two that were interrupted and the damaged one.
    assert len(made) - len(set(made)) == 3
    before = len(made)
    same(run(model, zoo.digits("test"), SMALL, tmp_path), results)
    assert len(made) == before


def test_a_larger_run_goes_on_in_the_same_folder(results: Results, model, tmp_path: Path) -> None:
    few = Plan(**{**vars(SMALL), "methods": ("gradient",), "limit": 4, "attacks": ("gaussian",)})
    run(model, zoo.digits("test"), few, tmp_path)
    same(run(model, zoo.digits("test"), SMALL, tmp_path), results)


def test_another_configuration_is_refused(results: Results, model) -> None:
    other = Plan(**{**vars(SMALL), "k": 0.5})
    with pytest.raises(ValueError, match=r"belongs to another configuration: plan\.k was 0\.4 and is 0\.5\. "):
        run(model, zoo.digits("test"), other, results.folder)
    with pytest.raises(ValueError, match="model_fingerprint was"):
        run(zoo.trained("digits_cnn_silu"), zoo.digits("test"), SMALL, results.folder)
    (results.folder / "manifest.json").rename(results.folder / "kept")
    (results.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(model, zoo.digits("test"), SMALL, results.folder)
    (results.folder / "kept").rename(results.folder / "manifest.json")


def test_a_full_disk_loses_nothing(model, tmp_path: Path, monkeypatch, capsys) -> None:
    write, count = runner.write, [0]

    def full(path, fill):
        count[0] += 1
        if count[0] > 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, fill)

    monkeypatch.setattr(runner, "write", full)
    line = ["evaluate", "--limit", "2", "--methods", "gradient,random", "--attack", "gaussian", "--out", str(tmp_path)]
    assert cli.main(line) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("moreau-ext: error: [Errno 28] No space left on device")
    monkeypatch.undo()
    kept = list((tmp_path / "parts").rglob("*.npz"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert cli.main(line) == 0
    assert kept[0].stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": ("magic",)}, "methods: expected some of gradient"),
        ({"attacks": ("magic",)}, "attacks: expected some of gaussian"),
        ({"magnitudes": (-1.0,)}, "magnitudes: expected positive numbers"),
        (
            {"methods": ("sparse",), "settings": methods.Settings(budget=192)},
            "budget: sparse takes at least 224 gradients",
        ),
    ],
)
def test_plans_refuse(more: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**{**vars(SMALL), **more})


# --- data ----------------------------------------------------------------------------------------------------------


def cifar(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(10, size=count)
    return generator.integers(256, size=(count, 3072), dtype=np.uint8), labels.astype(np.uint8)


def write_binary(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], pixels], axis=1).tobytes())


def write_pickle(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    table = {b"batch_label": b"tiny", b"labels": labels.tolist(), b"data": pixels, b"filenames": [b"x.png"]}
    (folder / name).write_bytes(pickle.dumps(table, protocol=2))


@pytest.mark.parametrize(
    ("writer", "below"),
    [(write_binary, "cifar-10-batches-bin"), (write_pickle, ""), (write_pickle, "cifar-10-batches-py")],
)
def test_cifar10_is_read_from_its_own_files(tmp_path: Path, writer, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    train = [cifar(3, 1), cifar(2, 2)]
    for i, batch in enumerate(train, 1):
        writer(folder, f"data_batch_{i}", *batch)
    test = cifar(4, 3)
    writer(folder, "test_batch", *test)
    found = data.load(f"cifar10:{tmp_path}")
    assert found.inputs.shape == (4, 3, 32, 32)
    assert torch.equal((found.inputs * 255).round().byte().flatten(1), torch.from_numpy(test[0]))
    assert found.targets.tolist() == test[1].tolist()
    assert found.names[3] == "cat"
    assert data.cifar10(tmp_path, "train").targets.tolist() == [*train[0][1], *train[1][1]]
    assert len(data.cifar10(tmp_path, "all").inputs) == 9


def test_a_pickle_that_is_a_program_is_refused(tmp_path: Path) -> None:
    for content in (Malicious(tmp_path / "owned"), {b"data": Malicious(tmp_path / "owned"), b"labels": []}):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"names posix\.system, which arrays do not need"):
            data.cifar10(tmp_path)
        assert not (tmp_path / "owned").exists()


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found none of test_batch"):
        data.cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(ValueError, match=r"test_batch.bin: expected rows of 3073 bytes"):
        data.cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + b"\0" * 3072)
    with pytest.raises(ValueError, match="expected labels 0 to 9"):
        data.cifar10(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "test_batch").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="test_batch is no batch of CIFAR-10's Python version"):
        data.cifar10(tmp_path)
    with pytest.raises(ValueError, match="data: expected digits, photographs, cifar10:PATH or imagefolder:PATH"):
        data.load("mnist")


def test_folders_of_pictures(tmp_path: Path) -> None:
    for name, colour in (("b", (255, 0, 0)), ("a", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10), colour).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    with pytest.warns(UserWarning, match="left out 1 that are no images by their suffix"):
        found = data.load(f"imagefolder:{tmp_path}", size=8)
    assert found.names == ("a", "b")
    assert found.targets.tolist() == [0, 1]
    assert found.inputs.shape == (2, 3, 8, 8)
    assert found.inputs[0, :, 0, 0].tolist() == [0, 0, 1]
    (tmp_path / "a" / "notes.txt").unlink()
    (tmp_path / "a" / "2.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"2.png cannot be read as an image"):
        data.imagefolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="found no images"):
        data.imagefolder(tmp_path / "nothing")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_on_cifar_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(1, 3):
        write_binary(tmp_path, f"data_batch_{i}", *cifar(4, i))
    write_binary(tmp_path, "test_batch", *cifar(3, 0))
    out = tmp_path / "out"
    line = ["evaluate", "--data", f"cifar10:{tmp_path}", "--model", "resnet20", "--limit", "1", "--methods",
            "gradient,group_superpixels", "--attack", "frozen", "--magnitudes", "3", "--budget", "224", "--tile", "4",
            "--attack-samples", "4", "--no-checks", "--out", str(out)]  # fmt: skip
    assert cli.main(line) == 2
    assert "resnet20 has no weights: give --weights FILE or --train EPOCHS" in capsys.readouterr().err
    assert cli.main([*line, "--train", "1"]) == 0
    names = {"claims.csv", "claims.md", "manifest.json", "parts", "report.html", "results.csv", "results.parquet",
             "robustness.png", "summary.json", "weights.pt"}  # fmt: skip
    assert {p.name for p in out.iterdir()} == names
    printed = capsys.readouterr().out
    assert "1 inputs, 2 methods, 1 attacks, 1 magnitudes" in printed
    assert "Group-Sparse, superpixels" in printed
    # The weights are those that were trained, and may be given by name.
    assert cli.main([*line, "--weights", str(out / "weights.pt")]) == 0


def test_the_command_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", "--data", "photographs", "--size", "32", "--limit", "1", "--block", "1", "--budget", "224",
            "--methods", "gradient,sparse", "--attack", "gaussian", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(line) == 0
    assert "1 inputs, 2 methods, 1 attacks" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["model"], manifest["plan"]["baseline"]) == ("efficientnet_lite0", "blur")
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    maps = {row["method"]: row for row in table if row["attack"] == "none" and row["id"] == 0}
    # Dense maps have no Jaccard index; a sparse map of noisy gradients changes with the seed.
    assert maps["gradient"]["seed_jaccard"] is None
    assert maps["gradient"]["seed_cosine"] == pytest.approx(1)
    assert 0 < maps["sparse"]["seed_jaccard"] < 1
    assert maps["sparse"]["max_sensitivity"] is None
    # Resumed, nothing is computed again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.npz")}
    assert cli.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.npz")}


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    line = [str(SCRIPT), "evaluate", "--limit", "4", "--methods", "gradient,smoothgrad", "--attack", "adaptive",
            "--magnitudes", "0.3,1", "--attack-samples", "64", "--out", str(tmp_path)]  # fmt: skip
    with start(line) as process:
        for _ in range(600):
            if list(tmp_path.rglob("*.npz")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()) == (130, ["moreau-ext: interrupted"])
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    assert kept
    assert not list(tmp_path.rglob("*.tmp"))
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--magnitudes", "0.3,-1"], "--magnitudes: expected positive numbers"),
        (["--rho", "0"], "--rho: expected a positive number"),
        (["--methods", "magic"], "--methods: expected some of gradient"),
        (["--attack", "magic"], "--attack: expected some of gaussian"),
        (["--data", "mnist"], "--data: expected digits, photographs, cifar10:PATH or imagefolder:PATH, got 'mnist'"),
        (["--model", "magic"], "--model: expected one of digits_cnn"),
        (["--model", "no.such:thing"], "--model: cannot import no.such (No module named 'no')"),
        (["--model", "math:pi"], "--model: math:pi: expected an nn.Module, got float"),
        (["--model", "resnet20", "--weights", "nothing.pt"], "--weights: nothing.pt is not there"),
    ],
)
def test_bad_use(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--limit", "1", "--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_unwritable_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for command in (["evaluate"], ["study", "tabular"]):
        assert cli.main([*command, "--out", str(tmp_path / "file")]) == 2
        assert "cannot write there" in capsys.readouterr().err


def test_a_pickle_as_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.pt"
    torch.save({"0.weight": Malicious(tmp_path / "owned")}, weights)
    line = ["evaluate", "--model", "resnet20", "--weights", str(weights), "--limit", "1", "--out", str(tmp_path / "o")]
    assert cli.main(line) == 2
    assert f"--weights: {weights} holds more than tensors, or is damaged, and is not loaded" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


# --- studies -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_studies_say_what_they_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = zoo.train
    # Nets that are trained for the study itself: two epochs will do here.
    for module in (zoo, zoo.training):
        monkeypatch.setattr(module, "train", lambda model, data, _, *more, **kw: train(model, data, 2, *more, **kw))
    assert cli.main(["study", name, "--limit", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{ending}" for ending in ("md", "csv", "png")}
    text = (tmp_path / f"{name}.md").read_text()
    assert text in printed
    findings = [line for line in text.splitlines() if line.startswith("- ")]
    assert findings
    with open(tmp_path / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) for r in rows if r["count"] != "0")


def test_an_input_convex_net_is_convex() -> None:
    torch.manual_seed(0)
    net = studies.InputConvex(5, 16, 3).double()
    a, b = torch.randn(200, 5, dtype=torch.float64), torch.randn(200, 5, dtype=torch.float64)
    t = torch.rand(200, 1, dtype=torch.float64)
    assert (net(t * a + (1 - t) * b) <= t * net(a) + (1 - t) * net(b) + 1e-12).all()


def test_occlusion_tries_the_pixels_of_the_mask_alone() -> None:
    calls: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], dim=1)

    x = torch.ones(2, 1, 2, 2)
    where = torch.zeros_like(x, dtype=torch.bool)
    where[0, 0, 0, 1] = where[1, 0, 1, 1] = where[1, 0, 0, 0] = True
    maps, passes = studies.occlusion(model, x, torch.tensor([0, 0]), where)
    assert ((maps > 0) == where).all()
    assert passes.tolist() == [2, 3]
    assert sum(map(len, calls)) == 2 + 3


def test_examples() -> None:
    for module in (runner, data, methods, studies):
        assert doctest.testmod(module).failed == 0
