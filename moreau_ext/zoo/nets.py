"""Small networks: a CNN, a ResNet, a perceptron and a vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "softplus", "silu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    # log(1 + exp(5v))/5. With the default sharpness of 1 the net is nearly linear, and loses 1-2 % of the digits.
    "softplus": lambda: nn.Softplus(beta=5),
    "silu": nn.SiLU,
}


def _activation(name: str) -> nn.Module:
    """An activation, never in place: hooks and other tools need the values that it would overwrite."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class _Tokens(nn.Module):
    """Square patches of an image, each embedded in ``dim`` numbers, plus a learned position: [B, patches, dim]."""

    def __init__(self, image_size: int, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return tokens


class _Attention(nn.Module):
    """Self-attention between all tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class _TransformerBlock(nn.Module):
    """Attention, then a two-layer perceptron per token, each after layer normalisation and with a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(dim), _Attention(dim, heads))
        self.think = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        out: Tensor = x + self.think(x)
        return out


class _MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, which is a 1 x 1 convolution if the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return out


def _build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A float32 net on the CPU in eval mode, with weights that depend only on ``seed``.

    The modules are created without storage, so that their own initialisation draws nothing from the global generator.
    """
    with torch.inference_mode(False), torch.device("meta"):
        model = make().to(torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.Linear):
                # Variance 1/(3·inputs), torch's default. Larger weights cost the transformer 4 % of the digits.
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, _Tokens):
                module.position.normal_(std=0.2, generator=generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()
    return model.eval()


def digits_cnn(activation: Activation = "relu", seed: int = 0) -> nn.Module:
    """A convolutional net for the digits, untrained: [B, 1, 8, 8] -> [B, 10] logits.

    Two 3 x 3 convolutions (16 and 32 channels) with average pooling between them, and a linear layer; 9,930 weights.
    Pooling is by averages, not maxima, so that the net is smooth if its activation is.

    Args:
        activation: "relu" gives a piecewise linear net; "gelu", "softplus" (of sharpness 5) and "silu" smooth ones.
        seed: of the weights.

    Raises:
        ValueError: another ``activation``.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.digits_cnn("silu")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _build(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            _activation(activation),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            _activation(activation),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        ),
        seed,
    )


def resnet20(num_classes: int = 10, seed: int = 0) -> nn.Module:
    """ResNet-20 for 3 x 32 x 32 images, untrained: [B, 3, 32, 32] -> [B, num_classes] logits.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2, with 1 x 1 convolutions as shortcuts where the shape changes.

    Args:
        num_classes: width of the output.
        seed: of the weights.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.resnet20()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for after in (16, 32, 64):
            for block in range(3):
                layers.append(_ResidualBlock(before, after, 2 if block == 0 and after != before else 1))
                before = after
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    return _build(make, seed)


def tabular_mlp(features: int = 30, classes: int = 2, activation: Activation = "relu", seed: int = 0) -> nn.Module:
    """A perceptron for table rows, untrained: [B, features] -> [B, classes] logits, two hidden layers of 32.

    Args:
        features: numbers per row.
        classes: width of the output.
        activation: as for :func:`digits_cnn`.
        seed: of the weights.

    Raises:
        ValueError: another ``activation``.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.tabular_mlp(features=5, classes=3)(torch.zeros(2, 5)).shape
        torch.Size([2, 3])
    """
    return _build(
        lambda: nn.Sequential(
            nn.Linear(features, 32),
            _activation(activation),
            nn.Linear(32, 32),
            _activation(activation),
            nn.Linear(32, classes),
        ),
        seed,
    )


def tiny_vit(
    image_size: int = 32,
    patch: int = 4,
    dim: int = 64,
    depth: int = 3,
    heads: int = 4,
    channels: int = 3,
    num_classes: int = 10,
    seed: int = 0,
) -> nn.Module:
    """A vision transformer, untrained: [B, channels, image_size, image_size] -> [B, num_classes] logits.

    Patches are embedded and get a learned position. Blocks of attention and perceptron (GELU, twice as wide) follow,
    with layer normalisation before each. A linear layer takes the mean over the tokens. The net is smooth.

    Args:
        image_size: edge of the image in pixels.
        patch: edge of a patch in pixels; must divide ``image_size``.
        dim: width of a token; ``heads`` must divide it.
        depth: number of blocks.
        heads: attention heads per block.
        channels: of the image.
        num_classes: width of the output.
        seed: of the weights.

    Raises:
        ValueError: ``patch`` does not divide ``image_size``, or ``heads`` does not divide ``dim``.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929, pooled by the mean instead of a class token.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.tiny_vit(image_size=8, patch=2, channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if image_size % patch:
        raise ValueError(f"patch must divide image_size, got patches of {patch} in images of {image_size}")
    if dim % heads:
        raise ValueError(f"heads must divide dim, got {heads} heads for a width of {dim}")
    return _build(
        lambda: nn.Sequential(
            _Tokens(image_size, patch, channels, dim),
            *(_TransformerBlock(dim, heads) for _ in range(depth)),
            nn.LayerNorm(dim),
            _MeanOverTokens(),
            nn.Linear(dim, num_classes),
        ),
        seed,
    )
