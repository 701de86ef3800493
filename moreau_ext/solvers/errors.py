"""What is known of the error of a map: its parts, p-values, and the features that are there beyond noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A bound is met by the end of a level, and each level makes an explanation half as long again: the middle of the two.
LEVELS = 1.5**0.5
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Errors:
    """The parts of the error of an answer, relative to its length; float64 [B], NaN where unknown.

    Args:
        sampling: of the mean over finitely many noisy copies, one standard deviation.
        settling: of an iteration that has not come to rest.
        nonlinearity: of gradients that were averaged over several points, and of all that a look at the answer found.
        total: the root of the sum of their squares.
        unit_cost: gradients that would leave a sampling error of 1; it falls with the square root of their number.
    """

    sampling: Tensor
    settling: Tensor
    nonlinearity: Tensor
    total: Tensor
    unit_cost: Tensor

    @classmethod
    def of(
        cls, scale: Tensor, sampling2: Tensor, settling2: Tensor, nonlinearity2: Tensor, unit_cost2: Tensor
    ) -> Errors:
        """From squared lengths and the length that they are relative to.

        Args:
            scale: of the answer.
            sampling2, settling2, nonlinearity2: the parts.
            unit_cost2: samples times the square of their error; the squared length of the answer without the noise in
                it is what it is relative to.
        """
        length2 = scale.square()
        clean2 = (length2 - sampling2).maximum(length2 / 100)

        def share(part2: Tensor, of2: Tensor) -> Tensor:
            return torch.where(part2 == 0, 0.0, part2 / of2.clamp_min(_TINY))

        parts = [share(part2, length2).sqrt() for part2 in (sampling2, settling2, nonlinearity2)]
        total = torch.stack([part.square() for part in parts]).sum(0).sqrt()
        sampling, settling, nonlinearity = parts
        return cls(sampling, settling, nonlinearity, total, share(unit_cost2, clean2))

    @classmethod
    def unknown(cls, like: Tensor) -> Errors:
        """NaN, [B] as ``like``."""
        nan = torch.full_like(like, torch.nan, dtype=torch.float64)
        return cls(nan, nan, nan, nan, nan)


def normal_of_student(t: Tensor, freedom: Tensor) -> Tensor:
    """The z with P(Z > z) = P(T > t), T of Student's distribution with so many degrees of freedom, to 4 % of the
    tail (Wallace 1959)."""
    scaled = (freedom * torch.log1p(t.square() / freedom)).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    return torch.copysign(scaled, t)


def normal_of_gamma(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The z with P(Z > z) = P(Y > value) for a scaled χ² of that mean and variance (Wilson and Hilferty 1931)."""
    ninth = variance / (9 * mean.square().clamp_min(_TINY))
    ratio = (value / mean.clamp_min(_TINY)).clamp_min(0) ** (1 / 3)
    return (ratio - (1 - ninth)) / ninth.clamp_min(_TINY).sqrt()


def upper_tail(z: Tensor) -> Tensor:
    """P(Z > z)."""
    tail: Tensor = torch.special.ndtr(-z)
    return tail


def benjamini_hochberg(p_values: Tensor, q: float, tested: Tensor) -> Tensor:
    """The hypotheses of each row, [B, n], that are rejected at a false discovery rate of q; bool.

    Args:
        p_values: in [0, 1].
        q: the rate.
        tested: bool [B, n]; the others count for nothing.

    Source: Benjamini and Hochberg (1995).
    """
    p_values = p_values.masked_fill(~tested, torch.inf)
    ordered = p_values.sort(dim=1).values
    rank = torch.arange(1, p_values.shape[1] + 1, dtype=ordered.dtype, device=ordered.device)
    under = ordered <= q * rank / tested.sum(1, keepdim=True).clamp_min(1)
    last = torch.where(under, ordered, -1.0).amax(1, keepdim=True)
    return p_values <= last
