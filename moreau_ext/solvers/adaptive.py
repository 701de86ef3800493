"""The solver that stops when it is done: steps from measured curvature, momentum, and samples that grow.

The method is inertial proximal gradient with gradient restart (O'Donoghue and Candès 2015). Its step size comes from
Barzilai-Borwein secants under common random numbers, its answer from Polyak-Ruppert averages, and its sample sizes from
a bound of the residual, as in adaptive sampling (Byrd, Chin, Nocedal, Wu 2012).

Levels. The first takes steps on a fixed bank of few samples (common random numbers) and measures the curvature. Every
later one takes fresh noise, half as many gradients as were spent before it, and ends with a bound of each input's
residual (:mod:`moreau_ext.solvers.bound`); inputs under the tolerance leave. Where the iteration still moves the next
level takes more steps, elsewhere more samples a step. Of a few windows of the last steps, each input's answer is the
average over the one with the smallest bound.

Where the support or the displacement's length was asked for (:class:`Tuning`), η and ρ are functions of p: they are set
anew from p̄ after each level, and the answer, its residual and its bound are those of the problem with the η and ρ that
are returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..ops.layout import Tensors, copy_into, divide, inner, over_features, states_like, subtract, take, total
from .base import Runner, State, Steps
from .bound import DAMPING, DIFFERENCES, LENGTHS, Averages, Estimate, Window, best_estimate, dependence
from .errors import LEVELS, Errors
from .look import BLOCK, SCORES, keep_scores, look, steps_kept, subset, unexplained2, upper_residual2
from .problem import Problem
from .samples import GradientSum, NoisyCopies
from .solution import Answer

# Steps and samples of the burn-in.
_BURN_IN, _FEWEST = 12, 4
# The same where eta or rho follow the solution: few samples overstate the largest entries.
_TUNED_BURN_IN, _TUNED_FEWEST = 24, 8
# Samples a step of the first averaging level.
_FIRST_SAMPLES = 8
# Steps of a level where nothing else is wanted, and the gradients of the shortest.
_STEPS, _LEAST = 16, 128
# A level costs this share of what was spent before it: little is wasted on an input that was nearly done.
_GROWTH = 0.5
# Windows that are kept: memory, each is two maps.
_WINDOWS = 4
# Samples at either end of the difference between p(y) and p nearer to the mean point.
_FD_SAMPLES = 8
# Points within so many σ: the gradient is taken for linear. It is smoothed over one.
_FAR = 2.0
# ρ·curvature·way, in tolerances, from which the curvature matters: most ways lie along flat directions.
_STEEP = 4.0
# A 95 % quantile of the noise that is less than this share of the tolerance.
_QUIET = 0.25
# Samples of a look at an answer, at least.
_FEWEST_LOOKED = 16
# Inputs are looked at together where they want numbers of samples that differ by less.
_LOOK_STEP = 64
# A bound of so many tolerances may become a claim at the end of the next level.
_CLOSE = 4.0
# How sure a look must be, in shares of the way from the mean of its noise to the 95 % quantile.
_CERTAINTY = 0.6
# p(0) gives eta_max when eta is a fraction of it, and the largest of noisy entries is biased: more samples there.
_AT_ZERO = 32
# And a quarter of the budget where the standard error of these is more than so much of p(0).
_NOISY = 0.5
# Before any curvature is known.
_FIRST_STEP = 0.25
# Shorter steps, relative to the displacement, give no secant.
_SHORT = 1e-3
# The last number of a step within its level.
_DRAWS = (1 << 20) - 1
# Halves the burn-in (measured on digits: 0.5 against 0 and 0.7).
_MOMENTUM = 0.5
# Successive changes of the displacement that turn back by half mean that the step is too long; noise alone turns back
# by a third at most.
_TURNING = -0.5
_DX_DX, _DX_DG, _DG_DG = (ops.PRODUCTS.index(name) for name in ("dx_dx", "dx_dg", "dg_dg"))
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class _Iterate:
    """The record of tensors that a step changes in place."""

    problem: Problem
    copies: NoisyCopies
    y: Tensors  # of a proximal step; between steps it holds x
    x: Tensors  # where the next gradients are taken
    x_prev: Tensors  # where the last step took its gradients
    y_prev: Tensors  # y before the last step
    last_step: Tensors  # y − y_prev
    gradient: Tensors
    last_gradient: Tensors
    step_size: Tensors  # [B]
    points: Tensors  # sums of the open window; () where there is none
    gradients: Tensors
    squares: Tensors  # sum of squared successive differences of the gradient, times samples / 2
    sums: Tensor  # float64 [B, 8], see ops.SUMS: of this level; of all in squares; of the open window
    curvature: Tensor  # float64 [B], the largest measured
    change2: Tensor  # float64 [B], the largest ‖p_t − p_{t−1}‖² of the burn-in, whose noise is common
    score: Tensor  # float64 [B], sum of the samples' scores at `x_prev`
    each: Tensor  # [B, samples], their scores
    scores: Tensor  # [B, _SCORES], of the last samples, where they belong modulo _SCORES
    statistics: Tensor
    arrivals: Tensor  # for the kernels; zero between launches


@dataclass
class _Carried:
    """The tensors that inputs take along from level to level."""

    y: Tensors
    y_prev: Tensors
    squares: Tensors
    sums: Tensor
    curvature: Tensor
    change2: Tensor
    at_zero: Tensor  # float64 [B], ‖p(0)‖²
    eta: Tensors  # as reported
    steps: Tensor  # int64 [B]
    looked: Tensor  # int64 [B], gradients that confirmed or refuted an answer
    windows: tuple[Window, ...] = ()  # the steps with fresh noise, oldest first


@dataclass
class _State(State):
    """``spend``: gradients of the level that runs next; 0 where there is none. ``estimate``: of the last one."""

    spend: int = 0
    estimate: Estimate | None = None


@dataclass(frozen=True)
class AdaptiveProximalGradient:
    """Proximal gradient steps that adapt to each input and stop when its residual is small enough.

    The step size comes from curvature measured in a short burn-in on a fixed bank, with Nesterov's momentum (restarted
    where it points uphill); fresh antithetic noise follows, in levels of more and more gradients, of more samples a
    step or, while the iteration still moves, more steps; the map is A = S_η(p̄), p̄ averaged over the last steps, as
    many as give the smallest bound. An input is done when the one-sided 95 % bound of its relative residual is ≤ tol.

    Args:
        tol: relative residual asked for, ‖δ − y‖ / max(‖δ‖, ‖y‖, 10⁻³ρ‖p(0)‖).
        max_gradients: most gradient evaluations per input, those of looks included, beside those of ``rho="auto"``. The
            first two levels take 48 (192 where η or ρ follow the solution; 32 more where η is a ratio) and 144: less
            than that is refused. Each later one costs half of what was spent before it, at least 144, the last what is
            left of the budget.
        progress: show a progress bar over inputs (needs tqdm).
        denoise: correct the map for what sampling noise adds to the magnitudes that η is compared with, and to the
            length of the map (docs/method.md). At the default tolerance it changes next to nothing; where the budget
            ends with an error of tens of percent, as on ImageNet networks, it takes up to half of that error away.

    In the Solution, ``relative_residual`` is that bound, and ``converged`` says whether it is ≤ tol. The bound is the
    solver's own, made from its own samples; ``explainer.certificate`` judges a solution on independent ones.

    Raises:
        ValueError: a setting out of range; when called, a ``max_gradients`` that the first levels exceed.

    Example:
        >>> import torch
        >>> from moreau_ext import AdaptiveProximalGradient, MoreauGrad
        >>> a = torch.tensor([[3.0, 0.1]])
        >>> explainer = MoreauGrad(lambda x: (x * a).sum(1), solver=AdaptiveProximalGradient())
        >>> s = explainer.attribute(a, return_solution=True)
        >>> bool(s.converged), int(s.gradient_evaluations)
        (True, 256)

    Deterministic, and independent of the batch beyond the rounding of the model's passes.
    Source: the method of arXiv 2302.05294; momentum with restart of O'Donoghue and Candès (2015); averaging of Polyak
    and Juditsky (1992); sample sizes as in Byrd, Chin, Nocedal and Wu (2012).
    """

    tol: float = 5e-2
    max_gradients: int = 2048
    progress: bool = False
    denoise: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.tol < math.inf:
            raise ValueError(f"tol: expected a positive number, got {self.tol!r}")
        check_count("max_gradients", self.max_gradients)
        object.__setattr__(self, "max_gradients", int(self.max_gradients))  # numpy's too

    @property
    def rows(self) -> int:
        return _FIRST_SAMPLES

    @property
    def budget(self) -> str:
        return "max_gradients"

    def init(self, problem: Problem, runner: Runner) -> _State:
        """δ = 0, or where the problem starts. Where η is a fraction of η_max, p(0) is measured."""
        tuned = problem.tuning is not None
        least = least_gradients(problem.penalty.relative, tuned)
        if self.max_gradients < least:
            raise ValueError(
                f"max_gradients: expected at least {least}, which the first levels take with these settings, got "
                f"{self.max_gradients}"
            )
        zero = torch.zeros_like(problem.value, dtype=torch.float64)
        eta, evaluations, looked = problem.penalty.eta, 0, torch.zeros_like(problem.keys)
        if problem.penalty.relative:
            gradient, variance, looked = self._at_zero(problem, runner)
            penalty, eta = problem.penalty.resolve(gradient, variance if self.denoise else None)
            problem, evaluations = replace(problem, penalty=penalty), _AT_ZERO
        begin = states_like(problem.inputs) if problem.start is None else problem.start.displacement
        carried = _Carried(
            y=tuple([b.clone() for b in begin]),
            y_prev=tuple([b.clone() for b in begin]),
            squares=states_like(problem.inputs),
            sums=zero[:, None].repeat(1, len(ops.SUMS)),
            curvature=zero.clone(),
            change2=zero.clone(),
            at_zero=zero if problem.start is None else problem.start.gradient2,
            # One of every input, also where a row serves all.
            eta=tuple([e.expand(problem.batch, *e.shape[1:]) if e.dim() > 1 else e for e in eta]),
            steps=torch.zeros_like(problem.keys),
            looked=looked,
        )
        samples = _TUNED_FEWEST if tuned else _FEWEST
        state = self._state(problem.own_settings(), carried, samples)
        state.evaluations = evaluations
        state.spend = samples * (_TUNED_BURN_IN if tuned else _BURN_IN)
        return state

    def _at_zero(self, problem: Problem, runner: Runner) -> tuple[Tensors, Tensors, Tensor]:
        """p(0), its variance, and the gradients beyond the first 32 that it took, int64 [B].

        Where these are mostly noise, as on ImageNet networks, their largest entry is the largest noise: a quarter of
        the budget is spent on it there.
        """
        looked = torch.zeros_like(problem.keys)
        p, variance = _mean_and_variance(problem, _AT_ZERO, 0, runner)
        noisy = total(variance) > _NOISY**2 * inner(p, p)
        more = self.max_gradients // 4 // 2 * 2 - _AT_ZERO
        rows = noisy.nonzero().squeeze(1)
        if len(rows) and more > 0:
            further = _mean_and_variance(subset(problem, rows), more, _DRAWS, runner)
            whole = _AT_ZERO + more
            for mean, spread, q, v in zip(p, variance, *further, strict=True):
                mean[rows] = (_AT_ZERO * mean[rows] + more * q) / whole
                spread[rows] = v * (more / whole)
            looked[rows] = more
        return p, variance, looked

    def resume(self, problem: Problem, carried: _Carried, last: _State, samples: int) -> _State:
        state = self._state(problem, carried, samples)
        state.level, state.evaluations = last.level, last.evaluations
        state.spend = last.spend
        return state

    def _state(self, problem: Problem, carried: _Carried, samples: int) -> _State:
        numbers = torch.zeros(problem.batch, len(ops.STATISTICS), dtype=torch.float64, device=problem.keys.device)
        iterate = _Iterate(
            problem=problem,
            copies=NoisyCopies(problem, samples, True),
            y=carried.y,
            x=states_like(problem.inputs),
            x_prev=states_like(problem.inputs),
            y_prev=carried.y_prev,
            last_step=states_like(problem.inputs),
            gradient=states_like(problem.inputs),
            last_gradient=states_like(problem.inputs),
            step_size=tuple([torch.empty_like(r) for r in problem.rho]),
            points=(),
            gradients=(),
            squares=carried.squares,
            sums=carried.sums,
            curvature=carried.curvature,
            change2=carried.change2,
            score=numbers[:, 0].clone(),
            each=problem.value.new_zeros(problem.batch, samples),
            scores=problem.value.new_zeros(problem.batch, SCORES),
            statistics=numbers,
            arrivals=torch.zeros(problem.batch, dtype=torch.int32, device=numbers.device),
        )
        return _State(problem, iterate, carried, samples)

    def schedule(self, state: _State) -> Iterator[Steps]:
        """One level: the burn-in on common noise, or steps with fresh noise, each half of them a window."""
        iterate, carried, problem, samples = state.iterate, state.carried, state.problem, state.samples
        length = state.spend // samples
        copy_into(iterate.x, iterate.y)
        for tensor in (*iterate.x_prev, *iterate.last_gradient, *iterate.last_step):
            tensor.zero_()
        iterate.sums[:, :DIFFERENCES] = 0
        iterate.copies.step.fill_(_first_draw(state.level))
        options: dict[str, Any] = {"samples": samples}
        if state.level == 0:
            copy_into(iterate.step_size, tuple([_FIRST_STEP * r for r in problem.rho]))
            options |= {"common_noise": True, "settled": False, "tuned": problem.tuning is not None}
            yield Steps(_step, 1, options | {"first": True})
            if problem.start is None:
                carried.at_zero = iterate.statistics[:, 3].clone()
            yield Steps(_step, length - 1, options | {"first": False})
        else:
            copy_into(iterate.step_size, _damped(problem, iterate.curvature))
            # The first differences of level 1 may be more than noise. Its first half is used only until level 2.
            settled_from = 0 if state.level > 1 else length // 4 + 1
            windows = [*carried.windows]
            for start, stop in ((0, length // 2), (length // 2, length)):
                iterate.points, iterate.gradients = states_like(problem.inputs), states_like(problem.inputs)
                edges = {start, stop} | {t for t in (1, settled_from) if start < t < stop}
                for begin, end in pairwise(sorted(edges)):
                    settled = begin >= settled_from
                    more = {"common_noise": False, "settled": settled, "tuned": False, "first": begin == 0}
                    yield Steps(_step, end - begin, options | more)
                windows.append(Window(iterate.points, iterate.gradients, iterate.sums[:, LENGTHS:].clone()))
                iterate.sums[:, LENGTHS:] = 0
            iterate.points = iterate.gradients = ()
            step_dot_last, last_sq = iterate.sums[:, :DIFFERENCES].unbind(1)
            steeper = 2 * iterate.curvature + 1 / torch.stack([r.double() for r in problem.rho]).amin(0)
            iterate.curvature.copy_(torch.where(step_dot_last < _TURNING * last_sq, steeper, iterate.curvature))
            if state.level == 2:
                # The first half of the level before was not settled; it stood in while there was nothing else.
                del windows[0]
            while len(windows) > _WINDOWS:
                windows[:2] = [windows[0] + windows[1]]
            carried.windows = tuple(windows)
        state.level += 1
        carried.steps += length
        state.evaluations += samples * length

    def estimate(self, state: _State, runner: Runner) -> Answer | None:
        """The answer of each input's best window, and its bound.

        The bias ‖x̄ − y‖ is that of the mean point x̄; y itself has ‖y + ρS(p(y))‖ = ρ‖S(p(y)) − S(p̄)‖, where
        p(y) = p̄ + H(y − x̄). A bound by ρβ‖x̄ − y‖ would be many times as large: what has not settled lies along flat
        directions. H along y − x̄ is a difference of gradients whose ends see the same noise, one of them at y, and at
        least σ apart: over a way much shorter than the noise few samples would meet a kink, and most would see none.

        An answer whose bound is under the tolerance is looked at before it counts; see :meth:`_confirm`.
        """
        if state.level == 1:
            state.spend = _LEAST
            return None
        carried, problem = state.carried, state.problem
        seen = Averages(problem, carried.windows, carried.squares, carried.sums, carried.curvature, carried.at_zero)
        found, fd_scale, points = runner.call(_estimate_and_fd_points, seen)
        draw = _first_draw(state.level - 1) + state.spend // state.samples
        copies = NoisyCopies(problem, _FD_SAMPLES, True, draw)
        near, far = points
        ends = _mean_gradient(copies, near, _FD_SAMPLES, runner), _mean_gradient(copies, far, _FD_SAMPLES, runner)
        state.evaluations += 2 * _FD_SAMPLES
        ended = _LevelEnd(problem, found, fd_scale, ends, state.iterate.x_prev, state.iterate.score, state.samples)
        found, envelope = runner.call(_measure_bias, ended)
        found = self._confirm(state, found, draw + 1, runner)
        state.estimate = found
        follows = problem.tuning is not None and problem.tuning.support is not None
        if problem.tuning is not None:
            copy_into(problem.rho, found.rho)
        if follows:
            copy_into(problem.penalty.eta, found.eta)
        state.spend = _level_cost(state.evaluations, self.max_gradients)
        variance = divide(carried.squares, carried.sums[:, DIFFERENCES] * found.samples)
        answered, maps, displacement = found.problem(problem), found.maps, found.displacement
        if self.denoise:
            answered, maps, displacement = problem.denoised(found.gradient, variance)
        return Answer(
            rho=answered.rho,
            eta=answered.penalty.eta if follows else carried.eta,
            maps=maps,
            displacement=displacement,
            gradient=found.gradient,
            envelope=envelope,
            residual=found.residual,
            relative_residual=found.bound,
            evaluations=state.evaluations + carried.looked,
            variance=variance,
            # Successive differences share a gradient: three carry the information of two.
            freedom=carried.sums[:, DIFFERENCES] / 1.5,
            dependence=dependence(carried.sums, variance),
            error=Errors.of(
                found.scale,
                found.variance,
                found.bias2,
                found.nonlinearity2,
                LEVELS * found.variance_upper * found.samples,
            ),
        )

    def _confirm(self, state: _State, found: Estimate, draw: int, runner: Runner) -> Estimate:
        """The estimate, with the answers under the tolerance looked at; what is found counts as nonlinearity.

        For all of them the scores of the last samples must agree with the gradients. Where the bound rests on more than
        was seen (:meth:`_doubts`), fresh gradients at the answer must too; an answer without the room for them in the
        budget is not confirmed.
        """
        nonlinearity2, carried = found.nonlinearity2.clone(), state.carried
        far, _ = self._doubts(state, found)
        samples, rare = self._look_sizes(state, found)
        claimed = found.bound <= self.tol
        for count in sorted(set(samples[claimed].tolist())):
            rows = (claimed & (samples == count)).nonzero().squeeze(1)
            # A penalty takes its own rows: one η may be that of all inputs.
            some, part = subset(found.problem(state.problem), rows), take(replace(found, eta=()), rows)
            squares, sums, more2 = take(carried.squares, rows), carried.sums[rows], part.nonlinearity2
            rho2 = some.rho_of_input.square()
            size, steps = state.samples, steps_kept(state.spend // state.samples, state.samples)
            variance = divide(squares, sums[:, DIFFERENCES])
            kept = state.iterate.scores[rows]
            first = _first_draw(state.level - 1)
            missed2 = unexplained2(some, part.gradient, variance, sums, kept, size, steps, first)
            # Of points that are far apart the scores say that the gradient changes between them.
            more2 = torch.maximum(more2, torch.where(far[rows], 0.0, rho2 * missed2))
            if 0 < count < _FEWEST_LOOKED:
                more2 = torch.maximum(more2, 2 * (self.tol * part.scale).square())
            elif count > 0:
                seen = look(some, part.displacement, count, draw, runner)
                carried.looked[rows] += count
                # Without noise the differences of a level are those between its points.
                noisy = (_least_sigma(some) > 0).double()
                squares = tuple(
                    [a * over_features(noisy.to(a.dtype), a) + b for a, b in zip(squares, seen.squares, strict=True)]
                )
                sums = sums * noisy[:, None] + seen.sums
                apart2 = upper_residual2(some, part.maps, seen, squares, sums, _CERTAINTY)
                more2 = torch.maximum(more2, apart2 - part.variance)
                more2 = more2 + (3 * rare[rows] / (part.samples + count)).square()
                variance = divide(squares, sums[:, DIFFERENCES])
                blocks = range(count // BLOCK)
                missed2 = unexplained2(some, part.gradient, variance, sums, seen.scores, BLOCK, blocks, draw)
                more2 = torch.maximum(more2, rho2 * missed2)
            nonlinearity2[rows] = more2
        return replace(found, nonlinearity2=nonlinearity2)

    def _look_sizes(self, state: _State, found: Estimate) -> tuple[Tensor, Tensor]:
        """Samples of a look at each answer, int64 [B], 0 where there is no doubt; and by how much rare gradients may
        change it, as a length of displacement for each gradient that is one.

        A quarter of what was spent before. Where hardly any noise was seen, gradients that differ as much as any did on
        the way there may still be as rare as 3 in N: of a larger share N samples see one in 95 of 100 cases. There it
        is as many as exclude them, if no more than were spent before.
        """
        far, quiet = self._doubts(state, found)
        rare = torch.where(
            quiet & (_least_sigma(state.problem) > 0), state.problem.rho_of_input * state.carried.change2.sqrt(), 0.0
        )
        wanted = 3 * rare / (self.tol * found.scale).clamp_min(_TINY) - found.samples
        # Few different sizes: inputs of one size are looked at together.
        wanted = ((wanted / _LOOK_STEP).ceil() * _LOOK_STEP).clamp(state.evaluations // 4, state.evaluations).long()
        # Without noise all samples are one.
        wanted = torch.where(_least_sigma(state.problem) > 0, wanted, _FEWEST_LOOKED)
        room = self.max_gradients - state.evaluations - state.carried.looked
        samples = torch.minimum(wanted, room).clamp_min(1) // BLOCK * BLOCK
        # 0 says that there is no doubt: where there is one and no room, it is 1, which is too few for a look.
        return torch.where(far | quiet, samples.clamp_min(1), 0), rare

    def _doubts(self, state: _State, found: Estimate) -> tuple[Tensor, Tensor]:
        """Whether a bound rests on more than was seen, two bool [B].

        The first: points or a way that reach farther than the noise, where the gradient need not be linear, or a way
        along which the largest curvature would be too much. The second: such a way, or hardly any noise, of which rare
        gradients may be all there is.
        """
        problem = state.problem
        limit2 = (self.tol * found.scale).square()
        far = found.reach2 > (_FAR * _least_sigma(problem)).square()
        steep = (problem.rho_of_input * state.carried.curvature).square() * found.way2 > _STEEP**2 * limit2
        return far | steep, steep | (found.variance_upper < _QUIET**2 * limit2)

    def next(self, state: _State, answer: Answer | None) -> Tensor:
        """Powers of two: more samples where noise is the larger part of the residual, else more steps."""
        found, spend = state.estimate, state.spend
        if answer is None or found is None:
            return torch.full_like(state.problem.keys, _FIRST_SAMPLES)
        if spend == 0:
            return torch.zeros_like(state.problem.keys)
        most = 1 << (spend.bit_length() - 4)
        usual = max(state.samples, min(most, 1 << (spend // _STEPS).bit_length() - 1))
        samples = torch.where(found.nonlinearity2 > found.variance, max(usual, 2 * state.samples), usual)
        samples = torch.where(found.bias2 > found.variance, state.samples, samples).clamp_max(most)
        # Gradients of looks differ between inputs: those without room for another level, and for the look that its
        # answer may need, are done.
        total = state.evaluations + spend + 2 * _FD_SAMPLES
        far, quiet = self._doubts(state, found)
        doubtful = (far | quiet) & (answer.relative_residual <= _CLOSE * self.tol)
        spent = total + state.carried.looked + torch.where(doubtful, total // 8, 0)
        return torch.where((answer.relative_residual <= self.tol) | (spent > self.max_gradients), 0, samples)


def _step(iterate: _Iterate, *, samples: int, common_noise: bool, settled: bool, tuned: bool, first: bool) -> None:
    """One iteration, in place: p at x, y⁺ = S_{γη}((1 − γ/ρ)x − γp), x⁺ = y⁺ + β(y⁺ − y) with restart.

    Args:
        iterate: changed in place.
        samples: m.
        common_noise: the noise bank stays, and the secant of two gradients is the curvature.
        settled: the change of the gradient is noise, and counts for its variance.
        tuned: η and ρ follow the gradient.
        first: of a level: there is no last gradient.
    """
    problem, copies = iterate.problem, iterate.copies
    gradients: Tensors = copies.gradients(iterate.y, iterate.gradient, iterate.score, each=iterate.each)
    if tuned:
        for g, total in zip(gradients, iterate.gradient, strict=True):
            ops.accumulate(g, total, carry=len(copies.chunks) > 1)
        problem.retune(tuple([g / samples for g in iterate.gradient]))
        gamma = [_FIRST_STEP * r for r in problem.rho] if first else _damped(problem, iterate.curvature)
        copy_into(iterate.step_size, tuple(gamma))
    statistics = [
        ops.prox_step(
            None if tuned else gradients[i],
            iterate.gradient[i],
            iterate.y[i],
            count=samples,
            carry=tuned or len(copies.chunks) > 1,
            rho=problem.rho[i],
            step_size=iterate.step_size[i],
            eta=problem.penalty.strength(i),
            groups=problem.penalty.partition(i),
            arrivals=iterate.arrivals,
        )
        for i in range(len(problem.inputs))
    ]
    iterate.statistics.copy_(statistics[0] if len(statistics) == 1 else torch.stack(statistics).sum(0))
    products = ops.momentum_step(
        iterate.y,
        iterate.y_prev,
        iterate.x,
        iterate.x_prev,
        iterate.gradient,
        iterate.last_gradient,
        iterate.last_step,
        squares=iterate.squares if settled and not first else (),
        points=iterate.points,
        gradients=iterate.gradients,
        sums=iterate.sums,
        statistics=iterate.statistics,
        samples=samples,
        momentum=_MOMENTUM,
        first=first,
        arrivals=iterate.arrivals,
    )
    if not common_noise:
        keep_scores(iterate.scores, iterate.each, copies.step & _DRAWS)
        copies.step += 1
    elif not first:
        # The Barzilai-Borwein secant |⟨Δx, Δg⟩|/‖Δx‖²; over a way of little more than rounding it is none.
        dx_dx, dx_dg = products[:, _DX_DX], products[:, _DX_DG]
        secant = dx_dg.abs() / dx_dx.clamp_min(_TINY)
        reliable = dx_dx > _SHORT**2 * iterate.statistics[:, 1]
        iterate.curvature.copy_(torch.maximum(iterate.curvature, torch.where(reliable, secant, 0.0)))
        iterate.change2.copy_(torch.maximum(iterate.change2, products[:, _DG_DG]))
        copy_into(iterate.step_size, _damped(problem, iterate.curvature))


def _damped(problem: Problem, curvature: Tensor) -> Tensors:
    """γ = 0.7/(1/ρ + L), per tensor [B]."""
    return tuple([(DAMPING / (1 / r.double() + curvature)).to(r.dtype) for r in problem.rho])


def _mean_and_variance(problem: Problem, samples: int, step: int, runner: Runner) -> tuple[Tensors, Tensors]:
    """The mean gradient at δ = 0, and the variance of that mean."""
    copies = NoisyCopies(problem, samples, True, step)
    gradient, squares = states_like(problem.inputs), states_like(problem.inputs)
    score = torch.empty_like(problem.value, dtype=torch.float64)
    runner.repeat(GradientSum.run, GradientSum(copies, None, gradient, score, squares=squares), 1)
    p = tuple([g / samples for g in gradient])
    return p, tuple([v / samples for v in copies.variance(squares, p)[0]])


def _mean_gradient(copies: NoisyCopies, place: Tensors | None, samples: int, runner: Runner) -> Tensors:
    """The mean gradient at a place; None for δ = 0."""
    gradient = states_like(copies.inputs)
    score = torch.empty(gradient[0].shape[0], dtype=torch.float64, device=gradient[0].device)
    summed = GradientSum(copies, place, gradient, score)
    runner.repeat(GradientSum.run, summed, 1)
    return tuple([g / samples for g in summed.gradient])


def _least_sigma(problem: Problem) -> Tensor:
    """The smallest σ of a tuple, float64 [B]."""
    return torch.stack([s.double() for s in problem.sigma]).amin(0)


def _estimate_and_fd_points(seen: Averages) -> tuple[Estimate, Tensor, tuple[Tensors, Tensors]]:
    """The estimate, and two places whose gradients are compared, y and one towards x̄: how many times y − x̄ apart."""
    found = best_estimate(seen)
    way = subtract(found.displacement, found.point)
    # Below rounding the difference carries no information.
    fd_scale = (_least_sigma(seen.problem) / inner(way, way).sqrt().clamp_min(1e-30)).clamp(1.0, 1e6)
    towards = tuple(
        [y - over_features(fd_scale.to(w.dtype), w) * w for y, w in zip(found.displacement, way, strict=True)]
    )
    return found, fd_scale, (found.displacement, towards)


@dataclass
class _LevelEnd:
    """A level that has ended, with the gradients at two places about its answer."""

    problem: Problem
    estimate: Estimate
    fd_scale: Tensor
    fd_gradients: tuple[Tensors, ...]
    x_prev: Tensors
    score: Tensor
    samples: int


def _measure_bias(ended: _LevelEnd) -> tuple[Estimate, Tensor]:
    """The estimate with the bias of y itself, and the envelope H; see :meth:`AdaptiveProximalGradient.estimate`."""
    found = ended.estimate
    problem = found.problem(ended.problem)
    p_at_y = tuple(
        [
            p + (b - a) / over_features(ended.fd_scale.to(p.dtype), p)
            for p, b, a in zip(found.gradient, *ended.fd_gradients, strict=True)
        ]
    )
    maps, _ = problem.image(p_at_y)
    shift = tuple([over_features(r, a) * (a - b) for a, b, r in zip(maps, found.maps, problem.rho, strict=True)])
    envelope = problem.objective(ended.x_prev, ended.score / ended.samples)
    return replace(found, bias2=inner(shift, shift)), envelope


def least_gradients(relative: bool, tuned: bool) -> int:
    """Gradients of the first two levels, and of η_max.

    Args:
        relative: whether η is a fraction of η_max.
        tuned: whether η or ρ follow the solution.
    """
    burn_in = _TUNED_FEWEST * _TUNED_BURN_IN if tuned else _FEWEST * _BURN_IN
    return burn_in + _LEAST + 2 * _FD_SAMPLES + _AT_ZERO * relative


def _first_draw(level: int) -> int:
    """The noise bank's step at the beginning of a level: no two levels of an input share one."""
    return level * (_DRAWS + 1)


def _level_cost(spent: int, budget: int) -> int:
    """Gradients of the next level, the estimate at its end not counted; 0 where too little is left for one.

    8 to 15 times a power of two: every number of samples that is a power of two up to that divides it.
    """
    cost = min(max(_LEAST, int(_GROWTH * spent)), budget - spent - 2 * _FD_SAMPLES)
    if cost < _LEAST // 2:
        return 0
    last = cost.bit_length() - 4
    return cost >> last << last
