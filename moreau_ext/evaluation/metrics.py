"""Metrics of maps, one number per input, each with its formula and source.

Metrics that compare two maps do not depend on the scale of either. Every docstring defines the value for a map of
zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "cosine",
    "gini",
    "normalised_distance",
    "ssim",
    "support_fraction",
    "support_jaccard",
    "topk_intersection",
    "topk_mask",
]

# Features per sort: 128 MiB of float64, so that the maps of a whole data set are not copied at once.
_CHUNK = 1 << 24


def gini(maps: Tensor) -> Tensor:
    """The Gini coefficient of |map| over the features of each input, a measure of sparsity.

    G = Σ_k (2k - n - 1)·a_k / (n·Σ_k a_k), with a_1 <= ... <= a_n the sorted |map| of one input. 0 if all
    features are equal, 1 - 1/n if one carries all; it does not depend on the map's scale or sign.

    Args:
        maps: [B, *features], real and of any dtype.

    Returns:
        float64 [B] in [0, 1). A map of zeros has no coefficient; it gets 0, like a map of equal features. NaN or
        infinity in a map gives NaN.

    Raises:
        ValueError: no batch axis.

    Source: Chalasani et al. 2020, "Concise Explanations of Neural Networks using Adversarial Training", ICML.

    Notes:
        The number of an input does not depend on the rest of the batch, up to rounding.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import gini
        >>> gini(torch.tensor([[1.0, -1.0], [0.0, 3.0], [0.0, 0.0]])).tolist()
        [0.0, 0.5, 0.0]
    """
    if maps.dim() < 1:
        raise ValueError("maps: expected a batch axis, got a tensor without axes")
    flat = maps.detach().reshape(maps.shape[0], -1) if maps.numel() else maps.new_zeros(maps.shape[0], 1)
    n = flat.shape[1]
    weights = torch.arange(1 - n, n, 2, dtype=torch.float64, device=maps.device)
    parts = []
    for rows in torch.split(flat, max(1, _CHUNK // n)):
        a = rows.to(torch.float64).abs_() if rows.dtype != torch.float64 else rows.abs()
        a = a.sort(dim=1).values
        # Divided by the largest, so that no sum overflows or underflows.
        a = a / a[:, -1:].where(a[:, -1:] != 0, 1)
        parts.append((a @ weights) / (n * a.sum(1)).where(a[:, -1] != 0, 1))
    return torch.cat(parts)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 [B, features]."""
    if a.dim() < 1 or a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, with a batch axis, got {tuple(b.shape)}")

    def flat(t: Tensor) -> Tensor:
        return t.detach().reshape(len(t), -1).double() if t.numel() else t.new_zeros(len(t), 1).double()

    return flat(a), flat(b)


def support_fraction(maps: Tensor) -> Tensor:
    """The share of non-zero features: |{i: map_i != 0}| / n.

    Args:
        maps: [B, *features].

    Returns:
        float64 [B] in [0, 1]. Only exact zeros count as zero; NaN counts as non-zero.

    Raises:
        ValueError: no batch axis.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import support_fraction
        >>> support_fraction(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist()
        [0.5, 0.0]
    """
    flat, _ = _pair(maps, maps)
    return (flat != 0).double().mean(1)


def support_jaccard(maps: Tensor, others: Tensor) -> Tensor:
    """The Jaccard index of two supports, |S ∩ S'| / |S ∪ S'| with S = {i: map_i != 0}.

    Args:
        maps, others: [B, *features].

    Returns:
        float64 [B] in [0, 1]; 1 if both are empty, NaN if both are dense: two full supports agree, which says nothing.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import support_jaccard
        >>> support_jaccard(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])).tolist()
        [0.5]
    """
    one, other = (flat != 0 for flat in _pair(maps, others))
    shared, either = (one & other).double().sum(1), (one | other).double().sum(1)
    found = torch.where(either > 0, shared / either.clamp_min(1), 1.0)
    return torch.where(one.all(1) & other.all(1), torch.nan, found)


def topk_mask(maps: Tensor, k: int | float) -> Tensor:
    """The positions of the k largest |map| of each input.

    Args:
        maps: [B, *features].
        k: an integer, the number of features; or a fraction in (0, 1] of the map's own non-zero features, rounded up.
            Zeros are never among the largest, so a sparse map may have fewer than k. Ties go to the earlier feature.

    Returns:
        bool, shaped as ``maps``.

    Raises:
        ValueError: a ``k`` below 1 that is no fraction, or a fraction above 1.
    """
    if isinstance(k, bool) or not (0 < k <= 1 if isinstance(k, float) else k >= 1):
        raise ValueError(f"k: expected a positive integer, or a fraction of the non-zeros in (0, 1], got {k!r}")
    size, _ = _pair(maps, maps)
    size = size.abs()
    nonzero = (size > 0).sum(1, keepdim=True)
    # A product such as 0.4 * 5 may round to slightly more than its integer.
    count = (nonzero * k - 1e-9).ceil() if isinstance(k, float) else nonzero.clamp_max(k)
    order = size.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size.shape[1], device=size.device).expand_as(order))
    return (rank < count).reshape(maps.shape)


