"""Settings of explainers that smooth the score with noise."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral

import torch

from ..ops.layout import Tensors
from ..ops.noise import noise_keys
from ..solvers.problem import Problem
from .base import Explainer
from .settings import Scalar, check_scalar, per_input_setting


@dataclass(frozen=True, eq=False, repr=False)
class Noisy(Explainer):
    """An explainer that smooths the score with the noise bank."""

    noise_level: Scalar | None = field(default=None, kw_only=True)
    sigma: Scalar | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_level is not None and self.sigma is not None:
            raise ValueError("give noise_level (a fraction of each input's range) or sigma (absolute), not both")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):  # Integral: numpy's too
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("noise_level", "sigma"):
            if getattr(self, name) is not None:
                check_scalar(name, getattr(self, name))

    def pose(self, problem: Problem) -> Problem:
        return replace(problem, keys=noise_keys(self.seed, problem.ids), sigma=self._sigmas(problem))

    def _sigmas(self, problem: Problem) -> Tensors:
        inputs = problem.inputs
        if self.sigma is not None:
            return tuple(per_input_setting("sigma", self.sigma, x) for x in inputs)
        levels = self._levels(inputs)
        extents = [
            high.to(level.dtype).amax(1) - low.to(level.dtype).amin(1)
            for level, (low, high) in zip(levels, problem.free_values, strict=True)
        ]
        if problem.score.fixed is None:
            return tuple([level * extent for level, extent in zip(levels, extents, strict=True)])
        # Without free features a tensor has the extent −∞. No feature has its σ, and it must not be a tuple's least.
        found = [level * extent.clamp_min(0) for level, extent in zip(levels, extents, strict=True)]
        none = torch.stack([extent < 0 for extent in extents])
        others = torch.stack([s.double() for s in found]).amax(0).masked_fill(none.all(0), 1.0)
        return tuple([torch.where(n, others.to(s.dtype), s) for n, s in zip(none, found, strict=True)])

    def _levels(self, inputs: Tensors) -> Tensors:
        """σ as a fraction of the range of each input."""
        level = 0.05 if self.noise_level is None else self.noise_level
        return tuple(per_input_setting("noise_level", level, x) for x in inputs)
