"""The solver that stops when it is done: steps from measured curvature, momentum, and samples that grow.

Levels. The first walks a fixed bank of few samples and measures the curvature it meets. Every later one takes fresh
noise, half as many gradients as were spent before it, and ends with a bound of each input's residual; inputs under the
tolerance leave. Where the iteration still moves the next level takes more steps, elsewhere more samples a step.

Why averages. Let δ_t be the points where gradients were taken, p_t = ∇f_σ(x+δ_t) + ε_t the m-sample means, and δ̄, p̄
their averages weighted by samples. The answer is y = −ρ S_η(p̄). Its residual has a part that is seen, ‖δ̄ − y‖ (what
the iteration has not settled yet), and the noise of p̄, ρε̄, with variance ρ²V_j/N per feature: V_j that of one sample's
gradient, N the samples averaged. V is estimated from successive differences, ½E(p_t − p_{t−1})²·m, which drift does not
bias once the steps are small, and counted by what S_η lets through: features that are zero in the map, and most of
what turns a group without lengthening it, do not contribute. A third part allows for a gradient that is not linear over
the points: half of the radius by which they spread, beyond what noise explains. How many of the last steps are averaged
is chosen for each input: of a few windows, the one with the smallest bound.

What follows the solution. Where the support or the displacement's length was asked for (:class:`Tuning`), η and ρ are
functions of p: they are set anew from p̄ after each level, and the answer, its residual and its bound are those of the
problem with the η and ρ that are returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..capture.records import READ
from ..capture.runner import Graphs, Steps
from ..ops.layout import Tensors, join_rows, over_features, states_like, take_rows
from .batching import check_finite, in_groups, progress_bar
from .bound import DAMPING, DIFFERENCES, LENGTHS, Answer, Seen, Window, best_answer, inner, minus
from .penalties import Penalty
from .problem import Problem, objective
from .samples import NoisyCopies
from .solution import Solution, assemble, in_order, rows_of

_BURN_IN = 12

# The same where eta or rho follow the solution, on twice the samples: few samples overstate the largest entries.
_TUNED_BURN_IN = 24

# Steps of a level where nothing else is wanted, and the gradients of the shortest.
_STEPS, _LEAST = 16, 128

# A level costs this share of what was spent before it: little is wasted on an input that was nearly done.
_GROWTH = 0.5

# Windows that are kept: memory, each is two maps.
_WINDOWS = 4

# Samples of the burn-in; the first averaging level has twice as many.
_FEWEST = 4

# Samples at either end of the difference p(y) - p(mean point).
_AT_ENDS = 8

# p(0) gives eta_max when eta is a fraction of it, and the largest of noisy entries is biased: more samples there.
_AT_ZERO = 32

# Before any curvature is known.
_FIRST_STEP = 0.25

# Of the displacement's length: a shorter way shows no curvature.
_SHORT = 1e-3

# Halves the burn-in (measured on digits: 0.5 against 0 and 0.7).
_MOMENTUM = 0.5

# Successive changes of the displacement that turn back by half mean that the step is too long; noise alone turns back
# by a third at most.
_TURNING = -0.5

_WAY, _BEND = ops.PRODUCTS.index("way"), ops.PRODUCTS.index("bend")

# Numbers that the end of a level works on, for each feature: about as many maps.
_WORKING = 16


@dataclass(frozen=True)
class AdaptiveProximalGradient:
    """Proximal gradient steps that adapt to each input and stop when its residual is small enough.

    The step size comes from curvature met in a short burn-in on a fixed bank, with Nesterov's momentum (restarted where
    it points uphill); fresh antithetic noise follows, in levels of more and more gradients, of more samples a step or,
    while the iteration still moves, more steps; the map is A = S_η(p̄), p̄ averaged over the last steps, as many as give
    the smallest bound. An input is done when the one-sided 95 % bound of its relative residual is ≤ tol.

    Args:
        tol: relative residual asked for, ‖δ − y‖ / max(‖δ‖, ‖y‖, 10⁻³ρ‖p(0)‖).
        max_gradients: most gradient evaluations per input. The first two levels, 48 (80 where η is a ratio, 192 where
            η or ρ follow the solution) and 144, always run; each later one costs half of what was spent before it, at
            least 144, the last what is left of the budget.
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
        (True, 192)

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
        check_count("max_gradients", self.max_gradients)
        object.__setattr__(self, "max_gradients", int(self.max_gradients))  # numpy's too

    def solve(self, problem: Problem, *, max_batch: int | None = None, graphs: Graphs | None = None) -> Solution:
        """Solves a problem with at most ``max_batch`` noisy inputs in one forward pass. ``graphs``: captured steps to
        replay, and to keep.

        Raises:
            ValueError: the model gave a gradient that is not finite; names the id of the input.
        """
        bar = progress_bar(problem.keys.shape[0], "input") if self.progress else None
        try:
            with (graphs or Graphs(False)).steps(problem.score.model, problem.keys.device) as steps:
                return in_groups(
                    problem, 2 * _FEWEST, max_batch, lambda some, rows: self._solve(some, rows, steps, bar)
                )
        finally:
            if bar is not None:
                bar.close()

    def _solve(self, problem: Problem, max_batch: int | None, steps: Steps, bar: Any) -> Solution:
        begun = _start(problem, max_batch, steps)
        states, finished = [begun], []
        while states:
            # Every input at one level has spent the same; those that take as many samples a step go on together, so
            # that a pass is large. None depends on which others are with it.
            pieces: dict[int, list[_Piece]] = {}
            spend = 0
            for state in states:
                walk = _walk(state, _chunk(state, state.samples, max_batch), steps)
                check_finite(walk.statistics, walk.score, state.problem.ids, state.steps)
                if state.level == 0:
                    every = torch.arange(len(state.where), device=state.where.device)
                    pieces[2 * _FEWEST], spend = [(state, every)], _LEAST
                    continue
                solution, samples = _look(state, walk, max_batch, steps, self.tol, self.max_gradients)
                spend = _level_cost(state.evaluations, self.max_gradients)
                samples = samples[: state.real]
                for count in sorted(set(samples.tolist())):
                    these = (samples == count).nonzero().squeeze(1)
                    if count:
                        pieces.setdefault(count, []).append((state, these))
                        continue
                    finished.append((state.where[these], solution.take(these)))
                    if bar is not None:
                        bar.update(len(these))
            states = [_joined(begun, some, count, spend // count, steps) for count, some in sorted(pieces.items())]
        return in_order(finished)


@dataclass
class _State:
    """What is carried from step to step, for the inputs that are still in it."""

    problem: Problem
    where: Tensor
    point: Tensors  # where the next gradient is taken
    previous: Tensors  # the displacement before momentum
    gradient: Tensors
    squares: Tensors  # sum of squared successive differences of the gradient, times samples / 2
    sums: Tensor  # float64 [B, 8], see ops.SUMS: of this level; of all in squares; of this window
    curvature: Tensor  # float64 [B], the largest met
    at_zero: Tensor  # float64 [B], ‖p(0)‖²
    steps: Tensor  # int64 [B]
    real: int  # inputs; the rows behind them fill up to a size that has a graph
    windows: tuple[Window, ...] = ()  # the steps with fresh noise, oldest first
    eta: Tensors | None = None  # as reported
    level: int = 0
    samples: int = _FEWEST
    length: int = _BURN_IN  # steps of the level
    evaluations: int = 0


# Some of the inputs of a state, by their rows.
_Piece = tuple[_State, Tensor]


def _mean_gradient(state: _State, copies: NoisyCopies, samples: int, place: Tensors | None, steps: Steps) -> Tensors:
    """The mean gradient at a place."""
    copies.total(place, state.gradient, torch.empty_like(state.curvature), steps)
    return tuple(g / samples for g in state.gradient)


def _look(
    state: _State, walk: _Walk, max_batch: int | None, steps: Steps, tol: float, budget: int
) -> tuple[Solution, Tensor]:
    """What the inputs would return after a level, and how many samples a step each wants in the next one, int64 [B]."""
    problem, many = state.problem, _WORKING * sum(x.numel() for x in state.problem.inputs)
    seen = Seen(problem, state.windows, state.squares, state.sums, state.curvature, state.at_zero)
    answer, stretch, places = steps.result(_answer_and_ends, seen, key="answer", elements=many)
    copies = NoisyCopies(problem, _AT_ENDS, True, _chunk(state, _AT_ENDS, max_batch))
    copies.step.fill_(_first_draw(state.level) + state.length)  # the walk has drawn those before
    ends = tuple(_mean_gradient(state, copies, _AT_ENDS, place, steps) for place in places)
    state.evaluations += 2 * _AT_ENDS
    ended = _Ended(
        problem=problem,
        answer=answer,
        stretch=stretch,
        ends=ends,
        before=walk.before,
        score=walk.score,
        steps=state.steps,
        eta=state.eta,
        samples=state.samples,
        evaluations=state.evaluations,
        spend=_level_cost(state.evaluations, budget),
    )
    answer, solution, samples = steps.result(partial(_judged, tol=tol), ended, key=("judged", tol), elements=many)
    state.problem = answer.problem(problem)
    return solution, samples


def _answer_and_ends(seen: Seen) -> tuple[Answer, Tensor, tuple[Tensors, ...]]:
    """The answer, and where to take the two gradients that are compared: how many times δ̄ − y apart, and the places."""
    answer = best_answer(seen)
    way = minus(answer.displacement, answer.point)
    sigma = torch.stack([s.double() for s in seen.problem.sigma]).amin(0)
    # Way below rounding there is nothing left to settle, whatever a difference says.
    stretch = (sigma / inner(way, way).sqrt().clamp_min(1e-30)).clamp(1.0, 1e6)
    places = tuple(
        tuple(d + over_features((side * stretch).to(d.dtype), d) * w for d, w in zip(answer.point, way, strict=True))
        for side in (-0.5, 0.5)
    )
    return answer, stretch, places


@dataclass
class _Ended:
    """A level that has ended, with the gradients at two places about its answer."""

    problem: Problem
    answer: Answer
    stretch: Tensor
    ends: tuple[Tensors, ...]
    before: Tensors  # the last point at which gradients were taken
    score: Tensor  # float64 [B], sum of the samples' scores there
    steps: Tensor
    eta: Tensors | None
    samples: int
    evaluations: int
    spend: int  # gradients of the next level

    def measured(self) -> Answer:
        """The answer with the residual that y itself has where δ̄ has ‖δ̄ − y‖.

        ‖y + ρS(p(y))‖ = ρ‖S(p(y)) − S(p̄)‖, and p(y) = p̄ + H(y − δ̄). A bound by ρβ‖δ̄ − y‖ would be many times as
        large: what has not settled lies along flat directions. H along y − δ̄ is a difference of gradients whose ends
        see the same noise, σ apart: over a way much shorter than the noise few samples would meet a kink, and most
        would see none.
        """
        answer = self.answer
        problem = answer.problem(self.problem)
        there = tuple(
            p + (b - a) / over_features(self.stretch.to(p.dtype), p)
            for p, a, b in zip(answer.gradient, *self.ends, strict=True)
        )
        maps = there if problem.penalty is None else problem.penalty.prox(there)
        moved = tuple(over_features(r, a) * (a - b) for a, b, r in zip(maps, answer.maps, problem.rho, strict=True))
        return replace(answer, settled=inner(moved, moved))

    def next_samples(self, answer: Answer) -> Tensor:
        """Samples per step of each input's next level, int64 [B]: powers of two; 0 where there is none."""
        if self.spend == 0:
            return torch.zeros_like(self.steps)
        most = 1 << (self.spend.bit_length() - 4)
        usual = max(self.samples, min(most, 1 << (self.spend // _STEPS).bit_length() - 1))
        samples = torch.where(answer.spread > answer.noise, max(usual, 2 * self.samples), usual)
        return torch.where(answer.settled > answer.noise, self.samples, samples).clamp_max(most)


def _judged(ended: _Ended, tol: float) -> tuple[Answer, Solution, Tensor]:
    """The answer, what the inputs would return now, with the bound of their residuals, and the samples they want."""
    answer = ended.measured()
    problem = answer.problem(ended.problem)
    solution = assemble(
        problem,
        eta=problem.penalty.eta if problem.penalty is not None and problem.tuning is not None else ended.eta,
        maps=answer.maps,
        displacement=answer.displacement,
        gradient=answer.gradient,
        envelope=objective(problem, ended.before, ended.score / ended.samples),
        residual=(answer.settled + answer.spread + answer.noise).sqrt(),
        relative_residual=answer.bound,
        steps=ended.steps,
        evaluations=ended.evaluations,
        tol=tol,
    )
    return answer, solution, torch.where(solution.converged, 0, ended.next_samples(answer))


def _first_draw(level: int) -> int:
    """The noise bank's step at the beginning of a level: no two levels of an input share one."""
    return level << 20


def _level_cost(spent: int, budget: int) -> int:
    """Gradients of the next level, a look at its end not counted; 0 where too little is left for one.

    8 to 15 times a power of two: every number of samples that is a power of two up to that divides it.
    """
    cost = min(max(_LEAST, int(_GROWTH * spent)), budget - spent - 2 * _AT_ENDS)
    if cost < _LEAST // 2:
        return 0
    last = cost.bit_length() - 4
    return cost >> last << last


def _start(problem: Problem, max_batch: int | None, steps: Steps) -> _State:
    def first() -> Tensors:
        return (
            states_like(problem.inputs)
            if problem.start is None
            else tuple(d.clone() for d in problem.start.displacement)
        )

    def nothing() -> Tensor:
        return torch.zeros_like(problem.value, dtype=torch.float64)

    state = _State(
        problem=problem,
        where=torch.arange(problem.keys.shape[0], device=problem.keys.device),
        point=first(),
        previous=first(),
        gradient=states_like(problem.inputs),
        squares=states_like(problem.inputs),
        sums=nothing()[:, None].repeat(1, len(ops.SUMS)),
        curvature=nothing(),
        at_zero=nothing() if problem.start is None else problem.start.gradient2,
        steps=torch.zeros_like(problem.keys),
        real=problem.keys.shape[0],
        eta=None if problem.penalty is None else problem.penalty.eta,
    )
    if problem.tuning is not None:
        state.samples, state.length = 2 * _FEWEST, _TUNED_BURN_IN
    if problem.penalty is not None and problem.penalty.relative:
        _resolve(state, max_batch, steps)
    return state


def _chunk(state: _State, samples: int, max_batch: int | None) -> int:
    """Samples per pass: what is left of max_batch for every input."""
    return samples if max_batch is None else min(samples, max(1, max_batch // state.where.shape[0]))


def _first_gamma(problem: Problem) -> Tensors:
    return tuple(_FIRST_STEP * r for r in problem.rho)


def _damped(problem: Problem, curvature: Tensor) -> Tensors:
    """γ = 0.7/(1/ρ + L), per tensor [B]."""
    return tuple((DAMPING / (1 / r.double() + curvature)).to(r.dtype) for r in problem.rho)


def _resolve(state: _State, max_batch: int | None, steps: Steps) -> None:
    """η from η_max, with more samples than a step of the burn-in has."""
    copies = NoisyCopies(state.problem, _AT_ZERO, True, _chunk(state, _AT_ZERO, max_batch))
    first = _mean_gradient(state, copies, _AT_ZERO, None, steps)
    penalty: Penalty | None = state.problem.penalty
    if penalty is not None:
        penalty, state.eta = penalty.resolve(first)
    state.problem = replace(state.problem, penalty=penalty)
    state.evaluations += _AT_ZERO


@dataclass
class _Walk:
    """What a step reads and writes, in place: it may be captured."""

    problem: Problem = field(metadata=READ)
    copies: NoisyCopies
    point: Tensors  # and `here`: where the next gradients are taken
    here: Tensors
    before: Tensors  # the point at which the last step took its gradients
    gradient: Tensors
    last_gradient: Tensors
    previous: Tensors  # the displacement before momentum, and its last change
    change: Tensors
    gamma: Tensors  # step sizes, [B]
    points: Tensors  # of the window; empty where there is none
    gradients: Tensors
    squares: Tensors
    sums: Tensor
    curvature: Tensor
    score: Tensor  # float64 [B], sum of the samples' scores at `before`
    statistics: Tensor
    arrivals: Tensor = field(metadata=READ)  # for the kernels; zero between launches


def _walk(state: _State, chunk: int, steps: Steps) -> _Walk:
    """The steps of one level; the state's tensors are changed in place."""
    problem, burning = state.problem, state.level == 0
    gamma = _first_gamma(problem) if burning else _damped(problem, state.curvature)
    batch = problem.keys.shape[0]
    state.sums[:, :DIFFERENCES] = 0
    nothing = torch.zeros(batch, len(ops.STATISTICS), dtype=torch.float64, device=problem.keys.device)
    walk = _Walk(
        problem=problem,
        copies=NoisyCopies(problem, state.samples, True, chunk),
        point=state.point,
        here=tuple(d.clone() for d in state.point),
        before=states_like(state.point),
        gradient=state.gradient,
        last_gradient=states_like(state.point),
        previous=state.previous,
        change=states_like(state.point),
        gamma=gamma,
        points=(),
        gradients=(),
        squares=state.squares,
        sums=state.sums,
        curvature=state.curvature,
        score=nothing[:, 0].clone(),
        statistics=nothing,
        arrivals=torch.zeros(batch, dtype=torch.int32, device=nothing.device),
    )
    walk.copies.step.fill_(_first_draw(state.level))
    windows = [*state.windows]
    # The first differences of a level 1 may be more than noise; its first half is a window of its own.
    edges = {1, state.length // 2}
    if state.level == 1:
        edges.add(state.length // 4 + 1)
    for start, stop in pairwise(sorted({0, state.length} | {t for t in edges if t < state.length})):
        if not burning and start in (0, state.length // 2):
            _close(windows, walk)
            walk.points, walk.gradients = states_like(problem.inputs), states_like(problem.inputs)
        settled = not burning and (state.level > 1 or start > state.length // 4)
        tuned = burning and problem.tuning is not None  # which makes new tensors at every step
        if start > 0 and not tuned:
            steps.run(
                partial(_step, samples=state.samples, burning=burning, settled=settled),
                walk,
                stop - start,
                key=("adaptive", state.samples, burning, settled),
                elements=state.samples * sum(x.numel() for x in problem.inputs),
            )
            continue
        for t in range(start, stop):
            walk.copies.total(walk.point, walk.gradient, walk.score, steps)
            if tuned:
                walk.problem = walk.problem.tuned(tuple(g / state.samples for g in walk.gradient))
                _copy(_damped(walk.problem, walk.curvature) if t else _first_gamma(walk.problem), walk.gamma)
            _move(walk, None, samples=state.samples, burning=burning, settled=settled, first=t == 0)
            if t == 0 and burning and problem.start is None:
                state.at_zero = walk.statistics[:, 3].clone()
    _close(windows, walk)
    state.problem = walk.problem
    state.evaluations += state.samples * state.length
    state.steps = state.steps + state.length
    if not burning:
        steeper = 2 * state.curvature + 1 / torch.stack([r.double() for r in problem.rho]).amin(0)
        turned, length = walk.sums[:, :DIFFERENCES].unbind(1)
        state.curvature = torch.where(turned < _TURNING * length, steeper, state.curvature)
    if state.level == 2:
        # The first half of the level before was not settled; it stood in while there was nothing else.
        del windows[0]
    while len(windows) > _WINDOWS:
        windows[:2] = [windows[0] + windows[1]]
    state.windows = tuple(windows)
    return walk


def _close(windows: list[Window], walk: _Walk) -> None:
    """Ends the window of a walk, if there is one."""
    if walk.points:
        windows.append(Window(walk.points, walk.gradients, walk.sums[:, LENGTHS:].clone()))
        walk.points = walk.gradients = ()
        walk.sums[:, LENGTHS:] = 0


def _step(walk: _Walk, *, samples: int, burning: bool, settled: bool) -> None:
    gradients = walk.copies.chunked_gradients(walk.point, walk.gradient, walk.score)
    _move(walk, gradients, samples=samples, burning=burning, settled=settled)


def _move(
    walk: _Walk, gradients: Tensors | None, *, samples: int, burning: bool, settled: bool, first: bool = False
) -> None:
    """What a step does with its gradients, in place: those that are not in their sum yet, or None.

    ``settled``: the change of the gradient is noise; ``first`` of a level: there is none yet."""
    problem, penalty = walk.problem, walk.problem.penalty
    statistics = [
        ops.prox_step(
            None if gradients is None else gradients[i],
            walk.gradient[i],
            walk.point[i],
            count=samples,
            carry=gradients is None or len(walk.copies.chunks) > 1,
            rho=problem.rho[i],
            step_size=walk.gamma[i],
            eta=None if penalty is None else penalty.eta[i],
            groups=None if penalty is None else penalty.partition(i),
            arrivals=walk.arrivals,
        )
        for i in range(len(problem.inputs))
    ]
    walk.statistics.copy_(statistics[0] if len(statistics) == 1 else torch.stack(statistics).sum(0))
    products = ops.momentum_step(
        walk.point,
        walk.previous,
        walk.here,
        walk.before,
        walk.gradient,
        walk.last_gradient,
        walk.change,
        squares=walk.squares if settled and not first else (),
        points=walk.points,
        gradients=walk.gradients,
        sums=walk.sums,
        statistics=walk.statistics,
        samples=samples,
        momentum=_MOMENTUM,
        first=first,
        arrivals=walk.arrivals,
    )
    if not burning:
        walk.copies.step += 1
    elif not first:
        # On one bank the change of the gradient along the change of the point is curvature, without noise.
        way, bend = products[:, _WAY], products[:, _BEND]
        met = bend.abs() / way.clamp_min(torch.finfo(torch.float64).tiny)
        # Over a way of little more than rounding it is none.
        told = way > _SHORT**2 * walk.statistics[:, 1]
        walk.curvature.copy_(torch.maximum(walk.curvature, torch.where(told, met, 0.0)))
        _copy(_damped(problem, walk.curvature), walk.gamma)


def _copy(values: Tensors, to: Tensors) -> None:
    for value, target in zip(values, to, strict=True):
        target.copy_(value)


def _joined(begun: _State, pieces: list[_Piece], samples: int, length: int, steps: Steps) -> _State:
    """The inputs of the pieces at their next level."""
    real = sum(len(rows) for _, rows in pieces)
    full = begun.where.shape[0]
    size = steps.size(real, full, samples * sum(x[0].numel() for x in begun.problem.inputs))
    last, of_last = pieces[-1]
    # Filled up with copies of one of its inputs, which nobody will look at.
    pieces = [*pieces[:-1], (last, torch.cat([of_last, of_last[-1:].expand(size - real)]))]

    def numbers(of: Callable[[_State], Tensor]) -> Tensor:
        return torch.cat([of(state)[keep] for state, keep in pieces])

    def rows(of: Callable[[_State], Tensors]) -> Tensors:
        taken = [[take_rows(t, keep) for t in of(state)] for state, keep in pieces]
        return tuple(join_rows(list(parts)) for parts in zip(*taken, strict=True))

    def window(i: int) -> Window:
        return Window(
            rows(lambda state: state.windows[i].points),
            rows(lambda state: state.windows[i].gradients),
            numbers(lambda state: state.windows[i].counts),
        )

    first = pieces[0][0]
    where = numbers(lambda state: state.where)
    problem = begun.problem.take(where)
    if problem.tuning is not None:
        etas = rows(lambda state: () if state.problem.penalty is None else state.problem.penalty.eta)
        penalty = problem.penalty and replace(problem.penalty, eta=etas)
        problem = replace(problem, rho=rows(lambda state: state.problem.rho), penalty=penalty)
    eta = begun.eta
    return _State(
        problem=problem,
        where=where,
        point=rows(lambda state: state.point),
        previous=rows(lambda state: state.previous),
        gradient=states_like(problem.inputs),
        squares=rows(lambda state: state.squares),
        curvature=numbers(lambda state: state.curvature),
        at_zero=numbers(lambda state: state.at_zero),
        sums=numbers(lambda state: state.sums),
        steps=numbers(lambda state: state.steps),
        real=real,
        windows=tuple(window(i) for i in range(len(first.windows))),
        eta=None if eta is None else tuple(rows_of(e, begun.where.shape[0])[where] for e in eta),
        level=first.level + 1,
        samples=samples,
        length=length,
        evaluations=first.evaluations,
    )
