"""The loop that finds the displacement: init, step, stop -> Solution. The only place that iterates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .checks import check_count
from .graphs import READ, SCRATCH, Graphs, Steps
from .memory import attempt
from .ops.layout import (
    Tensors,
    flat_rows,
    like_layout,
    over_features,
    row_chunks,
    rows_like,
    squared_norm,
    states_like,
    take_rows,
)
from .ops.noise import Noise
from .penalties import Penalty
from .scores import Score

# Steps between two looks at the residual: each look waits for the device once.
_LOOK_EVERY = 10

# The floor of the relative residual's denominator, as a fraction of rho*||p(0)||: where the solution is zero, the plain
# ratio would stay at 1 until the last zero is exact.
_FLOOR = 1e-3

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Solution:
    """What an explanation found. Fields over features have the form of the inputs (a tensor or a tuple of tensors);
    the others hold one number per input, [B].

    Args:
        attribution: the map A = S_η(p) ≈ −δ*/ρ, in the dtype of the inputs; units of a gradient; positive raises the
            score.
        displacement: y = −ρ·A, the answer for δ*, state dtype.
        envelope: H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ) at the last displacement that was evaluated: the envelope F(x),
            from above, with the error of its m samples. float64.
        envelope_gradient: p, the gradient of the envelope; dense where the map is sparse.
        score: f(x), without noise.
        residual: with ProximalGradient ‖δ − y‖₂ of the last displacement evaluated, the noise of its m samples
            included; with AdaptiveProximalGradient an estimate of the answer's own, noise included. float64.
        relative_residual: with ProximalGradient residual / max(‖δ‖, ‖y‖, 10⁻³·ρ·‖p(0)‖); with AdaptiveProximalGradient
            a 95 % bound of the answer's residual, over the same. float64.
        steps: steps taken.
        gradient_evaluations: gradients of the model that the steps took, with those that ``rho="auto"`` did.
        converged: relative_residual ≤ tol. Never True for the gradient baselines, which solve nothing.
        nnz: non-zero entries of the map.
        support: non-zero features, or groups where there are groups.
        empty: nnz == 0.
        eta: η that was used (absolute), 0 without a penalty; [B], or one per feature.
        rho: ρ that was used.
        sigma: σ that was used, per tensor of a tuple.
    """

    attribution: Any
    displacement: Any
    envelope: Tensor
    envelope_gradient: Any
    score: Tensor
    residual: Tensor
    relative_residual: Tensor
    steps: Tensor
    gradient_evaluations: Tensor
    converged: Tensor
    nnz: Tensor
    support: Tensor
    empty: Tensor
    eta: Any
    rho: Tensor
    sigma: Any

    @staticmethod
    def concatenate(parts: Iterable[Solution]) -> Solution:
        """One solution of many, in their order; every field over features must be a tuple of tensors."""
        parts = list(parts)

        def join(values: list[Any]) -> Any:
            if isinstance(values[0], tuple):
                return tuple(join(list(column)) for column in zip(*values, strict=True))
            return torch.cat(values)

        return Solution(**{f.name: join([getattr(p, f.name) for p in parts]) for f in fields(Solution)})

    def take(self, index: Tensor) -> Solution:
        """The solution of some of the inputs."""

        def pick(value: Any) -> Any:
            return tuple(pick(v) for v in value) if isinstance(value, tuple) else value[index]

        return Solution(**{f.name: pick(getattr(self, f.name)) for f in fields(Solution)})


@dataclass(frozen=True)
class Tuning:
    """Settings that are found while solving, because they were asked for by what they lead to; [B] each, or None.

    At a solution δ* = −ρ·S_η(p), p = p(δ*), so the support of δ* is that of S_η(p), and ‖δ*‖ = ρ‖S_η(p)‖. Hence
    η = ``penalty.threshold(p, support)`` and ρ = radius/‖S_η(p)‖ at the p of the solution, and a solver that sets them
    so whenever it knows p better ends at a problem whose solution has what was asked for.

    Args:
        support: features, or groups, that are not to be zero; int64.
        radius: ‖δ*‖₂, float64, in units of the inputs.
    """

    support: Tensor | None = None
    radius: Tensor | None = None

    def take(self, index: Tensor) -> Tuning:
        """The tuning of some of the inputs."""
        return Tuning(*(None if t is None else t[index] for t in (self.support, self.radius)))


@dataclass(frozen=True)
class Start:
    """Where a solver begins, if not at δ = 0.

    Args:
        displacement: per tensor, state dtype.
        gradient2: ‖p(0)‖², float64 [B], which a first step from 0 would have shown.
    """

    displacement: Tensors
    gradient2: Tensor

    def take(self, index: Tensor) -> Start:
        """The start of some of the inputs."""
        return Start(tuple(take_rows(d, index) for d in self.displacement), self.gradient2[index])


@dataclass(frozen=True)
class Problem:
    """minimise over δ: f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ), for a batch.

    Args:
        inputs: x, dense tensors [B, *features] that belong to the solver.
        score: f, bound to the inputs.
        value: f(x), [B].
        ids: int64 [B], the names that errors use.
        keys: int64 [B], the noise bank's keys.
        sigma: σ per tensor, state dtype [B].
        rho: ρ, per tensor, state dtype [B].
        penalty: η·Ω, or None.
        tuning: what η and ρ follow, or None where they are as given.
        start: where to begin, or None for δ = 0; then the penalty is absolute.
    """

    inputs: Tensors
    score: Score
    value: Tensor
    ids: Tensor
    keys: Tensor
    sigma: Tensors
    rho: Tensors
    penalty: Penalty | None
    tuning: Tuning | None = None
    start: Start | None = None

    def take(self, index: Tensor) -> Problem:
        """The problem of some of the inputs."""
        return Problem(
            inputs=tuple(take_rows(x, index) for x in self.inputs),
            score=self.score.take(index),
            value=self.value[index],
            ids=self.ids[index],
            keys=self.keys[index],
            sigma=tuple(s[index] for s in self.sigma),
            rho=tuple(r[index] for r in self.rho),
            penalty=None if self.penalty is None else self.penalty.take(index),
            tuning=None if self.tuning is None else self.tuning.take(index),
            start=None if self.start is None else self.start.take(index),
        )

    def tuned(self, gradient: Tensors) -> Problem:
        """The problem with the η and ρ that follow from p, where they follow anything."""
        if self.tuning is None:
            return self
        problem, penalty = self, self.penalty
        if self.tuning.support is not None and penalty is not None:
            eta = penalty.threshold(gradient, self.tuning.support)
            penalty = replace(penalty, eta=tuple(eta.to(r.dtype) for r in self.rho))
            problem = replace(problem, penalty=penalty)
        if self.tuning.radius is not None:
            maps = gradient if penalty is None else penalty.prox(gradient)
            length = squared_norm(maps).sqrt()
            # A map of zeros cannot be made longer: it keeps the rho it has.
            problem = replace(
                problem,
                rho=tuple(
                    torch.where(length > 0, self.tuning.radius / length.clamp_min(_TINY), r).to(r.dtype)
                    for r in self.rho
                ),
            )
        return problem


@dataclass(init=False)
class NoisyCopies:
    """The noisy rows of a problem at a displacement, made chunk by chunk in buffers that are used again."""

    inputs: Tensors = field(metadata=READ)
    chunks: list[tuple[int, int]]  # (first sample, samples)
    step: Tensor
    _noise: list[Noise] = field(metadata=READ)
    _scores: dict[int, Score] = field(metadata=READ)
    _rows: dict[int, Tensors] = field(metadata=SCRATCH)

    def __init__(self, problem: Problem, num_samples: int, antithetic: bool, chunk: int) -> None:
        self.inputs = problem.inputs
        self.chunks = [(start, min(chunk, num_samples - start)) for start in range(0, num_samples, chunk)]
        self.step = torch.zeros(1, dtype=torch.int64, device=problem.keys.device)
        self._noise = []
        offset = 0
        for x, sigma in zip(problem.inputs, problem.sigma, strict=True):
            self._noise.append(Noise(problem.keys, self.step, sigma, num_samples, antithetic, offset))
            offset += x[:1].numel()
        batch = problem.keys.shape[0]
        row = torch.arange(batch, device=problem.keys.device)
        self._scores = {size: problem.score.take(row.repeat_interleave(size)) for _, size in self.chunks}
        self._rows = {size: tuple(rows_like(x, batch * size) for x in problem.inputs) for _, size in self.chunks}

    def noise(self, tensor: int, chunk: int) -> Noise:
        return self._noise[tensor].chunk(*self.chunks[chunk])

    def rows(self, chunk: int) -> Tensors:
        return self._rows[self.chunks[chunk][1]]

    def write(self, chunk: int, displacement: Tensors | None) -> None:
        """Draws a chunk of noisy copies into its buffer."""
        for i, (x, out) in enumerate(zip(self.inputs, self.rows(chunk), strict=True)):
            d = None if displacement is None else displacement[i]
            ops.perturb(x, d, self.noise(i, chunk), out=out)

    def gradient(self, chunk: int) -> tuple[Tensor, Tensors]:
        """Scores [B, samples] and gradients at what the buffer of a chunk holds."""
        rows = self.rows(chunk)
        size = self.chunks[chunk][1]
        scores, gradients = self._scores[size].gradient(rows)
        return scores.view(-1, size), tuple(like_layout(g, x) for g, x in zip(gradients, rows, strict=True))

    def chunked_gradients(
        self, displacement: Tensors | None, into: Tensors, score: Tensor, *, drawn: bool = False
    ) -> Tensors:
        """The gradients of the last chunk at a displacement; the sum of those of the chunks before it is written
        ``into`` tensors of the state dtype, the sum of all scores into ``score``, float64 [B]. ``drawn``: the buffer of
        the first chunk holds its noisy copies already."""
        last = len(self.chunks) - 1
        for c in range(last + 1):
            if c or not drawn:
                self.write(c, displacement)
            scores, gradients = self.gradient(c)
            if c == 0:
                torch.sum(scores, 1, dtype=torch.float64, out=score)
            else:
                score += scores.sum(1, dtype=torch.float64)
            if c == last:
                break
            for g, sum_of in zip(gradients, into, strict=True):
                ops.accumulate(g, sum_of, carry=c > 0)
        return gradients

    def total(self, displacement: Tensors | None, into: Tensors, score: Tensor, steps: Steps) -> None:
        """The same with all gradients in the sum."""
        samples = sum(size for _, size in self.chunks)
        elements = samples * sum(x.numel() for x in self.inputs)
        steps.run(_Total.form, _Total(self, displacement, into, score), 1, key=samples, elements=elements)


@dataclass
class _Total:
    """A sum of gradients at a displacement, in place: it may be captured."""

    copies: NoisyCopies
    displacement: Tensors | None = field(metadata=READ)
    into: Tensors
    score: Tensor

    def form(self) -> None:
        gradients = self.copies.chunked_gradients(self.displacement, self.into, self.score)
        for g, sum_of in zip(gradients, self.into, strict=True):
            ops.accumulate(g, sum_of, carry=len(self.copies.chunks) > 1)


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


def objective(problem: Problem, displacement: Tensors, score: Tensor) -> Tensor:
    """H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ), float64 [B], given f_σ(x+δ)."""
    pull = [
        flat_rows(d).double().square().sum(1) / (2 * r.double()) for d, r in zip(displacement, problem.rho, strict=True)
    ]
    value = score + torch.stack(pull).sum(0)
    return value if problem.penalty is None else value + problem.penalty.value(displacement)


def relative_residual(residual: Tensor, squares: tuple[Tensor, ...], floor: Tensor) -> Tensor:
    """residual / max(norms, floor), given the norms' squares; 0/0 is a score that is flat here, solved by δ = 0."""
    denominator = torch.maximum(torch.stack(squares).amax(0).sqrt(), floor)
    return torch.where(residual == 0, 0.0, residual / denominator)


