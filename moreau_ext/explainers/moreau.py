"""MoreauGrad and its sparse forms. The gradient baselines are in gradients.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import ops
from ..analysis.curvature import convex_rho
from ..capture.runner import Graphs, Mode, check_mode
from ..model.restore import leaves_as_found
from ..model.target import Target
from ..ops.layout import tensor_of
from ..solvers.adaptive import AdaptiveProximalGradient
from ..solvers.base import Solver
from ..solvers.fixed import ProximalGradient
from ..solvers.groups import Groups, Pixels
from ..solvers.loop import solve
from ..solvers.path import solve_path
from ..solvers.penalties import GroupL2, Penalty
from ..solvers.problem import Problem, Tuning
from ..solvers.solution import Form, Solution
from .base import warn_unconverged
from .certified import Certified
from .inputs import Call, Ids, Mask, empty_solution, in_form
from .settings import Scalar, check_scalar, per_input_setting
from .sparse import Sparse


@dataclass(frozen=True, eq=False, repr=False)
class MoreauGrad(Certified):
    """The gradient of the Moreau envelope of a smoothed score,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ),    A(x) = ∇F(x) = −δ*/ρ,    f_σ(x) = E f(x + σz), z ~ N(0, I).

    Args:
        model: an nn.Module or any callable that maps inputs [n, ...] to outputs [n, ...]. It is run in eval mode and
            left as it was found, with its buffers, and so are the modules that a function, method, partial or object
            is found to use. It must not mix the inputs of a batch. Or what :func:`moreau_ext.prepare` made of one: a
            faster copy, with the number of rows and the memory layout that were measured fastest.
        rho: ρ > 0, a number or one per input [B]: how far to look, in units of x²/score. The problem has one solution
            where ρλ < 1, λ the weak-convexity constant of f_σ. "auto", the default: ρ = ½/max(λ, β/10), with λ and the
            smoothness β measured at each x by 64 gradients: half of what keeps the problem strongly convex there. By
            default a ρ that cannot be measured, without noise on a score with kinks, is 1, and so is that of
            :class:`ProximalGradient`, whose step size needs a number.
        radius: instead of ρ, the length ‖δ*‖₂ of the displacement, in units of the inputs; a number or one per input.
            ρ is then what leads to it, found while solving. It does not depend on the scale of the score.
        radius_ratio: the same as a fraction of each input's range max x − min x.
        noise_level: σ as a fraction of each input's own range max x − min x (per tensor of a tuple); default 0.05. A
            constant input has range 0 and gets no noise.
        sigma: σ ≥ 0, absolute, instead; a number or one per input.
        seed: of the noise bank. Same seed and ids, same noise, whatever the batch; global generators are not touched.
        score: what is explained: "logit", "log_prob", "prob", or "margin" (the logit minus the largest other one).
        solver: "auto", an :class:`AdaptiveProximalGradient` with its defaults, which adapts to each input and stops at
            a bound of the residual; or one with settings, or a :class:`ProximalGradient` (fixed steps and samples, for
            a ρ that is given).
        cuda_graphs: on a GPU, "auto" captures the steps of an nn.Module without hooks as CUDA graphs and replays them:
            the same numbers, without the processor's time for a launch of every operation. They are kept for later
            calls, and their memory goes with the explainer. True also captures models with hooks, which a replay does
            not run, and other callables, whose parameters must then stay where they are. A model that cannot be
            captured runs step by step, with one warning. While a step is captured, some milliseconds, other threads
            must not draw from torch's generator of the device. False, the default until a GPU has confirmed what was
            repaired after a crash of a benchmark (docs/limitations.md), captures nothing.
        max_batch: most noisy inputs in one forward pass; results agree to rounding. None is no limit. "auto" is what a
            prepared model was measured with; otherwise the largest power of two of rows, 1,024 at most, that fits half
            of a GPU's free memory, or on a CPU 64 MiB for each thread (more leave the caches; four rows at least) and a
            quarter of what there is for the process. Their bytes are measured at the first call for each shape and
            dtype of the inputs, by passes of one and of two rows (the model's hooks see them, gradient_evaluations do
            not count them). A pass that runs out of memory is done again in halves, whatever
            max_batch, with one warning per call; a single row that does not fit raises MemoryError.
        unused_inputs: "raise", or "zero" for a zero map, when the score does not depend on an input.
        precision: how float32 models multiply in their passes; displacement, sums and the map are float32 in each.
            "float32", the default, exactly, also on CUDA, where torch's own default lets cuDNN convolve in TF32; "tf32"
            lets cuDNN and cuBLAS use it, 11 bits of each factor, and is "float32" where there is no CUDA; "bfloat16"
            runs them under autocast, 8 bits. An autocast of the caller does not count. The map, its bound and its
            certificate are then those of the model as it is run. benchmarks/bench_precision.py measures how far the
            maps move. The flags are the process's: a call that wants other ones waits for the passes under way, and
            they are restored after each pass.
        output_fn: reads the tensor to explain from what the model returns, where that is a tuple, a dict or an object;
            ``.logits`` and ["logits"] are found without it.
        layer: explain the output of this layer in place of the inputs: a name of ``model.named_modules()``, or the
            module. Maps, noise, penalties and ``fixed`` are then those of its output at the inputs, [B, *features],
            which the model gets instead of the layer's own; so inputs may be token ids or categories. The layer runs
            once in a pass, and returns a tensor, or a tuple or dict that begins with one.

    Raises:
        ValueError, TypeError: a setting out of range, by name; when called, "tf32" or "bfloat16" for inputs that are
            not float32, whose dtype decides how their model multiplies.

    Example:
        >>> import torch
        >>> from moreau_ext import MoreauGrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3)).eval()
        >>> MoreauGrad(model, rho=0.5).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])

    Deterministic on one machine: the same bits each run where the model's own kernels are deterministic.
    Source: arXiv 2302.05294, section 3.
    """

    rho: Scalar | Literal["auto"] | None = field(default=None, kw_only=True)
    radius: Scalar | None = field(default=None, kw_only=True)
    radius_ratio: Scalar | None = field(default=None, kw_only=True)
    solver: Solver | Literal["auto"] = field(default="auto", kw_only=True)
    cuda_graphs: Mode = field(default=False, kw_only=True)
    _graphs: Graphs = field(init=False, repr=False)
    # With one row per pass the adaptive solver holds 32 maps of its one input: 17 are counted elsewhere, 3 are slack.
    _held = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.cuda_graphs)
        object.__setattr__(self, "_graphs", Graphs(self.cuda_graphs))
        if sum(setting is not None for setting in (self.rho, self.radius, self.radius_ratio)) > 1:
            raise ValueError(
                "give one of rho, radius (the length of the displacement) and radius_ratio (the same as a fraction of "
                "each input's range)"
            )
        for name in ("radius", "radius_ratio"):
            if getattr(self, name) is not None:
                check_scalar(name, getattr(self, name), positive=True)
        if isinstance(self._asked_rho, str):
            if self._asked_rho != "auto":
                raise TypeError(f"rho: expected a number, got {self.rho!r}; or 'auto', in small letters")
        elif self._asked_rho is not None:
            check_scalar("rho", self._asked_rho, positive=True)
        if self.solver == "auto":
            object.__setattr__(self, "solver", AdaptiveProximalGradient())
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"solver: expected a ProximalGradient, an AdaptiveProximalGradient or 'auto', got {self.solver!r}"
            )
        if isinstance(self.solver, ProximalGradient):
            self._check_fixed(self.solver)

    @property
    def _method(self) -> Solver:
        # "auto" has become a solver when the explainer was made.
        return cast(Solver, self.solver)

    @property
    def _claim(self) -> tuple[float, str]:
        return self._method.tol, self._method.budget

    @property
    def _asked_rho(self) -> Any:
        """A number, "auto", or None with a radius. Fields stay as they were given, for dataclasses.replace."""
        if self.rho is not None or self.radius is not None or self.radius_ratio is not None:
            return self.rho
        return 1.0 if isinstance(self.solver, ProximalGradient) else "auto"

    @property
    def _rho_is_given(self) -> bool:
        return self._asked_rho is not None and not isinstance(self._asked_rho, str)

    def _check_fixed(self, solver: ProximalGradient) -> None:
        if not self._rho_is_given:
            raise ValueError(
                "solver: ProximalGradient has one step size for all inputs, which does not fit a rho that is found for "
                "each; give rho as a number, or use the adaptive solver"
            )
        # Where the score is flat a step multiplies the displacement by 1 - step_size/rho.
        rho = tensor_of(self._asked_rho, torch.float64)
        least = float(rho.min()) if rho.numel() else float("inf")
        if solver.max_steps > 1 and solver.step_size >= 2 * least:
            raise ValueError(
                f"step_size: {solver.step_size} diverges for rho = {least:.4g}; expected less than 2·rho, "
                "and rho/10 is usual"
            )

    def pose(self, problem: Problem) -> Problem:
        problem = super().pose(problem)
        # A ρ that is measured or tuned starts at 1.
        rho = self._asked_rho if self._rho_is_given else 1.0
        problem = replace(problem, rho=tuple([per_input_setting("rho", rho, x) for x in problem.inputs]))
        radius = self._radius(problem)
        return problem if radius is None else replace(problem, tuning=Tuning(radius=radius))

    def _radius(self, problem: Problem) -> Tensor | None:
        """‖δ*‖ asked for, float64 [B]."""
        first = problem.inputs[0]
        if self.radius is not None:
            return per_input_setting("radius", self.radius, first).double()
        if self.radius_ratio is None:
            return None
        ends = [*problem.free_values]
        least = torch.stack([low.amin(1).double() for low, _ in ends]).amin(0)
        largest = torch.stack([high.amax(1).double() for _, high in ends]).amax(0)
        if bool((largest == least).any()):
            row = int((largest == least).nonzero()[0])
            raise ValueError(f"radius_ratio: input {row} is constant, its range is 0; give radius, or rho")
        # Where nothing is free there is no displacement, whatever its length.
        extent = (largest - least).clamp_min(0)
        return per_input_setting("radius_ratio", self.radius_ratio, first).double() * extent

    def _solve(self, problem: Problem) -> Solution:
        problem, cost = self._with_rho(problem)
        with self._graphs.runner(problem.score.model, problem.keys.device) as runner:
            solution = solve(problem, self._method, runner)
        return replace(solution, gradient_evaluations=solution.gradient_evaluations + cost)

    def _with_rho(self, problem: Problem) -> tuple[Problem, int | Tensor]:
        """The problem with its rho measured, where that was asked for, and the gradients that it took."""
        if not isinstance(self._asked_rho, str):
            return problem, 0
        rho, cost = convex_rho(problem, unknown=1.0 if self.rho is None else None)
        return replace(problem, rho=tuple(rho.to(r.dtype) for r in problem.rho)), cost


@dataclass(frozen=True, eq=False, repr=False)
class SparseMoreau(Sparse, MoreauGrad):
    """MoreauGrad with a penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        solver = self.solver
        averages = isinstance(solver, ProximalGradient) and solver.average_of == "displacement"
        if self.support is not None and averages:
            raise ValueError(
                "support: the published schedule averages displacements, which makes the union of their supports; use "
                "another solver"
            )

    @leaves_as_found
    def eta_path(
        self,
        inputs: Form,
        ratios: Sequence[float],
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
    ) -> tuple[Solution[Form], ...]:
        """The solutions for η = ratio·η_max, from sparse to dense, each begun where the sparser one ended.

        η_max is measured once per input, so that the ratios of one path are of the same number; the explainer's own
        eta, eta_ratio or support does not count.

        Args:
            inputs, target, additional_forward_args, ids, fixed, forward_kwargs: see :meth:`attribute`.
            ratios: ≥ 0, in any order.

        Returns:
            One :class:`Solution` per ratio, in the order of ``ratios``. The first that is solved, the largest ratio,
            counts the 64 gradients of η_max, and with ``rho="auto"`` those of ρ.

        Raises:
            ValueError, TypeError: see :meth:`attribute`; no ratios, or one that is no number ≥ 0; ``radius``, whose ρ
            would change along the path.

        Example:
            >>> import torch
            >>> from moreau_ext import SparseMoreauGrad
            >>> f = SparseMoreauGrad(lambda x: (x * torch.tensor([4.0, 2.0, 1.0])).sum(1))
            >>> [int(s.nnz) for s in f.eta_path(torch.ones(1, 3), [0.1, 0.4, 0.8])]
            [3, 2, 1]
        """
        if isinstance(ratios, (int, float)):
            raise TypeError(f"ratios: expected a list of numbers, got {ratios!r}")
        steps = [float(r) for r in ratios]
        if not steps or not all(0 <= r < math.inf for r in steps):
            raise ValueError(f"ratios: expected numbers >= 0, at least one, got {ratios!r}")
        if self.radius is not None or self.radius_ratio is not None:
            raise ValueError("eta_path: radius leads to another rho at each eta; give rho")

        call = Call(inputs, target, additional_forward_args, forward_kwargs, ids, fixed)
        with self._posed(call) as (tensors, problem):
            if problem is None:
                found = [empty_solution(tensors)] * len(steps)
            else:
                problem, cost = self._with_rho(problem)
                problem = replace(problem, tuning=None)
                with self._graphs.runner(problem.score.model, problem.keys.device) as runner:
                    found = solve_path(problem, steps, self._method, runner)
                first = steps.index(max(steps))
                spent = found[first].gradient_evaluations + cost
                found[first] = replace(found[first], gradient_evaluations=spent)
        warn_unconverged(found, *self._claim)
        return tuple([in_form(solution, self._like(call, solution.attribution)) for solution in found])


