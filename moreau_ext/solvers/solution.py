"""The solution of a batch."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import torch
from torch import Tensor

from ..ops.layout import Tensors, each_tensor, flat_rows, in_form_of, join, take, tensors_of
from .errors import Errors, benjamini_hochberg
from .problem import Problem

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # The form of the inputs: one tensor, several by position, or several by name.
    Form = TypeVar("Form", bound=Tensor | tuple[Tensor, ...] | Mapping[str, Tensor], default=Any)
else:
    from typing import TypeVar

    Form = TypeVar("Form")

# Some inputs of a batch, by position.
Index = int | slice | Sequence[int] | Sequence[bool] | Tensor | np.ndarray[Any, Any]

_PREMISE = (
    "Errors rest on what was sampled: a step of the score that fewer than 3 in N of N samples straddle may be missed."
)


@dataclass(frozen=True, repr=False)
class Solution(Generic[Form]):
    """The result of an explanation. Fields over features have the form of the inputs (a tensor, a tuple or a dict); the
    others hold one number per input, [B].

    Args:
        attribution: the map A = S_η(p) ≈ −δ*/ρ, in the dtype of the inputs; units of a gradient; positive raises the
            score.
        displacement: y = −ρ·A, the answer for δ*, state dtype.
        envelope: H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ) at the last displacement that was evaluated: the envelope F(x),
            from above, with the error of its m samples. float64.
        envelope_gradient: p, the gradient of the envelope; dense where the map is sparse.
        score: f(x), without noise.
        residual: with ProximalGradient ‖δ − y‖₂ of the last displacement evaluated, the noise of its m samples
            included; with AdaptiveProximalGradient an estimate of the answer's own, noise included. float64.
        relative_residual: with ProximalGradient residual / max(‖δ‖, ‖y‖, 10⁻³·ρ·‖p(0)‖); with AdaptiveProximalGradient
            a 95 % bound of the answer's residual, over the same. float64.
        steps: steps taken.
        gradient_evaluations: gradients of the model per input: of the steps, of η_max, of the estimates, and of
            ``rho="auto"``; retried passes do not count.
        converged: relative_residual ≤ tol. Never True for the gradient baselines, which solve nothing.
        nnz: non-zero entries of the map.
        support: non-zero features, or groups where there are groups.
        empty: nnz == 0.
        eta: η that was used (absolute), 0 without a penalty; [B], or one per feature.
        rho: ρ that was used.
        sigma: σ that was used, per tensor of a tuple.
        standard_error: of the envelope gradient p, by sampling, in the form and dtype of the map; an entry of the map
            errs by no more without a penalty or with L1. NaN where it is not known: of a single sample or pair, and of
            methods that are no mean of samples.
        p_value: the probability of a mean gradient as large as this one if the feature, or its group, were just at the
            threshold η, or at 0 without a penalty; see :meth:`significant`. State dtype; NaN for fixed features.
        error: the parts of the map's error, see :class:`Errors`.
        target: what was explained, int64 [B, k], k indices into the axes of the output behind the batch; None for a
            callable target, and for a model with one output per input.
        ids: int64 [B], the names of the inputs to the noise bank.
        fixed: the features that were fixed; bool, in the form of the map.
    """

    attribution: Form
    displacement: Form
    envelope: Tensor
    envelope_gradient: Form
    score: Tensor
    residual: Tensor
    relative_residual: Tensor
    steps: Tensor
    gradient_evaluations: Tensor
    converged: Tensor
    nnz: Tensor
    support: Tensor
    empty: Tensor
    eta: Tensor | Form
    rho: Tensor
    sigma: Form
    standard_error: Form
    p_value: Form
    error: Errors
    target: Tensor | None
    ids: Tensor
    fixed: Form

    @staticmethod
    def concatenate(parts: Iterable[Solution[Form]]) -> Solution[Form]:
        """One solution of many, in their order."""
        whole: Solution[Form] = join(list(parts))
        return whole

    def significant(self, q: float = 0.1) -> Form:
        """The features that are in the map beyond sampling noise, at a false discovery rate of q.

        Bool, in the form of the map; whole groups where there are groups.

        Of the features marked for an input, a share of q at most is expected to be zero in the map of infinitely many
        samples (Benjamini and Hochberg 1995, on ``p_value``). It says nothing about the other parts of ``error``.

        Args:
            q: in (0, 1).

        Raises:
            ValueError: q out of range.

        Example:
            >>> import torch
            >>> from moreau_ext import SmoothGrad
            >>> f = SmoothGrad(lambda x: (x * torch.tensor([3.0, 0.0])).sum(1), num_samples=8)
            >>> f.attribute(torch.ones(1, 2), return_solution=True).significant()
            tensor([[ True, False]])
        """
        if not 0 < q < 1:
            raise ValueError(f"q: expected a number between 0 and 1, got {q!r}")
        tails, maps = tensors_of(self.p_value), tensors_of(self.attribution)
        flat = torch.cat([flat_rows(p) for p in tails], dim=1)
        sizes = [flat_rows(p).shape[1] for p in tails]
        fixed = torch.cat([flat_rows(f) for f in tensors_of(self.fixed)], dim=1)
        found = torch.split(benjamini_hochberg(flat.nan_to_num(1.0), q, ~fixed), sizes, dim=1)
        marked = tuple([f.view(p.shape) & (a != 0) for f, p, a in zip(found, tails, maps, strict=True)])
        found_in_form: Form = in_form_of(self.p_value, marked)
        return found_in_form

    def forecast(self, tol: float) -> Tensor:
        """The gradients that a sampling error of ``tol`` would take, int64 [B]; −1 where it is not known.

        It falls with the square root of their number, so a tenth of the error costs a hundred times as many. Settling
        and nonlinearity are not in it.

        Args:
            tol: relative error, > 0.

        Example:
            >>> import torch
            >>> from moreau_ext import SmoothGrad
            >>> f = SmoothGrad(lambda x: x.square().sum(1), num_samples=64)
            >>> bool(f.attribute(torch.tensor([[1.0, 2.0]]), return_solution=True).forecast(0.001) > 64)
            True
        """
        if not 0 < tol < math.inf:
            raise ValueError(f"tol: expected a positive number, got {tol!r}")
        wanted = (self.error.unit_cost / tol**2).ceil().clamp_max(2.0**62)
        return torch.where(wanted.isnan(), -1, wanted.nan_to_num(0.0).clamp_min(1)).long()

    def __getitem__(self, index: Index) -> Solution[Form]:
        """The solution of some inputs, by position: an integer, a slice, a list, or a mask [B].

        The batch axis stays, also for a single one.

        Raises:
            IndexError: out of range, or of another form.

        Example:
            >>> import torch
            >>> from moreau_ext import SmoothGrad
            >>> f = SmoothGrad(lambda x: x.square().sum(1), num_samples=4)
            >>> s = f.attribute(torch.ones(5, 2), return_solution=True)
            >>> s[3].ids, len(s[1:4]), len(s[s.score > 5])
            (tensor([3]), 3, 0)
        """
        positions = torch.arange(len(self), device=self.ids.device)
        try:
            found = positions[index]
        except TypeError as error:
            raise IndexError(str(error)) from None
        if found.dim() > 1:
            raise IndexError(f"expected an integer, a slice, a list or a mask of the {len(self)} inputs, got {index!r}")
        return self.take(found.reshape(-1))

    def to(self, device: torch.device | str) -> Solution[Form]:
        """The solution with its tensors on a device. Dtypes differ between fields, and stay."""
        moved: Solution[Form] = each_tensor(self, lambda tensor: tensor.to(device))
        return moved

    def cpu(self) -> Solution[Form]:
        """The solution with its tensors on the CPU."""
        return self.to("cpu")

    def __len__(self) -> int:
        return len(self.ids)

    def summary(self, limit: int = 8) -> str:
        """A line per input, at most ``limit``.

        It says the error and its parts, how much of the map is beyond sampling noise, and what smaller errors cost.

        Example:
            >>> import torch
            >>> from moreau_ext import SmoothGrad
            >>> f = SmoothGrad(lambda x: x.square().sum(1), num_samples=64)
            >>> print(f.attribute(torch.ones(1, 2), return_solution=True).summary().splitlines()[0])
            Solution of 1 input: 0 converged, 0 empty
        """
        count = len(self)
        lines = [
            f"Solution of {count} input{'s' * (count != 1)}: {int(self.converged.sum())} converged, "
            f"{int(self.empty.sum())} empty"
        ]
        if count == 0:
            return lines[0]
        shown = self.take(torch.arange(min(count, limit), device=self.ids.device))
        marked = torch.stack([flat_rows(m).sum(1) for m in tensors_of(shown.significant())]).sum(0)
        certain = marked / shown.nnz.clamp_min(1)
        costs = [shown.forecast(tol).tolist() for tol in (0.1, 0.01)]
        named = shown.ids.tolist()
        # One id for all names none of them.
        numbers = named if len(set(named)) == len(named) else range(len(named))
        for row, number in enumerate(numbers):
            line = shown._line(row, float(certain[row]), [c[row] for c in costs])
            lines.append(f"  input {number}: {line}")
        if count > limit:
            lines.append(f"  ... and {count - limit} more")
        return "\n".join([*lines, _PREMISE])

    def _line(self, row: int, certain: float, costs: list[int]) -> str:
        error, spent = self.error, f"{int(self.gradient_evaluations[row]):,} gradients"
        total = float(error.total[row])
        if math.isnan(total):
            return f"{spent}, error unknown; {int(self.nnz[row]):,} features in the map"
        parts = ", ".join(
            f"{name} {float(part[row]):.2%}"
            for name, part in (
                ("sampling", error.sampling),
                ("settling", error.settling),
                ("nonlinearity", error.nonlinearity),
            )
        )
        said = [f"{spent}, error {total:.1%} ({parts})", f"cosine to the limit {math.sqrt(max(0.0, 1 - total**2)):.3f}"]
        said.append(f"{certain:.0%} of its {int(self.nnz[row]):,} features beyond noise at q = 0.1")
        said.append(f"10 % takes about {costs[0]:,} gradients, 1 % {costs[1]:,}")
        if not math.isnan(float(self.relative_residual[row])):  # else nothing was solved
            said.append("converged" if bool(self.converged[row]) else "not converged")
        return "; ".join(said)

    __repr__ = __str__ = summary

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def take(self, index: Tensor) -> Solution[Form]:
        """The solution of some of the inputs."""
        some: Solution[Form] = take(self, index)
        return some


@dataclass
class Answer:
    """An answer to a problem, per input.

    Args:
        rho, eta: of the problem that is answered, per tensor; η as reported, () without a penalty.
        maps: A = S_η(p), state dtype.
        displacement: the answer for δ*.
        gradient: p.
        envelope: H, float64 [B].
        residual, relative_residual: float64 [B].
        evaluations: gradients taken, int64 [B].
        confirmed: bool [B], whether independent samples agree that it is solved; None where the residual says it all.
        variance: of p, per feature; NaN where it is not known.
        freedom: float64 [B], the degrees of freedom of that variance.
        dependence: float64 [B]; see :meth:`moreau_ext.solvers.penalties.Penalty.p_values`.
        error: the parts of the error.
    """

    rho: Tensors
    eta: Tensors
    maps: Tensors
    displacement: Tensors
    gradient: Tensors
    envelope: Tensor
    residual: Tensor
    relative_residual: Tensor
    evaluations: Tensor
    variance: Tensors
    freedom: Tensor
    dependence: Tensor
    error: Errors
    confirmed: Tensor | None = None


def assemble(problem: Problem, answer: Answer, *, steps: int | Tensor, tol: float) -> Solution:
    """The Solution of an answer, with what follows from it."""
    attribution = tuple([a.to(x.dtype) for a, x in zip(answer.maps, problem.inputs, strict=True)])
    nnz = torch.stack([flat_rows(a != 0).sum(1) for a in attribution]).sum(0)
    ones = torch.ones_like(nnz)
    tails = problem.penalty.p_values(answer.gradient, answer.variance, answer.freedom, answer.dependence)
    none = torch.zeros((), dtype=torch.bool, device=problem.keys.device)
    masks = (none,) * len(problem.inputs) if problem.score.fixed is None else problem.score.fixed.of_rows
    fixed, variance = tuple([m.expand_as(x) for m, x in zip(masks, problem.inputs, strict=True)]), answer.variance
    if problem.score.fixed is not None:
        tails = tuple([p.masked_fill(m, torch.nan) for p, m in zip(tails, fixed, strict=True)])
        variance = tuple([v.masked_fill(m, 0.0) for v, m in zip(variance, fixed, strict=True)])
    solved = answer.relative_residual <= tol
    eta = answer.eta or tuple([torch.zeros_like(r) for r in answer.rho])
    return Solution(
        attribution=attribution,
        displacement=answer.displacement,
        envelope=answer.envelope,
        envelope_gradient=answer.gradient,
        score=problem.value,
        residual=answer.residual,
        relative_residual=answer.relative_residual,
        steps=ones * steps,
        gradient_evaluations=answer.evaluations,
        converged=solved if answer.confirmed is None else solved & answer.confirmed,
        nnz=nnz,
        support=(problem.penalty.magnitudes(answer.maps) > 0).sum(1),
        empty=nnz == 0,
        # One eta per input, also where a row of them serves all.
        eta=tuple([e.expand(problem.batch, *e.shape[1:]) if e.dim() > 1 else e for e in eta]),
        rho=answer.rho[0],
        sigma=problem.sigma,
        standard_error=tuple([v.sqrt().to(x.dtype) for v, x in zip(variance, problem.inputs, strict=True)]),
        p_value=tuple([p.to(a.dtype) for p, a in zip(tails, answer.maps, strict=True)]),
        error=answer.error,
        target=problem.score.target if isinstance(problem.score.target, Tensor) else None,
        ids=problem.ids,
        fixed=fixed,
    )


# A Solution is tensors and numbers: torch.load takes it at its default.
torch.serialization.add_safe_globals([Solution, Errors])
