"""``moreau-ext show``: the rows, their titles, their images and the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from moreau_ext import Gradient, GroupSparseMoreauGrad, ProximalGradient, Tiles, cli, plots
from moreau_ext.batch import Preprocess, explain_dataset
from moreau_ext.batch.models import class_names
from moreau_ext.batch.show import pick, picture


class Net(nn.Module):
    """Two classes of images of one channel; its metadata names them."""

    pretrained_cfg: ClassVar = {"label_names": ("dark", "light $5")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = x[:, :, :4].sum((1, 2, 3))
        return torch.stack([5 - top, top], 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two folders, and arrays and a table, each with results in maps-…"""
    folder = tmp_path_factory.mktemp("show")
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    images[:3] //= 16
    for i, image in enumerate(images):
        path = folder / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.save(folder / "x.npy", images[:, None] / np.float32(255))
    pd.DataFrame({"age": [1.0, 2.0], "height": [0.5, 0.1]}).to_parquet(folder / "t.parquet")
    explainer = GroupSparseMoreauGrad(Net(), groups=Tiles(4), eta=0.5, sigma=0.0, solver=ProximalGradient(2, 3, 0.1))
    explain_dataset(explainer, folder / "in", folder / "maps-in", preprocess=Preprocess(mode="L"))
    explain_dataset(explainer, folder / "x.npy", folder / "maps-x")
    explain_dataset(Gradient(lambda x: (x * torch.tensor([2.0, -3.0])).sum(1)), folder / "t.parquet", folder / "maps-t")
    return folder


def test_rows_are_the_first_random_or_of_each_class(place: Path) -> None:
    out = place / "maps-in"

    def names(*how: Any) -> list[str]:
        return [row["source"] for row in pick(out, *how)]

    everything = names(None, "first", 9)
    assert everything == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png"]
    assert names() == everything[:4]
    assert names(None, "random", 6, 1) != names(None, "random", 6, 2)
    assert sorted(names(None, "random", 6, 1)) == everything
    assert names(None, "random", 2, 1) == names(None, "random", 6, 1)[:2]
    assert [row["target"] for row in pick(out, choice="class")] == [0, 1]
    assert names(None, "class") == ["a/0.png", "a/4.png"]


def test_the_picture_has_classes_groups_and_images(place: Path) -> None:
    rows = pick(place / "maps-in", choice="class")
    figure = picture(place / "maps-in", rows, source=place / "in")
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert titles[0].startswith("a/0.png\nclass 0, dark\n50% non-zero, residual ")
    assert titles[3].startswith("a/4.png\nclass 1, light $5\n")
    assert titles[2] == titles[5] == "over the image"
    assert len(figure.axes[1].collections) == 1  # the borders of the tiles
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["exactly 0", "group in the map"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.asarray(Image.open(place / "in/a/0.png")) / 255)
    alone = picture(place / "maps-in", rows, names=["one"], norms=True)
    assert [axes.get_title().split("\n")[1] for axes in alone.axes[:2]] == ["class 0, one", "class 1"]
    assert "over the image" not in [axes.get_title() for axes in alone.axes]
    rows[0]["predicted"] = 1
    assert "class 0, dark; predicted: class 1, light $5" in picture(place / "maps-in", rows).axes[0].get_title()
    # The rows of an array come from its file.
    figure = picture(place / "maps-x", pick(place / "maps-x", [4]), source=place / "x.npy")
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.load(place / "x.npy")[4, 0], rtol=1e-6)


def test_a_row_of_a_table_is_drawn_as_bars(place: Path) -> None:
    figure = picture(place / "maps-t", pick(place / "maps-t", [1]))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["height", "age"]
    assert figure.axes[0].get_title().startswith("t.parquet:1\n")


def test_names_of_files(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    out = str(place / "maps-in")
    for _ in range(2):
        assert cli.main(["show", out, "--limit", "1"]) == 0
    assert capsys.readouterr().out == "wrote maps-in.png: a/0.png\nwrote maps-in-2.png: a/0.png\n"
    for name, start in (("a.pdf", b"%PDF"), ("a.SVG", b"<?xml"), ("a.jpg", b"\xff\xd8"), ("a.png", b"\x89PNG")):
        assert cli.main(["show", out, "--limit", "1", "--to", name]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["maps-in", "--to", "a.abc"], "--to a.abc: expected a suffix of png, pdf, "),
        (["maps-in", "--to", "a"], "--to a: expected a suffix .* got none"),
        (["maps-in", "--to", "no/a.png"], "--to no/a.png: the folder no is not there"),
        (["maps-in", "--names", "gone.txt"], "--names: gone.txt cannot be read"),
        (["maps-in", "--norms", "--blur", "2"], "--norms: .*leave one of the two out"),
        (["maps-in", "--source", "in/a"], "--source: in/a holds no a/0.png"),
        (["maps-in", "--source", "in/b/1.png", "--limit", "1"], "--source: in/b/1.png is no a/0.png"),
        (["maps-in", "--source", "gone"], "--source: gone is not there"),
        (["maps-x", "--source", "in"], "--source: in: expected the file .* that was explained"),
        (["maps-t"], "--limit: rows of a table are drawn one at a time, got 2"),
        (["maps-t", "--rows", "class"], "--rows: .* has one output, and no classes"),
        (["maps-t", "--rows", "best"], "--rows: invalid choice: 'best'"),
    ],
)
def test_refusals(line: list[str], words: str, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert cli.main(["show", *line]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(words, said), said
    assert sorted(place.iterdir()) == before


def test_names_of_classes_come_from_metadata() -> None:
    model: Any = nn.Linear(1, 2)
    assert class_names(model) is None
    model.config = type("Config", (), {"id2label": {1: "dog", 0: "cat"}})()
    assert class_names(model) == ["cat", "dog"]
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # Hugging Face's for classes without names
    assert class_names(model) is None


def test_figures_show_in_notebooks(place: Path) -> None:
    assert picture(place / "maps-in", pick(place / "maps-in", limit=1))._repr_png_().startswith(b"\x89PNG")
    assert plots.features([1.0])._repr_png_().startswith(b"\x89PNG")
