"""The explainers people call: MoreauGrad and its sparse forms. The gradient baselines are in baselines.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..analysis.certificate import Certificate, absolute, certify
from ..analysis.curvature import RHO_SAMPLES, convex_rho
from ..analysis.derivative import map_vjp
from ..analysis.hessian import METHODS, Method
from ..capture.runner import Graphs, Mode, check_mode
from ..model.modes import evaluating
from ..model.precision import resolution
from ..model.target import Target
from ..ops.layout import Tensors, flat_rows
from ..solvers.adaptive import AdaptiveProximalGradient
from ..solvers.fixed import ProximalGradient
from ..solvers.groups import Groups, Pixels
from ..solvers.loop import solve
from ..solvers.path import solve_path
from ..solvers.penalties import GroupL2, Penalty
from ..solvers.problem import Problem
from ..solvers.solution import Solution
from .base import Noisy, Sparse
from .settings import Scalar, check_scalar, per_input_setting

Solver = ProximalGradient | AdaptiveProximalGradient


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"hessian: expected one of {', '.join(METHODS)}, got {method!r}")


def _parts_of(solution: Solution, inputs: Any, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(displacement, eta) of a solution as tuples, in the state dtype and memory layout of the inputs."""
    if not isinstance(solution, Solution):
        raise TypeError(
            f"solution: expected a Solution (attribute with return_solution=True), got {type(solution).__name__}"
        )
    of_one = isinstance(solution.displacement, Tensor)
    found = (solution.displacement,) if of_one else solution.displacement
    shapes = [tuple(d.shape) for d in found] if of_one == isinstance(inputs, Tensor) else None
    expected = [tuple(x.shape) for x in tensors]
    if shapes != expected:
        raise ValueError(f"solution: expected displacements shaped as the inputs, {expected}, got {shapes}")
    states = tuple(torch.empty_like(x, dtype=ops.state_dtype(x.dtype)) for x in tensors)
    displacement = tuple(s.copy_(d) for s, d in zip(states, found, strict=True))
    eta = solution.eta if isinstance(solution.eta, tuple) else (solution.eta,) * len(tensors)
    return displacement, tuple(e.to(s) for e, s in zip(eta, states, strict=True))


