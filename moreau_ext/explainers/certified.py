"""Certificates of solutions, and derivatives of their maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..analysis.certificate import Certificate, absolute, certify
from ..analysis.derivative import map_vjp
from ..analysis.hessian import ESTIMATES, Method
from ..model.precision import resolution
from ..model.restore import leaves_as_found
from ..model.target import Target, of_rows, target_index
from ..ops.layout import Tensors, in_form_of, tensors_of
from ..solvers.base import Solver
from ..solvers.fixed import ProximalGradient
from ..solvers.problem import Problem
from ..solvers.solution import Form, Solution
from .inputs import Call, Ids, Inputs, check_batch
from .noisy import Noisy
from .settings import Scalar, check_scalar, per_input_setting


def _check_method(method: str) -> None:
    if method not in ESTIMATES:
        raise ValueError(f"hessian: expected one of {', '.join(ESTIMATES)}, got {method!r}")


def _known_of(
    solution: Solution, inputs: Inputs | None, target: Target, ids: Ids
) -> tuple[Tensors, Tensors, Target, Ids, Any]:
    """(displacement, eta) of a solution as tuples, and its target, ids and fixed features, on the device of the inputs.

    Args:
        solution, target, ids: as given.
        inputs: as given; None where a layer's output is displaced in their place.

    Raises:
        TypeError: not a Solution.
        ValueError: a solution of other shapes or another target than those given.
    """
    if not isinstance(solution, Solution):
        raise TypeError(
            f"solution: expected a Solution (attribute with return_solution=True), got {type(solution).__name__}"
        )
    displacement, fixed = tensors_of(solution.displacement), solution.fixed
    if inputs is not None:
        given = check_batch(inputs)
        shapes, expected = [[tuple(d.shape) for d in tensors] for tensors in (displacement, given)]
        if shapes != expected or isinstance(inputs, Tensor) != isinstance(solution.displacement, Tensor):
            raise ValueError(f"solution: expected displacements shaped as the inputs, {expected}, got {shapes}")
        fixed = in_form_of(inputs, tuple([f.to(x.device) for f, x in zip(tensors_of(fixed), given, strict=True)]))
    if not any(bool(f.any()) for f in tensors_of(fixed)):
        fixed = None
    eta = (solution.eta,) * len(displacement) if isinstance(solution.eta, Tensor) else tensors_of(solution.eta)
    batch = len(solution.ids)
    ids = solution.ids if ids is None else ids
    known = solution.target
    if known is not None and target is None:
        index = known.tolist()
        target = known[:, 0] if known.shape[1] == 1 else [tuple(row) for row in index]
    elif known is not None and not callable(target) and not of_rows(target):
        asked = target_index(target, batch)
        if asked.tolist() != known.tolist():
            raise ValueError(
                f"target: the solution explains {known.squeeze(1).tolist()[:5]}, and the target given is "
                f"{asked.squeeze(1).tolist()[:5]}; leave it out, or solve for it"
            )
    return displacement, eta, target, ids, fixed


def _like_states(displacement: Tensors, inputs: Tensors) -> Tensors:
    """Copies in the state dtype and memory layout of what is displaced, on its device."""
    shapes, expected = [[tuple(t.shape) for t in tensors] for tensors in (displacement, inputs)]
    if shapes != expected:
        raise ValueError(
            f"solution: expected displacements shaped as the output of the layer, {expected}, got {shapes}"
        )
    states = [torch.empty_like(x, dtype=ops.state_dtype(x.dtype)) for x in inputs]
    return tuple([s.copy_(d) for s, d in zip(states, displacement, strict=True)])


@dataclass(frozen=True, eq=False, repr=False)
class Certified(Noisy):
    """An explainer that solves a problem: its solutions can be certified, and its maps differentiated."""

    @property
    @abstractmethod
    def _method(self) -> Solver:
        """The solver."""

    @property
    @abstractmethod
    def _rho_is_given(self) -> bool:
        """Whether ρ is a number, rather than measured or a function of the solution."""

    def _solved(self, problem: Problem, solution: Solution, eta: Tensors) -> Problem:
        """The problem that a solution belongs to: with its eta, which may have been found on the way or be one of a
        path, and with its rho where that was found.

        Raises:
            ValueError: the score or the target is another one than the solution's.
        """
        if solution.target is None and isinstance(problem.score.target, Tensor):
            raise ValueError(
                "target: the solution explains a callable, or a model with one output per input, and not a class; give "
                "the target of the call that it came from"
            )
        # Far more than rounding, in a pass of other rows too, and less than classes differ by.
        share = max(1e-3, 16 * max(resolution(self.precision, x) for x in problem.inputs))
        here, there = problem.value.double(), solution.score.to(problem.value.device, torch.float64)
        other = (here - there).abs() > share * torch.maximum(here.abs(), there.abs()) + 1e-4
        if bool(other.any()):
            row = int(other.nonzero()[0])
            raise ValueError(
                f"solution: its score of input {row} is {float(there[row]):.4g}, and the score here is "
                f"{float(here[row]):.4g}: give the inputs, target and additional_forward_args of the call that it came "
                "from. A model that draws random numbers has no score"
            )
        penalty = absolute(problem.penalty, tuple([e.to(r) for e, r in zip(eta, problem.rho, strict=True)]))
        if self._rho_is_given:
            return replace(problem, penalty=penalty, tuning=None)
        rho = tuple(solution.rho.to(r) for r in problem.rho)
        return replace(problem, rho=rho, penalty=penalty, tuning=None)

    @leaves_as_found
    def certificate(
        self,
        inputs: Inputs,
        solution: Solution,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        forward_kwargs: Mapping[str, object] | None = None,
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
            inputs, additional_forward_args, forward_kwargs: as in the call of :meth:`attribute` that gave ``solution``.
            target, ids: the solution's by default; other ids draw another bank. A callable target must be given.
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
        displacement, eta, target, ids, fixed = _known_of(solution, inputs if self.layer is None else None, target, ids)
        call = Call(inputs, target, additional_forward_args, forward_kwargs, ids, fixed)
        with self._posed(call) as (tensors, problem):

            def known(name: str, setting: Scalar) -> Tensor:
                check_scalar(name, setting)
                return per_input_setting(name, setting, tensors[0]).double()

            everywhere = None if lipschitz is None else known("lipschitz", lipschitz)
            both = None if moduli is None else (known("moduli[0]", moduli[0]), known("moduli[1]", moduli[1]))
            if problem is None:
                return Certificate.empty(tensors[0].device, num_samples, confidence)
            return certify(
                self._solved(problem, solution, eta),
                _like_states(displacement, tensors),
                num_samples=num_samples,
                num_hvp_samples=num_hvp_samples,
                steps=lanczos_steps,
                method=hessian,
                confidence=confidence,
                lipschitz=everywhere,
                moduli=both,
            )

    @leaves_as_found
    def vjp(
        self,
        inputs: Inputs,
        solution: Solution,
        vectors: Form,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        forward_kwargs: Mapping[str, object] | None = None,
        num_samples: int | None = None,
        hessian: Method = "auto",
        hold_settings: bool = False,
        tol: float | None = None,
        max_steps: int = 100,
    ) -> Form:
        """vᵀ·DA(x), the derivative of the map A in direction of the inputs, by the implicit function theorem.

        With S the support of the map, H = ∇²f_σ(x + δ*) and M the second derivative of the penalty on S (0 for L1),

            (I + ρ(H_SS + M))·w = v_S,      vᵀDA = H_:,S·w,

        by minimal residuals: no unrolling, and no graph of the solver. Off the support the map does not move (strict
        complementarity), so v counts on S alone. It is what an adaptive attack on the map needs.

        Args:
            inputs, additional_forward_args, forward_kwargs: as in the call of :meth:`attribute` that gave ``solution``.
            target, ids: the solution's by default; other ids draw another bank. A callable target must be given.
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
        displacement, eta, target, ids, fixed = _known_of(solution, inputs if self.layer is None else None, target, ids)
        expected = [tuple(d.shape) for d in displacement]
        directions = tensors_of(vectors) if isinstance(vectors, (Tensor, tuple, Mapping)) else ()
        if [tuple(v.shape) for v in directions] != expected:
            raise ValueError(f"vectors: expected the form and shape of the maps, {expected}")
        counts = {"autograd": num_samples or 256, "stein": num_samples or 4096, "none": 1}
        own = None
        if num_samples is None and isinstance(self._method, ProximalGradient) and self._method.noise == "fixed":
            own = (self._method.num_samples, self._method.antithetic)
        call = Call(inputs, target, additional_forward_args, forward_kwargs, ids, fixed)
        with self._posed(call) as (tensors, problem):
            result = tensors
            if tol is None:
                tol = 1e-10 if all(x.dtype == torch.float64 for x in tensors) else 1e-5
            if problem is not None:
                follows = problem.penalty.relative and not hold_settings
                result = map_vjp(
                    self._solved(problem, solution, eta),
                    _like_states(displacement, tensors),
                    tuple(v.to(x.device) for v, x in zip(directions, tensors, strict=True)),
                    samples={name: -(-n // 4) * 4 for name, n in counts.items()},
                    own_bank=own,
                    method=hessian,
                    follows=follows,
                    levels=None if hold_settings or self.sigma is not None else self._levels(tensors),
                    tol=tol,
                    max_steps=max_steps,
                )
            result = tuple(r.to(x.dtype) for r, x in zip(result, tensors, strict=True))
        found: Form = in_form_of(self._like(call, result), result)
        return found
