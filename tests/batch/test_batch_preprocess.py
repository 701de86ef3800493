"""From pixels to inputs: order, sizes, and what models say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from moreau_ext.batch import Preprocess

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_by_hand() -> None:
    image = photograph()
    x = Preprocess(resize=(20, 16), crop=(10, 8), **IMAGENET).image(image)
    pixels = np.asarray(image.resize((16, 20), Image.Resampling.BILINEAR).crop((4, 5, 12, 15)), np.float32) / 255
    expected = (pixels - np.array(IMAGENET["mean"], np.float32)) / np.array(IMAGENET["std"], np.float32)
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_shorter_edge() -> None:
    assert Preprocess(resize=15).image(photograph()).shape == (3, 15, 20)
    assert Preprocess(resize=15).image(photograph(30, 40)).shape == (3, 20, 15)
    assert Preprocess(crop=64).image(photograph()).shape == (3, 64, 64)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('mode = "L"\nresize = [8, 9]\nmean = [0.5]\n')
    (tmp_path / "p.json").write_text(json.dumps({"mode": "L", "resize": [8, 9], "mean": [0.5]}))
    read = [Preprocess.read(tmp_path / name) for name in ("p.toml", "p.json")]
    assert read == [Preprocess(mode="L", resize=(8, 9), mean=(0.5,))] * 2
    assert Preprocess.of(read[0].record(), "x") == read[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mode = 'CMYK'", "mode: expected one of RGB, L"),
        ("resize = 0", "resize: expected a positive integer"),
        ("crop = [1, 2, 3]", "crop: expected a positive integer"),
        ("std = [0.0]", "std: expected positive"),
        ("mean = 'gray'", "mean: expected one number per channel"),
        ("scale = -1", "scale: expected a positive number"),
        ("interpolation = 'best'", "interpolation: expected one of"),
        ("rezise = 5", "unknown rezise"),
        ("mode", "is not TOML"),
    ],
)
def test_what_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        Preprocess.read(tmp_path / "p.toml")


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="mean has 2 channels"):
        Preprocess(mean=(0.0, 1.0)).tensor(torch.zeros(3, 4))


def test_hugging_face(tmp_path: Path) -> None:
    settings = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }
    (tmp_path / "p.json").write_text(json.dumps(settings))
    expected = Preprocess(resize=(224, 224), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert Preprocess.read(tmp_path / "p.json") == expected


def test_timm_and_torchvision() -> None:
    cfg = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", **IMAGENET}
    assert Preprocess.of_timm(cfg) == Preprocess(resize=256, interpolation="bicubic", crop=(224, 224), **IMAGENET)
    transform = SimpleNamespace(
        resize_size=[232], crop_size=[224], interpolation=SimpleNamespace(value="bilinear"), **IMAGENET
    )
    assert Preprocess.of_torchvision(transform) == Preprocess(resize=232, crop=224, **IMAGENET)
