"""Timing: rows per pass, and whether a change is faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

from ..model.memory import BLIND_ROWS, Footprint, attempt
from .passes import Rows, rows_that_fit
from .report import Lever, Model

# A gain is believed beyond what two equal candidates differ by when measured like this on a busy machine, 2-4 %.
WORTH = 0.95

_ROUNDS = 7

_PASS_SECONDS = 0.02

_LONGEST_PASS_SECONDS = 0.15

_PROBE_SECONDS = 0.8


def rows_for_timing(model: Model, rows: Rows, most: int) -> int:
    """Rows whose pass is long enough to time."""
    count = 1
    while count * 2 <= most:
        seconds = attempt(partial(_least, rows.timed(model, count), 2), rows.device, last=count == 1)
        if seconds is None:
            return count // 2
        if seconds > _PASS_SECONDS:
            break
        count *= 2
    return count


def _least(run: Callable[[], float], times: int) -> float:
    """The least of the seconds of some runs, the first left out."""
    return min([run() for _ in range(times)][1:])


def alternating(one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of both, by turns, so that a machine that changes speed changes it for both."""
    one(), other()
    first = max(one(), 1e-7)
    repeat = min(20, max(1, int(_PASS_SECONDS / 2 / first)))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for run, times in zip((one, other), seconds, strict=True):
            times.append(sum(run() for _ in range(repeat)))
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def probe_rows(
    model: Model, rows: Rows, taken: Footprint | None, budget: int, limit: int | None, timing: bool
) -> tuple[int, Lever, tuple[tuple[int, float], ...]]:
    """(rows per pass, the report, seconds per row by rows per pass)."""
    fitting = rows_that_fit(taken, budget)
    most = fitting if limit is None else min(limit, fitting)
    if taken is None:
        memory = f"memory could not be measured, {BLIND_ROWS} at most"
    elif taken.peak(1) > budget:
        memory = f"one row takes {taken.peak(1):,} bytes, more than the budget of {budget:,}"
    else:
        memory = f"{budget:,} bytes hold {fitting:,}"
    if not timing:
        return most, Lever("max_batch", True, f"{most} rows, not timed; {memory}"), ()
    runs: dict[int, Callable[[], float]] = {}
    seconds: dict[int, list[float]] = {}
    best, count = math.inf, 1
    while count <= most:
        run = rows.timed(model, count)
        spent = attempt(partial(_least, run, 4), rows.device, last=count == 1)
        if spent is None:
            break
        runs[count], seconds[count] = run, [spent]
        best = min(best, spent / count)
        # Not where two sizes look worse: on a busy machine that ended the search of a transformer at two rows.
        if spent > _LONGEST_PASS_SECONDS:
            break
        count *= 2
    close = [c for c in runs if seconds[c][0] / c < 1.3 * best]
    end = time.perf_counter() + _PROBE_SECONDS
    for _ in range(_ROUNDS):
        if time.perf_counter() > end:
            break
        for c in close:
            repeat = min(20, max(1, int(_PASS_SECONDS / 4 / seconds[c][0])))
            seconds[c].append(sum(runs[c]() for _ in range(repeat)) / repeat)
    # The least: what others do on the machine only ever adds, and a long pass is measured too seldom for a median.
    timed = {c: min(s) / c for c, s in seconds.items()}
    fastest = min(timed.values())
    # The smaller of equals: less memory, and less lost where the rows do not fill the last chunk.
    chosen = min(c for c, s in timed.items() if s <= fastest / WORTH)
    reason = f"{chosen} rows, the fewest within 5 % of the fastest of {', '.join(map(str, timed))}; {memory}"
    lever = Lever("max_batch", True, reason, time_ratio=timed[chosen] / timed[1])
    return chosen, lever, tuple(timed.items())
