"""``run``: carries out a plan in parts, so that it can be interrupted and resumed.

A part holds the results of one method for one block of inputs in one test: the maps, those of another seed, the checks,
or one attack of one magnitude. It is a file that is written atomically, and depends only on the manifest and its name.
The table is assembled from the parts, so a resumed run ends with the same table as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from .._errors import ConvergenceWarning, SettingError, without
from .._files import write
from ..data.manifest import check_same, differences, read_manifest, write_manifest
from ..data.progress import progress_bar
from ..model.modes import evaluating
from ..solvers.solution import Solution
from ..zoo.data import Dataset
from .attacks import ATTACKS
from .derivatives import find_hessian
from .faithfulness import area, blurred, max_sensitivity, perturbation_curve, randomised
from .methods import Method, methods
from .metrics import cosine, gini, normalised_distance, ssim, support_fraction, support_jaccard, topk_intersection
from .plan import METRICS, Numbers, Plan, Results, Unit, attack_of, load_data, units_of


class _Runner:
    """Computes the parts of a plan."""

    def __init__(self, model: Any, data: Dataset, plan: Plan, folder: Path) -> None:
        self.model, self.plan, self.folder = model, plan, folder
        self.inputs = data.inputs
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.hessian = find_hessian(model, self.inputs.to(self.device), noise_level=plan.settings.noise_level)
        self.methods = methods(plan.settings)
        self.reseeded = methods(replace(plan.settings, seed=plan.settings.seed + 1))
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
        clean = load_data(self.folder / Unit(unit.method, "maps", 0.0, "", unit.start, unit.stop, 0).file)
        if clean is None:
            raise RuntimeError(
                f"{self.folder}: the maps of {unit.method} are missing. Likely cause: files were removed"
            )
        maps = torch.from_numpy(clean["maps"]).to(x)
        if unit.test == "seeds":
            other = self.explain(self.reseeded[unit.method], x, target, ids).attribution
            return _numpy(target=target, seed_jaccard=support_jaccard(maps, other), seed_cosine=cosine(maps, other))
        if unit.test == "checks":
            return self._checks(method, x, target, ids, maps)
        return self._attacked(method, unit, x, target, ids, maps)

    def explain(self, method: Method, x: Tensor, target: Tensor, ids: Tensor, model: Any = None) -> Solution:
        explainer = method.build(self.model if model is None else model, x)
        return explainer.attribute(x, target, ids=ids, return_solution=True)

    def _maps(self, method: Method, x: Tensor, target: Tensor, ids: Tensor) -> Numbers:
        found = self.explain(method, x, target, ids)
        maps, plan = found.attribution, self.plan
        baseline = blurred(x) if plan.baseline == "blur" else plan.baseline
        curves = {
            kind: area(
                perturbation_curve(
                    self.model, x, maps, target, kind, baseline=baseline, steps=plan.curve_steps, ids=ids
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
        attack = attack_of(self.plan, unit.test, unit.radius, self.hessian)
        # An attacked input has groups of its own again.
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
    """A digest of contents, types and shapes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run(
    model: nn.Module,
    data: Dataset,
    plan: Plan,
    out: str | Path,
    *,
    name: str = "",
    source: str = "",
    progress: bool = False,
) -> Results:
    """Carries out a plan, or the parts of it that are missing.

    Args:
        model: [B, *features] -> [B, classes]; run in eval mode. The maps explain its predictions.
        data: the inputs, in a fixed order.
        plan: the settings.
        out: folder of the manifest and the parts; created if it does not exist.
        name: of the model, for the manifest.
        source: of the data, for the manifest.
        progress: show a progress bar (needs tqdm).

    Raises:
        ValueError: the folder belongs to another configuration; data without inputs.
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

    An interrupted and resumed run gives the same numbers, up to rounding.
    """
    if not len(data.inputs):
        raise SettingError("data", "has no inputs")
    folder = Path(out)
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
    manifest = read_manifest(folder)
    if manifest is None:
        write_manifest(folder, identity)
    else:
        check_same(folder, differences(manifest, identity))
    data = data._replace(inputs=data.inputs[: plan.limit], targets=data.targets[: plan.limit])
    # Residuals are a column of the table.
    with evaluating(model), without(ConvergenceWarning):
        runner = _Runner(model, data, plan, folder / "parts")
        table = _columns(_parts(runner, units_of(plan, len(data.inputs)), progress), data)
    return Results(table, plan, folder, data, runner.hessian)


def _parts(runner: _Runner, units: list[Unit], progress: bool) -> Iterator[tuple[Unit, Numbers]]:
    """Yields every part, read or computed and written."""
    form = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
    total = sum(unit.cost for unit in units)
    with progress_bar(total, show=progress, extra="evaluation", disable=None, bar_format=form) as advance:
        for unit in units:
            path = runner.folder / unit.file
            part = load_data(path)
            if part is None:
                advance(0, unit.file.removesuffix(".npz"))
                made: dict[str, Any] = runner.make(unit)
                path.parent.mkdir(exist_ok=True)
                write(path, partial(np.savez, **made))
                part = made
            advance(unit.cost)
            yield unit, part


def _columns(parts: Iterable[tuple[Unit, Numbers]], data: Dataset) -> Numbers:
    """The table, one row per input, method and test. Other seeds and the checks of a map are in the row of the map."""
    blocks: dict[tuple[str, str, float, int], Numbers] = {}
    for unit, part in parts:
        columns = {name: column for name, column in part.items() if name not in ("maps", "inputs")}
        test = "none" if unit.test in ("maps", "seeds", "checks") else unit.test
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