@dataclass(frozen=True, eq=False)
class MoreauGrad(Noisy):
    """The gradient of the Moreau envelope of a smoothed score,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ),    A(x) = ∇F(x) = −δ*/ρ,    f_σ(x) = E f(x + σz), z ~ N(0, I).

    Args:
        model: an nn.Module or any callable that maps inputs [n, ...] to outputs [n, ...]. It is run in eval mode and
            left as it was found. It must not mix the inputs of a batch. Or what :func:`moreau_ext.prepare` made
            of one: a faster copy, with the number of rows and the memory layout that were measured fastest.
        rho: ρ > 0, a number or one per input [B]: how far to look; 1 by default. Units of x²/score. The problem has one
            solution where ρλ < 1, λ the weak-convexity constant of f_σ. "auto": ρ = ½/max(λ, β/10), with λ and the
            smoothness β measured at each x (upper ends of their intervals, 512 gradients): half of what keeps the
            problem strongly convex there.
        radius: instead of ρ, the length ‖δ*‖₂ of the displacement, in units of the inputs; a number or one per input.
            ρ is then what leads to it, found while solving. It does not depend on the scale of the score.
        radius_ratio: the same as a fraction of each input's range max x − min x.
        noise_level: σ as a fraction of each input's own range max x − min x (per tensor of a tuple); default 0.1. A
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
            mended after a crash of a benchmark (README, Limits), captures nothing.
        max_batch: most noisy inputs in one forward pass; results agree to rounding. None is no limit. "auto" is what a
            prepared model was measured with; otherwise 1,024, or the largest power of two of rows that fits half of a
            GPU's free memory, or a quarter of what the CPU has for the process. That is measured at the first call for
            each shape and dtype of the inputs, by passes of one and of two rows (the model's hooks see them,
            gradient_evaluations do not count them). A pass that runs out of memory is done again in halves, whatever
            max_batch, with one warning per call; a single row that does not fit raises MemoryError.
        unused_inputs: "raise", or "zero" for a zero map, when the score does not depend on an input.
        precision: how float32 models multiply in their passes; displacement, sums and the map are float32 in each.
            "float32", the default, exactly, also on CUDA, where torch's own default lets cuDNN convolve in TF32; "tf32"
            lets cuDNN and cuBLAS use it, 11 bits of each factor, and is "float32" where there is no CUDA; "bfloat16"
            runs them under torch.autocast, 8 bits. The map, its bound and its certificate are then those of the model
            as it is run. benchmarks/bench_precision.py measures how far the maps move. The flags are the process's: a
            call that wants other ones waits for the passes under way, and they are restored after each pass.

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
    # With one row per pass the adaptive solver holds 54, of its one input at a time.
    _held = 40

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
    def _asked_rho(self) -> Any:
        """A number, "auto", or None with a radius. Fields stay as they were given, for dataclasses.replace."""
        return 1.0 if self.rho is None and self.radius is None and self.radius_ratio is None else self.rho

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
        rho = torch.as_tensor(self._asked_rho, dtype=torch.float64)
        least = float(rho.min()) if rho.numel() else float("inf")
        if solver.max_steps > 1 and solver.step_size >= 2 * least:
            raise ValueError(
                f"step_size: {solver.step_size} diverges for rho = {least:.4g}; expected less than 2·rho, "
                "and rho/10 is usual"
            )

    def _rho(self) -> Scalar:
        # What follows the solution, or is measured, begins anywhere.
        return self._asked_rho if self._rho_is_given else 1.0

    def _radius(self, inputs: Tensors) -> Tensor | None:
        if self.radius is not None:
            return per_input_setting("radius", self.radius, inputs[0]).double()
        if self.radius_ratio is None:
            return None
        largest = torch.stack([flat_rows(x).amax(1).double() for x in inputs]).amax(0)
        least = torch.stack([flat_rows(x).amin(1).double() for x in inputs]).amin(0)
        if bool((largest == least).any()):
            row = int((largest == least).nonzero()[0])
            raise ValueError(f"radius_ratio: input {row} is constant, its range is 0; give radius, or rho")
        return per_input_setting("radius_ratio", self.radius_ratio, inputs[0]).double() * (largest - least)

    @property
    def _solver(self) -> Any:
        """The solver; "auto" is one since the explainer was made."""
        return self.solver

    def _solve(self, problem: Problem) -> Solution:
        problem = self._with_rho(problem)
        with self._graphs.runner(problem.score.model, problem.keys.device) as runner:
            return self._with_cost(solve(problem, self._solver, runner))

    def _with_rho(self, problem: Problem) -> Problem:
        """The problem with its rho measured, where that was asked for."""
        if not isinstance(self.rho, str):
            return problem
        rho = convex_rho(problem, max_batch=self._max_rows(problem))
        return replace(problem, rho=tuple(rho.to(r.dtype) for r in problem.rho))

    def _with_cost(self, solution: Solution) -> Solution:
        """The solution with the gradients that measuring its rho took."""
        measured = RHO_SAMPLES if isinstance(self.rho, str) else 0
        return replace(solution, gradient_evaluations=solution.gradient_evaluations + measured)

    def _solved(self, problem: Problem, solution: Solution, eta: Tensors) -> Problem:
        """The problem that a solution belongs to: with its eta, which may have been found on the way or be one of a
        path, and with its rho where that was found.

        Raises:
            ValueError: the score is another one than the solution's.
        """
        # Far more than rounding, in a pass of other rows too, and less than classes differ by.
        share = max(1e-3, 16 * max(resolution(self.precision, x) for x in problem.inputs))
        here, there = problem.value.double(), solution.score.to(problem.value.device, torch.float64)
        other = (here - there).abs() > share * torch.maximum(here.abs(), there.abs()) + 1e-4
        if bool(other.any()):
            row = int(other.nonzero()[0])
            raise ValueError(
                f"solution: its score of input {row} is {float(there[row]):.4g}, and the score here is "
                f"{float(here[row]):.4g}: give the inputs, target and additional_forward_args of the call that it came "
                "from (without a target the predicted class is meant). A model that draws random numbers has no score"
            )
        penalty = absolute(problem.penalty, eta)
        if self._rho_is_given:
            return replace(problem, penalty=penalty, tuning=None)
        rho = tuple(solution.rho.to(r) for r in problem.rho)
        return replace(problem, rho=rho, penalty=penalty, tuning=None)

    def certificate(
        self,
        inputs: Any,
        solution: Solution,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        num_samples: int = 4096,
        num_hvp_samples: int = 128,
        hessian: Method = "auto",
        lanczos_steps: int = 20,
        confidence: float = 0.95,
        lipschitz: Scalar | None = None,
        moduli: tuple[Scalar, Scalar] | None = None,
    ) -> Certificate:
        """How good the displacements of a solution are, on noise that no solver has seen.

        The KKT residual with a confidence interval; λ and β, the curvature of the smoothed score at the displacement;
        and what these imply for the distance to the solution and the Lipschitz constant of the map. Curvature measured
        at one point is not a global modulus: such implications are labelled "measured locally", and "bound" only where
        you give constants that hold everywhere. See :class:`Certificate`.

        Args:
            inputs, target, additional_forward_args, ids: as in the call of :meth:`attribute` that gave ``solution``.
            solution: with ``return_solution=True``. Any :class:`Solution` of these inputs will do, of
                :meth:`eta_path` too: its displacement and its eta are used, and its rho where that was found.
            num_samples: gradients per input for the residual, and for the curvature of models with kinks; rounded up
                to a multiple of 64.
            num_hvp_samples: samples of the curvature of smooth models, each about 2·lanczos_steps second derivatives;
                rounded up to a multiple of 64.
            hessian: "autograd" (second derivatives; right for smooth models), "stein" (from gradients, for any model
                with noise), or "auto", which finds out for each input.
            lanczos_steps: products per eigenvalue estimate.
            confidence: of the intervals.
            lipschitz: L of the score in its inputs, a number or one per input, if known: then λ, β ≤ L·√(2/π)/σ.
            moduli: (λ, β) of the smoothed score, if known to hold everywhere.

        Returns:
            A :class:`Certificate`; print it for a table.

        Raises:
            ValueError: a setting out of range, a solution of other shapes or another score, or "stein" without noise.

        Example:
            >>> import torch
            >>> from moreau_ext import MoreauGrad, ProximalGradient
            >>> f = MoreauGrad(lambda x: x.square().sum(1) / 2, sigma=0.1, solver=ProximalGradient(8, 100))
            >>> x = torch.ones(1, 3)
            >>> proof = f.certificate(x, f.attribute(x, return_solution=True))
            >>> proof.status, round(float(proof.smoothness), 3), bool(proof.distance < 1e-2)
            (('measured locally',), 1.0, True)

        Deterministic, and independent of the batch up to the rounding of the model's passes.
        """
        counts = {"num_samples": num_samples, "num_hvp_samples": num_hvp_samples, "lanczos_steps": lanczos_steps}
        for name, count in counts.items():
            check_count(name, count)
        _check_method(hessian)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._check_inputs(inputs)
            displacement, eta = _parts_of(solution, inputs, tensors)
            names = self._check_ids(ids, tensors[0].shape[0], tensors[0].device)

            def known(name: str, setting: Scalar) -> Tensor:
                check_scalar(name, setting)
                return per_input_setting(name, setting, tensors[0]).double()

            everywhere = None if lipschitz is None else known("lipschitz", lipschitz)
            both = None if moduli is None else (known("moduli[0]", moduli[0]), known("moduli[1]", moduli[1]))
            if tensors[0].shape[0] == 0:
                return Certificate.empty(tensors[0].device, num_samples, confidence)
            with evaluating(self._module):
                problem = self._problem(tensors, target, additional_forward_args, names)
                problem = self._solved(problem, solution, eta)
                return certify(
                    problem,
                    displacement,
                    num_samples=num_samples,
                    num_hvp_samples=num_hvp_samples,
                    steps=lanczos_steps,
                    method=hessian,
                    confidence=confidence,
                    lipschitz=everywhere,
                    moduli=both,
                    max_batch=self._max_rows(problem),
                )

    def vjp(
        self,
        inputs: Any,
        solution: Solution,
        vectors: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        num_samples: int | None = None,
        hessian: Method = "auto",
        hold_settings: bool = False,
        tol: float | None = None,
        max_steps: int = 100,
    ) -> Any:
        """vᵀ·DA(x), the derivative of the map A in direction of the inputs, by the implicit function theorem.

        With S the support of the map, H = ∇²f_σ(x + δ*) and M the second derivative of the penalty on S (0 for L1),

            (I + ρ(H_SS + M))·w = v_S,      vᵀDA = H_:,S·w,

        by minimal residuals: no unrolling, and no graph of the solver. Off the support the map does not move (strict
        complementarity), so v counts on S alone. It is what an adaptive attack on the map needs.

        Args:
            inputs, target, additional_forward_args, ids: as in the call of :meth:`attribute` that gave ``solution``.
            solution: with ``return_solution=True``. The result is as good as its displacement is a solution.
            vectors: v, in the form and shape of ``inputs``.
            num_samples: noisy copies per input in H. By default those of a solver with noise="fixed", for models with
                second derivatives: then the result is the derivative of what that solver computes; otherwise 256, or
                4096 for "stein", from an independent bank.
            hessian: "autograd" (second derivatives; right for smooth models), "stein" (from gradients, for any model
                with noise; a ReLU net's second derivatives are zero and would give a zero result), or "auto", which
                finds out for each input, at the cost of some 400 second derivatives: in a loop, name one.
            hold_settings: ``noise_level`` and ``eta_ratio`` make σ and η functions of x, whose derivative is included;
                True leaves it out. ρ and η that were found (``rho="auto"``, ``radius``, ``support``) are held.
            tol: relative residual of the linear system; 1e-10 in float64, else 1e-5.
            max_steps: products with H at most.

        Returns:
            In the form, shape and dtype of ``inputs``. Warns where it cannot be measured (kinks without noise) or the
            system was not solved to ``tol``.

        Raises:
            ValueError: vectors or a solution of other shapes, a solution of another score, a setting out of range, or
                "stein" without noise.

        Example:
            >>> import torch
            >>> from moreau_ext import MoreauGrad, ProximalGradient
            >>> f = MoreauGrad(lambda x: x.square().sum(1) / 2, sigma=0.1, solver=ProximalGradient(8, 100))
            >>> x = torch.ones(1, 3)
            >>> f.vjp(x, f.attribute(x, return_solution=True), torch.ones(1, 3))  # A = x/(1 + rho)
            tensor([[0.5000, 0.5000, 0.5000]])
        """
        _check_method(hessian)
        check_count("max_steps", max_steps)
        if num_samples is not None:
            check_count("num_samples", num_samples)
        if tol is not None and not 0 < tol < 1:
            raise ValueError(f"tol: expected a number between 0 and 1, got {tol!r}")
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._check_inputs(inputs)
            displacement, eta = _parts_of(solution, inputs, tensors)
            directions = (vectors,) if isinstance(vectors, Tensor) else vectors
            expected = [tuple(x.shape) for x in tensors]
            if not isinstance(directions, tuple) or [tuple(v.shape) for v in directions] != expected:
                raise ValueError(f"vectors: expected the form and shape of the inputs, {expected}")
            directions = tuple(v.to(x.device) for v, x in zip(directions, tensors, strict=True))
            names = self._check_ids(ids, tensors[0].shape[0], tensors[0].device)
            if tol is None:
                tol = 1e-10 if all(x.dtype == torch.float64 for x in tensors) else 1e-5
            counts = {"autograd": num_samples or 256, "stein": num_samples or 4096, "none": 1}
            own = None
            if num_samples is None and isinstance(self.solver, ProximalGradient) and self.solver.noise == "fixed":
                own = (self.solver.num_samples, self.solver.antithetic)
            result = tensors
            if tensors[0].shape[0]:
                levels = None if hold_settings or self.sigma is not None else self._levels(tensors)
                with evaluating(self._module):
                    problem = self._problem(tensors, target, additional_forward_args, names)
                    penalty = problem.penalty
                    problem = self._solved(problem, solution, eta)
                    follows = penalty.relative and not hold_settings
                    result = map_vjp(
                        problem,
                        displacement,
                        directions,
                        samples={name: -(-n // 4) * 4 for name, n in counts.items()},
                        own_bank=own,
                        method=hessian,
                        ratio=penalty.eta if follows else None,
                        levels=levels,
                        tol=tol,
                        max_steps=max_steps,
                        max_batch=self._max_rows(problem),
                    )
            result = tuple(r.to(x.dtype) for r, x in zip(result, tensors, strict=True))
        return result[0] if isinstance(inputs, Tensor) else result


@dataclass(frozen=True, eq=False)
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

    def eta_path(
        self,
        inputs: Any,
        ratios: Sequence[float],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
    ) -> tuple[Solution, ...]:
        """The solutions for η = ratio·η_max, from sparse to dense, each begun where the sparser one ended.

        η_max is measured once per input, so that the ratios of one path are of the same number; the explainer's own
        eta, eta_ratio or support does not count.

        Args:
            inputs, target, additional_forward_args, ids: see :meth:`attribute`.
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

        def solve(problem: Problem) -> list[Solution]:
            problem = replace(self._with_rho(problem), tuning=None)
            with self._graphs.runner(problem.score.model, problem.keys.device) as runner:
                found = solve_path(problem, steps, self._solver, runner)
            first = steps.index(max(steps))
            found[first] = self._with_cost(found[first])
            return found

        return tuple(self._run(inputs, target, additional_forward_args, ids, solve, len(steps)))


@dataclass(frozen=True, eq=False)
class SparseMoreauGrad(SparseMoreau):
    """MoreauGrad with an L1 penalty on the displacement: exactly sparse maps,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η‖δ‖₁,    A(x) = −δ*/ρ = S_η(∇F(x)).

    Args:
        model, rho, radius, radius_ratio, noise_level, sigma, seed, score, solver, max_batch, unused_inputs, precision:
            see :class:`MoreauGrad`.
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

    def _penalty(self, inputs: Tensors) -> Penalty:
        return self._l1(inputs)


@dataclass(frozen=True, eq=False)
class GroupSparseMoreauGrad(SparseMoreau):
    """MoreauGrad with a group penalty on the displacement: whole groups of features are in the map or out of it,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η Σ_g w_g‖δ_g‖₂,    A(x) = −δ*/ρ.

    Args:
        model, rho, radius, radius_ratio, noise_level, sigma, seed, score, solver, max_batch, unused_inputs, precision:
            see :class:`MoreauGrad`.
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

    def _penalty(self, inputs: Tensors) -> Penalty:
        each = self.groups if isinstance(self.groups, tuple) else (self.groups,) * len(inputs)
        if len(each) != len(inputs):
            raise ValueError(f"groups: expected one per input tensor, {len(inputs)}, got {len(each)}")
        eta, relative = self._strength(inputs)
        partitions = tuple(g.partition(x, ops.state_dtype(x.dtype)) for g, x in zip(each, inputs, strict=True))
        return GroupL2(eta, relative, partitions)
