"""``Config``: a job described by names, from the command line or for a worker on another machine."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_count
from .._errors import SettingError
from ..explainers.base import Explainer
from ..explainers.registry import Model, make_explainer
from ..model.precision import Precision, check_precision
from ..preparation.prepare import prepare
from ..solvers.adaptive import AdaptiveProximalGradient, least_gradients
from ..solvers.fixed import ProximalGradient
from ..solvers.groups import Pixels, Tiles
from .models import fingerprint, load_model, load_preprocess
from .preprocess import Preprocess

NAMED_METHODS = ("gradient", "smoothgrad", "moreau", "sparse", "group")
_SOLVED = ("moreau", "sparse", "group")
# The methods that have a setting.
_METHODS_WITH: dict[str, tuple[str, ...]] = {
    "rho": _SOLVED,
    "radius": _SOLVED,
    "eta": ("sparse", "group"),
    "eta_ratio": ("sparse", "group"),
    "support": ("sparse", "group"),
    "sigma": ("smoothgrad", *_SOLVED),
    "noise_level": ("smoothgrad", *_SOLVED),
    "steps": _SOLVED,
    "samples": ("smoothgrad", *_SOLVED),
    "tol": _SOLVED,
    "max_gradients": _SOLVED,
    "tile": ("group",),
}
# Settings of the explainers, passed on as they are.
_EXPLAINER = ("rho", "radius", "eta", "eta_ratio", "support", "sigma", "noise_level")
# The published step size is this fraction of rho.
_STEP = 0.1


def fix_max_batch(explainer: Any, example: Tensor, choices: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Replaces ``max_batch="auto"`` by a number.

    A resumed run uses the number of the first run, and so computes the same bits, whatever memory is free.

    Args:
        explainer: any.
        example: inputs as the model takes them.
        choices: of the first run; None in the first run.

    Returns:
        (the explainer, the choices); (the same explainer, None) if it has a number already.
    """
    if explainer.max_batch != "auto":
        return explainer, None
    # NaN is replaced: bad inputs are reported row by row when they are explained.
    rows = explainer.rows_per_pass(example.nan_to_num()) if choices is None else choices["max_batch"]
    return dataclasses.replace(explainer, max_batch=rows), {"max_batch": rows}


