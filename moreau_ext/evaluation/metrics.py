"""Numbers that judge maps: tensor in, one number per input out. Each states its formula and where it comes from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gini"]

# Features sorted at a time: 128 MiB of float64, so that a data set's maps need no second copy in memory.
_CHUNK = 1 << 24


def gini(maps: Tensor) -> Tensor:
    """How unevenly |map| is spread over the features of each input: the Gini coefficient, a measure of sparsity.

    G = Σ_k (2k - n - 1)·a_k / (n·Σ_k a_k), with a_1 <= ... <= a_n the sorted |map| of one input. 0 where all features
    weigh the same, 1 - 1/n where one carries all; it does not change with the map's scale or sign.

    Args:
        maps: [B, *features], real and of any dtype.

    Returns:
        float64 [B] in [0, 1). A map of zeros only has no coefficient and is given 0, the value of a map that singles
        nothing out; NaN or infinity in a map gives NaN.

    Raises:
        ValueError: no batch axis.

    Source: Chalasani et al. 2020, "Concise Explanations of Neural Networks using Adversarial Training", ICML.

    Notes:
        Each input's number is its own: the rest of the batch changes it by rounding at most.

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
        # By the largest first, so that no sum overflows or drowns in the smallest numbers.
        a = a / a[:, -1:].where(a[:, -1:] != 0, 1)
        parts.append((a @ weights) / (n * a.sum(1)).where(a[:, -1] != 0, 1))
    return torch.cat(parts)
