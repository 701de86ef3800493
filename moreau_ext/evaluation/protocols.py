"""The experiments: every method on every input, in parts that are kept, so that a run can be interrupted and resumed.

A part is what one method gives for one block of inputs in one test: its map, its checks, or one attack of one
magnitude. It is a file of its own, whole or not there, a function of the manifest and its name alone. The tables are
put together from the parts, so a run that was interrupted ends with the same tables as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from .._files import write
from ..model.modes import evaluating
from ..solvers.solution import Solution
from ..zoo import Dataset
from .attacks import ATTACKS, Attack, Norm
from .derivatives import Hessian, find_hessian
from .faithfulness import area, max_sensitivity, perturbation_curve, randomised
from .methods import OURS, RIVALS, Method, Settings, methods
from .metrics import cosine, gini, normalised_distance, ssim, support_fraction, topk_intersection

__all__ = ["METRICS", "Interval", "Plan", "Results", "bootstrap", "claims", "compare", "run", "summarise"]

Numbers = dict[str, np.ndarray[Any, Any]]

METRICS: dict[str, tuple[str, int]] = {
    "gini": ("Gini", 1),
    "support": ("non-zero share", -1),
    "deletion": ("deletion area", -1),
    "insertion": ("insertion area", 1),
    "max_sensitivity": ("max-sensitivity", -1),
    "randomised_top": ("cosine, top layer random", -1),
    "randomised_all": ("cosine, all layers random", -1),
    "gradients": ("gradients", -1),
    "relative_residual": ("relative residual", -1),
    "distance": ("normalised distance", -1),
    "topk": ("top-k intersection", 1),
    "topk_fixed": ("top-k, same k", 1),
    "ssim": ("SSIM", 1),
    "cosine": ("cosine", 1),
    "distance_l2": ("L2 distance", 0),
    "distance_linf": ("Linf distance", 0),
    "kept": ("prediction kept", 0),
    "share_before": ("attacked share before", 0),
    "share_after": ("attacked share after", 0),
    "attack_gradients": ("gradients of the attack", 0),
}
"""Columns of the table: what they are called, and whether more is better (1), worse (-1) or neither (0)."""

_CHECKS = ("max_sensitivity", "randomised_top", "randomised_all")


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    ``methods``, ``attacks``, ``magnitudes``, ``norm`` and ``limit`` choose parts: a later run in the same folder may
    choose others, and keeps what is there. Everything else changes numbers, and a folder holds one kind.

    Args:
        methods: names of :func:`moreau_ext.evaluation.methods.methods`.
        attacks: names of ``ATTACKS``.
        magnitudes: radii of the attacks.
        norm: of the radii.
        limit: the first so many inputs.
        settings: of the methods.
        block: inputs per part; raise it with the device's memory.
        k: of the top-k intersection and the attacks' objective: a fraction of the non-zeros of the clean map.
        fixed_k: of the other top-k intersection, the same number for all methods; 1/8 of the features if None.
        baseline: of deletion and insertion.
        curve_steps: of both.
        radius: of max-sensitivity, in the inputs' unit.
        draws: of max-sensitivity.
        attack_samples: gradients per derivative in an attack.
        checks: whether max-sensitivity and the randomised models are measured.
    """

    methods: tuple[str, ...]
    attacks: tuple[str, ...] = ("gaussian", "frozen", "adaptive")
    magnitudes: tuple[float, ...] = (0.1, 0.3, 1.0)
    norm: Norm = "l2"
    limit: int | None = None
    settings: Settings = field(default_factory=Settings)
    block: int = 100
    k: float = 0.4
    fixed_k: int | None = None
    baseline: float = 0.0
    curve_steps: int = 16
    radius: float = 0.02
    draws: int = 10
    attack_samples: int = 256
    checks: bool = True

    def __post_init__(self) -> None:
        known = methods(self.settings)
        for name in self.methods:
            if name not in known:
                raise ValueError(f"methods: expected some of {', '.join(known)}, got {name!r}")
        for name in self.attacks:
            if name not in ATTACKS:
                raise ValueError(f"attacks: expected some of {', '.join(ATTACKS)}, got {name!r}")
        for radius in self.magnitudes:
            if not 0 < radius < math.inf:
                raise ValueError(f"magnitudes: expected positive numbers, got {radius!r}")

    def identity(self) -> dict[str, Any]:
        """What changes numbers."""
        chosen = {"methods", "attacks", "magnitudes", "norm", "limit", "checks"}
        return {name: value for name, value in asdict(self).items() if name not in chosen}