def residual_floor(problem: Problem, gradient2: Tensor) -> Tensor:
    """10⁻³·ρ·‖p(0)‖, float64 [B], from ‖p(0)‖²."""
    return _FLOOR * torch.stack([r.double() for r in problem.rho]).amax(0) * gradient2.sqrt()


def assemble(
    problem: Problem,
    *,
    eta: Tensors | None,
    maps: Tensors,
    displacement: Tensors,
    gradient: Tensors,
    envelope: Tensor,
    residual: Tensor,
    relative_residual: Tensor,
    steps: int | Tensor,
    evaluations: int,
    tol: float,
) -> Solution:
    """The Solution of what a solver found, with what follows from it."""
    attribution = tuple(a.to(x.dtype) for a, x in zip(maps, problem.inputs, strict=True))
    nnz = torch.stack([flat_rows(a != 0).sum(1) for a in attribution]).sum(0)
    ones = torch.ones_like(nnz)
    none = tuple(torch.zeros_like(r) for r in problem.rho)
    return Solution(
        attribution=attribution,
        displacement=displacement,
        envelope=envelope,
        envelope_gradient=gradient,
        score=problem.value,
        residual=residual,
        relative_residual=relative_residual,
        steps=ones * steps,
        gradient_evaluations=ones * evaluations,
        converged=relative_residual <= tol,
        nnz=nnz,
        support=nnz if problem.penalty is None else (problem.penalty.magnitudes(maps) > 0).sum(1),
        empty=nnz == 0,
        eta=none if eta is None else tuple(rows_of(e, nnz.shape[0]) for e in eta),
        rho=problem.rho[0],
        sigma=problem.sigma,
    )


