"""Settings of explainers with a penalty."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .. import ops
from ..ops.layout import Tensors, tensor_of
from ..solvers.penalties import L1, Penalty
from ..solvers.problem import Problem, Tuning
from .base import Explainer
from .settings import Scalar, check_scalar, per_feature, per_input_setting


@dataclass(frozen=True, eq=False, repr=False)
class Sparse(Explainer):
    """An explainer with a strength η: absolute, as a fraction of each input's η_max, or by the support it leads to."""

    eta: Scalar | None = field(default=None, kw_only=True)
    eta_ratio: Scalar | None = field(default=None, kw_only=True)
    support: Scalar | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(setting is not None for setting in (self.eta, self.eta_ratio, self.support)) > 1:
            raise ValueError(
                "give one of eta (absolute), eta_ratio (a fraction of each input's eta_max) and support (features or "
                "groups that are not zero)"
            )
        for name in ("eta", "eta_ratio"):
            if getattr(self, name) is not None:
                check_scalar(name, getattr(self, name))
        if self.support is not None:
            check_scalar("support", self.support, positive=True)
            if tensor_of(self.support).is_floating_point() and bool((tensor_of(self.support) > 1).any()):
                raise ValueError(
                    f"support: expected a count (an integer) or a fraction in (0, 1], got {self.support!r}"
                )

    def pose(self, problem: Problem) -> Problem:
        problem = super().pose(problem)
        problem = replace(problem, penalty=self._penalty(problem))
        if self.support is None:
            return problem
        asked = tensor_of(self.support)
        support = per_input_setting("support", asked.double(), problem.inputs[0])
        count = problem.penalty.count(problem.free)
        if asked.is_floating_point():
            support = (support.double() * count).round().clamp_min(1)
        return replace(problem, tuning=replace(problem.tuning or Tuning(), support=support.long(), count=count))

    def _penalty(self, problem: Problem) -> Penalty:
        """L1 unless overridden."""
        inputs = problem.inputs
        if self.eta is not None and tensor_of(self.eta).dim() > 1:
            return L1((per_feature(tensor_of(self.eta, dtype=ops.state_dtype(inputs[0].dtype)), inputs),))
        return L1(*self._strength(inputs))

    def _strength(self, inputs: Tensors) -> tuple[Tensors, bool]:
        """(η or its ratio to η_max per tensor, whether it is the ratio)."""
        if self.support is not None:
            return tuple(per_input_setting("eta", 0.0, x) for x in inputs), False
        if self.eta is None:
            ratio = 0.1 if self.eta_ratio is None else self.eta_ratio
            return tuple(per_input_setting("eta_ratio", ratio, x) for x in inputs), True
        return tuple(per_input_setting("eta", self.eta, x) for x in inputs), False
