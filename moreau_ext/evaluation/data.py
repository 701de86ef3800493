"""Data to evaluate on: the digits, CIFAR-10's own files, and folders of pictures. Nothing is downloaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import zoo
from ..zoo.data import Dataset, Split

__all__ = ["cifar10", "imagefolder", "load"]

_CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_PIXELS = 3 * 32 * 32
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def load(spec: str, split: Split = "test", size: int = 224) -> Dataset:
    """Data by their name.

    Args:
        spec: "digits", "cifar10:PATH" or "imagefolder:PATH".
        split: "test", "train" or "all"; folders of pictures have one part only, which serves every split.
        size: edge of the pictures of a folder.

    Raises:
        ValueError: another ``spec``, or files that are not what they should be.
        FileNotFoundError: nothing there.

    Example:
        >>> from moreau_ext.evaluation.data import load
        >>> tuple(load("digits").inputs.shape)
        (360, 1, 8, 8)
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        return zoo.digits(split)
    if kind == "cifar10" and path:
        return cifar10(path, split)
    if kind == "imagefolder" and path:
        return imagefolder(path, size)
    raise ValueError(f"data: expected digits, cifar10:PATH or imagefolder:PATH, got {spec!r}")


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers, and refuses everything else that a pickle could name and so run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.ndarray.__reduce__(np.empty(0))[0]  # the same function, without its deprecated address
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
        raise ValueError(
            f"{path}: expected rows of {1 + _CIFAR_PIXELS} bytes, as in CIFAR-10's binary version, got {raw.size} bytes"
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
        raise ValueError(f"{path}: is no batch of CIFAR-10's Python version: {error}") from error
    return pixels, labels


def cifar10(path: str | Path, split: Split = "test") -> Dataset:
    """CIFAR-10 from its own files, the binary version (``test_batch.bin``) or the Python one (``test_batch``).

    Args:
        path: the folder that holds the files, or the one above it, as the archives unpack.
        split: "train" (``data_batch_1`` to ``data_batch_5``, those that are there), "test", or "all".

    Returns:
        inputs float32 [N, 3, 32, 32] in [0, 1], targets int64 [N], the ten names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another form, or a pickle that names anything but arrays, which is refused unread: a
            pickle from elsewhere is a program.

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
                raise ValueError(f"{folder}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
            return Dataset(torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(labels), _CIFAR_NAMES)
    raise FileNotFoundError(
        f"{base}: found none of {', '.join(names)}, with .bin or without, there or in its cifar-10-batches-bin or -py"
    )


def imagefolder(path: str | Path, size: int = 224) -> Dataset:
    """Pictures in one folder per class: PATH/CLASS/PICTURE, classes and pictures in the order of their names.

    Args:
        path: the folder of folders.
        size: edge of the square: pictures are turned to RGB, resized to that shorter side, and cut in the middle.

    Returns:
        inputs float32 [N, 3, size, size] in [0, 1], not normalised: a model that needs it does so itself.

    Raises:
        FileNotFoundError: no pictures there.
        ValueError: a file that cannot be read as a picture, by its name.
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f'pictures are read by Pillow ({error}): pip install "moreau_ext[evaluation]"') from error
    base = Path(path)
    classes = sorted(d for d in base.iterdir() if d.is_dir()) if base.is_dir() else []
    inputs, targets = [], []
    for number, folder in enumerate(classes):
        for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in _PICTURES):
            try:
                with Image.open(file) as image:
                    upright = ImageOps.exif_transpose(image).convert("RGB")
            except Exception as error:  # decoders of damaged files raise nearly anything
                raise ValueError(f"{file}: cannot be read as a picture: {error}") from error
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
            inputs.append(torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1))
            targets.append(number)
    if not inputs:
        raise FileNotFoundError(f"{base}: found no pictures in folders named by their class, PATH/CLASS/PICTURE")
    names = tuple(folder.name for folder in classes)
    return Dataset(torch.stack(inputs).contiguous(), torch.tensor(targets), names)