@dataclass(frozen=True, eq=False, repr=False)
class SparseMoreauGrad(SparseMoreau):
    """MoreauGrad with an L1 penalty on the displacement: exactly sparse maps,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η‖δ‖₁,    A(x) = −δ*/ρ = S_η(∇F(x)).

    Args:
        model, rho, radius, radius_ratio, noise_level, sigma, seed, score, solver, cuda_graphs, max_batch,
            unused_inputs, precision, output_fn, layer: see :class:`MoreauGrad`.
        eta: η ≥ 0, absolute, in units of the gradient: a number, one per input [B], or one per feature [1, *features]
            or [B, *features].
        eta_ratio: η as a fraction of that input's η_max = ‖p(0)‖_∞, the least η with a zero map; default 0.1. It does
            not depend on the scale of the score. 1 or more gives zero maps by definition.
        support: instead of η, how many features are not to be zero: a count (an integer) or a fraction in (0, 1] (a
            float), or one per input. η is then what leads to it, found while solving: in the middle between the entries
            of p that it separates. ``Solution.support`` is what came out, which differs where entries are equal (a
            tie), or where the score does not depend on so many features.

    Example:
        >>> import torch
        >>> from moreau_ext import SparseMoreauGrad
        >>> a = SparseMoreauGrad(lambda x: (x * torch.tensor([3.0, 0.1])).sum(1), eta=1.0).attribute(torch.ones(1, 2))
        >>> a.round(decimals=4)
        tensor([[2., 0.]])

    Source: arXiv 2302.05294, section 4.1.
    """


