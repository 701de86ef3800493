"""The solver that stops when it is done: steps from measured curvature, momentum, and samples that grow.

Levels. The first walks a fixed bank of few samples and measures the curvature it meets. Every later one takes fresh
noise, and ends with a bound of each input's residual; inputs under the tolerance leave. Where noise is the larger part
of it the next level takes twice the samples, where the iteration still moves, twice the steps.

Why averages. Let δ_t be the points where gradients were taken, p_t = ∇f_σ(x+δ_t) + ε_t the m-sample means, and δ̄, p̄
their averages weighted by samples. The answer is y = −ρ S_η(p̄). Its residual has a part that is seen, ‖δ̄ − y‖ (what
the iteration has not settled yet), and the noise of p̄, ρε̄, with variance ρ²V_j/N per feature: V_j that of one sample's
gradient, N the samples averaged. V is estimated from successive differences, ½E(p_t − p_{t−1})²·m, which drift does not
bias once the steps are small. Features that are zero in the map do not contribute. A third part allows for a gradient
that is not linear over the points: half of the radius by which they spread, beyond what noise explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .groups import flat_rows
from .penalties import Penalty, over_features
from .scores import row_chunks
from .solvers import (
    NoisyCopies,
    Problem,
    Solution,
    Tensors,
    assemble,
    check_finite,
    in_order,
    objective,
    progress_bar,
    relative_residual,
    residual_floor,
    rows_of,
    take_rows,
)

_BURN_IN = 12
_STEPS = 16
# Samples of the burn-in; the first averaging level has twice as many, and so on.
_FEWEST = 4
# p(0) gives eta_max when eta is a fraction of it, and the largest of noisy entries is biased: more samples there.
_AT_ZERO = 32
# gamma = 0.7/(1/rho + L): the largest curvature met is a lower bound of the largest there is.
_DAMPING = 0.7
# Before any curvature is known.
_FIRST_STEP = 0.25
# Halves the burn-in (measured on digits: 0.5 against 0 and 0.7).
_MOMENTUM = 0.5
# The largest curvature met in twelve steps is less than beta.
_SAFETY = 1.0
# Over points that wander the gradient is not linear, so its mean there is not the gradient at their mean. On digits the
# residual this leaves was 0.3 to 1 times the radius of the points.
_ALLOWANCE = 0.5
# Successive changes of the displacement that turn back by half mean that the step is too long; noise alone turns back
# by a third at most.
_TURNING = -0.5
# One-sided 95 % of a normal.
_QUANTILE = 1.645


def _sums(tensors: Tensors) -> Tensor:
    """Sum over all features of all tensors, float64 [B]."""
    return torch.stack([flat_rows(t).sum(1, dtype=torch.float64) for t in tensors]).sum(0)


def _inner(a: Tensors, b: Tensors) -> Tensor:
    return _sums(tuple(u.double() * v.double() for u, v in zip(a, b, strict=True)))


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return tuple(u - v for u, v in zip(a, b, strict=True))


@dataclass
class _State:
    """What is carried from step to step, for the inputs that are still in it."""

    problem: Problem
    where: Tensor
    point: Tensors  # where the next gradient is taken
    previous: Tensors  # the displacement before momentum
    gradient: Tensors
    points: Tensors  # sum of points and of gradients, weighted by samples
    gradients: Tensors
    squares: Tensors  # sum of squared successive differences of the gradient, times samples / 2
    curvature: Tensor  # float64 [B], the largest met
    floor: Tensor  # float64 [B]
    lengths: Tensor  # float64 [B], sum of ‖point‖², weighted by samples
    eta: Tensors | None = None
    weight: float = 0.0
    level: int = 0
    samples: int = _FEWEST
    length: int = _BURN_IN  # steps of the level
    differences: int = 0
    drawn: int = 0  # steps of fresh noise so far
    steps: int = 0
    evaluations: int = 0


@dataclass(frozen=True)
class AdaptiveProximalGradient:
    """Proximal gradient steps that adapt to each input and stop when its residual is small enough.

    The step size comes from curvature met in a short burn-in on a fixed bank, with Nesterov's momentum (restarted where
    it points uphill); fresh antithetic noise follows, in levels of 16 steps and more, each with twice the samples of
    the one before, or twice the steps while the iteration still moves; the map is A = S_η(p̄), p̄ averaged over the
    last levels. An input is done when the one-sided 95 % bound of its relative residual is ≤ tol.

    Args:
        tol: relative residual asked for, ‖δ − y‖ / max(‖δ‖, ‖y‖, 10⁻³ρ‖p(0)‖).
        max_gradients: most gradient evaluations per input. The levels cost 48 (80 where η is a ratio), 128, 256, 512,
            ...; one that would exceed the budget is not begun, but the first two always run.
        progress: show a progress bar over inputs (needs tqdm).

    In the Solution, ``relative_residual`` is that bound, and ``converged`` says whether it is ≤ tol. The bound is the
    solver's own, made from what it saw on the way; ``explainer.certificate`` judges a solution on independent samples.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> from moreau_ext import AdaptiveProximalGradient, MoreauGrad
        >>> a = torch.tensor([[3.0, 0.1]])
        >>> explainer = MoreauGrad(lambda x: (x * a).sum(1), solver=AdaptiveProximalGradient())
        >>> s = explainer.attribute(a, return_solution=True)
        >>> bool(s.converged), int(s.gradient_evaluations)
        (True, 176)

    Deterministic, and independent of the batch beyond the rounding of the model's passes.
    Source: the method of arXiv 2302.05294; momentum with restart of O'Donoghue and Candès (2015); averaging of Polyak
    and Juditsky (1992).
    """

    tol: float = 1e-2
    max_gradients: int = 2048
    progress: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tol < math.inf:
            raise ValueError(f"tol: expected a positive number, got {self.tol!r}")
        if isinstance(self.max_gradients, bool) or not isinstance(self.max_gradients, int) or self.max_gradients < 1:
            raise ValueError(f"max_gradients: expected a positive integer, got {self.max_gradients!r}")

    def solve(self, problem: Problem, *, max_batch: int | None = None) -> Solution:
        """Solves a problem with at most ``max_batch`` noisy inputs in one forward pass.

        Raises:
            ValueError: the model gave a gradient that is not finite; names the id of the input.
        """
        batch = problem.keys.shape[0]
        size = batch if max_batch is None else max(1, max_batch // (2 * _FEWEST))
        bar = progress_bar(batch, "input") if self.progress else None
        try:
            return Solution.concatenate(
                self._solve(problem.take(index), max_batch, bar)
                for index in row_chunks(batch, size, problem.keys.device)
            )
        finally:
            if bar is not None:
                bar.close()

    def _solve(self, problem: Problem, max_batch: int | None, bar: Any) -> Solution:
        # Inputs that go different ways go on in batches of their own, so that none depends on another.
        waiting, finished = [_start(problem, max_batch)], []
        while waiting:
            state = waiting.pop()
            copies = NoisyCopies(state.problem, state.samples, True, _chunk(state, state.samples, max_batch))
            scores, before, statistics = _walk(state, copies)
            check_finite(statistics, scores, state.problem.ids, state.steps - 1)
            if state.level == 0:
                waiting.append(replace(state, level=1, samples=2 * _FEWEST, length=_STEPS))
                continue
            solution, drifting, spread_out = self._result(state, scores, before)
            longer = replace(state, length=2 * state.length)
            finer = replace(state, samples=2 * state.samples, length=_STEPS)
            go_on = torch.zeros_like(drifting)
            # Averages start anew while the points still move or are far apart, and once after the first of them.
            for chosen, following, keep in (
                (drifting, longer, False),
                (~drifting & spread_out, finer, False),
                (~drifting & ~spread_out, finer, state.level > 1),
            ):
                if state.evaluations + following.samples * following.length > self.max_gradients:
                    continue
                these = chosen & ~solution.converged
                go_on = go_on | these
                if bool(these.any()):
                    waiting.append(_part(following if keep else _forget(following), these.nonzero().squeeze(1)))
            done = (~go_on).nonzero().squeeze(1)
            if len(done):
                finished.append((state.where[done], solution.take(done)))
                if bar is not None:
                    bar.update(len(done))
        return in_order(finished)

    def _result(self, state: _State, scores: Tensor, before: Tensors) -> tuple[Solution, Tensor, Tensor]:
        """What the inputs would return now, with the bound of their residuals; whose points still move, and whose are
        far apart, compared with the noise."""
        problem, penalty = state.problem, state.problem.penalty
        p = tuple(g / state.weight for g in state.gradients)
        point = tuple(d / state.weight for d in state.points)
        maps = p if penalty is None else penalty.prox(p)
        y = tuple(-over_features(r, a) * a for a, r in zip(maps, problem.rho, strict=True))
        # Variance of rho * p̄ per feature of the map.
        variance = tuple(
            torch.where(a != 0, q, 0).double()
            * over_features(r.double(), q).square()
            / (state.differences * state.weight)
            for a, q, r in zip(maps, state.squares, problem.rho, strict=True)
        )
        noise, deviation = _sums(variance), (2 * _inner(variance, variance)).sqrt()
        gap = _minus(point, y)
        # ‖y + ρS(p(y))‖ = ρ‖S(p(y)) − S(p̄)‖ ≤ ρβ‖y − δ̄‖ + ρ‖ε̄‖: the answer's own residual, with what is known of β.
        rho = torch.stack([r.double() for r in problem.rho]).amax(0)
        settled = _inner(gap, gap) * (_SAFETY * rho * state.curvature).clamp_min(1).square()
        squares = (_inner(point, point), _inner(y, y))
        # Noise alone spreads the points by (γ/ρ) times its variance in a step; a gradient is nearly linear over that.
        scatter = _DAMPING / (1 + rho * state.curvature) * noise * (state.weight / state.samples)
        spread = _ALLOWANCE**2 * (state.lengths / state.weight - squares[0] - scatter).clamp_min(0)
        total = settled + spread + noise
        solution = assemble(
            problem,
            eta=state.eta,
            maps=maps,
            displacement=y,
            gradient=p,
            envelope=objective(problem, before, scores),
            residual=total.sqrt(),
            relative_residual=relative_residual((total + _QUANTILE * deviation).sqrt(), squares, state.floor),
            steps=state.steps,
            evaluations=state.evaluations,
            tol=self.tol,
        )
        return solution, settled > noise, spread > noise


def _start(problem: Problem, max_batch: int | None) -> _State:
    def zeros() -> Tensors:
        return tuple(torch.zeros_like(x, dtype=ops.state_dtype(x.dtype)) for x in problem.inputs)

    nothing = torch.zeros_like(problem.value, dtype=torch.float64)
    state = _State(
        problem=problem,
        where=torch.arange(problem.keys.shape[0], device=problem.keys.device),
        point=zeros(),
        previous=zeros(),
        gradient=zeros(),
        points=zeros(),
        gradients=zeros(),
        squares=zeros(),
        curvature=nothing,
        floor=nothing,
        lengths=nothing,
        eta=None if problem.penalty is None else problem.penalty.eta,
    )
    if problem.penalty is not None and problem.penalty.relative:
        _resolve(state, max_batch)
    return state


def _zeros(state: _State) -> Tensors:
    return tuple(torch.zeros_like(d) for d in state.point)


def _chunk(state: _State, samples: int, max_batch: int | None) -> int:
    """Samples per pass: what is left of max_batch for every input."""
    return samples if max_batch is None else min(samples, max(1, max_batch // state.where.shape[0]))


def _damped(state: _State) -> Tensors:
    """γ = 0.7/(1/ρ + L), per tensor [B]."""
    return tuple((_DAMPING / (1 / r.double() + state.curvature)).to(r.dtype) for r in state.problem.rho)


def _resolve(state: _State, max_batch: int | None) -> None:
    """η from η_max, with more samples than a step of the burn-in has."""
    copies = NoisyCopies(state.problem, _AT_ZERO, True, _chunk(state, _AT_ZERO, max_batch))
    _mean_gradient(state, copies, None)
    first = tuple(g / _AT_ZERO for g in state.gradient)
    penalty: Penalty | None = state.problem.penalty
    if penalty is not None:
        penalty, state.eta = penalty.resolve(first)
    state.problem = replace(state.problem, penalty=penalty)
    state.evaluations += _AT_ZERO


def _mean_gradient(state: _State, copies: NoisyCopies, point: Tensors | None) -> Tensor:
    """Sums the gradients at a point into ``state.gradient``; returns the sum of the scores, float64 [B]."""
    total = torch.zeros_like(state.curvature)
    for c in range(len(copies.chunks)):
        copies.write(c, point)
        scores, gradients = copies.gradient(c)
        total += scores.sum(1, dtype=torch.float64)
        for g, into in zip(gradients, state.gradient, strict=True):
            ops.accumulate(g, into, carry=c > 0)
    return total


def _walk(state: _State, copies: NoisyCopies) -> tuple[Tensor, Tensors, Tensor]:
    """The steps of one level, in place: (f_σ, the point, the step's statistics) of the last gradient."""
    problem, penalty, samples, burning = state.problem, state.problem.penalty, state.samples, state.level == 0
    gamma = tuple(_FIRST_STEP * r for r in problem.rho) if burning else _damped(state)
    state.squares, state.differences = _zeros(state), 0
    copies.step.fill_(state.drawn)
    before = state.point
    last_gradient: Tensors | None = None
    last_change: Tensors | None = None
    score = statistics = state.floor
    turned, length = torch.zeros_like(state.floor), torch.zeros_like(state.floor)
    for t in range(state.length):
        score = _mean_gradient(state, copies, state.point) / samples
        last_point, before = before, tuple(d.clone() for d in state.point)
        statistics = torch.stack(
            [
                ops.prox_step(
                    None,
                    state.gradient[i],
                    state.point[i],
                    count=samples,
                    carry=True,
                    rho=problem.rho[i],
                    step_size=gamma[i],
                    eta=None if penalty is None else penalty.eta[i],
                    groups=None if penalty is None else penalty.partition(i),
                )
                for i in range(len(problem.inputs))
            ]
        ).sum(0)
        if burning and t == 0:
            state.floor = residual_floor(problem, statistics[:, 3])
        change: Tensors | None = None if last_gradient is None else _minus(state.gradient, last_gradient)
        if burning and change is not None:
            # On one bank the change of the gradient along the change of the point is curvature, without noise.
            moved = _minus(before, last_point)
            met = _inner(moved, change).abs() / _inner(moved, moved).clamp_min(torch.finfo(torch.float64).tiny)
            state.curvature = torch.maximum(state.curvature, met)
            gamma = _damped(state)
        if not burning:
            state.drawn += 1
            copies.step += 1
            if change is not None:
                for q, c in zip(state.squares, change, strict=True):
                    q.addcmul_(c, c, value=samples / 2)
                state.differences += 1
            if state.level > 1 or t >= state.length // 4:
                for total, value in zip((*state.points, *state.gradients), (*before, *state.gradient), strict=True):
                    total.add_(value, alpha=samples)
                state.lengths = state.lengths + samples * statistics[:, 1]
                state.weight += samples
        last_gradient = tuple(g.clone() for g in state.gradient)
        step = _momentum(state, before)
        if last_change is not None:
            turned += _inner(step, last_change)
            length += _inner(last_change, last_change)
        last_change = step
        state.steps += 1
        state.evaluations += samples
    if not burning:
        steeper = 2 * state.curvature + 1 / torch.stack([r.double() for r in problem.rho]).amin(0)
        state.curvature = torch.where(turned < _TURNING * length, steeper, state.curvature)
    return score, before, statistics


def _momentum(state: _State, before: Tensors) -> Tensors:
    """Moves the point on along the last change of the displacement, unless the step just taken turned against it;
    returns the change."""
    new = tuple(d.clone() for d in state.point)
    change = _minus(new, state.previous)
    uphill = _inner(_minus(before, new), change) > 0
    for d, c in zip(state.point, change, strict=True):
        d.add_(over_features(torch.where(uphill, 0.0, _MOMENTUM).to(d.dtype), d) * c)
    state.previous = new
    return change


def _forget(state: _State) -> _State:
    """The state with its averages begun anew."""
    return replace(
        state, points=_zeros(state), gradients=_zeros(state), lengths=torch.zeros_like(state.lengths), weight=0.0
    )


def _part(state: _State, keep: Tensor) -> _State:
    """The state of some of the inputs, at the next level."""

    def rows(tensors: Tensors) -> Tensors:
        return tuple(take_rows(t, keep) for t in tensors)

    return replace(
        state,
        level=state.level + 1,
        problem=state.problem.take(keep),
        where=state.where[keep],
        point=rows(state.point),
        previous=rows(state.previous),
        gradient=rows(state.gradient),
        points=rows(state.points),
        gradients=rows(state.gradients),
        squares=rows(state.squares),
        curvature=state.curvature[keep],
        floor=state.floor[keep],
        lengths=state.lengths[keep],
        eta=None if state.eta is None else tuple(rows_of(e, state.where.shape[0])[keep] for e in state.eta),
    )