@dataclass(frozen=True)
class Unit:
    """One part: a method, a test ("maps", "checks", or an attack), and a block of inputs."""

    method: str
    test: str
    radius: float
    norm: str
    start: int
    stop: int
    cost: float

    @property
    def file(self) -> str:
        what = self.test if not self.radius else f"{self.test}-{self.norm}-{self.radius:g}"
        return f"{self.method}/{what}-{self.start}-{self.stop}.npz"


@dataclass(frozen=True)
class Results:
    """What a run measured.

    Args:
        table: columns of equal length, one row per input, method and test: id, target, label, method, attack ("none"
            for the maps themselves), norm, magnitude, and ``METRICS``, NaN where one does not apply.
        plan: what was asked for.
        folder: where the parts are.
        data: what was explained.
        hessian: which second derivative the attacks used.
    """

    table: Numbers
    plan: Plan
    folder: Path
    data: Dataset
    hessian: Hessian

    def rows(self, method: str, attack: str = "none", magnitude: float = 0.0) -> Numbers:
        """The rows of one method in one test."""
        t = self.table
        here = (t["method"] == method) & (t["attack"] == attack) & (t["magnitude"] == magnitude)
        return {name: column[here] for name, column in t.items()}

    def maps(self, method: str, rows: int, attack: str = "none", magnitude: float = 0.0) -> tuple[Tensor, Tensor]:
        """(maps, the inputs they explain) of the first inputs."""
        found = [
            _load(self.folder / "parts" / unit.file)
            for unit in _units(self.plan, len(self.data.inputs))
            if unit.method == method
            and unit.test == ("maps" if attack == "none" else attack)
            and unit.radius == magnitude
            and unit.start < rows
        ]
        parts = [part for part in found if part is not None]
        maps = torch.from_numpy(np.concatenate([part["maps"] for part in parts]))[:rows]
        if attack == "none":
            return maps, self.data.inputs[: len(maps)]
        return maps, torch.from_numpy(np.concatenate([part["inputs"] for part in parts]))[:rows]


def _units(plan: Plan, count: int) -> list[Unit]:
    """The parts of a plan, in an order in which each finds what it needs."""
    table = methods(plan.settings)
    found = []
    for start in range(0, count, plan.block):
        stop = min(count, start + plan.block)
        for name in plan.methods:
            method, rows = table[name], stop - start
            # A map costs its gradients and something for the rest; so the bar moves evenly.
            one = rows * (method.gradients + 20)
            found.append(Unit(name, "maps", 0.0, "", start, stop, one))
            if plan.checks:
                found.append(Unit(name, "checks", 0.0, "", start, stop, one * (plan.draws + 2)))
            if not method.attacked:
                continue
            for attack in plan.attacks:
                for radius in plan.magnitudes:
                    spent = _attack(plan, attack, radius, "stein").cost(method.gradients)
                    found.append(Unit(name, attack, radius, plan.norm, start, stop, one + rows * spent))
    return found


def _attack(plan: Plan, name: str, radius: float, hessian: Hessian) -> Attack:
    return Attack(
        radius=radius,
        norm=plan.norm,
        k=plan.k,
        num_samples=plan.attack_samples,
        hessian=hessian,
        noise_level=plan.settings.noise_level,
        seed=plan.settings.seed,
        **ATTACKS[name],
    )


