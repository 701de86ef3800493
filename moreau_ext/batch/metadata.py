"""The preprocessing that the metadata of a model describes: Hugging Face's processors, timm, torchvision.

A setting is carried out exactly, or refused by name: never other pixels than those of the model's own pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .._errors import SettingError

# Pillow's names and numbers, which Hugging Face's files use.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SHORT_224: dict[str, Any] = {"size": {"shortest_edge": 224}, "do_center_crop": True}
# Defaults of the processors of transformers, which their files may leave out, where they are not these.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": FILTERS["bicubic"],
    "do_center_crop": False,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
}
_MOBILE: dict[str, Any] = {"size": {"shortest_edge": 256}, "resample": FILTERS["bilinear"], "do_center_crop": True}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {},
    "Bit": {**_SHORT_224, **_CLIP},
    "CLIP": {**_SHORT_224, **_CLIP},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "DeiT": {"size": {"height": 256, "width": 256}, "do_center_crop": True},
    "EfficientNet": {
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False,
        "include_top": True,
    },
    "Levit": {**_SHORT_224, **_IMAGENET},
    "MobileNetV1": _MOBILE,
    "MobileNetV2": _MOBILE,
    "MobileViT": {**_SHORT_224, "crop_size": {"height": 256, "width": 256}, "do_flip_channel_order": True},
    "PoolFormer": {**_SHORT_224, **_IMAGENET, "crop_pct": 0.9},
    "Pvt": _IMAGENET,
    "Segformer": {**_IMAGENET, "size": {"height": 512, "width": 512}, "resample": FILTERS["bilinear"]},
    "Siglip": {},
    "ViT": {"resample": FILTERS["bilinear"]},
}
# About other things than the pixels of one RGB image.
_IGNORED = {
    "_processor_class", "_valid_processor_keys", "device", "disable_grouping", "do_convert_rgb", "do_reduce_labels",
    "feature_extractor_type", "id2label", "image_processor_type", "label2id", "num_labels", "processor_class",
    "reduce_labels", "return_tensors", "default_to_square",
}  # fmt: skip
# Processors whose size is the shorter edge if it is one number.
_SHORTER = {"Bit", "CLIP", "ConvNext", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT", "PoolFormer", "Siglip"}


def _refused(text: str) -> SettingError:
    return SettingError("preprocess", f"preprocessor_config.json: {text}; describe the steps in a file of your own")


def hugging_face(settings: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """The settings of a :class:`Preprocess` that makes the pixels of an image processor of transformers.

    Args:
        settings: of its file, ``preprocessor_config.json``.
        kind: of the processor, as "ViTImageProcessor", if the file does not name it.

    Raises:
        SettingError: a processor or a setting that is unknown here.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or kind
    if named is None:
        raise _refused("names no image_processor_type, so the meaning of its settings is not known")
    name = str(named)
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    if name not in _PROCESSORS:
        raise _refused(f"{named} is not known here ({', '.join(_PROCESSORS)})")
    given = {key: value for key, value in settings.items() if value is not None}
    found = {**_DEFAULTS, **_PROCESSORS[name], **given}
    unknown = [key for key in given if key not in _DEFAULTS | _PROCESSORS[name] and key not in _IGNORED and given[key]]
    channels_first = {"data_format": ("channels_first", "ChannelDimension.FIRST"), "do_pad": (False,)}
    unknown = [key for key in unknown if given[key] not in channels_first.get(key, ())]
    if unknown:
        raise _refused(f"{', '.join(f'{key}={given[key]!r}' for key in unknown)} is not known for {named}")

    resize, crop = _sizes(name, found)
    scale = float(found["rescale_factor"]) if found["do_rescale"] else 1.0
    mean, std = (_numbers(found[f"image_{which}"]) for which in ("mean", "std"))
    normalised = bool(found["do_normalize"])
    if name == "MobileViT":  # never
        normalised = False
    shift, spread = (mean, std) if normalised else ((0.0,) * len(std), (1.0,) * len(std))
    if found.get("rescale_offset") and found["do_rescale"]:  # pixel·scale − 1
        shift = tuple(value + 1 for value in shift)
    if found.get("include_top"):  # divided by std once more
        spread = tuple(a * b for a, b in zip(spread, std, strict=True))
    return {
        "mode": "BGR" if found.get("do_flip_channel_order") else "RGB",
        "resize": resize,
        "interpolation": _filter(found["resample"]),
        "crop": crop,
        "crop_offset": "round" if crop is None else "floor",
        "scale": scale,
        "mean": shift if any(shift) else None,
        "std": spread if any(value != 1 for value in spread) else None,
    }


