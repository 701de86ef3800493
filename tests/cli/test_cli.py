"""The command line as people run it: what it prints and writes, and how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCRIPT, start
from matplotlib.image import imread

from moreau_ext import cli, zoo
from moreau_ext.cli import common, photographs
from moreau_ext.cli import demo as demo_module

pytestmark = pytest.mark.slow

METHODS = ["gradient", "smoothgrad", "moreau", "sparse", "group"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The caller's, but with a cache of our own, trained once for this file, and no wait policy."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**kept, "XDG_CACHE_HOME": cache, "MPLCONFIGDIR": cache}


@pytest.fixture(scope="session")
def run(environment: dict[str, str]):
    def command(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        line = [str(SCRIPT), *map(str, arguments)]
        return subprocess.run(line, env={**environment, **more}, capture_output=True, text=True, timeout=300)

    return command


def only_line(process: subprocess.CompletedProcess[str]) -> str:
    """The error, which must be one line and no traceback."""
    (line,) = process.stderr.splitlines()
    assert line.startswith("moreau-ext: error: ")
    return line


# --- demo ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    process = run("demo", "--data", "digits", "--limit", 12, "--out", out)
    assert process.returncode == 0, process.stderr
    # matplotlib may say there that it builds its font cache.
    assert "moreau-ext:" not in process.stderr
    return out, process.stdout


def test_demo_writes_its_files_and_nothing_else(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert sorted(p.name for p in out.iterdir()) == ["digits.png", "summary.json"]
    assert f"wrote digits.png and summary.json to {out}" in printed
    picture = imread(out / "digits.png")
    assert picture.shape[0] > picture.shape[1] > 1000
    # Red and blue are both there.
    red, blue = picture[..., 0], picture[..., 2]
    assert np.mean(red - blue > 0.3) > 0.01
    assert np.mean(blue - red > 0.3) > 0.01


def test_demo_summary(demo: tuple[Path, str]) -> None:
    summary = json.loads((demo[0] / "summary.json").read_text())
    settings = summary["settings"]
    assert settings["inputs"] == 12
    assert settings["schedule"] == "default"
    assert settings["solver"]["name"] == "AdaptiveProximalGradient"
    assert settings["solver"]["tol"] == 0.02
    assert settings["seed"] == 0
    assert summary["test_accuracy"] > 0.97
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["threads"] >= 1

    methods = summary["methods"]
    assert list(methods) == METHODS
    for name, result in methods.items():
        assert 0 < result["gini_mean"] < 1
        assert result["seconds"] > 0
        assert result["images_per_second"] == pytest.approx(12 / result["seconds"])
        solved = name in ("moreau", "sparse", "group")
        assert (result["converged_share"] is not None) == solved
        if solved:
            assert 0 < result["relative_residual_median"] <= result["relative_residual_p90"] < 0.03
            assert result["converged_share"] > 0.8
            assert 100 < result["gradient_evaluations_per_input"] <= 2048
    # What the three are for: only the penalties make zeros.
    assert methods["gradient"]["gradient_evaluations_per_input"] == 1
    assert methods["smoothgrad"]["gradient_evaluations_per_input"] == 480
    assert methods["moreau"]["nonzero_fraction_mean"] == 1
    assert methods["sparse"]["nonzero_fraction_mean"] < 0.6
    assert methods["group"]["nonzero_fraction_mean"] < 0.6
    assert methods["sparse"]["gini_mean"] > methods["moreau"]["gini_mean"] + 0.1


def test_demo_prints_the_table(demo: tuple[Path, str]) -> None:
    lines = demo[1].splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("method"))
    assert [line.split()[0] for line in lines[head + 1 : head + 6]] == METHODS


def test_demo_repeats_and_maps_do_not_depend_on_the_limit(run, tmp_path: Path) -> None:
    # The picture shows ten digits, so explaining ten or twelve gives the same one. Not on a prepared copy: what is
    # fastest there is measured, and another choice rounds differently.
    pictures = []
    for limit in (10, 12):
        line = ("demo", "--data", "digits", "--prepare", "none", "--limit", limit, "--out", tmp_path / str(limit))
        assert run(*line).returncode == 0
        pictures.append(imread(tmp_path / str(limit) / "digits.png"))
    assert pictures[0].shape == pictures[1].shape
    np.testing.assert_allclose(pictures[0], pictures[1], atol=0.002)


def test_demo_writes_over_old_results(run, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    (tmp_path / "other").write_text("mine")
    assert run("demo", "--data", "digits", "--limit", 1, "--out", tmp_path).returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text())["settings"]["inputs"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.png", "other", "summary.json"]


def test_the_published_schedule(run, tmp_path: Path) -> None:
    assert run("demo", "--data", "digits", "--limit", 1, "--paper", "--out", tmp_path).returncode == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["schedule"] == "paper"
    solver = summary["settings"]["solver"]
    assert (solver["max_steps"], solver["num_samples"], solver["average_last"]) == (300, 32, 101)
    assert not solver["antithetic"]
    assert summary["methods"]["moreau"]["gradient_evaluations_per_input"] == 9600


def test_an_unwritable_out_is_refused_before_any_work(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    process = run("demo", "--out", tmp_path / "file", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert process.returncode == 2
    assert f"--out {tmp_path / 'file'}: cannot write there" in only_line(process)
    assert process.stdout == ""
    assert not (tmp_path / "cache").exists()


def test_ctrl_c_ends_with_130_and_leaves_no_partial_file(environment: dict[str, str], tmp_path: Path) -> None:
    with start([SCRIPT, "demo", "--out", tmp_path], env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("digits_cnn is right for 9")
        # Well into the explanations, which take many seconds.
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == ["moreau-ext: interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs of 32 pixels, and few gradients."""
    small = zoo.photographs(32)
    monkeypatch.setattr(zoo, "photographs", lambda: small)
    monkeypatch.setattr(photographs, "_GRADIENTS", 336)
    monkeypatch.setattr(photographs, "_TILE", 4)
    monkeypatch.setattr(photographs, "_TILES", 12)