def _load(path: Path) -> Numbers | None:
    """A part, or None where there is none or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # zip and numpy raise nearly anything on a damaged file
        return None


class _Runner:
    """What all parts share."""

    def __init__(self, model: Any, data: Dataset, plan: Plan, folder: Path) -> None:
        self.model, self.plan, self.folder = model, plan, folder
        self.inputs = data.inputs
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.hessian = find_hessian(model, self.inputs.to(self.device), noise_level=plan.settings.noise_level)
        self.methods = methods(plan.settings)
        self._random: dict[int | None, nn.Module] = {}
        self.fixed_k = plan.fixed_k or max(1, self.inputs[0].numel() // 8)

    def make(self, unit: Unit) -> Numbers:
        x = self.inputs[unit.start : unit.stop].to(self.device)
        ids = torch.arange(unit.start, unit.stop, device=self.device)
        method = self.methods[unit.method]
        with torch.no_grad():
            target = torch.cat([self.model(rows).argmax(1) for rows in torch.split(x, self.plan.settings.max_batch)])
        if unit.test == "maps":
            return self._maps(method, x, target, ids)
        clean = _load(self.folder / Unit(unit.method, "maps", 0.0, "", unit.start, unit.stop, 0).file)
        if clean is None:
            raise RuntimeError(f"{self.folder}: the maps of {unit.method} are gone; were files removed meanwhile?")
        maps = torch.from_numpy(clean["maps"]).to(x)
        if unit.test == "checks":
            return self._checks(method, x, target, ids, maps)
        return self._attacked(method, unit, x, target, ids, maps)

    def explain(self, method: Method, x: Tensor, target: Tensor, ids: Tensor, model: Any = None) -> Solution:
        explainer = method.build(self.model if model is None else model, x)
        return explainer.attribute(x, target, ids=ids, return_solution=True)

    def _maps(self, method: Method, x: Tensor, target: Tensor, ids: Tensor) -> Numbers:
        found = self.explain(method, x, target, ids)
        maps, plan = found.attribution, self.plan
        curves = {
            kind: area(
                perturbation_curve(
                    self.model, x, maps, target, kind, baseline=plan.baseline, steps=plan.curve_steps, ids=ids
                )
            )
            for kind in ("deletion", "insertion")
        }
        return _numpy(
            target=target,
            maps=maps,
            gini=gini(maps),
            support=support_fraction(maps),
            gradients=found.gradient_evaluations.double(),
            relative_residual=found.relative_residual,
            **curves,
        )

    def _checks(self, method: Method, x: Tensor, target: Tensor, ids: Tensor, maps: Tensor) -> Numbers:
        plan = self.plan
        worst = max_sensitivity(
            lambda moved: self.explain(method, moved, target, ids).attribution,
            x,
            maps,
            radius=plan.radius,
            draws=plan.draws,
            ids=ids,
        )
        columns = {"max_sensitivity": worst}
        for name, layers in (("randomised_top", 1), ("randomised_all", None)):
            if layers not in self._random:
                self._random[layers] = randomised(self.model, layers, plan.settings.seed)
            other = self.explain(method, x, target, ids, self._random[layers])
            columns[name] = cosine(maps, other.attribution)
        return _numpy(target=target, **columns)

    def _attacked(self, method: Method, unit: Unit, x: Tensor, target: Tensor, ids: Tensor, maps: Tensor) -> Numbers:
        attack = _attack(self.plan, unit.test, unit.radius, self.hessian)
        # The groups of an attacked input are its own again when its map is judged.
        found = attack.run(method.build(self.model, x), self.model, x, target, ids=ids)
        other = self.explain(method, found.inputs, target, ids).attribution
        pictures = x.dim() in (3, 4) and min(x.shape[-2:]) >= 3
        return _numpy(
            target=target,
            maps=other,
            inputs=found.inputs,
            distance=normalised_distance(maps, other),
            topk=topk_intersection(maps, other, self.plan.k),
            topk_fixed=topk_intersection(maps, other, self.fixed_k),
            ssim=ssim(maps, other) if pictures else torch.full_like(found.distance_l2, math.nan),
            cosine=cosine(maps, other),
            distance_l2=found.distance_l2,
            distance_linf=found.distance_linf,
            kept=found.kept.double(),
            share_before=found.share_before,
            share_after=found.share_after,
            attack_gradients=torch.full_like(found.distance_l2, found.gradients),
        )


def _numpy(**columns: Tensor) -> Numbers:
    return {name: column.detach().cpu().numpy() for name, column in columns.items()}


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Of contents, types and shapes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest of a new folder; refuses one that holds other numbers.

    Raises:
        ValueError: the folder is another configuration's; says what differs.
    """
    path = folder / "manifest.json"
    wanted = json.loads(json.dumps(identity))
    if path.is_file():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path}: is damaged; remove the folder, or choose another with --out") from None
        if there != wanted:
            keys = sorted({*there, *wanted})
            wrong = [f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} now" for key in keys
                     if there.get(key) != wanted.get(key)]  # fmt: skip
            raise ValueError(
                f"{folder}: holds the results of another configuration ({'; '.join(wrong)}); choose another --out"
            )
        return
    text = json.dumps(wanted, indent=2) + "\n"
    write(path, lambda file: file.write(text.encode()))


