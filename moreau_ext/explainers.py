"""The explainers people call: MoreauGrad and its sparse forms. The gradient baselines are in baselines.py."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import ops
from .groups import Groups, Pixels, flat_rows, memory_layout
from .noise import noise_keys
from .penalties import L1, GroupL2, Penalty
from .scores import ScoreName, Target, UnusedInputs, bind_score, check_score_settings, evaluating
from .solvers import Problem, ProximalGradient, Solution

Tensors = tuple[Tensor, ...]
# One number, or one per input of the batch to come.
Scalar = float | Tensor


def _check_scalar(name: str, value: Any, *, positive: bool = False) -> None:
    if value is None:
        return
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    low = tensor <= 0 if positive else tensor < 0
    if bool((low | ~torch.isfinite(tensor)).any()):
        expected = "a positive" if positive else "a non-negative"
        raise ValueError(f"{name}: expected {expected} finite number, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


@dataclass(frozen=True, eq=False)
class Explainer(ABC):
    """What all explainers share: checking, and leaving the model as it was found.

    An explainer is a frozen record of settings. Every call's state is local, so threads may share one.
    """

    model: Callable[..., Any]
    score: ScoreName = field(default="logit", kw_only=True)
    max_batch: int | None = field(default=1024, kw_only=True)
    unused_inputs: UnusedInputs = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"model: expected a callable, got {type(self.model).__name__}")
        if self.max_batch is not None:
            check_count("max_batch", self.max_batch)
        check_score_settings(self.score, self.unused_inputs)

    @abstractmethod
    def _solve(self, problem: Problem) -> Solution:
        """The solution of a batch that has at least one input."""

    def _rho(self) -> Scalar:
        return 1.0

    def _keys(self, ids: Tensor) -> Tensor:
        return ids

    def _sigmas(self, inputs: Tensors) -> Tensors:
        """σ of every tensor, [B]."""
        return tuple(per_input_setting("sigma", 0.0, x) for x in inputs)

    def _penalty(self, inputs: Tensors) -> Penalty | None:
        return None

    @overload
    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: Literal[False] = False,
    ) -> Any: ...

    @overload
    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: Literal[True],
    ) -> Solution: ...

    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: bool = False,
    ) -> Any:
        """The maps of a batch.

        Args:
            inputs: a tensor [B, *features], or a tuple of them, of floating point; any rank >= 1. Each input's map is
                its own: it does not depend on the batch beyond the rounding of the model's passes. A model that mixes
                the inputs of a batch (batch statistics, contrastive heads) is not supported.
            target: what to explain: None (the predicted class; the output itself where there is one per input), an
                int, a tensor or array [B] or [B, 1], a list of B ints or of B tuples, one tuple (outputs of higher
                rank), or a callable output -> [B].
            additional_forward_args: passed to the model after the inputs; tensors whose first axis is B follow the
                inputs.
            ids: int64 [B], each input's name to the noise bank; its position by default. Give them when you split a
                data set into batches, and an input draws the same noise in any of them.
            return_solution: return a :class:`Solution` instead of the maps alone.

        Returns:
            The maps, in the form, shape, dtype and device of ``inputs``; or the Solution.

        Raises:
            ValueError: NaN or infinity in an input, a target out of range or of the wrong length, groups that do not
                fit, a score that does not depend on an input, or a gradient that is not finite.
            TypeError: inputs that are no floating-point tensors, or targets that are no integers.
        """
        single = isinstance(inputs, Tensor)
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._check_inputs(inputs)
            batch = tensors[0].shape[0]
            names = self._check_ids(ids, batch, tensors[0].device)
            if batch == 0:
                solution = _nothing(tensors)
            else:
                with evaluating(self.model):
                    score, value = bind_score(
                        self.model,
                        tensors,
                        target,
                        score=self.score,
                        additional_forward_args=additional_forward_args,
                        unused_inputs=self.unused_inputs,
                        max_batch=self.max_batch,
                    )
                    solution = self._solve(
                        Problem(
                            inputs=tensors,
                            score=score,
                            value=value,
                            ids=names,
                            keys=self._keys(names),
                            sigma=self._sigmas(tensors),
                            rho=tuple(per_input_setting("rho", self._rho(), x) for x in tensors),
                            penalty=self._penalty(tensors),
                        )
                    )
        empty = int(solution.empty.sum())
        if empty:
            warnings.warn(
                f"{empty} of {batch} maps are zero everywhere: the score is flat there, or eta is at or above eta_max; "
                "Solution.empty says which",
                stacklevel=2,
            )
        if single:
            form = ("attribution", "displacement", "envelope_gradient", "eta", "sigma")
            solution = replace(solution, **{name: getattr(solution, name)[0] for name in form})
        elif all(e.dim() == 1 for e in solution.eta):
            solution = replace(solution, eta=solution.eta[0])
        return solution if return_solution else solution.attribution

    def _check_inputs(self, inputs: Any) -> Tensors:
        """Our own dense copies."""
        tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError(f"inputs: expected a tensor or a tuple of tensors, got {type(inputs).__name__}")
        for i, x in enumerate(tensors):
            name = "inputs" if isinstance(inputs, Tensor) else f"inputs[{i}]"
            if not x.is_floating_point():
                raise TypeError(
                    f"{name}: expected floating point, got {x.dtype}. Token ids cannot be displaced: explain the "
                    "embeddings, with a model that takes them as input"
                )
            if x.layout != torch.strided:
                raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call .to_dense() first")
            if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
            if x.dim() < 1:
                raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
            if x.shape[0] != tensors[0].shape[0]:
                raise ValueError(f"{name}: expected {tensors[0].shape[0]} inputs, as in inputs[0], got {x.shape[0]}")
            if x.device != tensors[0].device:
                raise ValueError(
                    f"{name}: expected a tensor on {tensors[0].device}, as inputs[0], got one on {x.device}"
                )
            if x.shape[0] and x.numel() == 0:
                raise ValueError(f"{name}: has no features, shape {tuple(x.shape)}")
            finite = flat_rows(torch.isfinite(x)).all(1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise ValueError(f"{name}: input {row} holds NaN or infinity")
        if isinstance(self.model, nn.Module):
            devices = {p.device for p in self.model.parameters()}
            if len(devices) == 1 and tensors[0].device not in devices:
                raise ValueError(f"inputs: are on {tensors[0].device}, but the model is on {devices.pop()}")
        return tuple(_own(x) for x in tensors)

    def _check_ids(self, ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if ids is None:
            return torch.arange(batch, device=device)
        try:
            names = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"ids: expected int64, one per input, got {ids!r}") from None
        if names.is_floating_point() or names.is_complex() or names.dtype == torch.bool:
            raise TypeError(f"ids: expected int64, got {names.dtype}")
        if names.shape != (batch,):
            raise ValueError(f"ids: expected one per input, [{batch}], got shape {tuple(names.shape)}")
        return names.to(device=device, dtype=torch.int64)


def _own(x: Tensor) -> Tensor:
    copy = x.detach().clone()
    return copy if memory_layout(copy) is not None else copy.contiguous()


def per_input_setting(name: str, value: Scalar | None, x: Tensor) -> Tensor:
    """A setting as state dtype [B] for one tensor."""
    state, batch = ops.state_dtype(x.dtype), x.shape[0]
    # In the state dtype at once: a Python number would otherwise pass through float32.
    tensor = torch.as_tensor(value, dtype=state, device=x.device)
    if tensor.dim() == 0:
        return tensor.expand(batch).contiguous()
    if tensor.shape != (batch,):
        raise ValueError(f"{name}: expected a number or one per input, [{batch}], got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def _nothing(inputs: Tensors) -> Solution:
    """The solution of an empty batch."""
    device = inputs[0].device
    states = tuple(x.to(ops.state_dtype(x.dtype)) for x in inputs)
    scalars = tuple(s.new_empty(0) for s in states)
    numbers, counts = (
        torch.empty(0, dtype=torch.float64, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
    )
    flags = torch.empty(0, dtype=torch.bool, device=device)
    return Solution(
        attribution=inputs,
        displacement=states,
        envelope=numbers,
        envelope_gradient=states,
        score=scalars[0],
        residual=numbers,
        relative_residual=numbers,
        steps=counts,
        gradient_evaluations=counts,
        converged=flags,
        nnz=counts,
        empty=flags,
        eta=scalars,
        sigma=scalars,
    )


def _per_feature(eta: Tensor, inputs: Tensors) -> Tensor:
    if len(inputs) > 1:
        raise ValueError("eta: one per feature is for a single input tensor, not for a tuple")
    x = inputs[0]
    if eta.shape not in ((1, *x.shape[1:]), tuple(x.shape)):
        raise ValueError(
            f"eta: expected a number, one per input [{x.shape[0]}], or one per feature {(1, *x.shape[1:])} or "
            f"{tuple(x.shape)}, got shape {tuple(eta.shape)}"
        )
    like = torch.empty_like(x[: eta.shape[0]], dtype=ops.state_dtype(x.dtype))
    return like.copy_(eta)


@dataclass(frozen=True, eq=False)
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
        if self.noise_level is None and self.sigma is None:
            object.__setattr__(self, "noise_level", 0.1)
        for name in ("noise_level", "sigma"):
            _check_scalar(name, getattr(self, name))

    def _keys(self, ids: Tensor) -> Tensor:
        return noise_keys(self.seed, ids)

    def _sigmas(self, inputs: Tensors) -> Tensors:
        if self.noise_level is None:
            return tuple(per_input_setting("sigma", self.sigma, x) for x in inputs)
        sigmas = []
        for x in inputs:
            level = per_input_setting("noise_level", self.noise_level, x)
            flat = flat_rows(x).to(level.dtype)
            sigmas.append(level * (flat.amax(1) - flat.amin(1)))
        return tuple(sigmas)


@dataclass(frozen=True, eq=False)
class Sparse(Explainer):
    """An explainer with a strength η, absolute or as a fraction of each input's η_max."""

    eta: Scalar | None = field(default=None, kw_only=True)
    eta_ratio: Scalar | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta is not None and self.eta_ratio is not None:
            raise ValueError("give eta (absolute) or eta_ratio (a fraction of each input's eta_max), not both")
        if self.eta is None and self.eta_ratio is None:
            object.__setattr__(self, "eta_ratio", 0.1)
        for name in ("eta", "eta_ratio"):
            _check_scalar(name, getattr(self, name))

    def _l1(self, inputs: Tensors) -> L1:
        if self.eta is not None and torch.as_tensor(self.eta).dim() > 1:
            return L1((_per_feature(torch.as_tensor(self.eta, dtype=ops.state_dtype(inputs[0].dtype)), inputs),))
        return L1(*self._strength(inputs))

    def _strength(self, inputs: Tensors) -> tuple[Tensors, bool]:
        """(η or its ratio to η_max per tensor, whether it is the ratio)."""
        if self.eta is None:
            return tuple(per_input_setting("eta_ratio", self.eta_ratio, x) for x in inputs), True
        return tuple(per_input_setting("eta", self.eta, x) for x in inputs), False


