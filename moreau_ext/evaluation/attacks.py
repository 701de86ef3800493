"""Attacks on maps: nearby inputs with the same prediction and another map.

Except for the Gaussian attack, they minimise the share of the clean map's largest features,

    J(x') = Σ_{i ∈ T} |A_i(x')| / Σ_i |A_i(x')|,      T = the k largest |A(x)|,      ‖x' − x‖ ≤ ε,   argmax f(x') kept,

the top-k attack of Ghorbani, Abid and Zou (2019, arXiv 1710.10547) for maps of any scale. They differ in the map whose
share they minimise:

    frozen     1{A(x) ≠ 0}·|∇f(x' + δ*)| without noise, with the displacement δ* and the support of the clean map. This
               is the attack of the published comparison (arXiv 2302.05294); metrics use the actual map.
    adaptive   the map itself, with its derivative (:mod:`.derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.gradients import Gradient
from ..ops.layout import flat_rows
from ..solvers.solution import Solution
from .derivatives import Hessian, explainer_vjp, gradient_vjp
from .faithfulness import drawn
from .metrics import topk_mask

__all__ = ["ATTACKS", "Attack", "Attacked"]

Kind = Literal["gaussian", "frozen", "adaptive"]
Norm = Literal["l2", "linf"]
ATTACKS: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian"},
    "frozen": {"kind": "frozen"},
    "adaptive": {"kind": "adaptive"},
    "frozen_strong": {"kind": "frozen", "steps": 100, "restarts": 5, "published_step": False},
    "adaptive_strong": {"kind": "adaptive", "steps": 100, "restarts": 3},
}
"""Settings of :class:`Attack` by name: the default attacks have 10 steps, the strong ones 100 steps and restarts."""

_GAUSSIAN, _START, _FRESH = 0x5EED_6A55, 0x5EED_57A2, 1 << 40
_DRAWS = 20
_MOMENTUM = 0.75


@dataclass(frozen=True)
class Attacked:
    """The result of an attack, [B] except for ``inputs``.

    Args:
        inputs: x', [B, *features].
        distance_l2, distance_linf: ‖x' − x‖, float64.
        kept: whether argmax f(x') is the target. An input stays at x if no step keeps the prediction.
        share_before, share_after: J of the attacked map, at x and at x'; NaN for the Gaussian attack.
        gradients: gradient evaluations of the model that the attack spent on an input.
    """

    inputs: Tensor
    distance_l2: Tensor
    distance_linf: Tensor
    kept: Tensor
    share_before: Tensor
    share_after: Tensor
    gradients: int


def _rows(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def _norm(u: Tensor, norm: Norm) -> Tensor:
    flat = flat_rows(u).double()
    return flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)


def _project(u: Tensor, radius: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return u.clamp(-radius, radius)
    return u * _rows((radius / _norm(u, norm).clamp_min(1e-30)).clamp_max(1.0), u)


def _share(maps: Tensor, top: Tensor) -> Tensor:
    """J, float64 [B]; 1 for a map of zeros: the attack has erased the top features and moved nothing elsewhere."""
    size, chosen = flat_rows(maps.abs()).double(), flat_rows(top).double()
    total = size.sum(1)
    return torch.where(total > 0, (size * chosen).sum(1) / total.clamp_min(1e-300), 1.0)


def _share_slope(maps: Tensor, top: Tensor) -> Tensor:
    """∂J/∂A."""
    size = flat_rows(maps.abs()).double()
    total = _rows(size.sum(1).clamp_min(1e-300), maps.double())
    slope = maps.sign().double() * (top.double() - _rows(_share(maps, top), maps.double())) / total
    return slope.to(maps.dtype)


@dataclass(frozen=True)
class Attack:
    """An attack and its budget.

    Args:
        kind: "gaussian", "frozen" or "adaptive".
        radius: ε > 0, in the inputs' unit.
        norm: of the budget, "l2" or "linf".
        k: of the objective: a fraction of the clean map's non-zeros, or a number of features.
        steps: of "frozen" and "adaptive".
        restarts: number of starts; the first at x, the others at random points of the ball. The best result counts.
        published_step: "frozen" takes sign steps of ε/100, as published. Otherwise, and for "adaptive", steps of ε/4
            along the gradient with momentum (its sign under "linf"); a step that changes the prediction is halved.
        num_samples: gradients for each derivative.
        hessian: "autograd" or "stein"; see :func:`moreau_ext.evaluation.find_hessian`.
        noise_level: of the smoothing, as a fraction of an input's range, for methods without one.
        seed: of the random points.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> from moreau_ext import Gradient
        >>> from moreau_ext.evaluation import Attack
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.SiLU(), torch.nn.Linear(9, 3)).eval()
        >>> x = torch.randn(4, 6)
        >>> attack = Attack("adaptive", radius=0.5, hessian="autograd")
        >>> found = attack.run(Gradient(model), model, x, model(x).argmax(1))
        >>> bool((found.distance_l2 <= 0.5 + 1e-6).all() & found.kept.all())
        True

    Inputs are not clipped to a range of pixel values. The result of an input depends only on the input, its id and the
    seed, up to the rounding of the model's passes, which sign steps may amplify.
    """

    kind: Kind
    radius: float
    norm: Norm = "l2"
    k: int | float = 0.4
    steps: int = 10
    restarts: int = 1
    published_step: bool = True
    num_samples: int = 256
    hessian: Hessian = "stein"
    noise_level: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "frozen", "adaptive"):
            raise ValueError(f"kind: expected 'gaussian', 'frozen' or 'adaptive', got {self.kind!r}")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm: expected 'l2' or 'linf', got {self.norm!r}")
        if not 0 < self.radius < float("inf"):
            raise ValueError(f"radius: expected a positive number, got {self.radius!r}")
        for name in ("steps", "restarts", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")

    def run(
        self,
        explainer: Explainer,
        model: Callable[..., Tensor],
        inputs: Tensor,
        target: Tensor,
        *,
        clean: Solution | None = None,
        ids: Tensor | None = None,
    ) -> Attacked:
        """Attacks the maps of a batch.

        Args:
            explainer: of the maps; one of this package.
            model: must keep its prediction: inputs -> logits [B, classes], in eval mode.
            inputs: [B, *features].
            target: int64 [B], the predicted class, which the maps explain.
            clean: the explainer's solution of the inputs, if known.
            ids: int64 [B], as the explainer takes them.
        """
        ids = torch.arange(inputs.shape[0], device=inputs.device) if ids is None else ids
        with torch.no_grad():
            if clean is None and self.kind != "gaussian":
                clean = explainer.attribute(inputs, target, ids=ids, return_solution=True)
            search = _Search(self, explainer, model, inputs, target, clean, ids)
            return search.gaussian() if self.kind == "gaussian" else search.descend()

    def cost(self, map_gradients: int) -> int:
        """The approximate number of gradient evaluations per input, given those of a map."""
        if self.kind == "gaussian":
            return 0
        seen = map_gradients if self.kind == "adaptive" else 1
        return self.restarts * (self.steps * (seen + self.num_samples) + seen)


class _Search:
    """One attack on one batch."""

    def __init__(
        self,
        attack: Attack,
        explainer: Explainer,
        model: Callable[..., Tensor],
        inputs: Tensor,
        target: Tensor,
        clean: Solution | None,
        ids: Tensor,
    ) -> None:
        self.attack, self.explainer, self.model = attack, explainer, model
        self.x, self.target, self.ids = inputs, target, ids
        flat = flat_rows(inputs)
        self.sigma = attack.noise_level * (flat.amax(1) - flat.amin(1))
        self.gradients = 0
        self.draws = 0
        if attack.kind == "gaussian" or clean is None:
            return  # needs no map
        self.clean = clean
        self.top = topk_mask(clean.attribution, attack.k)
        if attack.kind == "frozen":
            self.support = (clean.attribution != 0).to(inputs.dtype)
            self.frozen = clean.displacement.to(inputs.dtype)
            self.plain = Gradient(
                explainer.model,
                score=explainer.score,
                max_batch=explainer.max_batch,
                unused_inputs=explainer.unused_inputs,
                precision=explainer.precision,
            )

    def kept(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x).argmax(1) == self.target
        return found

    def result(self, x: Tensor, before: Tensor, after: Tensor) -> Attacked:
        moved = x - self.x
        distances = _norm(moved, "l2"), _norm(moved, "linf")
        return Attacked(x, *distances, self.kept(x), before, after, self.gradients)

    def gaussian(self) -> Attacked:
        """A random direction of length ε. If it changes the prediction, others are tried, then shorter ones."""
        attack, x = self.attack, self.x.clone()
        z = drawn(attack.seed ^ _GAUSSIAN, self.ids, self.x, _DRAWS)
        todo = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for draw in range(_DRAWS):
            u = z[:, draw]
            length = attack.radius if draw < _DRAWS // 2 else attack.radius / 2 ** (draw - _DRAWS // 2 + 1)
            candidate = self.x + u * _rows(length / _norm(u, attack.norm), u)
            good = todo & self.kept(candidate)
            x = torch.where(_rows(good, x) > 0, candidate, x)
            todo = todo & ~good
            if not bool(todo.any()):
                break
        unknown = torch.full((x.shape[0],), torch.nan, dtype=torch.float64, device=x.device)
        return self.result(x, unknown, unknown)

    def see(self, x: Tensor) -> tuple[Tensor, Solution]:
        """(the attacked map, the solution from which it is derived)."""
        if self.attack.kind == "adaptive":
            solution = self.explainer.attribute(x, self.target, ids=self.ids, return_solution=True)
            self.gradients += int(solution.gradient_evaluations.double().mean())
            return solution.attribution, solution
        self.gradients += 1
        solution = self.plain.attribute(x + self.frozen, self.target, return_solution=True)
        return self.support * solution.attribution, solution

    def slope(self, x: Tensor, maps: Tensor, solution: Solution) -> Tensor:
        """∂J/∂x, with fresh noise at every step."""
        attack, v = self.attack, _share_slope(maps, self.top)
        self.draws += 1
        self.gradients += attack.num_samples
        settings: dict[str, Any] = {
            "ids": self.ids + self.draws * _FRESH,
            "hessian": attack.hessian,
            "num_samples": attack.num_samples,
            "sigma": self.sigma,
        }
        if attack.kind == "frozen":
            return gradient_vjp(self.explainer, x + self.frozen, solution, self.support * v, self.target, **settings)
        return explainer_vjp(self.explainer, x, solution, v, self.target, **settings)

    def start(self, restart: int) -> Tensor:
        """The start of a restart: x first, then random points of the ball that keep the prediction."""
        attack = self.attack
        if restart == 0:
            return self.x.clone()
        u = drawn(attack.seed ^ _START, self.ids + restart * _FRESH, self.x)[:, 0]
        u = u * _rows(attack.radius / 2 / _norm(u, attack.norm), u)
        return torch.where(_rows(self.kept(self.x + u), u) > 0, self.x + u, self.x)

    def descend(self) -> Attacked:
        attack = self.attack
        signed = attack.norm == "linf" or (attack.kind == "frozen" and attack.published_step)
        published = attack.kind == "frozen" and attack.published_step
        length = attack.radius / (100 if published else 4)
        best, least, before = self.x.clone(), None, torch.empty(0)
        for restart in range(attack.restarts):
            at = self.start(restart)
            # The clean map is the adaptive attack's map at x.
            known = restart == 0 and attack.kind == "adaptive"
            maps, solution = (self.clean.attribution, self.clean) if known else self.see(at)
            share = _share(maps, self.top)
            if least is None:
                before, least = share, share.clone()
            step = torch.full_like(share, length)
            velocity = torch.zeros_like(at)
            for _ in range(attack.steps):
                slope = self.slope(at, maps, solution)
                if published:
                    velocity = slope
                else:
                    velocity = _MOMENTUM * velocity + slope / _rows(_norm(slope, "l2").clamp_min(1e-30), slope)
                direction = velocity.sign() if signed else velocity
                if not signed:
                    direction = direction / _rows(_norm(direction, "l2").clamp_min(1e-30), direction)
                moved = self.x + _project(at - _rows(step, at) * direction - self.x, attack.radius, attack.norm)
                good = self.kept(moved)
                if not published:
                    step = torch.where(good, step, step / 2)
                at = torch.where(_rows(good, at) > 0, moved, at)
                maps, solution = self.see(at)
                share = _share(maps, self.top)
                better = share < least
                least = torch.where(better, share, least)
                best = torch.where(_rows(better, best) > 0, at, best)
        return self.result(best, before, before if least is None else least)