@dataclass(frozen=True)
class Config:
    """Every setting that determines the results of a job, but for its inputs. None is the explainer's default.

    Args:
        model, weights: see :func:`load_model`.
        preprocess: a TOML or JSON file, or torchvision's weights by name; by default the metadata of the model.
        method: gradient, smoothgrad, moreau, sparse or group.
        rho, radius, eta, eta_ratio, support, sigma, noise_level, score, precision: settings of the explainer.
        seed: of the noise bank.
        steps, samples: fixed steps of size ρ/10 and noisy copies per step (60 and 8 if only one is given), in place of
            the adaptive solver; for smoothgrad, the number of copies.
        tol: relative residual at which an input has converged and is done, 5 % by default; with fixed steps 1 %, and
            checked every ten.
        max_gradients: budget per input of the adaptive solver.
        tile: edge of group's tiles in pixels; by default the channels of each pixel are a group.
        target: "predicted", a class, or the name of the source's column of targets.
        device: "cpu", "cuda" or "cuda:N"; not compared between runs.
        prepare: "auto" explains with a faster copy of the model, "none" with the model as it is.

    Raises:
        ValueError: an unknown method, a setting that the method does not have, or a value out of range.
    """

    model: str
    weights: str | None = None
    preprocess: str | None = None
    method: str = "sparse"
    rho: float | Literal["auto"] | None = None
    radius: float | None = None
    eta: float | None = None
    eta_ratio: float | None = None
    support: int | float | None = None
    sigma: float | None = None
    noise_level: float | None = None
    score: str = "logit"
    seed: int = 0
    steps: int | None = None
    samples: int | None = None
    tol: float | None = None
    max_gradients: int | None = None
    tile: int | None = None
    target: str | int = "predicted"
    precision: Precision = "float32"
    device: str = "cpu"
    prepare: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.method not in NAMED_METHODS:
            raise SettingError("method", f"expected one of {', '.join(NAMED_METHODS)}, got {self.method!r}")
        for name, methods in _METHODS_WITH.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise SettingError(name, f"{self.method} has none; it is a setting of {', '.join(methods)}")
        for name in (*_EXPLAINER, "tol"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise SettingError(name, f"expected a number of at least 0, got {value}")
        for name in ("steps", "samples", "tile", "max_gradients"):
            check_count(name, getattr(self, name), optional=True)
        if self.fixed_steps and (self.radius is not None or self.rho == "auto"):
            raise SettingError(
                "radius" if self.radius is not None else "rho",
                "steps and samples ask for fixed steps, which need a rho that is a number, not radius or rho auto",
            )
        if self.fixed_steps and self.max_gradients:
            raise SettingError("max_gradients", "steps and samples fix the number of gradients; leave it out, or them")
        relative = self.method in ("sparse", "group") and self.eta is None and self.support is None
        least = least_gradients(relative, self.radius is not None or self.support is not None)
        if self.max_gradients is not None and self.max_gradients < least:
            raise SettingError(
                "max_gradients", f"expected at least {least}, which the first levels take, got {self.max_gradients}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError("seed", f"expected 64 bits, got {self.seed}")
        check_precision(self.precision)
        if self.prepare not in ("auto", "none"):
            raise SettingError("prepare", f"expected 'auto' or 'none', got {self.prepare!r}")

    @property
    def fixed_steps(self) -> bool:
        """Whether the solver takes fixed steps."""
        return bool(self.steps or self.samples)

    @property
    def solves(self) -> bool:
        """Whether the method solves a problem, so that its inputs converge or not."""
        return self.method in _SOLVED

    @property
    def target_column(self) -> str | None:
        """The column of the source that holds targets."""
        return None if isinstance(self.target, int) or self.target == "predicted" else self.target

    def load(self) -> tuple[nn.Module, Preprocess | None]:
        """The model on its device, and the preprocessing of its inputs.

        Raises:
            ValueError, ImportError, FileNotFoundError: see :func:`load_model`; no such device.
        """
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise SettingError("device", f"expected cpu, cuda or cuda:N, got {self.device!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise SettingError("device", f"expected cpu, cuda or cuda:N, got {self.device!r}")
        if device.type == "cuda" and (
            not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
        ):
            raise SettingError("device", f"torch finds no such CUDA device, {self.device}")
        model, found = load_model(self.model, self.weights)
        return model.to(device), found if self.preprocess is None else load_preprocess(self.preprocess)

    def explainer(self, model: Model) -> Explainer:
        """The explainer of a model, or of its prepared copy."""
        settings: dict[str, Any] = {n: getattr(self, n) for n in _EXPLAINER if getattr(self, n) is not None}
        settings |= {"score": self.score, "precision": self.precision}
        if self.method != "gradient":
            settings["seed"] = self.seed
        if self.method == "smoothgrad" and self.samples:
            settings["num_samples"] = self.samples
        if self.method in _SOLVED:
            settings["solver"] = self._solver()
        if self.method == "group":
            settings["groups"] = Tiles(self.tile) if self.tile else Pixels()
        return make_explainer(self.method, model, **settings)

    def _solver(self) -> ProximalGradient | AdaptiveProximalGradient:
        if self.fixed_steps:
            fixed: dict[str, Any] = {"max_steps": self.steps, "num_samples": self.samples, "tol": self.tol}
            step_size = _STEP * (self.rho if isinstance(self.rho, (int, float)) else 1.0)
            return ProximalGradient(step_size=step_size, **{k: v for k, v in fixed.items() if v is not None})
        adaptive: dict[str, Any] = {"tol": self.tol, "max_gradients": self.max_gradients}
        return AdaptiveProximalGradient(**{k: v for k, v in adaptive.items() if v is not None})

    def prepared_explainer(
        self, model: nn.Module, example: Tensor, choices: dict[str, Any] | None
    ) -> tuple[Explainer, dict[str, Any] | None]:
        """The explainer, with the choices that depend on timing or on free memory.

        Args:
            model: on its device.
            example: inputs to prepare with, on the CPU.
            choices: of the first run, which are repeated; None in the first run.

        Returns:
            (the explainer, the choices, which the manifest keeps).

        Raises:
            SettingError: the model cannot be prepared as in the first run.
        """
        floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)
        example = example.to(torch.device(self.device), floating)
        if self.prepare == "none":
            return fix_max_batch(self.explainer(model), example, choices)
        if choices is None:
            ready = prepare(model, example, precision=self.precision)
            layout = "channels_last" if ready.memory_format == torch.channels_last else "preserve"
            return self.explainer(ready), {
                "levers": [lever.name for lever in ready.report if lever.applied],
                "layout": layout,
                "max_batch": ready.max_batch,
            }
        # Nothing is timed: the same copy with the same rows per pass computes the same bits.
        again = prepare(
            model,
            example,
            channels_last="channels_last" in choices["levers"],
            max_batch=choices["max_batch"],
            memory_budget=1 << 62,
            probe=False,
            precision=self.precision,
        )
        levers = [lever.name for lever in again.report if lever.applied]
        if levers != choices["levers"]:
            raise SettingError(
                "prepare",
                f"the first run's copy of the model had {', '.join(choices['levers'])}, but here it has "
                f"{', '.join(levers)}. Likely cause: another version of torch; give a new folder, or prepare none",
            )
        fastest = torch.channels_last if choices["layout"] == "channels_last" else torch.preserve_format
        return self.explainer(dataclasses.replace(again, memory_format=fastest)), choices

    def check_target(self, model: nn.Module, example: Tensor, folders: Sequence[str]) -> None:
        """Refuses a class that the model does not have, and warns of folders that are fewer or more than its classes.

        Args:
            model: on its device.
            example: inputs on the CPU; the first is passed.
            folders: of the images, where they are the targets.
        """
        if not isinstance(self.target, int) and not folders:
            return
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)
        output: Any = None
        with contextlib.suppress(Exception), torch.no_grad():  # a model may fail on this input alone
            output = model(example[:1].to(torch.device(self.device), dtype))
        classes = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else None
        if classes is None:
            return
        if isinstance(self.target, int):
            if not 0 <= self.target < classes:
                raise SettingError("target", f"expected a class of the model, 0 to {classes - 1}, got {self.target}")
        elif classes != len(folders):
            warnings.warn(
                f"target class: the model has {classes} classes, and there are {len(folders)} folders, numbered in "
                "alphabetical order; where a class has no folder, add an empty one",
                stacklevel=2,
            )

    def record(self, model: nn.Module, preprocess: Preprocess | None) -> dict[str, Any]:
        """The settings that are compared between runs: all but the device, with the contents of files in place of their
        names."""
        settings = dataclasses.asdict(self)
        for name in ("device", "weights", "preprocess"):
            del settings[name]
        return {
            **settings,
            "weights": fingerprint(model)["weights"],
            "preprocess": None if preprocess is None else preprocess.record(),
        }
