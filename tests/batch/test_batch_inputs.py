"""Files and arrays: every input is a row, or counted as left out with the reason; numbers are scaled by their type."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils import data

from moreau_ext import Gradient
from moreau_ext.batch import Preprocess, explain_dataset, open_source
from moreau_ext.batch.sources.base import in_words
from moreau_ext.data.images import FORMATS, read_image

GRAY = Preprocess(mode="L")


def picture(path: Path, kind: str | None = None, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path, kind)


def names(source: Any) -> list[str]:
    return source.load(0, len(source)).names


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_file_is_a_row_or_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.jfif", "d.J2K", "e.qoi", "f.pnm"):
        kind = {"jfif": "JPEG", "J2K": "JPEG2000"}.get(name.split(".")[1])
        picture(tmp_path / name, kind)
    for name in ("notes.txt", "more.txt", "README", ".hidden.png", ".cache/x.png", "old.tga", "x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert names(source) == ["a.png", "b.JPG", "c.jfif", "d.J2K", "e.qoi", "f.pnm"]
    assert source.load(0, 6).errors == {}
    assert source.left_out == {
        "suffix .txt": 2, "suffix (none)": 1, "suffix .tga": 1, "suffix .parquet": 1, "hidden": 2,
    }  # fmt: skip
    assert in_words(source.left_out).startswith("2 left out: hidden; 1 left out: suffix (none)")
    done = explain_dataset(Gradient(lambda x: x.flatten(1).sum(1)), tmp_path, tmp_path / "out")
    assert done.left_out == source.left_out


def test_classes_are_numbered_by_all_folders(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/x/2.png", "fox/1.png"):
        picture(tmp_path / name)
    for name in ("bee", "elk/empty", ".git"):
        (tmp_path / name).mkdir(parents=True)
    for given in (tmp_path, tmp_path / "*" / "**" / "*.png", tmp_path / "[df]*" / "**" / "*.png"):
        source = open_source(given, target="class")
        assert source.classes == ["bee", "cat", "dog", "elk", "fox"]
        loaded = source.load(0, len(source))
        by_name = {"cat/1.png": 1, "dog/x/2.png": 2, "fox/1.png": 4}
        assert loaded.targets == [by_name[name] for name in loaded.names]


def test_each_real_folder_is_read_once(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "b" / "1.png")
    picture(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "in" / "a").symlink_to("b")  # comes first, but is a link
    (tmp_path / "in" / "b" / "loop").symlink_to("..")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "same.png").symlink_to("b/1.png")  # a file's link is a file
    source = open_source(tmp_path / "in")
    assert names(source) == ["b/1.png", "c/2.png", "same.png"]
    assert source.left_out["link to a folder that is read already"] == 3
    found = names(open_source(tmp_path / "in" / "**" / "*.png"))
    assert found == ["b/1.png", "c/2.png", "same.png"]


@pytest.mark.parametrize("name", ["a[1].png", "b*.png", "what?.png", "[x]/y.png", "**.png"])
def test_a_path_that_exists_is_no_glob(name: str, tmp_path: Path) -> None:
    picture(tmp_path / name)
    picture(tmp_path / "a1.png")
    picture(tmp_path / "x" / "y.png")
    assert names(open_source(tmp_path / name)) == [Path(name).name]
    if "/" in name:
        assert names(open_source(tmp_path / "[x]" / "*.png")) == ["y.png"]
        pq.write_table(pa.table({"a": [1.0]}), tmp_path / "[x]" / "t[1].parquet")
        assert len(open_source(tmp_path / "[x]" / "t[1].parquet")) == 1


def test_a_glob_that_matches_nothing_is_refused_beside_others(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"source: .*\*.jpg matches no file"):
        open_source([tmp_path / "*.png", tmp_path / "*.jpg"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(ValueError, match=r"no image files in .*1 left out: suffix .txt"):
        open_source(tmp_path / "empty")


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"\xc5\xd0\xd3\xc6" + bytes(28)]
)
def test_no_interpreter_is_started(start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's EPS reader runs gs on a file, whatever its name."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "in").mkdir()
    for name in ("cat.png", "cat.eps", "cat.jpg"):
        (tmp_path / "in" / name).write_bytes(start + b"%%EndComments\nshowpage\n%%EOF\n")
    source = open_source([tmp_path / "in" / name for name in ("cat.png", "cat.eps", "cat.jpg")])
    assert set(source.load(0, 3).errors.values()) == {
        f"UnidentifiedImageError: is no image of a known format ({', '.join(FORMATS)})"
    }
    pq.write_table(pa.table({"image": [start + b"%%EOF\n"]}), tmp_path / "x.parquet")
    assert "UnidentifiedImageError" in open_source(tmp_path / "x.parquet").load(0, 1).errors[0]
    assert not called.exists()


@pytest.mark.parametrize("kind", ["TGA", "PCX", "SPIDER", "MSP", "XBM", "DIB"])
def test_other_formats_are_not_guessed_from_the_content(kind: str, tmp_path: Path) -> None:
    mode = {"SPIDER": "F", "MSP": "1", "XBM": "1"}.get(kind, "L")
    Image.new(mode, (8, 8)).save(tmp_path / "x.other", kind)
    (tmp_path / "x.other").rename(tmp_path / "x.png")
    with pytest.raises(OSError, match="no image of a known format"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((1, 10_000), Preprocess(resize=256, crop=224)),
        ((10_000, 1), Preprocess(resize=224, crop=224)),
        ((3, 60_000), Preprocess(resize=96)),
        ((1, 10_000), Preprocess(mode="L", resize=256)),
    ],
)
def test_a_picture_that_grows_to_a_bomb_is_an_error(size: tuple[int, int], how: Preprocess, tmp_path: Path) -> None:
    picture(tmp_path / "strip.png", size=size)
    (reason,) = open_source(tmp_path, preprocess=how).load(0, 1).errors.values()
    assert "would be resized to" in reason
    Image.fromarray(np.zeros(size, np.uint16)).save(tmp_path / "strip.png")
    assert "would be resized to" in open_source(tmp_path, preprocess=how).load(0, 1).errors[0]


@pytest.mark.parametrize("settings", [{"resize": 10_000}, {"crop": (1, 90_000_000)}, {"resize": [9500, 9500]}])
def test_settings_that_ask_for_a_bomb_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="asks for"):
        Preprocess(**settings)


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "white"),
    [("u1", 255), ("<u2", 65535), (">u2", 65535), ("?", True), *((k, 1) for k in ("<f4", ">f4", ">f8", "f2", "g"))],
)  # fmt: skip
def test_numbers_are_scaled_by_their_type(dtype: str, white: Any, tmp_path: Path) -> None:
    values = np.array([[0, white], [white, 0]]).astype(dtype)[None]
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.NPZ.npz", values)
    for source in (tmp_path / "x.npy", tmp_path / "x.NPZ.npz", values, {"x": values}, list(values)):
        loaded = open_source(source, preprocess=GRAY).load(0, 1)
        assert loaded.errors == {}
        assert loaded.inputs.tolist() == [[[0, 1], [1, 0]]]


def test_sixteen_bits_are_the_same_in_every_container(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    np.save(tmp_path / "x.npy", pixels[None, None])
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([pixels[None]] * 2))
    pq.write_table(pa.table({"x": tensors}), tmp_path / "x.parquet")
    sources = [tmp_path / f"x.{s}" for s in ("png", "tiff", "npy", "parquet")] + [torch.from_numpy(pixels)[None, None]]
    for source in sources:
        found = open_source(source, preprocess=GRAY).load(0, 1).inputs
        np.testing.assert_allclose(found[0, 0].numpy(), pixels / 65535, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[101, 7592]]),
        np.array([[-1000, 3000]], np.int16),
        np.array([[1, 2]], np.int8),
        np.array([[1, 2]], np.uint32),
        np.array([[1, 2]], ">i4"),
        np.array([[1 + 2j]]),
        np.array([["a"]]),
        np.array([["2020-01-01"]], "datetime64[D]"),
    ],
    ids=str,
)
def test_other_numbers_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values)
    for source in (tmp_path / "x.npy", values, list(values)):
        (reason,) = open_source(source).load(0, 1).errors.values()
        assert reason.startswith("holds ")
        assert "convert" in reason or "expected real numbers" in reason


# --- tables --------------------------------------------------------------------------------------------------------


def frame() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    return pd.DataFrame(
        {"age": [30, 41, 52, 63, 74], "bmi": values[:, 0], "dose": values[:, 1], "ill": [0, 1, 0, 1, 1]}
    )


def test_one_number_per_column(tmp_path: Path) -> None:
    table = frame()
    expected = table[["age", "bmi", "dose"]].to_numpy()
    for suffix in (".parquet", ".PARQUET", ".pq", ".parq"):
        table.to_parquet(tmp_path / f"x{suffix}")
    arrow = pa.Table.from_pandas(table)
    folder = tmp_path / "folder"
    folder.mkdir()
    table[:3].to_parquet(folder / "a.pq")
    table[3:].to_parquet(folder / "b.PQ")
    for source in (table, arrow, *tmp_path.glob("x*"), folder):
        opened = open_source(source, target="ill")
        loaded = opened.load(0, 5)
        assert loaded.targets == [0, 1, 0, 1, 1]
        np.testing.assert_allclose(loaded.inputs.numpy(), expected, rtol=1e-6)
    assert names(open_source(table))[:2] == ["DataFrame:0", "DataFrame:1"]
    assert open_source(table[["bmi", "dose"]]).load(0, 1).inputs.dtype == torch.float32


def test_tables_with_holes_and_texts() -> None:
    table = frame().astype({"age": "Int64"})
    table.loc[1, "age"] = pd.NA
    table.loc[2, "dose"] = np.nan
    loaded = open_source(table, target="ill").load(0, 5)
    assert loaded.good == [0, 3, 4]
    with pytest.raises(ValueError, match=r"column: .*name \(.*string\); leave these out of the table"):
        open_source(table.assign(name="x"))
    with pytest.raises(ValueError, match=r"target: .* has no column 'sick'"):
        open_source(table, target="sick")


def test_frames_of_arrays() -> None:
    x = torch.rand(4, 3)
    cells = pd.DataFrame({"x": list(x.numpy()), "y": [1, 2, 3, 4]})
    for source in (cells, cells["x"]):
        torch.testing.assert_close(open_source(source).load(0, 4).inputs, x)


def test_columns_of_every_kind(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (4, 4), 255).save(file, "PNG")
    images, numbers = [file.getvalue()] * 2, [[0.0, 1.0], [2.0, 3.0]]
    columns = {
        "binary_view": pa.array(images, pa.binary_view()),
        "large_binary": pa.array(images, pa.large_binary()),
        "dictionary": pa.array(images, pa.binary()).dictionary_encode(),
        "struct": pa.array([{"bytes": i, "path": "p"} for i in images]),
        "list": pa.array(numbers, pa.list_(pa.float32())),
        "large_list": pa.array(numbers, pa.large_list(pa.float64())),
        "fixed_size_list": pa.array(numbers, pa.list_(pa.float32(), 2)),
        "bytes_as_numbers": pa.array([[0, 255], [255, 0]], pa.list_(pa.uint8())),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({name: column, "label": [1, 2], "text": ["a", "b"]}), tmp_path / f"{name}.parquet")
        loaded = open_source(tmp_path / f"{name}.parquet", preprocess=GRAY, target="label").load(0, 2)
        assert loaded.errors == {}, name
        assert loaded.inputs.shape in ((2, 1, 4, 4), (2, 2))
        assert loaded.inputs.max() in (1.0, 3.0)
    view = pa.table({"x": pa.array(numbers, pa.list_view(pa.float32()))})
    assert open_source(view).load(0, 2).inputs.tolist() == numbers


@pytest.mark.parametrize("source", [{1.0, 2.0}, frozenset({1})])
def test_sets_have_no_order(source: Any) -> None:
    with pytest.raises(ValueError, match="has no order"):
        open_source(source)


# --- loaders -------------------------------------------------------------------------------------------------------


class Walk(data.IterableDataset):
    def __iter__(self) -> Any:
        yield from X


class Backwards(data.Sampler):
    def __iter__(self) -> Any:
        return iter(range(7, -1, -1))


class Own(data.DataLoader):
    def __iter__(self) -> Any:
        return iter(())


X = torch.arange(48.0).view(8, 6)
PAIRS = data.TensorDataset(X, torch.arange(8) % 3)
IN_ORDER = data.SequentialSampler(X)


@pytest.mark.parametrize(
    "loader",
    [
        data.DataLoader(PAIRS, 3),
        data.DataLoader(PAIRS, 4, drop_last=True),  # drops none
        data.DataLoader(PAIRS, batch_size=None),
        data.DataLoader(PAIRS, batch_sampler=data.BatchSampler(IN_ORDER, 3, False)),
        data.DataLoader(PAIRS, 4, collate_fn=lambda rows: (torch.stack([r[0] for r in rows]), [r[1] for r in rows])),
        data.DataLoader([{"name": f"n{i}", "x": x} for i, x in enumerate(X)], 3),
        data.DataLoader(Walk(), 3),
    ],
)
def test_loaders_in_order(loader: Any) -> None:
    source = open_source(loader, column="x" if isinstance(loader.dataset, list) else None)
    inputs = torch.cat([loaded.inputs for _, loaded in source.batches(5)])
    assert torch.equal(inputs, X)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (data.DataLoader(PAIRS, shuffle=True), "shuffles"),
        (data.DataLoader(PAIRS, sampler=data.SubsetRandomSampler(range(8))), "SubsetRandomSampler"),
        (data.DataLoader(PAIRS, sampler=data.WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
        (data.DataLoader(PAIRS, sampler=data.DistributedSampler(PAIRS, 2, 0, shuffle=False)), "DistributedSampler"),
        (data.DataLoader(PAIRS, sampler=Backwards()), "Backwards"),
        (data.DataLoader(PAIRS, batch_size=None, sampler=data.BatchSampler(IN_ORDER, 4, False)), "BatchSampler"),
        (data.DataLoader(PAIRS, batch_sampler=data.BatchSampler(Backwards(), 4, False)), "Backwards"),
        (data.DataLoader(PAIRS, batch_sampler=[[0, 1], [2, 3]]), "the batch_sampler list"),
        (data.DataLoader(PAIRS, 3, drop_last=True), "drop_last"),
        (data.DataLoader(PAIRS, batch_sampler=data.BatchSampler(IN_ORDER, 3, True)), "drop_last"),
        (data.DataLoader(PAIRS, 3, num_workers=2, in_order=False), "in_order=False"),
        (data.DataLoader(Walk(), 3, num_workers=2), "mixes the rows of 2 workers"),
        (Own(PAIRS, 3), "Own has an order of its own"),
    ],
)
def test_other_orders_are_refused_by_name(loader: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"source: .*{words}"):
        open_source(loader)


@pytest.mark.parametrize(
    "loader",
    [
        data.DataLoader(PAIRS, 2, collate_fn=lambda rows: rows),  # two pairs look like (inputs, labels)
        data.DataLoader([((x, x), 1) for x in X], 2),
        data.DataLoader(PAIRS, 2, collate_fn=lambda rows: (rows[0][0], 1)),
        data.DataLoader([{"x": x, "at": {"a": 1}} for x in X], 3, collate_fn=lambda rows: {"x": X[:3], "at": 1}),
    ],
)
def test_batches_that_are_none_are_refused(loader: Any) -> None:
    with pytest.raises(ValueError, match=r"source: the DataLoader's batches hold .*give the data set itself"):
        list(open_source(loader).batches(4))


# --- text is never markup ------------------------------------------------------------------------------------------


def test_names_are_no_formulas(tmp_path: Path) -> None:
    from moreau_ext.batch.show import pick
    from moreau_ext.batch.show import picture as drawn
    from moreau_ext.plots import bands, bars, gallery

    odd = ["price $5.png", "gr$$n_{.png", "$\\frac$.png", "a\x1b[2J.png"]
    for name in odd:
        picture(tmp_path / "in" / name)
    explain_dataset(Gradient(lambda x: x.flatten(1).sum(1)), tmp_path / "in", tmp_path / "out")
    figure = drawn(tmp_path / "out", pick(tmp_path / "out", limit=9), source=tmp_path / "in")
    titles = {axes.get_title().split("\n")[0] for axes in figure.axes[:12:3]}
    assert titles == {*odd[:3], "a\\x1b[2J.png"}
    assert not any(axes.title.get_usetex() or axes.title.get_parse_math() for axes in figure.axes[:12])
    figure.savefig(tmp_path / "1.png")
    x, name = torch.rand(1, 4, 4), odd[1]
    gallery(x, {name: x}, [name], name).savefig(tmp_path / "2.png")
    points = [(0.1, 0.9, 0.8, 1.0), (1.0, 0.5, 0.4, 0.6)]
    bands({name: {name: {"m": points}}}, {"m": name}, name).savefig(tmp_path / "3.png")
    bars({name: {name: {name: (0.5, 0.4, 0.6)}}}).savefig(tmp_path / "4.png")


@pytest.mark.slow
def test_control_characters_are_printed_as_escapes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("\x1b]0;evil\x07.png", "\x9b31m.png", "\u202egnp.png"):
        (tmp_path / "in" / name).write_bytes(b"junk")
    picture(tmp_path / "in" / "good.png")
    (tmp_path / "net.py").write_text(
        "import torch\nnet = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))\n"
    )
    given = ["explain", "in", "--model", "net:net", "--method", "gradient", "--prepare", "none", "--out", "o"]
    line = [sys.executable, "-m", "moreau_ext", *given]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 1, done.stderr
    said = done.stdout + done.stderr
    assert not set(said) & set("\x1b\x07\x9b\u202e")
    assert "\\x1b]0;evil\\x07.png: UnidentifiedImageError" in said
    assert "4 inputs: 1 explained now, 0 before, 3 with an error" in said
