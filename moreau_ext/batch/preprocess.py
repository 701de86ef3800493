"""Preprocessing of images for a model, read from TOML, JSON or the metadata of the model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import SettingError

if TYPE_CHECKING:
    from PIL import Image

# Pillow's own names and numbers, which Hugging Face's files use.
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_MODES = ("RGB", "L")
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
        mode: "RGB" or "L", converted by Pillow. CMYK and palettes become RGB without a colour profile; transparency is
            dropped. 16-bit gray is mapped exactly to [0, 1] in every channel.
        resize: the shorter edge in pixels, or (height, width).
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos.
        crop: the centre, as its edge or (height, width); smaller images are padded with zeros.
        scale: factor of pixel values 0 ... 255.
        mean, std: per channel, in units after ``scale``: x = (pixel·scale − mean)/std.

    Tensors that are not images (.npy, .npz, tensor columns) are scaled if they hold integers, and normalised.

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
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise SettingError("preprocess", f"mode: expected one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.interpolation not in _FILTERS:
            raise SettingError(
                "preprocess", f"interpolation: expected one of {', '.join(_FILTERS)}, got {self.interpolation!r}"
            )
        for name in ("resize", "crop"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _size(name, getattr(self, name)))
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
        elif image.mode != self.mode:
            image = image.convert(self.mode)
        image = self._crop(self._resize(image))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        pixels = pixels * (255 * self.scale / 65535 if wide else self.scale)
        if wide and self.mode == "RGB":
            pixels = pixels.expand(3, -1, -1)
        return self._normalise(pixels).contiguous()

    def tensor(self, values: Tensor) -> Tensor:
        """A tensor as a normalised input; integers are scaled to floating point."""
        return self._normalise(values if values.is_floating_point() else values.to(torch.float32) * self.scale)

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
        resample: Any = _FILTERS[self.interpolation]
        return image if image.size == (width, height) else image.resize((max(1, width), max(1, height)), resample)

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
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
    def of_hugging_face(cls, settings: Mapping[str, Any]) -> Preprocess:
        """From the ``preprocessor_config.json`` of an image classifier of Hugging Face."""
        filters = {number: name for name, number in _FILTERS.items()}

        def edge(size: Any) -> Any:
            if not isinstance(size, Mapping):
                return size
            if "shortest_edge" in size:
                return size["shortest_edge"]
            return (size["height"], size["width"])

        def when(flag: str, name: str, default: Any = None) -> Any:
            return settings.get(name) if settings.get(flag, name in settings) else default

        try:
            return cls(
                resize=edge(when("do_resize", "size")),
                interpolation=filters[settings.get("resample", 2)],
                crop=edge(when("do_center_crop", "crop_size")),
                scale=when("do_rescale", "rescale_factor") or (1 / 255 if settings.get("do_rescale", True) else 1.0),
                mean=when("do_normalize", "image_mean"),
                std=when("do_normalize", "image_std"),
            )
        except KeyError as error:
            raise SettingError(
                "preprocess", f"preprocessor_config.json has a value that is unknown here, {error}; give a file"
            ) from error

    @classmethod
    def of_timm(cls, settings: Mapping[str, Any]) -> Preprocess:
        """From timm's ``pretrained_cfg``: the shorter edge becomes ⌊size/crop_pct⌋, then the centre is cut out."""
        channels, *size = settings["input_size"]
        fraction = settings.get("crop_pct") or 1.0
        height, width = (int(edge / fraction) for edge in size)
        return cls(
            mode="L" if channels == 1 else "RGB",
            resize=height if size[0] == size[1] else (height, width),
            interpolation=settings.get("interpolation") or "bilinear",
            crop=(int(size[0]), int(size[1])),
            mean=settings.get("mean"),
            std=settings.get("std"),
        )

    @classmethod
    def of_torchvision(cls, transform: Any) -> Preprocess:
        """From ``transforms()`` of torchvision's weights (``ImageClassification``)."""
        (resize,), (crop,) = transform.resize_size, transform.crop_size
        return cls(
            resize=resize,
            interpolation=str(getattr(transform.interpolation, "value", transform.interpolation)),
            crop=crop,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )
