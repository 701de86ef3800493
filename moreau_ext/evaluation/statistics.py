"""Bootstrap intervals, paired comparisons and claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .methods import OURS, RIVALS, Method
from .plan import METRICS, Plan, Results


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over inputs.

    Args:
        mean, low, high: NaN without numbers.
        count: inputs.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.count else "-"


def bootstrap(values: Sequence[float] | np.ndarray[Any, Any], resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean, and the middle 95 % of the means of resamples drawn with replacement.

    Args:
        values: one per input; NaN is left out.
        resamples: their number.
        seed: of the draws; equal counts have equal draws, so that the rows of a table are comparable.

    Example:
        >>> from moreau_ext.evaluation import bootstrap
        >>> str(bootstrap([1.0, 1.0, 1.0]))
        '1.000 [1.000, 1.000]'
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return Interval(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    # In slices: 10,000 inputs would need 160 MB of indices at once.
    means = [
        numbers[generator.integers(len(numbers), size=(100, len(numbers)))].mean(1) for _ in range(-(-resamples // 100))
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def tests(plan: Plan) -> list[tuple[str, float]]:
    """(attack, magnitude) of the tests of a plan; ("none", 0) for the maps."""
    return [("none", 0.0), *((a, m) for a in plan.attacks for m in plan.magnitudes)]


def summarise(results: Results) -> list[dict[str, Any]]:
    """One record per method, test and metric: mean, low, high, count."""
    records = []
    for method in results.plan.methods:
        for attack, magnitude in tests(results.plan):
            rows = results.rows(method, attack, magnitude)
            for metric in METRICS:
                interval = bootstrap(rows[metric])
                if interval.count:
                    where = {"method": method, "attack": attack, "magnitude": magnitude, "metric": metric}
                    records.append({**where, **asdict(interval)})
    return records


def compare(
    results: Results, method: str, rival: str, metric: str, attack: str = "none", magnitude: float = 0.0
) -> tuple[Interval, str]:
    """The mean difference of two methods on the same inputs, and a verdict on the first.

    Returns:
        (method − rival with its 95 % interval, verdict): "undecided" if the interval contains 0, else "better" or
        "worse".
    """
    first, second = (results.rows(name, attack, magnitude)[metric] for name in (method, rival))
    # A random map has no attacked rows.
    interval = bootstrap(first - second if len(first) == len(second) else [])
    sense = METRICS[metric][1]
    if not interval.count or not sense or interval.low <= 0 <= interval.high:
        return interval, "undecided"
    return interval, "better" if interval.mean * sense > 0 else "worse"


def claims(results: Results) -> list[dict[str, Any]]:
    """One record per variant of MoreauGrad, metric, test and rival, by :func:`compare`.

    Returns:
        method, rival, metric, attack, magnitude; mean, low, high, count of the paired difference; verdict.
    """
    plan = results.plan
    where = [(metric, "none", 0.0) for metric in ("gini", "deletion", "insertion")]
    where += [(metric, *test) for test in tests(plan)[1:] for metric in ("topk", "ssim", "distance")]
    records = []
    for method in (m for m in OURS if m in plan.methods):
        for metric, attack, magnitude in where:
            for rival in (m for m in RIVALS if m in plan.methods):
                interval, verdict = compare(results, method, rival, metric, attack, magnitude)
                names = {"method": method, "rival": rival, "metric": metric, "attack": attack, "magnitude": magnitude}
                records.append({**names, **asdict(interval), "verdict": verdict})
    return records


def claim_name(claim: dict[str, Any], known: dict[str, Method]) -> str:
    """The label of a claim's row in a table whose columns are the rivals."""
    test = "" if claim["attack"] == "none" else f", {claim['attack']} {claim['magnitude']:g}"
    return f"{known[claim['method']].label}: {METRICS[claim['metric']][0]}{test}"
