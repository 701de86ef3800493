"""``moreau-ext explain`` and ``moreau-ext show`` as people run them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import SCRIPT, start
from matplotlib.image import imread
from PIL import Image

from moreau_ext import cli, zoo
from moreau_ext.batch import path_id, read

pytestmark = pytest.mark.slow

NET = ["--model", "moreau_ext.zoo:digits_cnn", "--preprocess", "gray.toml", "--samples", "2", "--steps", "3"]


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = zoo.digits()
    for i in range(12):
        path = tmp_path / "digits" / str(int(data.targets[i]) % 3) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.inputs[i, 0] * 255).round().numpy().astype(np.uint8)).save(path)
    (tmp_path / "gray.toml").write_text('mode = "L"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("default:target class")  # three folders for ten classes
def test_a_folder_in_a_data_set_out(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (digits / "digits" / "0" / "bad.png").write_bytes(b"no image")
    given = ["explain", "digits", *NET, "--target", "class", "--out", "maps"]
    assert cli.main(given) == 1
    printed = capsys.readouterr()
    assert "13 inputs: 12 explained now, 0 before, 1 with an error (see maps/errors.parquet)" in printed.out
    assert "moreau-ext: error: 0/bad.png: UnidentifiedImageError: is no image of a known format" in printed.err
    assert "images/s" in printed.out
    assert "image/s" in printed.err
    table = read("maps")
    assert set(table["target"].to_pylist()) == {0, 1, 2, None} or set(table["target"].to_pylist()) == {0, 1, 2}
    assert cli.main(given) == 1
    assert "0 explained now, 13 before" in capsys.readouterr().out
    assert cli.main([*given, "--precision", "bfloat16"]) == 2
    assert 'precision was "float32" and is "bfloat16"' in capsys.readouterr().err
    assert cli.main([*given, "--seed", "4"]) == 2
    assert "belongs to another configuration: seed was 0 and is 4" in capsys.readouterr().err

    assert cli.main(["show", "maps", "--source", "digits", "--id", str(path_id("0/00.png")), "--to", "one.png"]) == 0
    assert "wrote one.png: 0/00.png" in capsys.readouterr().out
    assert imread("one.png").shape[1] > 500
    assert cli.main(["show", "maps"]) == 0
    for number, words in ((7, "has no such row"), (path_id("0/bad.png"), "has no map: UnidentifiedImageError")):
        assert cli.main(["show", "maps", "--id", str(number)]) == 2
        assert "error: --id: " in (said := capsys.readouterr().err)
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["digits", "--out", "o"], 2, "--model"),
        (["digits", *NET], 2, "--out"),
        (["nowhere", *NET, "--out", "o"], 2, "SOURCE: nowhere is not there"),
        (["digits", *NET, "--out", "o", "--method", "gradient"], 2, "--steps: gradient has none"),
        (["digits", *NET, "--out", "o", "--rho", "-1"], 2, "--rho: expected a number of at least 0"),
        (["digits", *NET, "--out", "o", "--shard-rows", "3"], 2, "--shard-rows: expected a multiple of batch, 32"),
        (["digits", *NET, "--out", "o", "--target", "label"], 2, "--target: image files have only the column 'class'"),
        (["digits", *NET, "--out", "o", "--model", "a.b"], 2, "--model: expected package.module:factory"),
        (["digits", *NET, "--out", "o", "--weights", "gone.pt"], 2, "--weights: gone.pt is not there"),
        (["digits", *NET, "--out", "gray.toml"], 2, "--out gray.toml: File exists"),
        (["digits", *NET, "--out", "digits"], 2, "--out: digits holds 0, which is none of ours"),
        (["digits", *NET, "--out", "o", "--device", "cuda:99"], 2, "--device: torch finds no such CUDA device"),
        (["digits", *NET[:2], "--out", "o", "--samples", "2"], 2, "--preprocess: the model fails on the first inputs"),
    ],
)
def test_bad_use(
    arguments: list[str], status: int, words: str, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", *arguments]) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moreau-ext: error")]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("given", "column", "value"),
    [(["--support", "5"], "support", 5), (["--support", "0.25", "--radius", "0.5"], "support", 16)],
)
def test_the_sparsity_that_was_asked_for(given: list[str], column: str, value: int, digits: Path) -> None:
    assert cli.main(["explain", "digits", *NET[:4], *given, "--prepare", "none", "--out", "maps"]) == 0
    found = read("maps").to_pydict()
    assert found[column] == [value] * 12
    assert found["nnz"] == [value] * 12
    assert all(rho > 0 for rho in found["rho"])


def test_a_read_only_output(digits: Path) -> None:
    """Root may write anywhere, so a file system says no: /proc/self is read-only to all."""
    done = subprocess.run(
        [str(SCRIPT), "explain", "digits", *NET, "--out", "/proc/self/maps-of-mine"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("moreau-ext: error: --out /proc/self/maps-of-mine: ")


def test_ctrl_c_finishes_the_shard_and_exits_130(digits: Path) -> None:
    given = ["--batch", "1", "--shard-rows", "1", "--prepare", "none", "--out", "maps"]
    model = ["--model", "moreau_ext.zoo:digits_cnn", "--preprocess", "gray.toml", "--steps", "400", "--samples", "8"]
    with start([SCRIPT, "explain", "digits", *model, *given], cwd=digits) as process:
        for _ in range(600):
            if list((digits / "maps").glob("shard-*")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finishing the shard" in said
    assert said.splitlines()[-1] == "moreau-ext: interrupted"
    count = read(digits / "maps").num_rows
    assert 1 <= count < 12
    assert not list((digits / "maps").glob(".*"))


def test_missing_packages_are_named(digits: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert cli.main(["explain", "digits", *NET, "--out", "o"]) == 2
    assert 'explain needs pyarrow: pip install "moreau_ext[batch]"' in capsys.readouterr().err


def test_a_model_beside_the_command(digits: Path) -> None:
    (digits / "my_model.py").write_text("from moreau_ext.zoo import digits_cnn as net\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    given = ["--model", "my_model:net", "--preprocess", "gray.toml", "--method", "gradient", "--out", "maps"]
    line = [str(SCRIPT), "explain", "digits", *given]
    done = subprocess.run(line, env=environment, cwd=digits, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read(digits / "maps").num_rows == 12