def in_order(parts: list[tuple[Tensor, Solution]]) -> Solution:
    """Solutions of inputs that were done at different times, by their place in the batch."""
    whole = Solution.concatenate(solution for _, solution in parts)
    return whole.take(torch.cat([where for where, _ in parts]).argsort())


def in_groups(
    problem: Problem, rows: int, max_batch: int | None, solve: Callable[[Problem, int | None], Solution]
) -> Solution:
    """Solves a problem in groups of as many inputs as one pass takes.

    Passes that run out of memory are halved by the score. What is held between them belongs to the solver: a group
    that does not fit is solved again in two halves, or alone, with half the rows per pass.

    Args:
        problem: the batch.
        rows: of each input in a pass.
        max_batch: most rows in one pass of the model.
        solve: the solution of a group with so many rows per pass.
    """
    batch, device, limit = problem.keys.shape[0], problem.keys.device, problem.score.limit
    size = batch if max_batch is None else max(1, max_batch // rows)
    todo = [(index, max_batch) for index in reversed(row_chunks(batch, size, device))]
    done = []
    failed = 0
    while todo:
        index, most = todo.pop()
        count = len(index)
        some = problem if count == batch else problem.take(index)
        part = attempt(partial(solve, some, most), device, last=count == 1 and most == 1)
        if part is not None:
            done.append(part)
            continue
        failed = failed or count
        half = max(1, (rows * count if most is None else most) // 2)
        todo += [(piece, half) for piece in reversed(index.tensor_split(2)) if len(piece)]
    if failed:
        limit.say(f"{failed} inputs at once", "half of them, or half the rows in a pass, as often as it took")
    return Solution.concatenate(done)


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


def filled(alive: Tensor, steps: Steps, full: int, elements: int) -> tuple[Tensor, int]:
    """The rows that are alive, filled up with the first of them to a size that ``steps`` likes; and how many are."""
    keep = alive.nonzero().squeeze(1)
    left = len(keep)
    size = min(steps.size(left, full, elements), len(alive))
    return torch.cat([keep, keep[:1].expand(size - left)]), left


def _squares(problem: Problem, displacement: Tensors, gradient: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """‖δ − y‖², ‖δ‖² and ‖y‖² of a displacement and the gradient there, y = −ρ·S_η(p); float64 [B]."""
    maps = gradient if problem.penalty is None else problem.penalty.prox(gradient)
    image = tuple(-over_features(r, a) * a for a, r in zip(maps, problem.rho, strict=True))
    gap = tuple(d - y for d, y in zip(displacement, image, strict=True))
    return squared_norm(gap), squared_norm(displacement), squared_norm(image)


def rows_of(eta: Tensor, batch: int) -> Tensor:
    """One eta per input, also where a row of them serves all."""
    return eta.expand(batch, *eta.shape[1:]) if eta.dim() > 1 else eta


def check_finite(statistics: Tensor, scores: Tensor, ids: Tensor, steps: int | Tensor) -> None:
    """Raises ValueError, naming the inputs, where a step's statistics or scores are not finite. ``steps``: so far."""
    wrong = ~(torch.isfinite(statistics).all(1) & torch.isfinite(scores))
    if bool(wrong.any()):
        which, step = ids[wrong].tolist(), int(torch.as_tensor(steps).max())
        shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
        raise ValueError(
            f"model: the gradient or the score for input id {shown} is not finite (seen at step {step}). Likely "
            "causes: overflow in half precision, a square root or logarithm at 0 in the model, or a step_size too "
            "large for this rho"
        )


def progress_bar(steps: int, unit: str = "step") -> Any:
    """A bar on stderr, by tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm(total=steps, unit=unit, leave=False)