def test_demo_of_photographs(quick_photographs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["demo", "--data", "photographs", "--limit", "1", "--prepare", "none", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photographs.png", "summary.json"]
    assert "wrote photographs.png and summary.json" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["photographs"]
    assert "methods" not in summary
    assert list(found["methods"]) == METHODS
    assert found["settings"]["inputs"] == 1
    assert found["methods"]["sparse"]["nonzero_fraction_mean"] == pytest.approx(0.02, abs=0.001)
    assert found["methods"]["group"]["nonzero_fraction_mean"] == pytest.approx(12 / 64)
    # One photograph: two rows of six columns.
    picture = imread(tmp_path / "photographs.png")
    assert 0.4 < picture.shape[0] / picture.shape[1] < 0.7


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "skimage"])
def test_demo_without_the_packages_of_photographs(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "--data", "photographs", "--out", str(tmp_path)]) == 2
    words = f'the demo of photographs needs {missing}: pip install "moreau_ext[imagenet]"'
    assert capsys.readouterr().err.splitlines() == [f"moreau-ext: error: {words}"]
    # The digits are explained all the same, and one line says why there is no more.
    monkeypatch.setattr(demo_module, "_digits", lambda *_: {"methods": {}})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f'no photographs: {missing} missing; pip install "moreau_ext[imagenet]"'
    assert printed[1] == f"wrote digits.png and summary.json to {tmp_path}"


# --- bad use and failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["explicate"], "'explicate'"),
        (["demo", "--limit", "-3"], "--limit: expected a positive integer, got '-3'"),
        (["demo", "--limit", "0"], "--limit: expected a positive integer, got '0'"),
        (["demo", "--limit", "many"], "--limit: expected a positive integer, got 'many'"),
        (["demo", "--device", "tpu"], "--device"),
        (["demo", "--speed", "9"], "--speed"),
        (["info", "more"], "more"),
    ],
)
def test_bad_use(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("moreau-ext: error: ")
    assert words in line


def test_bad_use_of_the_script(run) -> None:
    process = run("demo", "--limit", "-3")
    assert process.returncode == 2
    assert "--limit" in only_line(process)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_at_once(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["demo"]) == 2
    assert 'the demo needs matplotlib and tqdm: pip install "moreau_ext[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 1, "moreau-ext: error: two lines"),
        (OSError(28, "No space left on device", "x"), 1, "moreau-ext: error: [Errno 28] No space left on device: 'x'"),
        (KeyError("weight"), 1, "moreau-ext: error: KeyError: 'weight'"),
        (KeyboardInterrupt(), 130, "moreau-ext: interrupted"),
    ],
)
def test_failures_end_in_one_line(error, status, line, monkeypatch, tmp_path, capsys) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(zoo, "trained", fail)
    assert cli.main(["demo", "--out", str(tmp_path)]) == status
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def half(file) -> None:
        file.write(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_warnings_are_one_line_too(run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = run(
        "demo", "--data", "digits", "--limit", 1, "--out", tmp_path / "out", XDG_CACHE_HOME=str(tmp_path / "file")
    )
    assert process.returncode == 0
    (line,) = [line for line in process.stderr.splitlines() if "moreau" in line]
    assert line.startswith("moreau-ext: warning: digits_cnn is trained anew each time: cannot write ")


# --- info, and before torch ----------------------------------------------------------------------------------------


def facts(process: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert process.returncode == 0, process.stderr
    return dict(line.split("  ", 1) for line in process.stdout.splitlines())


def test_info(run, environment: dict[str, str]) -> None:
    told = {name.strip(): value.strip() for name, value in facts(run("info")).items()}
    assert told["moreau_ext"] == importlib.metadata.version("moreau_ext")
    assert told["torch"].startswith(torch.__version__)
    assert told["numpy"] == np.__version__
    assert told["CPU kernels"].startswith("built with ")
    assert told["runs on cpu"] == "compiled kernels"
    assert told["CUDA kernels"] == "not built" or told["CUDA kernels"].startswith("built with nvcc ")
    assert told["OMP_WAIT_POLICY"] == "PASSIVE"
    assert told["threads"].endswith(f"of {os.cpu_count()} cores")
    assert told["cache"] == f"{environment['XDG_CACHE_HOME']}/moreau_ext"


def test_a_wait_policy_that_is_set_stays(run) -> None:
    assert "OMP_WAIT_POLICY  ACTIVE" in run("info", OMP_WAIT_POLICY="ACTIVE").stdout


def test_importing_the_command_line_loads_no_torch() -> None:
    code = "import sys, moreau_ext.cli; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_help_and_the_module_form(environment: dict[str, str]) -> None:
    for module in ("moreau_ext", "moreau_ext.cli"):
        line = [sys.executable, "-m", module, "demo", "--help"]
        process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert process.stdout.startswith("usage: moreau-ext demo")
        assert "published schedule" in process.stdout
