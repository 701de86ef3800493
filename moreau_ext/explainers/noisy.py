"""Settings of explainers that smooth the score with noise."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral

from ..ops.layout import Tensors, flat_rows
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
        return replace(problem, keys=noise_keys(self.seed, problem.ids), sigma=self._sigmas(problem.inputs))

    def _sigmas(self, inputs: Tensors) -> Tensors:
        if self.sigma is not None:
            return tuple(per_input_setting("sigma", self.sigma, x) for x in inputs)
        sigmas = []
        for x, level in zip(inputs, self._levels(inputs), strict=True):
            flat = flat_rows(x).to(level.dtype)
            sigmas.append(level * (flat.amax(1) - flat.amin(1)))
        return tuple(sigmas)

    def _levels(self, inputs: Tensors) -> Tensors:
        """σ as a fraction of the range of each input."""
        level = 0.05 if self.noise_level is None else self.noise_level
        return tuple(per_input_setting("noise_level", level, x) for x in inputs)