def topk_intersection(a: Tensor, b: Tensor, k: int | float = 0.4) -> Tensor:
    """The share of the k largest |a| that are among the k largest |b|: |T_k(a) ∩ T_k(b)| / k.

    Args:
        a: [B, *features], the map to compare with.
        b: shaped as ``a``.
        k: an integer, or a fraction of the non-zero features **of a**, rounded up; the same number is taken of b. The
            published protocol takes 0.4. A dense map then has a larger k than a sparse one; two unrelated dense maps
            share 40 % by chance, two unrelated sparse maps almost nothing. So compare methods by a fixed k too.

    Returns:
        float64 [B] in [0, 1]. Zeros are never among the largest. Where a is zero everywhere: 1 if b is, else 0.

    Raises:
        ValueError: shapes that differ, or another ``k``.

    Source: Ghorbani, Abid, Zou 2019, "Interpretation of Neural Networks is Fragile", AAAI, arXiv 1710.10547.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import topk_intersection
        >>> topk_intersection(torch.tensor([[4.0, -3.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0]]), k=2).tolist()
        [0.5]
    """
    x, y = _pair(a, b)
    top = topk_mask(x, k)
    count = top.sum(1, keepdim=True)
    size = y.abs()
    order = size.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size.shape[1], device=size.device).expand_as(order))
    shared = (top & (rank < count) & (size > 0)).sum(1).double()
    return torch.where(count[:, 0] > 0, shared / count[:, 0].clamp_min(1), (size == 0).all(1).double())


def normalised_distance(a: Tensor, b: Tensor) -> Tensor:
    """The distance of the directions of two maps: ‖a/‖a‖ − b/‖b‖‖₂.

    Args:
        a, b: [B, *features].

    Returns:
        float64 [B] in [0, 2]. A map of zeros has no direction and stays zero: 1 against any other, 0 against its like.

    Raises:
        ValueError: shapes that differ.

    Source: arXiv 2302.05294, section 5.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import normalised_distance
        >>> normalised_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).tolist()
        [2.0]
    """
    x, y = _pair(a, b)
    difference = _unit(x) - _unit(y)
    return difference.square().sum(1).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between two maps: a·b / (‖a‖·‖b‖).

    Args:
        a, b: [B, *features].

    Returns:
        float64 [B] in [−1, 1]; 0 where either is zero everywhere.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import cosine
        >>> cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])).tolist()
        [0.8]
    """
    x, y = _pair(a, b)
    return (_unit(x) * _unit(y)).sum(1).clamp(-1, 1)


def _unit(flat: Tensor) -> Tensor:
    # Divided by the largest, so that squares neither overflow nor underflow.
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / largest.where(largest != 0, 1)
    norm = flat.norm(dim=1, keepdim=True)
    unit: Tensor = flat / norm.where(norm != 0, 1)
    return unit


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The structural similarity of two maps, by scikit-image.

    |map| is summed over channels and divided by its maximum. These images in [0, 1] are compared by scikit-image's
    ``structural_similarity`` with its defaults (a uniform window of 7, or the largest odd one that fits).

    Args:
        a, b: [B, H, W] or [B, channels, H, W], at least 3 pixels wide and high.

    Returns:
        float64 [B] in [−1, 1]. A map of zeros is a black image.

    Raises:
        ImportError: scikit-image is missing.
        ValueError: shapes that differ or are not those of images.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import ssim
        >>> ssim(torch.ones(1, 1, 8, 8), -2 * torch.ones(1, 1, 8, 8)).tolist()
        [1.0]
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError(
            f'SSIM is scikit-image\'s ({error}); install it with: pip install "moreau_ext[evaluation]"'
        ) from error
    _pair(a, b)
    if a.dim() not in (3, 4) or min(a.shape[-2:]) < 3:
        raise ValueError(
            f"a, b: expected pictures, [B, H, W] or [B, channels, H, W] of at least 3 x 3, got {tuple(a.shape)}"
        )
    window = min(7, (min(a.shape[-2:]) - 1) // 2 * 2 + 1)
    pictures = []
    for maps in (a, b):
        size = maps.detach().abs().to("cpu", torch.float64)
        size = size.sum(1) if size.dim() == 4 else size
        largest = size.flatten(1).amax(1)[:, None, None] if len(size) else size.new_ones(0, 1, 1)
        pictures.append((size / largest.where(largest != 0, 1)).numpy())
    similarity: Callable[..., Any] = structural_similarity
    values = [
        math.nan if math.isnan(float(x.sum() + y.sum())) else similarity(x, y, data_range=1, win_size=window)
        for x, y in zip(*pictures, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64, device=a.device)