def _sizes(name: str, found: Mapping[str, Any]) -> tuple[Any, Any]:
    """(resize, crop) of a processor."""
    shorter = found.get("default_to_square") is False or name in _SHORTER
    size = _edge(found["size"], shorter)
    resize, crop = (size if found["do_resize"] else None), None
    if found["do_center_crop"]:
        crop = _edge(found["crop_size"], False)
    if resize is None:
        return None, crop
    fraction = found.get("crop_pct")
    if name == "ConvNext" and fraction:
        if not isinstance(size, int):
            raise _refused(f"size={found['size']!r} has no shortest_edge")
        if size >= 384:
            return (size, size), crop
        if crop is not None:
            raise _refused("do_center_crop after the crop of crop_pct is not known")
        return int(size / fraction), (size, size)
    if name == "PoolFormer" and fraction:
        square = isinstance(size, int) or size[0] == size[1]
        if not square:
            return (int(size[0] / fraction), int(size[1] / fraction)), crop
        return int((size if isinstance(size, int) else size[0]) / fraction), crop
    if name == "Levit" and isinstance(size, int):
        return int((256 / 224) * size), crop
    return resize, crop


def _edge(size: Any, shorter: bool) -> Any:
    if isinstance(size, Mapping):
        keys = {key for key, value in size.items() if value is not None}
        if keys == {"shortest_edge"}:
            return size["shortest_edge"]
        if keys == {"height", "width"}:
            return (size["height"], size["width"])
        raise _refused(f"a size of {', '.join(sorted(keys)) or 'nothing'} is not known")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return (size[0], size[1])
    if not isinstance(size, int):
        raise _refused(f"a size of {size!r} is not known")
    return size if shorter else (size, size)


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),)


def _filter(value: Any) -> str:
    names = {number: name for name, number in FILTERS.items()}
    name = names.get(value) if isinstance(value, int) else str(value).lower()
    if name not in FILTERS:
        raise _refused(f"resample={value!r} is not known")
    return name


def timm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a :class:`Preprocess` for timm's ``pretrained_cfg``, as ``timm.data.create_transform`` evaluates
    it. What is left out has timm's defaults.

    Raises:
        SettingError: a mode of cropping that is not known here, or a size that is not square.
    """
    channels, *size = settings["input_size"]
    fraction = settings.get("crop_pct") or 0.875
    mode = settings.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise SettingError("preprocess", f"crop_mode {mode!r} of pretrained_cfg is not known here; give a file")
    if len(size) != 2 or (mode == "center" and size[0] != size[1]):
        raise SettingError("preprocess", f"input_size {settings['input_size']!r} of pretrained_cfg is no square")
    height, width = (math.floor(edge / fraction) for edge in size)
    mean = settings.get("mean") or _IMAGENET["image_mean"]
    std = settings.get("std") or _IMAGENET["image_std"]
    return {
        "mode": "L" if channels == 1 else "RGB",
        "resize": height if mode == "center" else (height, width),
        "interpolation": settings.get("interpolation") or "bicubic",
        "crop": (int(size[0]), int(size[1])),
        "mean": tuple(mean),
        "std": tuple(std),
    }


def torchvision(transform: Any) -> dict[str, Any]:
    """The settings of a :class:`Preprocess` for ``transforms()`` of torchvision's weights (``ImageClassification``)."""
    (resize,), (crop,) = transform.resize_size, transform.crop_size
    return {
        "resize": resize,
        "interpolation": str(getattr(transform.interpolation, "value", transform.interpolation)),
        "crop": crop,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
    }
