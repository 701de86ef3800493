"""Preprocessing of images for a model, read from TOML, JSON or the metadata of the model."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import SettingError
from ..data.images import check_pixels
from . import metadata
from .metadata import FILTERS

if TYPE_CHECKING:
    from PIL import Image

_MODES = ("RGB", "L", "BGR")
_OFFSETS = ("round", "floor")
# The value of white.
_WHITE = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}
Size = int | tuple[int, int]


def _size(name: str, value: Any) -> Size:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_positive(v) for v in value):
        return (int(value[0]), int(value[1]))
    if _positive(value):
        return int(value)
    raise SettingError("preprocess", f"{name}: expected a positive integer or [height, width], got {value!r}")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Preprocess:
    """The steps from an image to an input of the model, in this order.

    Args:
        mode: "RGB", "L", or "BGR" (RGB with the channels reversed), converted by Pillow. CMYK and palettes become RGB
            without a colour profile; transparency is dropped. 16-bit gray is mapped exactly to [0, 1] in every channel.
        resize: the shorter edge in pixels, or (height, width).
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos.
        crop: the centre, as its edge or (height, width); smaller images are padded with zeros.
        crop_offset: rounding of the crop's corner: "round" as torchvision and timm, "floor" as Hugging Face.
        scale: factor of pixel values 0 ... 255.
        mean, std: per channel, in units after ``scale``: x = (pixel·scale − mean)/std.

    Tensors that are not images (.npy, .npz, tensor columns) are normalised; see :meth:`tensor` for their scale.

    Raises:
        ValueError: a value out of range, by name.

    Example:
        >>> from moreau_ext.batch import Preprocess
        >>> Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).crop
        224
    """

    mode: str = "RGB"
    resize: Size | None = None
    interpolation: str = "bilinear"
    crop: Size | None = None
    crop_offset: str = "round"
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise SettingError("preprocess", f"mode: expected one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.interpolation not in FILTERS:
            raise SettingError(
                "preprocess", f"interpolation: expected one of {', '.join(FILTERS)}, got {self.interpolation!r}"
            )
        if self.crop_offset not in _OFFSETS:
            raise SettingError(
                "preprocess", f"crop_offset: expected one of {', '.join(_OFFSETS)}, got {self.crop_offset!r}"
            )
        for name in ("resize", "crop"):
            if getattr(self, name) is not None:
                size = _size(name, getattr(self, name))
                object.__setattr__(self, name, size)
                edges = (size, size) if isinstance(size, int) else size
                try:
                    check_pixels(edges[1], edges[0], f"{name}: asks for")
                except ValueError as error:
                    raise SettingError("preprocess", str(error)) from error
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not 0 < self.scale < 1e9:
            raise SettingError("preprocess", f"scale: expected a positive number, got {self.scale!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is None:
                continue
            numbers = value if isinstance(value, (list, tuple)) else (value,)
            if not numbers or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
                raise SettingError("preprocess", f"{name}: expected one number per channel, got {value!r}")
            if name == "std" and min(numbers) <= 0:
                raise SettingError("preprocess", f"std: expected positive numbers, got {value!r}")
            object.__setattr__(self, name, tuple(float(v) for v in numbers))

    def image(self, image: Image.Image) -> Tensor:
        """An opened image as float32 [channels, height, width].

        Raises:
            ValueError: floating-point or 32-bit pixels outside 0 ... 65535, whose range is unknown.
        """
        wide = image.mode.startswith(("I", "F"))
        if wide:
            image = self._sixteen_bit(image)
        elif image.mode != ("L" if self.mode == "L" else "RGB"):
            image = image.convert("L" if self.mode == "L" else "RGB")
        image = self._crop(self._resize(image))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        pixels = pixels * (255 * self.scale / 65535 if wide else self.scale)
        if wide and self.mode != "L":
            pixels = pixels.expand(3, -1, -1)
        if self.mode == "BGR":
            pixels = pixels.flip(0)
        return self._normalise(pixels).contiguous()

    def tensor(self, values: Tensor) -> Tensor:
        """A tensor as a normalised input: floating point as it is, pixels scaled as in :meth:`image`.

        Args:
            values: floating point; uint8; uint16, whose 65535 is white; or bool, whose True is white.

        Raises:
            TypeError: other integers, which may be token ids, labels or measurements: their scale is not known.
        """
        if not values.is_floating_point():
            if values.dtype not in _WHITE:
                raise TypeError(
                    f"holds {str(values.dtype).removeprefix('torch.')}, whose scale is not known; convert pixels to "
                    "uint8 or uint16, other numbers to floating point"
                )
            values = values.to(torch.float32) * (255 * self.scale / _WHITE[values.dtype])
        return self._normalise(values)

    def _normalise(self, values: Tensor) -> Tensor:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is None:
                continue
            if values.dim() < 1 or len(numbers) not in (1, values.shape[0]):
                raise SettingError(
                    "preprocess", f"{name} has {len(numbers)} channels, the input has shape {tuple(values.shape)}"
                )
            by = torch.tensor(numbers, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))
            values = values - by if name == "mean" else values / by
        return values

    def _sixteen_bit(self, image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        if image.mode.startswith("F") or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise ValueError(f"mode {image.mode} with values outside 0 ... 65535 has no known range; save it as .npy")
        # Pillow resizes float images exactly, and 16-bit ones not at all.
        from PIL import Image

        return Image.fromarray(pixels.astype(np.float32))

    def _resize(self, image: Image.Image) -> Image.Image:
        if self.resize is None:
            return image
        if isinstance(self.resize, int):
            short = min(image.size)
            # As torchvision rounds: the longer edge down.
            width, height = (int(self.resize * edge / short) for edge in image.size)
        else:
            height, width = self.resize
        width, height = max(1, width), max(1, height)
        check_pixels(width, height, "would be resized to")
        resample: Any = FILTERS[self.interpolation]
        return image if image.size == (width, height) else image.resize((width, height), resample)

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        # More padding on the right, where it is uneven, but for "floor".
        left, top = (
            math.floor(more / 2) if self.crop_offset == "floor" else -(-more // 2) if more < 0 else round(more / 2)
            for more in (image.width - width, image.height - height)
        )
        return image.crop((left, top, left + width, top + height))

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples as lists
        return found

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Preprocess:
        """From a mapping of the arguments by name; errors name ``where`` it comes from."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise SettingError(
                "preprocess", f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}"
            )
        return cls(**settings)

    @classmethod
    def read(cls, path: str | Path) -> Preprocess:
        """From a TOML or JSON file, or a Hugging Face ``preprocessor_config.json``.

        Raises:
            ValueError: a file of another format, or with unknown settings.
            OSError: it cannot be read.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            kind = "JSON" if path.suffix == ".json" else "TOML"
            raise SettingError("preprocess", f"{path} is not {kind} ({error})") from error
        if not isinstance(settings, dict):
            raise SettingError("preprocess", f"{path}: expected names and values, got {type(settings).__name__}")
        if "image_processor_type" in settings or "do_normalize" in settings:
            return cls.of_hugging_face(settings)
        return cls.of(settings, str(path))

    @classmethod
    def of_hugging_face(cls, settings: Mapping[str, Any], kind: str | None = None) -> Preprocess:
        """From the ``preprocessor_config.json`` of a Hugging Face model; see :func:`metadata.hugging_face`."""
        return cls(**metadata.hugging_face(settings, kind))

    @classmethod
    def of_timm(cls, settings: Mapping[str, Any]) -> Preprocess:
        """From timm's ``pretrained_cfg``: the shorter edge becomes ⌊size/crop_pct⌋, then the centre is cut out."""
        return cls(**metadata.timm(settings))

    @classmethod
    def of_torchvision(cls, transform: object) -> Preprocess:
        """From ``transforms()`` of torchvision's weights (``ImageClassification``)."""
        return cls(**metadata.torchvision(transform))