def run(
    model: nn.Module,
    data: Dataset,
    plan: Plan,
    folder: str | Path,
    *,
    name: str = "",
    source: str = "",
    progress: bool = False,
) -> Results:
    """Carries out a plan, as far as the folder does not hold its parts yet.

    Args:
        model: [B, *features] -> [B, classes]; run in eval mode. Its predictions are what the maps explain.
        data: the inputs, in an order that stays.
        plan: what to measure.
        folder: for the manifest and the parts; made if it is missing.
        name: of the model, for the manifest.
        source: of the data, for the manifest.
        progress: show a progress bar (needs tqdm).

    Raises:
        ValueError: the folder holds another configuration; data without inputs.
        OSError: a part cannot be written.

    Example:
        >>> import tempfile
        >>> from moreau_ext import zoo
        >>> from moreau_ext.evaluation import Plan, run
        >>> plan = Plan(methods=("gradient",), attacks=("gaussian",), magnitudes=(0.3,), limit=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = run(zoo.trained("digits_cnn"), zoo.digits("test"), plan, folder)
        >>> len(found.table["id"])
        8

    Interrupted and run again, it gives the same numbers to rounding.
    """
    if not len(data.inputs):
        raise ValueError("data: has no inputs")
    folder = Path(folder)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    identity = {
        "manifest": 1,
        "data": source,
        "data_fingerprint": fingerprint([data.inputs, data.targets]),
        "model": name,
        "model_fingerprint": fingerprint(model.state_dict().values()),
        "plan": plan.identity(),
        "attacks": ATTACKS,
        "versions": {"moreau_ext": __version__, "torch": torch.__version__, "machine": platform.machine()},
    }
    check_manifest(folder, identity)
    data = data._replace(inputs=data.inputs[: plan.limit], targets=data.targets[: plan.limit])
    with evaluating(model):
        runner = _Runner(model, data, plan, folder / "parts")
        table = _columns(_parts(runner, _units(plan, len(data.inputs)), progress), data)
    return Results(table, plan, folder, data, runner.hessian)


def _parts(runner: _Runner, units: list[Unit], progress: bool) -> Iterator[tuple[Unit, Numbers]]:
    bar: Any = None
    if progress:
        from tqdm import tqdm

        # On a terminal only: a log file would fill with bars.
        form = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
        bar = tqdm(total=sum(unit.cost for unit in units), disable=None, bar_format=form)
    try:
        for unit in units:
            path = runner.folder / unit.file
            part = _load(path)
            if part is None:
                if bar is not None:
                    bar.set_postfix_str(unit.file.removesuffix(".npz"))
                made: dict[str, Any] = runner.make(unit)
                path.parent.mkdir(exist_ok=True)
                write(path, partial(np.savez, **made))
                part = made
            if bar is not None:
                bar.update(unit.cost)
            yield unit, part
    finally:
        if bar is not None:
            bar.close()


def _columns(parts: Iterable[tuple[Unit, Numbers]], data: Dataset) -> Numbers:
    """The tidy table; the checks of a map stand in its row."""
    blocks: dict[tuple[str, str, float, int], Numbers] = {}
    for unit, part in parts:
        columns = {name: column for name, column in part.items() if name not in ("maps", "inputs")}
        test = "none" if unit.test in ("maps", "checks") else unit.test
        key = (unit.method, test, unit.radius, unit.start)
        rows = len(columns["target"])
        if key not in blocks:
            blocks[key] = {
                "id": np.arange(unit.start, unit.stop),
                "target": columns["target"],
                "label": data.targets[unit.start : unit.stop].numpy(),
                "method": np.full(rows, unit.method, dtype=object),
                "attack": np.full(rows, test, dtype=object),
                "norm": np.full(rows, unit.norm, dtype=object),
                "magnitude": np.full(rows, unit.radius),
                **{metric: np.full(rows, np.nan) for metric in METRICS},
            }
        blocks[key].update(columns)
    whole = list(blocks.values())
    return {name: np.concatenate([block[name] for block in whole]) for name in whole[0]}