@dataclass(frozen=True, eq=False, repr=False)
class GroupSparseMoreauGrad(SparseMoreau):
    """MoreauGrad with a group penalty on the displacement: whole groups of features are in the map or out of it,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η Σ_g w_g‖δ_g‖₂,    A(x) = −δ*/ρ.

    Args:
        model, rho, radius, radius_ratio, noise_level, sigma, seed, score, solver, cuda_graphs, max_batch,
            unused_inputs, precision, output_fn, layer: see :class:`MoreauGrad`.
        eta: η ≥ 0, absolute; a number or one per input [B].
        eta_ratio: η as a fraction of that input's η_max = max_g ‖p_g(0)‖/w_g; default 0.1.
        support: instead of η, how many groups are not to be zero; see :class:`SparseMoreauGrad`.
        groups: :class:`Pixels` (default), :class:`Tiles` or :class:`Labels`; for a tuple of inputs one per tensor, or
            one for all.

    Example:
        >>> import torch
        >>> from moreau_ext import GroupSparseMoreauGrad, Tiles
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> a = GroupSparseMoreauGrad(model, groups=Tiles(4), eta_ratio=0.9).attribute(torch.randn(2, 1, 8, 8))
        >>> a.shape
        torch.Size([2, 1, 8, 8])

    Source: arXiv 2302.05294, section 4.2.
    """

    groups: Groups | tuple[Groups, ...] = field(default_factory=Pixels, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        each = self.groups if isinstance(self.groups, tuple) else (self.groups,)
        if not each or not all(isinstance(g, Groups) for g in each):
            raise TypeError(
                f"groups: expected Pixels, Tiles, Labels or a tuple of them (wrap a map in Labels), got {self.groups!r}"
            )

    def _penalty(self, problem: Problem) -> Penalty:
        inputs, fixed = problem.inputs, problem.score.fixed
        each = self.groups if isinstance(self.groups, tuple) else (self.groups,) * len(inputs)
        if len(each) != len(inputs):
            raise ValueError(f"groups: expected one per input tensor, {len(inputs)}, got {len(each)}")
        eta, relative = self._strength(inputs)
        masks = (None,) * len(inputs) if fixed is None else fixed.masks
        partitions = tuple(
            [g.partition(x, ops.state_dtype(x.dtype), mask) for g, x, mask in zip(each, inputs, masks, strict=True)]
        )
        return GroupL2(eta, relative, partitions)
