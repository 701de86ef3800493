"""The image reader, the manifest and the progress bar that batch jobs and evaluations share."""

from __future__ import annotations

import doctest
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moreau_ext import _errors
from moreau_ext._errors import SettingError, SettingFileNotFoundError, one_line
from moreau_ext.batch import open_source
from moreau_ext.data.images import read_image
from moreau_ext.data.manifest import Differs, check_same, differences, read_manifest, write_manifest
from moreau_ext.data.progress import progress_bar
from moreau_ext.evaluation import data

ORIENTATION = 0x0112  # the EXIF tag


# --- images --------------------------------------------------------------------------------------------------------


def photograph(path: Path, orientation: int) -> np.ndarray:
    """Writes a photograph with an orientation, and returns its stored pixels, [H, W, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda a: a), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90), (2, np.fliplr)],
)
def test_a_photograph_is_upright_in_batches_and_in_evaluations(orientation: int, upright, tmp_path: Path) -> None:
    pixels = photograph(tmp_path / "class" / "x.png", orientation)
    expected = torch.from_numpy(upright(pixels).astype(np.float32) / 255).permute(2, 0, 1)
    in_batches = open_source(tmp_path).load(0, 1).inputs
    in_evaluations = data.load(f"imagefolder:{tmp_path}", size=16).inputs
    torch.testing.assert_close(in_batches[0], expected)
    torch.testing.assert_close(in_evaluations[0], expected)


def test_a_damaged_orientation_is_ignored(tmp_path: Path) -> None:
    image = Image.effect_noise((8, 6), 50)
    for number, exif in enumerate((b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")):
        path = tmp_path / f"{number}.jpg"
        image.save(path, exif=exif)
        assert read_image(path).size == (8, 6)


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install \"moreau_ext\[batch\]\""):
        read_image(tmp_path / "x.png")


# --- the manifest --------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    written = write_manifest(tmp_path, {"a": 1, "shape": (2, 3)})
    assert written == read_manifest(tmp_path) == {"a": 1, "shape": [2, 3]}
    for text in ("{", "[1]"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(SettingError, match=r"out: .*manifest.json is damaged"):
            read_manifest(tmp_path)


def test_differences_are_named(tmp_path: Path) -> None:
    before = {"a": 1, "shape": [2, 3], "plan": {"k": 0.4, "gone": True}}
    assert differences(before, {"a": 1, "shape": (2, 3), "plan": {"k": 0.4, "gone": True}}) == []
    found = differences(before, {"a": 2, "shape": (2, 3), "plan": {"k": 0.5}, "new": "x"})
    assert found == ["a was 1 and is 2", "plan.k was 0.4 and is 0.5", "plan.gone was true and is null",
                     'new was null and is "x"']  # fmt: skip
    check_same(tmp_path, [])
    with pytest.raises(Differs, match=r"out: .* belongs to another configuration: a was 1 .* and 2 more\. Repeat"):
        check_same(tmp_path, [*found, "y", "z"])


# --- the progress bar ----------------------------------------------------------------------------------------------


def test_the_bar_shows_amounts_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with progress_bar(4, show=True, extra="batch", unit="image", file=file, mininterval=0) as advance:
        advance(3, "half")
        advance(1)
    assert "4/4" in file.getvalue()
    assert "half" in file.getvalue()
    with progress_bar(4, show=False, extra="batch") as advance:
        advance(4, "nothing")
    assert capsys.readouterr() == ("", "")


def test_missing_tqdm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"needs tqdm .*pip install \"moreau_ext\[evaluation\]\""):
        progress_bar(1, show=True, extra="evaluation").__enter__()
    with progress_bar(1, show=False, extra="evaluation"):
        pass


# --- errors --------------------------------------------------------------------------------------------------------


def test_setting_errors_hold_name_and_text() -> None:
    for error in (SettingError("out", "is no folder"), SettingFileNotFoundError("out", "is no folder")):
        copy = pickle.loads(pickle.dumps(error))  # Ray and processes of a pool send errors so
        assert (str(copy), copy.name, copy.text) == ("out: is no folder", "out", "is no folder")
        assert isinstance(copy, ValueError)
    assert isinstance(error, FileNotFoundError)


def test_errors_in_one_line() -> None:
    assert one_line(RuntimeError("two\n  lines")) == "RuntimeError: two lines"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_examples() -> None:
    assert doctest.testmod(_errors).failed == 0
