"""Data of an evaluation: digits, photographs, the files of CIFAR-10, folders of images. Nothing is downloaded."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import zoo
from .._errors import MoreauWarning, SettingError, SettingFileNotFoundError
from ..data.images import SUFFIXES, read_image
from ..zoo.data import Dataset, Split

__all__ = ["cifar10", "imagefolder", "load"]

_CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_PIXELS = 3 * 32 * 32


# Edge of the crops of photographs: at 224 pixels a gradient costs three times as much.
_CROP_SIZE, _CROPS = 128, 8


def load(spec: str, split: Split = "test", size: int | None = None) -> Dataset:
    """Loads data by name.

    Args:
        spec: "digits", "photographs" (48 crops of six), "cifar10:PATH" or "imagefolder:PATH".
        split: "test", "train" or "all"; photographs and a folder of images are the same for every split.
        size: edge of the photographs (128 by default) and of the images of a folder (224).

    Raises:
        ValueError: another ``spec``, or damaged files.
        FileNotFoundError: no such files.

    Example:
        >>> from moreau_ext.evaluation.data import load
        >>> tuple(load("digits").inputs.shape)
        (360, 1, 8, 8)
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        return zoo.digits(split)
    if spec == "photographs":
        return zoo.photographs(size or _CROP_SIZE, _CROPS)
    if kind == "cifar10" and path:
        return cifar10(path, split)
    if kind == "imagefolder" and path:
        return imagefolder(path, size or 224)
    raise SettingError("data", f"expected digits, photographs, cifar10:PATH or imagefolder:PATH, got {spec!r}")


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers. Any other name in a pickle is refused, since it could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.ndarray.__reduce__(np.empty(0))[0]  # the same function without its deprecated name
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, which arrays do not need")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _binary(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows of one label byte and 3,072 pixel bytes, channel by channel."""
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % (1 + _CIFAR_PIXELS):
        raise SettingError(
            "data",
            f"{path}: expected rows of {1 + _CIFAR_PIXELS} bytes, the binary version of CIFAR-10, got {raw.size} bytes",
        )
    rows = raw.reshape(-1, 1 + _CIFAR_PIXELS)
    return rows[:, 1:], rows[:, 0]


def _pickled(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        table = {k.decode() if isinstance(k, bytes) else k: v for k, v in found.items()}
        pixels, labels = table["data"], np.asarray(table["labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _CIFAR_PIXELS):
            raise ValueError(f"data of {pixels.dtype} {pixels.shape} for {len(labels)} labels")
    except Exception as error:  # a hostile or damaged pickle may raise nearly anything
        raise SettingError("data", f"{path} is no batch of CIFAR-10's Python version: {error}") from error
    return pixels, labels


def cifar10(path: str | Path, split: Split = "test") -> Dataset:
    """Loads CIFAR-10 from its files, the binary version (``test_batch.bin``) or the Python one (``test_batch``).

    Args:
        path: the folder of the files, or its parent, as the archives unpack.
        split: "train" (those of ``data_batch_1`` to ``data_batch_5`` that exist), "test", or "all".

    Returns:
        inputs float32 [N, 3, 32, 32] in [0, 1], targets int64 [N], the ten names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another format, or a pickle that names anything but arrays. Such a pickle is refused
            before it runs.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test', got {split!r}")
    base = Path(path)
    folders = [base, base / "cifar-10-batches-bin", base / "cifar-10-batches-py"]
    names = [f"data_batch_{i}" for i in range(1, 6)] if split != "test" else []
    names += ["test_batch"] if split != "train" else []
    for folder in folders:
        for ending, read in ((".bin", _binary), ("", _pickled)):
            files = [folder / f"{name}{ending}" for name in names if (folder / f"{name}{ending}").is_file()]
            if not files:
                continue
            parts = [read(file) for file in files]
            pixels = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32)
            labels = np.concatenate([t for _, t in parts]).astype(np.int64)
            if labels.min() < 0 or labels.max() > 9:
                raise SettingError("data", f"{folder}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
            return Dataset(torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(labels), _CIFAR_NAMES)
    raise SettingFileNotFoundError(
        "data",
        f"{base}: found none of {', '.join(names)}, with .bin or without, there or in its cifar-10-batches-bin or -py",
    )


def imagefolder(path: str | Path, size: int = 224) -> Dataset:
    """Loads images from one folder per class, PATH/CLASS/IMAGE, in the order of their names.

    Args:
        path: the folder of folders.
        size: edge of the square: an image is converted to RGB, resized to that shorter side, and cut in the middle.

    Returns:
        inputs float32 [N, 3, size, size] in [0, 1], upright by EXIF and not normalised: a model that needs normalised
        inputs does so itself.

    Raises:
        FileNotFoundError: no images.
        ValueError: a file that cannot be read as an image.
        ImportError: Pillow is missing.

    Warns of entries of the class folders that are no images by their suffix; hidden ones are left out.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f'images are read by Pillow ({error}): pip install "moreau_ext[evaluation]"') from error
    base = Path(path)
    classes = sorted(d for d in base.iterdir() if d.is_dir()) if base.is_dir() else []
    inputs, targets, left_out = [], [], 0
    for number, folder in enumerate(classes):
        for file in sorted(f for f in folder.iterdir() if not f.name.startswith(".")):
            if file.suffix.lower() not in SUFFIXES:
                left_out += 1
                continue
            try:
                image = read_image(file).convert("RGB")
            except Exception as error:  # decoders of damaged files raise nearly anything
                raise SettingError("data", f"{file} cannot be read as an image: {error}") from error
            square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            inputs.append(torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1))
            targets.append(number)
    if not inputs:
        raise SettingFileNotFoundError(
            "data", f"{base}: found no images in folders named by their class, PATH/CLASS/IMAGE"
        )
    if left_out:
        known = ", ".join(sorted(SUFFIXES))
        text = f"{base}: left out {left_out} that are no images by their suffix ({known})"
        warnings.warn(text, MoreauWarning, stacklevel=2)
    names = tuple(folder.name for folder in classes)
    return Dataset(torch.stack(inputs).contiguous(), torch.tensor(targets), names)
