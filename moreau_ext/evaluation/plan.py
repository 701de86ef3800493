"""The plan of an evaluation, its units of work, and its results."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._errors import SettingError
from ..solvers.adaptive import least_gradients
from ..zoo.data import Dataset
from .attacks import ATTACKS, Attack, Norm
from .derivatives import Hessian
from .methods import OURS, Settings, methods

Numbers = dict[str, np.ndarray[Any, Any]]

# (label, sense) of every column of the table: 1 if more is better, -1 if less is, 0 if neither.
METRICS: dict[str, tuple[str, int]] = {
    "gini": ("Gini", 1),
    "support": ("non-zero share", -1),
    "seed_jaccard": ("Jaccard, two seeds", 1),
    "seed_cosine": ("cosine, two seeds", 1),
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


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation.

    ``methods``, ``attacks``, ``magnitudes``, ``norm``, ``limit`` and ``checks`` select parts: a later run in the same
    folder may select others, and keeps the finished parts. All other settings change numbers, and a folder holds
    results of one value of each.

    Args:
        methods: names of :func:`moreau_ext.evaluation.methods.methods`.
        attacks: names of ``ATTACKS``.
        magnitudes: radii of the attacks.
        norm: of the radii.
        limit: number of inputs, from the first; None for all.
        settings: of the methods.
        block: inputs per part; raise it with the device's memory.
        k: of the top-k intersection and the attacks' objective: a fraction of the non-zeros of the clean map.
        fixed_k: of the second top-k intersection, the same number for all methods; 1/8 of the features if None.
        baseline: of deletion and insertion: a number, or "blur" for :func:`moreau_ext.evaluation.blurred`.
        curve_steps: of deletion and insertion.
        radius: of max-sensitivity, in the inputs' unit.
        draws: of max-sensitivity.
        attack_samples: gradients per derivative in an attack.
        checks: measure max-sensitivity and the randomised models.
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
    baseline: float | Literal["blur"] = 0.0
    curve_steps: int = 16
    radius: float = 0.02
    draws: int = 10
    attack_samples: int = 256
    checks: bool = True

    def __post_init__(self) -> None:
        known = methods(self.settings)
        for name in self.methods:
            if name not in known:
                raise SettingError("methods", f"expected some of {', '.join(known)}, got {name!r}")
        for name in self.attacks:
            if name not in ATTACKS:
                raise SettingError("attacks", f"expected some of {', '.join(ATTACKS)}, got {name!r}")
        for radius in self.magnitudes:
            if not 0 < radius < math.inf:
                raise SettingError("magnitudes", f"expected positive numbers, got {radius!r}")
        for name in self.methods:
            least = least_gradients(relative=name != "moreau", tuned=False)
            if name in OURS and self.settings.budget < least:
                raise SettingError("budget", f"{name} takes at least {least} gradients, got {self.settings.budget}")

    def identity(self) -> dict[str, Any]:
        """The settings that change numbers."""
        chosen = {"methods", "attacks", "magnitudes", "norm", "limit", "checks"}
        return {name: value for name, value in asdict(self).items() if name not in chosen}


@dataclass(frozen=True)
class Unit:
    """One part of an evaluation: a method, a test ("maps", "seeds", "checks", or an attack) and a block of inputs."""

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
    """The results of an evaluation.

    Args:
        table: columns of equal length, one row per input, method and test: id, target, label, method, attack ("none"
            for the maps themselves), norm, magnitude, and ``METRICS``, NaN where one does not apply.
        plan: its settings.
        folder: of the manifest and the parts.
        data: what was explained.
        hessian: which second derivative the attacks used.
    """

    table: Numbers
    plan: Plan
    folder: Path
    data: Dataset
    hessian: Hessian

    def rows(self, method: str, attack: str = "none", magnitude: float = 0.0) -> Numbers:
        """The rows of the table of one method in one test."""
        t = self.table
        here = (t["method"] == method) & (t["attack"] == attack) & (t["magnitude"] == magnitude)
        return {name: column[here] for name, column in t.items()}

    def maps(self, method: str, rows: int, attack: str = "none", magnitude: float = 0.0) -> tuple[Tensor, Tensor]:
        """(maps, their inputs) of the first inputs."""
        found = [
            load_data(self.folder / "parts" / unit.file)
            for unit in units_of(self.plan, len(self.data.inputs))
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


def units_of(plan: Plan, count: int) -> list[Unit]:
    """The parts of a plan; each comes after those it needs."""
    table = methods(plan.settings)
    found = []
    for start in range(0, count, plan.block):
        stop = min(count, start + plan.block)
        for name in plan.methods:
            method, rows = table[name], stop - start
            # For the progress bar: gradients of a map, and about 20 for everything else.
            one = rows * (method.gradients + 20)
            found.append(Unit(name, "maps", 0.0, "", start, stop, one))
            if method.attacked:
                found.append(Unit(name, "seeds", 0.0, "", start, stop, one))
            if plan.checks:
                found.append(Unit(name, "checks", 0.0, "", start, stop, one * (plan.draws + 2)))
            if not method.attacked:
                continue
            for attack in plan.attacks:
                for radius in plan.magnitudes:
                    spent = attack_of(plan, attack, radius, "stein").cost(method.gradients)
                    found.append(Unit(name, attack, radius, plan.norm, start, stop, one + rows * spent))
    return found


def attack_of(plan: Plan, name: str, radius: float, hessian: Hessian) -> Attack:
    """The attack of a name and radius, with the settings of a plan."""
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


def load_data(path: Path) -> Numbers | None:
    """The arrays of a part; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # zip and numpy raise nearly anything on a damaged file
        return None