@dataclass(frozen=True, eq=False)
class MoreauGrad(Noisy):
    """The gradient of the Moreau envelope of a smoothed score,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ),    A(x) = ∇F(x) = −δ*/ρ,    f_σ(x) = E f(x + σz), z ~ N(0, I).

    Args:
        model: an nn.Module or any callable that maps inputs [n, ...] to outputs [n, ...]. It is run in eval mode and
            left as it was found. It must not mix the inputs of a batch.
        rho: ρ > 0, a number or one per input [B]: how far to look. Units of x²/score. The problem has one solution
            where ρλ < 1, λ the weak-convexity constant of f_σ.
        noise_level: σ as a fraction of each input's own range max x − min x (per tensor of a tuple); default 0.1. A
            constant input has range 0 and gets no noise.
        sigma: σ ≥ 0, absolute, instead; a number or one per input.
        seed: of the noise bank. Same seed and ids, same noise, whatever the batch; global generators are not touched.
        score: what is explained: "logit", "log_prob", "prob", or "margin" (the logit minus the largest other one).
        solver: a :class:`ProximalGradient`.
        max_batch: most noisy inputs in one forward pass; lower it when memory runs out. Results agree to rounding.
        unused_inputs: "raise", or "zero" for a zero map, when the score does not depend on an input.

    Raises:
        ValueError, TypeError: a setting out of range, by name.

    Example:
        >>> import torch
        >>> from moreau_ext import MoreauGrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3)).eval()
        >>> MoreauGrad(model, rho=0.5).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])

    Deterministic on one machine: the same bits each run where the model's own kernels are deterministic.
    Source: arXiv 2302.05294, section 3.
    """

    rho: Scalar = field(default=1.0, kw_only=True)
    solver: ProximalGradient = field(default_factory=ProximalGradient, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scalar("rho", self.rho, positive=True)
        if not isinstance(self.solver, ProximalGradient):
            raise TypeError(f"solver: expected a ProximalGradient, got {type(self.solver).__name__}")
        # Where the score is flat a step multiplies the displacement by 1 - step_size/rho.
        least = float(torch.as_tensor(self.rho).min())
        if self.solver.max_steps > 1 and self.solver.step_size >= 2 * least:
            raise ValueError(
                f"step_size: {self.solver.step_size} diverges for rho = {least:.4g}; expected less than 2·rho, "
                "and rho/10 is usual"
            )

    def _rho(self) -> Scalar:
        return self.rho

    def _solve(self, problem: Problem) -> Solution:
        return self.solver.solve(problem, max_batch=self.max_batch)


@dataclass(frozen=True, eq=False)
class SparseMoreauGrad(Sparse, MoreauGrad):
    """MoreauGrad with an L1 penalty on the displacement: exactly sparse maps,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η‖δ‖₁,    A(x) = −δ*/ρ = S_η(∇F(x)).

    Args:
        model, rho, noise_level, sigma, seed, score, solver, max_batch, unused_inputs: see :class:`MoreauGrad`.
        eta: η ≥ 0, absolute, in units of the gradient: a number, one per input [B], or one per feature [1, *features]
            or [B, *features].
        eta_ratio: η as a fraction of that input's η_max = ‖p(0)‖_∞, the least η with a zero map; default 0.1. It does
            not depend on the scale of the score. 1 or more gives zero maps by definition.

    Example:
        >>> import torch
        >>> from moreau_ext import SparseMoreauGrad
        >>> a = SparseMoreauGrad(lambda x: (x * torch.tensor([3.0, 0.1])).sum(1), eta=1.0).attribute(torch.ones(1, 2))
        >>> a.round(decimals=4)
        tensor([[2., 0.]])

    Source: arXiv 2302.05294, section 4.1.
    """

    def _penalty(self, inputs: Tensors) -> Penalty | None:
        return self._l1(inputs)


@dataclass(frozen=True, eq=False)
class GroupSparseMoreauGrad(Sparse, MoreauGrad):
    """MoreauGrad with a group penalty on the displacement: whole groups of features are in the map or out of it,

        F(x) = min_δ f_σ(x+δ) + ‖δ‖²/(2ρ) + η Σ_g w_g‖δ_g‖₂,    A(x) = −δ*/ρ.

    Args:
        model, rho, noise_level, sigma, seed, score, solver, max_batch, unused_inputs: see :class:`MoreauGrad`.
        eta: η ≥ 0, absolute; a number or one per input [B].
        eta_ratio: η as a fraction of that input's η_max = max_g ‖p_g(0)‖/w_g; default 0.1.
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
            raise TypeError(f"groups: expected Pixels, Tiles, Labels or a tuple of them, got {self.groups!r}")

    def _penalty(self, inputs: Tensors) -> Penalty | None:
        each = self.groups if isinstance(self.groups, tuple) else (self.groups,) * len(inputs)
        if len(each) != len(inputs):
            raise ValueError(f"groups: expected one per input tensor, {len(inputs)}, got {len(each)}")
        eta, relative = self._strength(inputs)
        partitions = tuple(g.partition(x, ops.state_dtype(x.dtype)) for g, x in zip(each, inputs, strict=True))
        return GroupL2(eta, relative, partitions)
