"""The rules of the command line, as a table of wrong lines: each with its exit status and the words of its message."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SCRIPT
from PIL import Image
from torch import nn

from moreau_ext import cli, zoo
from moreau_ext.batch import read

NETS = """
import torch
from torch import nn
from moreau_ext.zoo import digits_cnn

def factory_fails():
    raise KeyError("layer9")

class Forward(nn.Module):
    def forward(self, x):
        return x.nothing()

class Late(nn.Module):  # fails on some inputs
    def __init__(self):
        super().__init__()
        self.net = digits_cnn()
    def forward(self, x):
        if bool((x[:, :, 0, 0] > 0.9).any()):
            raise RuntimeError("a corner is lit")
        return self.net(x)

def needs_arguments(width):
    return nn.Linear(width, 2)

number = 3
"""
DIGITS = ["--model", "moreau_ext.zoo:digits_cnn"]
GRAY = ["--preprocess", "gray.toml"]
FAST = ["--method", "gradient", "--prepare", "none"]
NET = [*DIGITS, *GRAY, *FAST]
OUT = ["--out", "o"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A researcher's folder."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "img").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 200, (8, 8), np.uint8)
        pixels[0, 0] = 255 if i == 11 else 0
        Image.fromarray(pixels).save(folder / "img" / f"{i:02}.png")
    Image.new("L", (32, 32)).save(folder / "large.png")
    (folder / "gray.toml").write_text('mode = "L"\n')
    (folder / "odd.toml").write_text('mode = "L"\nrezise = 8\n')
    (folder / "broken.toml").write_text('mode = "L\n')
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "PerceiverImageProcessor"}')
    (folder / "nets_here.py").write_text(NETS)
    (folder / "broken_net.py").write_text("x = (\n")
    (folder / "fails_net.py").write_text("1 / 0\n")
    net = zoo.digits_cnn()
    torch.save(net.state_dict(), folder / "w.pt")
    torch.save(net, folder / "whole.pt")
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, folder / "parallel.pt")
    torch.save({"state_dict": {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}}, folder / "compiled.pt")
    torch.save({"x": torch.zeros(1)}, folder / "other.pt")
    (folder / "w.safetensors").write_bytes(b"junk")
    (folder / "net.pt2").write_bytes(b"junk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fixed = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        torch.export.save(torch.export.export(fixed, (torch.rand(3, 1, 8, 8),)), folder / "fixed.pt2")
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "vit").mkdir()
    (folder / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    np.save(folder / "x.npy", np.zeros((3, 1, 8, 8), np.float32))
    np.save(folder / "tokens.npy", np.zeros((3, 8), np.int64))
    np.savez(folder / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    (folder / "bad.npy").write_bytes(b"junk")
    pq.write_table(pa.table({"name": ["a"], "age": [1.0]}), folder / "t.parquet")
    for name in ("empty", "junk", "full"):
        (folder / name).mkdir()
    (folder / "junk" / "a.png").write_bytes(b"junk")
    (folder / "full" / "thesis.tex").touch()
    return folder


TABLE: list[tuple[list[str], int, str]] = [
    # what is asked for
    (["explain"], 2, r"SOURCE, --model, --out \(moreau-ext explain --help shows"),
    (["explain", "img", *OUT], 2, "--model"),
    (["explain", "img", *NET], 2, "--out"),
    (["explian", "img"], 2, r"'explian'.*\(moreau-ext --help"),
    (["explain", "img", *NET, *OUT, "--mehtod", "sparse"], 2, r"--mehtod sparse \(moreau-ext explain --help shows"),
    (["explain", "img", *NET, *OUT, "--method", "lime"], 2, "--method: .*'lime'"),
    (["show"], 2, r"OUT \(moreau-ext show --help shows"),
    ([], 2, r"COMMAND \(moreau-ext --help shows"),
    (["info", "extra"], 2, r"unrecognized arguments: extra \(moreau-ext info --help shows"),
    # numbers
    (["explain", "img", *NET, *OUT, "--rho", "fast"], 2, "--rho: expected a number of at least 0, or auto, got 'fast'"),
    (["explain", "img", *NET, *OUT, "--eta", "much"], 2, "--eta: expected a number of at least 0, got 'much'"),
    (["explain", "img", *NET, *OUT, "--sigma", "nan"], 2, "--sigma: expected a number of at least 0, got 'nan'"),
    (["explain", "img", *NET, *OUT, "--noise-level", "-1"], 2, "--noise-level: expected a number"),
    (["explain", "img", *NET, *OUT, "--support", "1.5"], 2, "--support: expected a number of features, such as 20"),
    (["explain", "img", *NET, *OUT, "--support", "few"], 2, "--support: expected a number of features"),
    (["explain", "img", *NET, *OUT, "--batch", "0"], 2, "--batch: expected a positive integer, got '0'"),
    (["explain", "img", *NET, *OUT, "--steps", "1e3"], 2, "--steps: expected a positive integer, got '1e3'"),
    (["explain", "img", *NET, *OUT, "--seed", "x"], 2, "--seed: expected an integer, got 'x'"),
    (["explain", "img", *NET, *OUT, "--workers", "-1"], 2, "--workers: expected 0 or more"),
    (["explain", "img", *NET, *OUT, "--shard-rows", "3"], 2, "--shard-rows: expected a multiple of batch, 32"),
    (["explain", "img", *DIGITS, *OUT, "--max-gradients", "10"], 2, "--max-gradients: expected at least 224"),
    (["explain", "img", *DIGITS, *OUT, "--eta", "1", "--max-gradients", "10"], 2, "at least 192, which the first"),
    (["explain", "img", *DIGITS, *OUT, "--radius", "1", "--max-gradients", "300"], 2, "at least 368, which the first"),
    # settings that do not go together
    (["explain", "img", *NET, *OUT, "--rho", "1"], 2, "--rho: gradient has none; it is a setting of moreau"),
    (["explain", "img", *NET, *OUT, "--tile", "2"], 2, "--tile: gradient has none; it is a setting of group"),
    (["explain", "img", *DIGITS, *OUT, "--rho", "1", "--radius", "1"], 2, "--radius: not allowed with argument --rho"),
    (["explain", "img", *DIGITS, *OUT, "--steps", "9", "--rho", "auto"], 2, "--rho: steps and samples ask for fixed"),
    (["explain", "img", *DIGITS, *OUT, "--steps", "9", "--max-gradients", "999"], 2, "--max-gradients: steps and"),
    (["explain", "img", *NET, *OUT, "--device", "cuda:99"], 2, "--device: torch finds no such CUDA device"),
    (["explain", "img", *NET, *OUT, "--device", "tpu"], 2, "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    # the source
    (["explain", "nowhere", *NET, *OUT], 2, "SOURCE: nowhere is not there"),
    (["explain", "img/*.jpg", *NET, *OUT], 2, r"SOURCE: img/\*.jpg matches no file"),
    (["explain", "empty", *NET, *OUT], 2, "SOURCE: no image files in empty"),
    (["explain", "full", *NET, *OUT], 2, r"no image files in full \(1 left out: suffix .tex\)"),
    (["explain", "img", "x.npy", *NET, *OUT], 2, "SOURCE: expected one kind, got array and image files"),
    (["explain", "bad.npy", *NET, *OUT], 2, "SOURCE: bad.npy cannot be read"),
    (["explain", "two.npz", *NET, *OUT], 2, "--column: .*found a, b of a, b; name it"),
    (["explain", "two.npz", *NET, *OUT, "--column", "c"], 2, "--column: there is no 'c'"),
    (["explain", "t.parquet", *NET, *OUT], 2, r"--column: .*name \(.*string\); leave these out"),
    (["explain", "img", *NET, *OUT, "--column", "c"], 2, "--column: image files have none"),
    (["explain", "img", *NET, *OUT, "--target", "label"], 2, "--target: image files have only the column 'class'"),
    (["explain", "img", *NET, *OUT, "--target", "class"], 2, "--target: 'class' is the folder of a file"),
    (["explain", "img", *NET, *OUT, "--target", "-1"], 2, "--target: expected a class of the model, 0 to 9, got -1"),
    (["explain", "img", *NET, *OUT, "--target", "10"], 2, "--target: expected a class of the model, 0 to 9, got 10"),
    (["explain", "tokens.npy", *NET, *OUT], 1, "tokens.npy:0 holds int64, whose scale is not known"),
    (["explain", "junk", *NET, *OUT], 1, "none of the inputs can be read; a.png UnidentifiedImageError"),
    # the model
    (["explain", "img", *FAST, *OUT, "--model", "resnet18"], 2, "--model: expected package.module:factory"),
    (["explain", "img", *FAST, *OUT, "--model", "no_such:net"], 2, "--model: cannot import no_such"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here.py:x"], 2, "--model: .*a module is named without .py"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here:gone"], 2, "--model: nets_here has no gone"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here:number"], 2, "--model: .*expected an nn.Module, got int"),
    (["explain", "img", *FAST, *OUT, "--model", "broken_net:x"], 2, "--model: broken_net fails when it is imported: S"),
    (["explain", "img", *FAST, *OUT, "--model", "fails_net:x"], 2, "fails_net.py, line 1"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here:factory_fails"], 2, "KeyError: 'layer9'.*nets_here.py, lin"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here:Forward"], 2, "no attribute 'nothing'.*nets_here.py, line"),
    (["explain", "img", *FAST, *OUT, "--model", "nets_here:needs_arguments"], 2, "missing 1 required"),
    (["explain", "img", *FAST, *OUT, "--model", "w.pt"], 2, "--model: w.pt holds weights and no model. Name a factory"),
    (["explain", "img", *FAST, *OUT, "--model", "gone.pth"], 2, "--model: gone.pth holds weights"),
    (["explain", "img", *FAST, *OUT, "--model", "net.pt2"], 2, "--model: net.pt2 is no exported program"),
    (["explain", "img", *GRAY, *FAST, *OUT, "--model", "fixed.pt2"], 2, "--model: .*exported for fixed sizes.*dynamic"),
    (["explain", "img", *FAST, *OUT, "--model", "hf:text"], 2, "--model: hf:text is a bert, which is no image classif"),
    (["explain", "img", *FAST, *OUT, "--model", "hf:vit"], 2, "--model: hf:vit cannot be loaded from its safetensors"),
    (["explain", "img", *FAST, *OUT, "--model", "hf:gone"], 2, "--model: hf:gone holds no config.json"),
    (["explain", "img", *NET, *OUT, "--weights", "gone.pt"], 2, "--weights: gone.pt is not there"),
    (["explain", "img", *NET, *OUT, "--weights", "whole.pt"], 2, "--weights: whole.pt holds more than tensors"),
    (["explain", "img", *NET, *OUT, "--weights", "w.safetensors"], 2, "--weights: w.safetensors is damaged"),
    (["explain", "img", *NET, *OUT, "--weights", "other.pt"], 2, "--weights: other.pt: the weights do not fit"),
    (["explain", "img", *NET, *OUT, "--weights", "parallel.pt"], 2, r"names begin with 'module.' \(DataParallel\); sa"),
    (["explain", "img", *NET, *OUT, "--weights", "compiled.pt"], 2, "names begin with '_orig_mod.'"),
    # its inputs
    (["explain", "img", *DIGITS, *FAST, *OUT], 2, '--preprocess: .*It takes gray images: set mode = "L"'),
    (["explain", "large.png", *NET, *OUT, "--model", "moreau_ext.zoo:tabular_mlp"], 2, "--preprocess: .*resize and cr"),
    (["explain", "img", *DIGITS, *FAST, *OUT, "--preprocess", "gone.toml"], 2, "--preprocess: gone.toml is not there"),
    (["explain", "img", *DIGITS, *FAST, *OUT, "--preprocess", "odd.toml"], 2, "--preprocess: odd.toml: unknown rezise"),
    (["explain", "img", *DIGITS, *FAST, *OUT, "--preprocess", "broken.toml"], 2, "--preprocess: broken.toml is not TO"),
    (["explain", "img", *DIGITS, *FAST, *OUT, "--preprocess", "preprocessor_config.json"], 2, "--preprocess: .*Percei"),
    (["explain", "img", *GRAY, *FAST, *OUT, "--batch", "4", "--model", "nets_here:Late"], 1, "11.png: RuntimeError: a"),
    # the output
    (["explain", "img", *NET, "--out", "gray.toml"], 2, "--out gray.toml: File exists"),
    (["explain", "img", *NET, "--out", "gray.toml/deep"], 2, "--out gray.toml/deep: Not a directory"),
    (["explain", "img", *NET, "--out", "full"], 2, "--out: full holds thesis.tex, which is none of ours"),
    (["show", "nowhere"], 2, "OUT: nowhere holds no manifest.json"),
    (["show", "img", "--id", "x"], 2, "--id: expected an integer, got 'x'"),
    (["show", "img", "--limit", "0"], 2, "--limit: expected a positive integer"),
    (["show", "img", "--to", "maps"], 2, "--to maps: expected a suffix of png, pdf.*got none"),
    (["show", "img", "--rows", "best"], 2, "--rows: invalid choice: 'best'"),
    # the other commands
    (["demo", "--data", "cats"], 2, "--data: invalid choice: 'cats'"),
    (["demo", "--out", "gray.toml"], 2, "--out gray.toml: cannot write there"),
    (["demo", "--out", "empty/a/b", "--device", "cuda"], 2, "--device cuda: torch finds no CUDA device"),
    (["evaluate", "--data", "cifar100"], 2, "--data: expected digits, photographs, cifar10:PATH or imagefolder:PATH"),
    (["evaluate", "--data", "imagefolder:img", "--model", "resnet20"], 2, "--data: img: found no images in folders"),
    (["evaluate", "--data", "imagefolder:img", "--out", "empty/a"], 2, "--data: img: found no images"),
    (["evaluate", "--model", "lenet"], 2, "--model: expected one of digits_cnn"),
    (["evaluate", "--model", "no_such:net"], 2, "--model: cannot import no_such"),
    (["evaluate", "--model", "resnet20"], 2, "--model resnet20 has no weights: give --weights FILE or --train EPOCHS"),
    (["evaluate", "--model", "resnet20", "--weights", "gone.pt"], 2, "--weights: gone.pt is not there"),
    (["evaluate", "--weights", "w.pt"], 2, "--weights: digits_cnn has weights of its own"),
    (["evaluate", "--train", "3"], 2, "--train: digits_cnn has weights of its own"),
    (["evaluate", "--size", "64"], 2, "--size: the inputs of digits have one size"),
    (["evaluate", "--methods", "lime"], 2, "--methods: expected some of gradient, smoothgrad.*got 'lime'"),
    (["evaluate", "--methods", ","], 2, "--methods: expected names with commas between, got ','"),
    (["evaluate", "--attack", "pgd"], 2, "--attack: expected some of gaussian.*got 'pgd'"),
    (["evaluate", "--magnitudes", "0"], 2, "--magnitudes: expected positive numbers with commas between, got '0'"),
    (["evaluate", "--rho", "1,2"], 2, "--rho: expected a positive number, got '1,2'"),
    (["evaluate", "--seed", str(2**63)], 2, "--seed: expected an integer of 64 bits"),
    (["study", "everything"], 2, "NAME: invalid choice: 'everything'"),
    (["study", "tabular", "--out", "gray.toml"], 2, "--out gray.toml: cannot write there"),
]  # fmt: skip

# Unusual lines that are right, with a part of what they print on stdout.
RIGHT: list[tuple[list[str], str]] = [
    (["--debug", "info"], "CPU kernels"),
    (["explain", "img/00.png", "img/00.png", *NET, *OUT], "1 inputs: 1 explained now"),
    (["explain", "img/0[01].png", *NET, "--out", "o/deep/"], "2 inputs: 2 explained now"),
    (["explain", "x.npy", *NET, *OUT, "--target", "9", "--batch", "2", "--shard-rows", "2"], "3 inputs: 3 explained"),
    (["explain", "x.npy", *DIGITS, *FAST[2:], *OUT, "--steps", "90", "--samples", "2", "--tol", "9"], "100% converged"),
]


@pytest.mark.parametrize(("line", "status", "words"), TABLE, ids=[" ".join(line)[:70] for line, _, _ in TABLE])
def test_a_wrong_line(
    line: list[str], status: int, words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.iterdir())
    assert cli.main(line) == status
    printed = capsys.readouterr()
    errors = [text for text in printed.err.splitlines() if text.startswith("moreau-ext: error: ")]
    assert len(errors) == 1, printed.err
    assert re.search(words, errors[0]), errors[0]
    assert "Traceback" not in printed.err
    assert not re.search(r"\b_[a-z]", errors[0].replace("_orig_mod", "")), "a private name"
    if status == 2:
        assert printed.out == ""
        assert sorted(p.name for p in place.iterdir() if p.name != "__pycache__") == [n for n in before if n[0] != "_"]
    else:
        for path in (place / "o").iterdir():
            path.unlink()
        (place / "o").rmdir()


@pytest.mark.parametrize(("line", "words"), RIGHT, ids=[" ".join(line)[:70] for line, _ in RIGHT])
def test_an_unusual_line(line: list[str], words: str, place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 0
    printed = capsys.readouterr()
    assert words in printed.out
    assert "error" not in printed.err


def test_tolerance_ends_fixed_steps(place: Path, tmp_path: Path, monkeypatch) -> None:
    """--tol TOL: an input is done when its residual is at most TOL, before the last step."""
    monkeypatch.chdir(place)
    line = ["explain", "x.npy", *DIGITS, "--prepare", "none", "--steps", "30", "--samples", "2", "--rho", "0.1"]
    for tol, steps in (("9", 10), ("0", 30)):
        assert cli.main([*line, "--tol", tol, "--out", str(tmp_path / tol)]) == 0
        assert read(tmp_path / tol)["steps"].to_pylist() == [steps] * 3


def test_table_is_long() -> None:
    assert len(TABLE) + len(RIGHT) >= 100


def test_failed_inputs_are_status_1_with_the_first_reasons(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_bytes(b"junk")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    line = ["explain", str(tmp_path), *NET, "--out", str(tmp_path / "o")]
    assert cli.main(line) == 1
    printed = capsys.readouterr()
    assert "7 inputs: 1 explained now, 0 before, 6 with an error (see" in printed.out
    errors = [text for text in printed.err.splitlines() if ": error: " in text]
    assert [e.split("error: ")[1].split(":")[0] for e in errors] == ["a.png", "b.png", "c.png", "and 3 more"]
    assert cli.main(line) == 1  # nothing left to do, but the errors are there


@pytest.mark.filterwarnings("default:target class")
def test_folders_that_are_no_classes_are_warned_of(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    for name in "ab":
        shutil.copytree("img", tmp_path / "in" / name)
    assert cli.main(["explain", str(tmp_path / "in"), *NET, "--target", "class", "--out", str(tmp_path / "o")]) == 0
    assert "warning: target class: the model has 10 classes, and there are 2 folders" in capsys.readouterr().err


def test_debug_adds_the_traceback(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    for command in (["explain", "img", *FAST, *OUT, "--model", "nets_here:factory_fails"], ["show", "nowhere"]):
        assert cli.main([*command, "--debug"]) == 2
        said = capsys.readouterr().err
        assert "Traceback (most recent call last)" in said
        assert said.splitlines()[-1].startswith("moreau-ext: error: ")


def test_something_is_said_while_a_model_is_loaded(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["explain", "x.npy", *DIGITS, *FAST, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "moreau-ext: loading moreau_ext.zoo:digits_cnn\nmoreau-ext: 3 inputs; preparing the model" in said
    assert "converged" not in said


def test_left_out_files_are_counted(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "x.png")
    (tmp_path / "in" / "x.txt").touch()
    assert cli.main(["explain", str(tmp_path / "in"), *NET, "--out", str(tmp_path / "o")]) == 0
    assert "1 left out: suffix .txt" in capsys.readouterr().out


def test_workers_are_capped(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["explain", "x.npy", *DIGITS, *FAST, "--workers", "9999", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("command", ["demo", "explain", "show", "evaluate", "study", "info"])
def test_help_explains_every_option(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"usage: moreau-ext {command}" in text
    if command in ("explain", "show"):
        parser = cli._Commands()._commands.choices[command]
        for action in parser._actions:
            words = (action.help or "").split(". default: ")[0]
            assert len(words.split()) >= 2 or action.option_strings == ["--to"], action.option_strings


@pytest.mark.slow
def test_the_users_own_file_and_line_as_a_process(place: Path) -> None:
    line = [str(SCRIPT), "explain", "img", *FAST, *OUT, "--model", "nets_here:Forward"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"nets_here.py, line 11\)$", done.stderr.strip())
    done = subprocess.run(
        [sys.executable, "-m", "moreau_ext.cli", *line[1:]], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 2
