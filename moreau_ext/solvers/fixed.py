"""The proximal gradient method with a fixed number of steps and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..ops.layout import Tensors, copy_into, divide, inner, over_features, rows_like, states_like, subtract, take, total
from .base import Runner, State, Steps
from .errors import Errors
from .look import BLOCK, look, subset, upper_residual2
from .problem import Problem, relative_residual
from .samples import GradientSum, NoisyCopies
from .solution import Answer

# Steps between residual checks; each waits for the device once.
_CHECK_EVERY = 10
# Samples of a look at an answer.
_LOOK = 128


@dataclass
class _Iterate:
    """The record of tensors that a step changes in place."""

    problem: Problem
    copies: NoisyCopies
    rows: Tensors  # the first chunk of the copies, which a step leaves for the next one
    displacement: Tensors
    last: Tensors  # the displacement at which the last step took its gradients
    gradient: Tensors
    total: Tensors  # of what is averaged; () where nothing is
    squares: Tensors  # sum of the squared gradients of the last step before an estimate
    score: Tensor  # float64 [B], sum of the samples' scores at `last`
    statistics: Tensor
    step_size: Tensors  # [B]
    arrivals: Tensor  # for the kernels; zero between launches


@dataclass
class _Carried:
    """The tensors that inputs take along when others leave the batch."""

    displacement: Tensors
    gradient: Tensors
    total: Tensors
    squares: Tensors
    floor: Tensor  # float64 [B], the floor of the relative residual's denominator
    eta: Tensors  # as reported
    steps: Tensor  # int64 [B]
    looked: Tensor  # int64 [B], gradients that confirmed or refuted an answer
    looked_at: Tensor  # int64 [B], gradients of the steps before the last look
    refuted: Tensor  # float64 [B], the bound that it found


def _of_every_input(eta: Tensor, batch: int) -> Tensor:
    """One η per input, also where a row of them serves all."""
    return eta.expand(batch, *eta.shape[1:]) if eta.dim() > 1 else eta


@dataclass(frozen=True)
class ProximalGradient:
    """The proximal gradient method with noisy gradients,

        δ⁺ = S_{γη}((1 − γ/ρ)·δ − γ·p),   p = mean over m noisy copies of ∇f,

    from δ = 0, with a fixed number of steps. It contracts where ρλ < 1 and γ < 2/(1/ρ + β) (λ, β: weak-convexity and
    gradient-Lipschitz constants of f_σ), by 1 − γ/ρ a step where f_σ is flat. The map returned is A = S_η(p), p
    averaged over the last ``average_last`` steps: exactly sparse, and closer to the solution than δ.

    Args:
        num_samples: m, noisy copies per input and step.
        max_steps: T.
        step_size: γ; 0 < γ ≤ ρ is sensible. One step with γ = ρ is SmoothGrad.
        noise: "fresh" draws anew each step; "fixed" keeps the bank of step 0, so that the problem is deterministic and
            residuals can fall to rounding (for models with continuous gradients).
        antithetic: samples in pairs z, −z: about half the variance.
        average_last: steps whose p is averaged for the map.
        tol: an input leaves the batch once its relative residual is ≤ tol (checked every 10 steps). With fresh noise
            the residual includes the noise of m samples, is small by chance now and then, and counts once fresh
            gradients at the answer confirm it: 128, or four times m, at most as many as the steps took, and again when
            twice as many were taken. On a fixed bank the residual says nothing about the bank's own error: an input
            leaves, and counts as converged only if fresh gradients say so. 0 never stops early.
        progress: show a progress bar (needs tqdm).

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> from moreau_ext import ProximalGradient
        >>> ProximalGradient(num_samples=16, max_steps=100).gradients
        1600

    Source: arXiv 2302.05294, algorithm 1.
    """

    num_samples: int = 8
    max_steps: int = 60
    step_size: float = 0.1
    noise: Literal["fresh", "fixed"] = "fresh"
    antithetic: bool = True
    average_last: int = 10
    tol: float = 1e-2
    progress: bool = False
    # Only for paper(): the published code averages iterates, which makes the union of their supports.
    average_of: Literal["gradient", "displacement"] = "gradient"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_steps", "average_last"):
            check_count(name, getattr(self, name))
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size: expected a positive number, got {self.step_size!r}")
        if not self.tol >= 0:
            raise ValueError(f"tol: expected a number >= 0, got {self.tol!r}")
        if self.noise not in ("fresh", "fixed"):
            raise ValueError(f"noise: expected 'fresh' or 'fixed', got {self.noise!r}")
        if self.average_of not in ("gradient", "displacement"):
            raise ValueError(f"average_of: expected 'gradient' or 'displacement', got {self.average_of!r}")

    @classmethod
    def paper(cls, num_samples: int = 32, max_steps: int = 300, progress: bool = False) -> ProximalGradient:
        """The published schedule: 300 steps of size 0.1 with 32 independent samples, no stopping rule, and the mean of
        the last 101 iterates as the answer (so the support is the union of theirs). The map is −δ̄/ρ, where the
        published code returns δ̄."""
        return cls(
            num_samples=num_samples,
            max_steps=max_steps,
            antithetic=False,
            average_last=101,
            tol=0.0,
            progress=progress,
            average_of="displacement",
        )

    @property
    def gradients(self) -> int:
        """Gradient evaluations per input, at most."""
        return self.num_samples * self.max_steps

    @property
    def rows(self) -> int:
        return self.num_samples

    @property
    def budget(self) -> str:
        return "max_steps"

    def init(self, problem: Problem, runner: Runner) -> State:
        """All of p(0) is needed before the first shrinkage, where η is a fraction of η_max: it is taken here."""
        start = problem.start
        displacement = states_like(problem.inputs) if start is None else tuple([d.clone() for d in start.displacement])
        copies = NoisyCopies(problem, self.num_samples, self.antithetic)
        gradient, score = states_like(problem.inputs), torch.zeros_like(problem.value, dtype=torch.float64)
        squares = states_like(problem.inputs)
        first = GradientSum(copies, displacement, gradient, score, squares=squares)
        runner.repeat(GradientSum.run, first, 1)
        p = divide(gradient, torch.full_like(score, self.num_samples))
        penalty, eta = problem.penalty.resolve(p)
        problem = replace(problem, penalty=penalty).tuned(p)
        averages = self.average_last > 1 or self.average_of == "displacement"
        carried = _Carried(
            displacement=displacement,
            gradient=gradient,
            total=states_like(problem.inputs) if averages else (),
            squares=squares,
            floor=torch.zeros_like(score),
            eta=tuple([_of_every_input(e, problem.batch) for e in eta]),
            steps=torch.zeros_like(problem.keys),
            looked=torch.zeros_like(problem.keys),
            looked_at=torch.zeros_like(problem.keys),
            refuted=torch.zeros_like(score),
        )
        state = self._state(problem, carried, copies)
        state.iterate.score.copy_(score)
        return state

    def resume(self, problem: Problem, carried: _Carried, last: State, samples: int) -> State:
        """The next noisy copies are drawn again, the same bits."""
        taken = last.evaluations // self.num_samples
        copies = NoisyCopies(problem, self.num_samples, self.antithetic, taken if self.noise == "fresh" else 0)
        state = self._state(problem, carried, copies)
        state.level, state.evaluations = last.level, last.evaluations
        for rows, drawn in zip(state.iterate.rows, copies.draw(0, carried.displacement), strict=True):
            rows.copy_(drawn)
        return state

    def _state(self, problem: Problem, carried: _Carried, copies: NoisyCopies) -> State:
        numbers = torch.zeros(problem.batch, len(ops.STATISTICS), dtype=torch.float64, device=problem.keys.device)
        first = copies.chunks[0][1]
        iterate = _Iterate(
            problem=problem,
            copies=copies,
            rows=tuple([rows_like(x, problem.batch * first) for x in problem.inputs]),
            displacement=carried.displacement,
            last=tuple([torch.empty_like(d) for d in carried.displacement]),
            gradient=carried.gradient,
            total=carried.total,
            squares=carried.squares,
            score=numbers[:, 0].clone(),
            statistics=numbers,
            step_size=tuple([torch.full_like(r, self.step_size) for r in problem.rho]),
            arrivals=torch.zeros(problem.batch, dtype=torch.int32, device=numbers.device),
        )
        return State(problem, iterate, carried, self.num_samples)

    def schedule(self, state: State) -> Iterator[Steps]:
        """Up to the next residual check, every ten steps; from ``averaging_from`` on, sums are kept."""
        start = state.evaluations // self.num_samples
        stop = min((start // _CHECK_EVERY + 1) * _CHECK_EVERY, self.max_steps)
        averaging_from = max(0, self.max_steps - self.average_last)
        edges = sorted({start, stop} | {t for t in (1, averaging_from, stop - 1) if start < t < stop})
        for begin, end in pairwise(edges):
            averaging = bool(state.carried.total) and begin >= averaging_from
            if begin > 0:
                yield Steps(self.step, end - begin, {"averaging": averaging, "measure": end == stop})
                continue
            # Its gradients are there already; nothing is left that a capture could save.
            self.step(state.iterate, averaging=averaging, first=True)
            known = state.problem.start
            squared = state.iterate.statistics[:, 3] if known is None else known.gradient2
            state.carried.floor.copy_(state.problem.residual_floor(squared))
        state.level += 1
        state.carried.steps.fill_(stop)
        state.evaluations = stop * self.num_samples

    def step(self, iterate: _Iterate, *, averaging: bool, first: bool = False, measure: bool = False) -> None:
        """One fused step, δ⁺ = S_{γη}((1 − γ/ρ)·δ − γ·p), which draws the next noisy copies.

        After the last step nobody needs those, but it is a step like any other, and one of many.

        Args:
            iterate: changed in place.
            averaging: add p, or δ⁺, to the total.
            first: the sum of the gradients is there already.
            measure: keep the sum of the squared gradients.
        """
        copies, problem = iterate.copies, iterate.problem
        gradients: Tensors = ()
        if not first:
            gradients = copies.gradients(
                iterate.displacement,
                iterate.gradient,
                iterate.score,
                iterate.rows,
                squares=iterate.squares if measure else (),
            )
        if self.noise == "fresh":
            copies.step += 1
        copy_into(iterate.last, iterate.displacement)
        statistics = [
            ops.prox_step(
                gradients[i] if gradients else None,
                iterate.gradient[i],
                iterate.displacement[i],
                count=self.num_samples,
                carry=first or len(copies.chunks) > 1,
                rho=problem.rho[i],
                step_size=iterate.step_size[i],
                eta=problem.penalty.strength(i),
                groups=problem.penalty.partition(i),
                total=iterate.total[i] if averaging else None,
                total_of=self.average_of,
                x=x,
                noise=copies.noise(i, 0),
                out=iterate.rows[i],
                arrivals=iterate.arrivals,
            )
            for i, x in enumerate(problem.inputs)
        ]
        iterate.statistics.copy_(statistics[0] if len(statistics) == 1 else torch.stack(statistics).sum(0))

    def estimate(self, state: State, runner: Runner) -> Answer | None:
        """The KKT residual of the last displacement, and the map of the averaged gradient."""
        steps = state.evaluations // self.num_samples
        if not (steps == self.max_steps or self.tol > 0 or state.problem.tuning is not None):
            return None
        iterate, problem, carried = state.iterate, state.problem, state.carried
        averaged = steps - max(0, self.max_steps - self.average_last)
        mean = tuple([t / averaged for t in iterate.total]) if averaged > 0 else ()
        last = tuple([g.clone() for g in iterate.gradient])
        p = mean if mean and self.average_of == "gradient" else last
        of_one, freedom = iterate.copies.variance(iterate.squares, last)
        count = self.num_samples * (max(1, averaged) if mean and self.noise == "fresh" else 1)
        variance = tuple([v / count for v in of_one])
        squares = iterate.statistics[:, :3].unbind(1)
        if mean and self.average_of == "displacement":
            # 0 - 0 is +0.
            displacement = mean
            maps = tuple([0 - d / over_features(r, d) for d, r in zip(mean, problem.rho, strict=True)])
        else:
            if problem.tuning is not None:
                # The step used the eta of the last estimate; what is reported is the problem that the map belongs to.
                problem.retune(p)
                y = problem.image(iterate.gradient)[1]
                gap = subtract(iterate.last, y)
                squares = inner(gap, gap), inner(iterate.last, iterate.last), inner(y, y)
            maps, displacement = problem.image(p)
        residual = squares[0].sqrt()
        relative = relative_residual(residual, squares[1:], carried.floor)
        confirmed = self._confirmed(state, problem, maps, displacement, relative, runner)
        tuned = problem.tuning is not None
        return Answer(
            rho=problem.rho,
            eta=tuple([e.clone() for e in problem.penalty.eta]) if tuned else carried.eta,
            maps=maps,
            displacement=displacement,
            gradient=p,
            envelope=state.problem.objective(iterate.last, iterate.score / self.num_samples),
            residual=residual,
            relative_residual=relative,
            confirmed=confirmed,
            evaluations=state.evaluations + carried.looked,
            variance=variance,
            freedom=torch.full_like(residual, max(1, freedom)),
            # Samples do not tell which features move together.
            dependence=torch.full_like(residual, torch.inf),
            error=self._errors(
                problem,
                p,
                maps,
                variance,
                count,
                squares[0],
                torch.maximum(inner(displacement, displacement).sqrt(), carried.floor),
                state.evaluations,
            ),
        )

    def _errors(
        self,
        problem: Problem,
        p: Tensors,
        maps: Tensors,
        variance: Tensors,
        count: int,
        residual2: Tensor,
        scale: Tensor,
        evaluations: int,
    ) -> Errors:
        """The parts of the error: settling is what the last step's residual holds beyond the noise of its samples."""
        gain = problem.penalty.gain(p, maps, variance)
        let_through = total(tuple([g * v for g, v in zip(gain, variance, strict=True)]))
        sampling2 = problem.rho_of_input.square() * let_through
        of_step2 = sampling2 * (count / self.num_samples) if self.noise == "fresh" else 0.0
        settling2 = (residual2 - of_step2).clamp_min(0)
        return Errors.of(scale, sampling2, settling2, torch.zeros_like(scale), sampling2 * evaluations)

    def _confirmed(
        self, state: State, problem: Problem, maps: Tensors, displacement: Tensors, relative: Tensor, runner: Runner
    ) -> Tensor | None:
        """Whether fresh gradients at the answer bound its relative residual by tol, with 95 %; bool [B], None where
        nothing was asked for. Only those answers are looked at whose residual is ≤ tol.

        A residual of few noisy samples is small by chance now and then, and one on a fixed bank says nothing about the
        bank's own error. An answer that a look refuted is looked at again when twice as many gradients were taken.
        """
        if self.tol == 0:
            return None
        carried, claimed = state.carried, relative <= self.tol
        rows = (claimed & (state.evaluations >= 2 * carried.looked_at)).nonzero().squeeze(1)
        if len(rows):
            count = max(2 * BLOCK, min(max(_LOOK, 4 * self.num_samples), state.evaluations) // BLOCK * BLOCK)
            some, at = subset(problem, rows), take(displacement, rows)
            # Steps of the noise bank that no step of the solver reaches.
            seen = look(some, at, count, (1 << 40) + state.evaluations, runner)
            upper2 = upper_residual2(some, take(maps, rows), seen, seen.squares, seen.sums, 1.0).clamp_min(0)
            length2, floor = inner(at, at), carried.floor[rows]
            carried.refuted[rows] = relative_residual(upper2.sqrt(), (length2,), floor)
            carried.looked[rows] += count
            carried.looked_at[rows] = state.evaluations
        confirmed: Tensor = claimed & (carried.refuted <= self.tol)
        return confirmed

    def next(self, state: State, answer: Answer | None) -> Tensor:
        more = torch.full_like(state.problem.keys, self.num_samples * (state.evaluations < self.gradients))
        if answer is None or self.tol == 0:
            return more
        # On a fixed bank an answer that is solved stays as it is, confirmed or not.
        done = answer.relative_residual <= self.tol
        return torch.where(
            done if self.noise == "fixed" or answer.confirmed is None else done & answer.confirmed, 0, more
        )
