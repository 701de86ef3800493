"""Preprocessing that a model's metadata describes: the pixels of its own pipeline, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moreau_ext.batch import Preprocess
from moreau_ext.batch.metadata import _PROCESSORS

transformers = pytest.importorskip("transformers", reason="needs the extra [test]", exc_type=ImportError)

# Odd edges, wide and tall: crops whose corner lies between two pixels.
PHOTOGRAPHS = [
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h // 8, w // 8, 3), np.uint8)).resize((w, h))
    for w, h in ((451, 300), (333, 500))
]


def own(kind: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


def same_pixels(kind: str, settings: dict[str, Any], folder: Path) -> None:
    processor = own(kind, settings)
    processor.save_pretrained(folder)
    ours = Preprocess.read(folder / "preprocessor_config.json")
    for photograph in PHOTOGRAPHS:
        expected = torch.as_tensor(np.asarray(processor(photograph, return_tensors="np")["pixel_values"]))[0]
        torch.testing.assert_close(ours.image(photograph), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", _PROCESSORS)
def test_every_known_processor_with_its_defaults(kind: str, tmp_path: Path) -> None:
    same_pixels(kind, {}, tmp_path)
    # What a file leaves out has the processor's own default.
    bare = Preprocess.of_hugging_face({"image_processor_type": f"{kind}ImageProcessor"})
    assert bare == Preprocess.read(tmp_path / "preprocessor_config.json")
    assert bare == Preprocess.of_hugging_face({"feature_extractor_type": f"{kind}FeatureExtractor"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("ConvNext", {"size": {"shortest_edge": 225}, "crop_pct": 0.95}),
        ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.95}),
        ("ConvNext", {"size": 96}),
        ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "size": 112}),
        ("EfficientNet", {"include_top": False, "do_normalize": False}),
        ("EfficientNet", {"rescale_offset": True, "include_top": True, "do_normalize": False}),
        ("MobileViT", {"do_flip_channel_order": False, "size": {"shortest_edge": 288}}),
        ("MobileViT", {"do_normalize": True}),
        ("Levit", {"size": {"height": 240, "width": 250}}),
        ("PoolFormer", {"crop_pct": 0.95, "size": {"height": 224, "width": 224}}),
        ("ViT", {"size": {"shortest_edge": 225}, "resample": 0}),
        ("ViT", {"size": 97, "do_rescale": False}),
        ("ViT", {"do_resize": False, "do_normalize": False}),
        ("CLIP", {"size": 225, "crop_size": 223}),
        ("Bit", {"size": {"shortest_edge": 231}, "crop_size": {"height": 224, "width": 225}}),
        ("DeiT", {"crop_size": {"height": 260, "width": 262}}),  # pads
        ("Siglip", {"size": {"height": 100, "width": 60}, "image_mean": [0.1, 0.2, 0.3]}),
    ],
)
def test_other_settings(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    same_pixels(kind, settings, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "PerceiverImageProcessor"}, "PerceiverImageProcessor is not known"),
        ({"image_processor_type": "TextNetImageProcessor"}, "TextNetImageProcessor is not known"),
        ({"image_processor_type": "MyImageProcessor"}, "MyImageProcessor is not known"),
        ({"do_normalize": True, "size": 8}, "names no image_processor_type"),
        ({"image_processor_type": "ViTImageProcessor", "crop_pct": 0.9}, "crop_pct=0.9 is not known for ViT"),
        ({"image_processor_type": "ViTImageProcessor", "do_flip_channel_order": True}, "do_flip_channel_order=True"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad=True"),
        ({"image_processor_type": "ViTImageProcessor", "auto_map": {"AutoImageProcessor": "x"}}, "auto_map"),
        ({"image_processor_type": "ViTImageProcessor", "data_format": "channels_last"}, "data_format"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "a size of longest_edge"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 9, "longest_edge": 12}}, "a size of"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "resample=9"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": [9, 9]}, "has no shortest_edge"),
    ],
)
def test_what_is_not_known_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, **settings}))
    with pytest.raises(ValueError, match=rf"preprocess: preprocessor_config.json: .*{words}.*a file of your own"):
        Preprocess.read(tmp_path / "preprocessor_config.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"resize": 256, "interpolation": "bicubic"}),
        ({"crop_pct": 0.95, "interpolation": "bilinear"}, {"resize": 235, "interpolation": "bilinear"}),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, {"resize": (224, 224), "interpolation": "bicubic"}),
        ({"crop_mode": "center", "mean": None}, {"resize": 256, "interpolation": "bicubic"}),
    ],
)
def test_timm(change: dict[str, Any], expected: dict[str, Any]) -> None:
    """As timm.data.create_transform with resolve_data_config: crop_pct is 0.875 and the filter bicubic by default."""
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    found = Preprocess.of_timm({"input_size": (3, 224, 224), **change})
    assert found == Preprocess(crop=(224, 224), **expected, **imagenet)


@pytest.mark.parametrize(
    "settings", [{"crop_mode": "border"}, {"input_size": (3, 224, 320)}, {"interpolation": "random"}]
)
def test_timm_that_is_not_known_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preprocess: "):
        Preprocess.of_timm({"input_size": (3, 224, 224), **settings})


@pytest.mark.parametrize("edges", [(5, 8), (8, 5), (5, 5), (12, 9), (3, 9)])
def test_crops_as_torchvision(edges: tuple[int, int]) -> None:
    """Its centre crop: padded by ⌊k/2⌋ on the left and ⌈k/2⌉ on the right, then cut at int(round(k/2))."""
    width, height = edges
    image = Image.fromarray(np.random.default_rng(1).integers(1, 256, (height, width), np.uint8))
    pixels = np.asarray(image, np.float32) / 255
    for axis, edge in ((0, height), (1, width)):
        more = 8 - edge
        if more > 0:
            pad = [(0, 0), (0, 0)]
            pad[axis] = (more // 2, (more + 1) // 2)
            pixels = np.pad(pixels, pad)
        corner = round((pixels.shape[axis] - 8) / 2.0)
        pixels = pixels.take(range(corner, corner + 8), axis)
    np.testing.assert_allclose(Preprocess(mode="L", crop=8).image(image)[0].numpy(), pixels, rtol=1e-6)