# --- what the numbers say ------------------------------------------------------------------------------------------


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
    """The mean of some numbers and the middle 95 % of the means of resamples, drawn with replacement.

    Args:
        values: one per input; NaN is left out.
        resamples: how many.
        seed: of the drawing; the same for equally many values, so that the rows of a table are comparable.

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
    # In slices: a data set of 10,000 would need 160 MB of indices at once.
    means = [
        numbers[generator.integers(len(numbers), size=(100, len(numbers)))].mean(1) for _ in range(-(-resamples // 100))
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def tests(plan: Plan) -> list[tuple[str, float]]:
    """(attack, magnitude) of a plan's rows; ("none", 0) for the maps themselves."""
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
    """The mean difference of two methods on the same inputs, and what it says of the first.

    Returns:
        (method − rival with its 95 % interval, "better", "worse" or "undecided": whether the interval excludes 0).
    """
    first, second = (results.rows(name, attack, magnitude)[metric] for name in (method, rival))
    # A random map has no attacked rows.
    interval = bootstrap(first - second if len(first) == len(second) else [])
    sense = METRICS[metric][1]
    if not interval.count or not sense or interval.low <= 0 <= interval.high:
        return interval, "undecided"
    return interval, "better" if interval.mean * sense > 0 else "worse"


def claims(results: Results) -> list[dict[str, Any]]:
    """One record per variant of MoreauGrad, metric, test and rival: what :func:`compare` says of them.

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
    """The row of a claim in a table whose columns are the rivals."""
    test = "" if claim["attack"] == "none" else f", {claim['attack']} {claim['magnitude']:g}"
    return f"{known[claim['method']].label}: {METRICS[claim['metric']][0]}{test}"


def _claims_table(records: list[dict[str, Any]], known: dict[str, Method]) -> str:
    """The claims in Markdown: one row per method and test, one column per rival."""
    rivals = list(dict.fromkeys(claim["rival"] for claim in records))
    rows: dict[str, list[str]] = {}
    for claim in records:
        cell = "{mean:+.3f} [{low:+.3f}, {high:+.3f}] ".format(**claim) if claim["count"] else "– "
        verdict = claim["verdict"]
        cell += verdict if verdict == "undecided" else f"**{verdict}**"
        rows.setdefault(claim_name(claim, known), []).append(cell)
    head = ["method minus rival", *(known[rival].label for rival in rivals)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(results: Results, folder: Path) -> list[str]:
    """``results.parquet`` and ``results.csv`` (the same rows), ``summary.json``; ``claims.csv`` and ``claims.md`` (the
    same claims) where the plan has a variant of MoreauGrad and a rival.

    Returns:
        The names of the files.

    Raises:
        ImportError: pyarrow is missing.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    columns = {
        name: pyarrow.array(column.tolist() if column.dtype == object else column, from_pandas=True)
        for name, column in results.table.items()
    }
    table = pyarrow.table(columns)
    write(folder / "results.parquet", lambda file: pyarrow.parquet.write_table(table, file))
    write(folder / "results.csv", lambda file: pyarrow.csv.write_csv(table, file))
    known = methods(results.plan.settings)
    summary = {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "methods": {m: {"label": known[m].label, "how": known[m].how} for m in results.plan.methods},
        "inputs": len(results.data.inputs),
        "accuracy": float((results.rows(results.plan.methods[0])["target"] == results.data.targets.numpy()).mean()),
        "hessian": results.hessian,
        "numbers": summarise(results),
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write(folder / "summary.json", lambda file: file.write(text.encode()))
    names = ["results.parquet", "results.csv", "summary.json"]
    records = claims(results)
    if not records:
        return names
    claimed = pyarrow.Table.from_pylist(records)
    write(folder / "claims.csv", lambda file: pyarrow.csv.write_csv(claimed, file))
    lines = _claims_table(records, known)
    write(folder / "claims.md", lambda file: file.write(lines.encode()))
    return [*names, "claims.csv", "claims.md"]
