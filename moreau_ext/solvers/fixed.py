"""The loop that finds the displacement: init, step, stop -> Solution. The only place that iterates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..capture.records import READ
from ..capture.runner import Graphs, Steps
from ..ops.layout import Tensors, over_features, squared_norm, states_like, take_rows
from .batching import check_finite, filled, in_groups, progress_bar
from .problem import Problem, objective, relative_residual, residual_floor
from .samples import NoisyCopies
from .solution import Solution, assemble, in_order, rows_of

# Steps between two looks at the residual: each look waits for the device once.
_LOOK_EVERY = 10


@dataclass
class _Step:
    """What a step reads and writes, in place: it may be captured."""

    problem: Problem = field(metadata=READ)
    copies: NoisyCopies
    rows: Tensors  # the first chunk of the copies, which a step leaves for the next one
    displacement: Tensors
    before: Tensors  # the displacement at which the last step took its gradients
    gradient: Tensors
    total: Tensors | None
    score: Tensor  # float64 [B], sum of the samples' scores at `before`
    statistics: Tensor
    step_size: Tensors = field(metadata=READ)  # [B]
    arrivals: Tensor = field(metadata=READ)  # for the kernels; zero between launches


@dataclass
class _State:
    """What the loop carries from look to look, for the inputs that are still in it."""

    step: _Step
    where: Tensor  # [B] positions in the batch that came in
    alive: Tensor  # [B]; the others are done, or fill up to a size that has a graph
    floor: Tensor  # float64 [B], the floor of the relative residual's denominator
    eta: Tensors | None  # as reported
    averaged: int = 0


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
        tol: an input leaves the batch once its relative residual is ≤ tol (looked at every 10 steps), and counts as
            converged. With fresh noise the residual includes the noise of m samples. 0 never stops early.
        progress: show a progress bar over steps (needs tqdm).

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

    def solve(self, problem: Problem, *, max_batch: int | None = None, graphs: Graphs | None = None) -> Solution:
        """Solves a problem with at most ``max_batch`` noisy inputs in one forward pass.

        Inputs are taken in groups of ``max_batch // num_samples``; where even one input's samples are too many, they
        are made and summed in chunks. Results agree to the rounding of the model's passes. ``graphs``: captured steps
        to replay, and to keep.

        Raises:
            ValueError: the model gave a gradient that is not finite; names the id of the input.
        """
        groups = 1 if max_batch is None else -(-problem.keys.shape[0] // max(1, max_batch // self.num_samples))
        bar = progress_bar(self.max_steps * groups) if self.progress else None

        try:
            with (graphs or Graphs(False)).steps(problem.score.model, problem.keys.device) as steps:

                def solve(some: Problem, rows: int | None) -> Solution:
                    chunk = self.num_samples if rows is None else min(self.num_samples, rows)
                    return self._solve(some, chunk, steps, bar)

                return in_groups(problem, self.num_samples, max_batch, solve)
        finally:
            if bar is not None:
                bar.close()

    def _solve(self, problem: Problem, chunk: int, steps: Steps, bar: Any) -> Solution:
        state = self._init(problem, chunk)
        full = problem.keys.shape[0]
        finished: list[tuple[Tensor, Solution]] = []
        t = 0
        while t < self.max_steps:
            start, t = t, min((t // _LOOK_EVERY + 1) * _LOOK_EVERY, self.max_steps)
            self._advance(state, start, t, steps)
            if bar is not None:
                bar.update(t - start)
            last = t == self.max_steps
            if not (last or self.tol > 0 or problem.tuning is not None):
                continue
            alive = state.alive.nonzero().squeeze(1)
            step = state.step
            check_finite(step.statistics[alive], step.score[alive], step.problem.ids[alive], t)
            solution = self._result(state, t)
            done = (state.alive if last else state.alive & solution.converged).nonzero().squeeze(1)
            if len(done) == 0:
                continue
            finished.append((state.where[done], solution.take(done)))
            if len(done) == len(alive):
                if bar is not None:
                    bar.update(self.max_steps - t)
                break
            state.alive = state.alive & ~solution.converged
            state = self._compact(state, chunk, steps, full)
        return in_order(finished)

    def _init(self, problem: Problem, chunk: int) -> _State:
        displacement = states_like(problem.inputs)
        if problem.start is not None:
            displacement = tuple(d.clone() for d in problem.start.displacement)
        averages = self.average_last > 1 or self.average_of == "displacement"
        return _State(
            step=self._at(
                problem,
                chunk,
                displacement=displacement,
                gradient=states_like(problem.inputs),
                total=states_like(problem.inputs) if averages else None,
            ),
            where=torch.arange(problem.keys.shape[0], device=problem.keys.device),
            alive=torch.ones_like(problem.keys, dtype=torch.bool),
            floor=problem.value.double() * 0,
            eta=None,
        )

    def _at(
        self,
        problem: Problem,
        chunk: int,
        *,
        displacement: Tensors,
        gradient: Tensors,
        total: Tensors | None,
        number: Tensor | None = None,
    ) -> _Step:
        """Ready for a step from a displacement; ``number``: of the step in the noise bank, if not the first."""
        copies = NoisyCopies(problem, self.num_samples, self.antithetic, chunk)
        if number is not None:
            copies.step.copy_(number)
            copies.write(0, displacement)
        batch = problem.keys.shape[0]
        numbers = torch.zeros(batch, len(ops.STATISTICS), dtype=torch.float64, device=problem.keys.device)
        return _Step(
            problem=problem,
            copies=copies,
            rows=copies.rows(0),
            displacement=displacement,
            before=tuple(torch.empty_like(d) for d in displacement),
            gradient=gradient,
            total=total,
            score=torch.zeros_like(numbers[:, 0]),
            statistics=numbers,
            step_size=tuple(torch.full_like(r, self.step_size) for r in problem.rho),
            arrivals=torch.zeros(batch, dtype=torch.int32, device=numbers.device),
        )

    def _advance(self, state: _State, start: int, stop: int, steps: Steps) -> None:
        """Steps ``start`` to ``stop`` - 1."""
        averaging_from = self.max_steps - self.average_last
        edges = {1, averaging_from}
        for first, end in pairwise(sorted({start, stop} | {t for t in edges if start < t < stop})):
            averaging = state.step.total is not None and first >= averaging_from
            state.averaged += averaging * (end - first)
            if first == 0:
                self._first(state, averaging, steps)
            else:
                steps.run(
                    partial(self._step, averaging=averaging),
                    state.step,
                    end - first,
                    key=(self, averaging),
                    elements=self.num_samples * sum(x.numel() for x in state.step.problem.inputs),
                )

    def _first(self, state: _State, averaging: bool, steps: Steps) -> None:
        """Step 0. All of p(0) is needed before the first shrinkage, where eta is a fraction of eta_max."""
        step, problem = state.step, state.step.problem
        step.copies.total(step.displacement, step.gradient, step.score, steps)
        if problem.penalty is not None:
            p = tuple(g / self.num_samples for g in step.gradient)
            penalty, state.eta = problem.penalty.resolve(p)
            step.problem = replace(problem, penalty=penalty).tuned(p)
        self._move(step, None, averaging)
        at_zero = step.statistics[:, 3] if problem.start is None else problem.start.gradient2
        state.floor = residual_floor(step.problem, at_zero)

    def _step(self, step: _Step, *, averaging: bool) -> None:
        gradients = step.copies.chunked_gradients(step.displacement, step.gradient, step.score, drawn=True)
        self._move(step, gradients, averaging)

    def _move(self, step: _Step, gradients: Tensors | None, averaging: bool) -> None:
        """The fused step, with the next noisy copies. After the last one nobody needs those, but it is a step like any
        other, and one of many."""
        copies, problem = step.copies, step.problem
        if self.noise == "fresh":
            copies.step += 1
        statistics = []
        for i, x in enumerate(problem.inputs):
            step.before[i].copy_(step.displacement[i])
            statistics.append(
                ops.prox_step(
                    None if gradients is None else gradients[i],
                    step.gradient[i],
                    step.displacement[i],
                    count=self.num_samples,
                    carry=gradients is None or len(copies.chunks) > 1,
                    rho=problem.rho[i],
                    step_size=step.step_size[i],
                    eta=None if problem.penalty is None else problem.penalty.eta[i],
                    groups=None if problem.penalty is None else problem.penalty.partition(i),
                    total=step.total[i] if averaging and step.total is not None else None,
                    total_of=self.average_of,
                    x=x,
                    noise=copies.noise(i, 0),
                    out=step.rows[i],
                    arrivals=step.arrivals,
                )
            )
        step.statistics.copy_(statistics[0] if len(statistics) == 1 else torch.stack(statistics).sum(0))

    def _result(self, state: _State, steps: int) -> Solution:
        """What the inputs in the loop would return now."""
        step = state.step
        problem, penalty, before = step.problem, step.problem.penalty, step.before
        residual2, displacement2, image2 = step.statistics[:, 0], step.statistics[:, 1], step.statistics[:, 2]
        mean: Tensors | None = None
        if step.total is not None and state.averaged:
            mean = tuple(total / state.averaged for total in step.total)
        p = mean if mean is not None and self.average_of == "gradient" else tuple(g.clone() for g in step.gradient)
        if self.average_of == "displacement" and mean is not None:
            maps = tuple(0 - d / over_features(r, d) for d, r in zip(mean, problem.rho, strict=True))  # 0 - 0 is +0
            displacement = mean
        else:
            if problem.tuning is not None:
                # The step knew the eta of the last look; what is reported is the problem that the map belongs to.
                problem = step.problem = problem.tuned(p)
                penalty = problem.penalty
                residual2, displacement2, image2 = _squares(problem, before, step.gradient)
            maps = p if penalty is None else penalty.prox(p)
            displacement = tuple(-over_features(r, a) * a for a, r in zip(maps, problem.rho, strict=True))
        return assemble(
            problem,
            eta=state.eta if problem.tuning is None or penalty is None else penalty.eta,
            maps=maps,
            displacement=displacement,
            gradient=p,
            envelope=objective(problem, before, step.score / self.num_samples),
            residual=residual2.sqrt(),
            relative_residual=relative_residual(residual2.sqrt(), (displacement2, image2), state.floor),
            steps=steps,
            evaluations=steps * self.num_samples,
            tol=self.tol,
        )

    def _compact(self, state: _State, chunk: int, steps: Steps, full: int) -> _State:
        """The state without the inputs that are done, or with few of them; the next noisy copies are drawn again, the
        same bits."""
        step, batch = state.step, state.where.shape[0]
        keep, left = filled(state.alive, steps, full, self.num_samples * sum(x[0].numel() for x in step.problem.inputs))
        if len(keep) == batch:
            return state
        return _State(
            step=self._at(
                step.problem.take(keep),
                chunk,
                displacement=tuple(take_rows(d, keep) for d in step.displacement),
                gradient=tuple(take_rows(g, keep) for g in step.gradient),
                total=None if step.total is None else tuple(take_rows(x, keep) for x in step.total),
                number=step.copies.step,
            ),
            where=state.where[keep],
            alive=torch.arange(len(keep), device=keep.device) < left,
            floor=state.floor[keep],
            eta=None if state.eta is None else tuple(rows_of(e, batch)[keep] for e in state.eta),
            averaged=state.averaged,
        )


def _squares(problem: Problem, displacement: Tensors, gradient: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """‖δ − y‖², ‖δ‖² and ‖y‖² of a displacement and the gradient there, y = −ρ·S_η(p); float64 [B]."""
    maps = gradient if problem.penalty is None else problem.penalty.prox(gradient)
    image = tuple(-over_features(r, a) * a for a, r in zip(maps, problem.rho, strict=True))
    gap = tuple(d - y for d, y in zip(displacement, image, strict=True))
    return squared_norm(gap), squared_norm(displacement), squared_norm(image)
