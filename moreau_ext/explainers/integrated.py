"""captum's Integrated Gradients behind the call of our explainers, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count
from ..solvers.loop import in_groups
from ..solvers.problem import Problem
from ..solvers.solution import Solution
from .base import Explainer
from .gradients import unsolved


@dataclass(frozen=True, eq=False, repr=False)
class IntegratedGradients(Explainer):
    """Integrated Gradients from a zero (or given) baseline, as captum computes them.

    A_i(x) = (x_i − b_i) ∫₀¹ ∂_i f(b + t(x − b)) dt. Unlike the other maps it is multiplied by the input.

    Args:
        model, score, max_batch, unused_inputs, precision, output_fn, layer: see :class:`moreau_ext.MoreauGrad`.
        baselines: as captum takes them; None for 0.
        n_steps: points of the quadrature.

    Raises:
        ImportError: captum is not installed.

    Source: Sundararajan et al., arXiv 1703.01365; captum.attr.IntegratedGradients.
    """

    baselines: Any = field(default=None, kw_only=True)
    n_steps: int = field(default=50, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_steps", self.n_steps)
        if find_spec("captum") is None:
            raise ImportError("integrated_gradients is captum's: pip install captum")

    def _solve(self, problem: Problem) -> Solution:
        return in_groups(problem, 1, self._some)

    def _some(self, problem: Problem) -> Solution:
        from captum.attr import IntegratedGradients as Captum

        def forward(*arguments: Tensor) -> Tensor:
            *inputs, which = arguments
            score = problem.score.take(which)
            return score.of_output(score.output(tuple([x.clone() for x in inputs])))

        with torch.enable_grad(), problem.score.passing(problem.keys.device):
            maps = Captum(forward).attribute(
                problem.inputs,
                baselines=self.baselines,
                additional_forward_args=(torch.arange(problem.keys.shape[0], device=problem.keys.device),),
                n_steps=self.n_steps,
                internal_batch_size=problem.passes.max_rows,
            )
        maps = tuple(a.detach().to(r.dtype) for a, r in zip(maps, problem.rho, strict=True))
        return unsolved(problem, maps, self.n_steps)
