"""captum's Integrated Gradients behind the call of our explainers, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..baselines import at_zero
from ..explainers import Explainer, check_count
from ..groups import flat_rows
from ..solvers import Problem, Solution


@dataclass(frozen=True, eq=False)
class IntegratedGradients(Explainer):
    """Integrated Gradients from a zero (or given) baseline, as captum computes them.

    A_i(x) = (x_i − b_i) ∫₀¹ ∂_i f(b + t(x − b)) dt. Unlike the other maps it is multiplied by the input.

    Args:
        model, score, max_batch, unused_inputs: see :class:`moreau_ext.MoreauGrad`.
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
        from captum.attr import IntegratedGradients as Captum

        def forward(*arguments: Tensor) -> Tensor:
            *rows, which = arguments
            score = problem.score.take(which)
            return score.of_output(score.output(tuple(rows)))

        batch = problem.keys.shape[0]
        limit = None if self.max_batch is None else max(self.max_batch, batch)
        which = torch.arange(batch, device=problem.keys.device)
        with torch.enable_grad():
            maps = Captum(forward).attribute(
                problem.inputs,
                baselines=self.baselines,
                additional_forward_args=(which,),
                n_steps=self.n_steps,
                internal_batch_size=limit,
            )
        maps = tuple(a.detach().to(x.dtype) for a, x in zip(maps, problem.inputs, strict=True))
        nnz = torch.stack([flat_rows(a != 0).sum(1) for a in maps]).sum(0)
        ones, unknown = torch.ones_like(nnz), torch.full_like(problem.value, torch.nan).double()
        states = tuple(torch.zeros_like(r) for r in problem.rho)
        return at_zero(
            Solution(
                attribution=maps,
                displacement=tuple(a.to(r.dtype) for a, r in zip(maps, problem.rho, strict=True)),
                envelope=unknown,
                envelope_gradient=tuple(
                    torch.full_like(a, torch.nan, dtype=r.dtype) for a, r in zip(maps, problem.rho, strict=True)
                ),
                score=problem.value,
                residual=unknown,
                relative_residual=unknown,
                steps=ones,
                gradient_evaluations=ones * self.n_steps,
                converged=ones.bool(),
                nnz=nnz,
                empty=nnz == 0,
                eta=states,
                sigma=problem.sigma,
            )
        )
