"""Data sets of scikit-learn: digits and breast cancer."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Split = Literal["all", "train", "test"]


class Dataset(NamedTuple):
    """Inputs with their classes.

    Args:
        inputs: float32 [N, *features].
        targets: int64 [N], the class of each.
        names: of the classes, by number.
    """

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]


def _rows(count: int, split: Split) -> Tensor:
    """Row numbers of a split: the first 80 % of a permutation that depends only on ``count``, the rest, or all."""
    if split == "all":
        return torch.arange(count)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test', got {split!r}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    border = count * 4 // 5
    return (order[:border] if split == "train" else order[border:]).sort().values


def _needs_sklearn(error: ImportError) -> ImportError:
    return ImportError(f'these data come with scikit-learn ({error}); install it with: pip install "moreau_ext[demo]"')


def digits(split: Split = "all") -> Dataset:
    """Handwritten digits of 8 x 8 pixels: the 1,797 of scikit-learn, from the test part of UCI's optdigits.

    Args:
        split: "all" in the order of the source; "train" (1,437) or "test" (360), a fixed permutation cut at 80 %.

    Returns:
        inputs float32 [N, 1, 8, 8] in [0, 1] (ink counts 0..16 over 16), targets int64 [N], names "0".."9".

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another ``split``.

    Example:
        >>> from moreau_ext import zoo
        >>> tuple(zoo.digits("test").inputs.shape)
        (360, 1, 8, 8)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _needs_sklearn(error) from error
    raw = load_digits()
    rows = _rows(len(raw.target), split)
    images = torch.from_numpy(raw.images).to(torch.float32).div_(16).unsqueeze(1)
    return Dataset(images[rows], torch.from_numpy(raw.target).long()[rows], tuple(str(n) for n in raw.target_names))


def digits32(split: Split = "all") -> Dataset:
    """The digits as colour images of 32 x 32 pixels: enlarged (bilinear) and repeated for 3 channels.

    Args, returns and errors as for :func:`digits`, but inputs float32 [N, 3, 32, 32].

    Example:
        >>> from moreau_ext import zoo
        >>> tuple(zoo.digits32("test").inputs.shape)
        (360, 3, 32, 32)
    """
    small = digits(split)
    large = nn.functional.interpolate(small.inputs, size=(32, 32), mode="bilinear", align_corners=False)
    return small._replace(inputs=large.repeat(1, 3, 1, 1))


def breast_cancer(split: Split = "all") -> Dataset:
    """Measurements of 569 breast masses (UCI's Wisconsin diagnostic table), 30 features each.

    Args:
        split: "all" in the order of the source; "train" (455) or "test" (114), a fixed permutation cut at 80 %.

    Returns:
        inputs float32 [N, 30], each feature standardised by the mean and standard deviation of the train rows;
        targets int64 [N], 0 malignant and 1 benign.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another ``split``.

    Example:
        >>> from moreau_ext import zoo
        >>> zoo.breast_cancer().inputs.shape, zoo.breast_cancer().names
        (torch.Size([569, 30]), ('malignant', 'benign'))
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise _needs_sklearn(error) from error
    raw = load_breast_cancer()
    rows = _rows(len(raw.target), split)
    table = torch.from_numpy(raw.data)
    seen = table[_rows(len(raw.target), "train")]
    table = ((table - seen.mean(0)) / seen.std(0)).to(torch.float32)
    return Dataset(table[rows], torch.from_numpy(raw.target).long()[rows], tuple(str(n) for n in raw.target_names))
