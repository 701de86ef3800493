"""A whole job by name: what the command line gives, and what a worker on another machine makes its explainer from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_count
from ..explainers.registry import make_explainer
from ..model.precision import Precision, check_precision
from ..preparation.prepare import prepare
from ..solvers.adaptive import AdaptiveProximalGradient
from ..solvers.fixed import ProximalGradient
from ..solvers.groups import Pixels, Tiles
from .models import fingerprint, load_model, load_preprocess
from .preprocess import Preprocess

METHODS = ("gradient", "smoothgrad", "moreau", "sparse", "group")
_SOLVED = ("moreau", "sparse", "group")
# Which methods a setting belongs to.
_BELONGS: dict[str, tuple[str, ...]] = {
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
# The published step is this fraction of rho.
_STEP = 0.1


def settled(explainer: Any, example: Tensor, chosen: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """(the explainer with max_batch="auto" as a number, that number): a run that goes on passes the rows of the first,
    for the same bits, whatever memory is free then.

    Args:
        explainer: any.
        example: inputs as the model takes them.
        chosen: what the first run chose; None lets this one choose.
    """
    if explainer.max_batch != "auto":
        return explainer, None
    # What is wrong with an input is said where it is explained.
    rows = explainer.rows_per_pass(example.nan_to_num()) if chosen is None else chosen["max_batch"]
    return dataclasses.replace(explainer, max_batch=rows), {"max_batch": rows}


@dataclass(frozen=True)
class Config:
    """Everything that decides a job's results but its inputs. None means the explainer's default.

    Args:
        model, weights: see :func:`load_model`.
        preprocess: a TOML or JSON file, or torchvision's weights by name; by default what the model says.
        method: gradient, smoothgrad, moreau, sparse or group.
        rho, radius, eta, eta_ratio, support, sigma, noise_level, score, precision: settings of the explainer.
        seed: of the noise bank.
        steps, samples: fixed steps of size ρ/10 with so many noisy copies (60 and 8 where only one is given), instead
            of the solver that adapts; for smoothgrad, the number of copies.
        tol: relative residual at which an input is done (1 % for the solver that adapts; fixed steps are all taken).
        max_gradients: budget per input, of the solver that adapts.
        tile: group's tiles have this edge in pixels; by default each pixel's channels are a group.
        target: "predicted", a class, or the name of the source's column with the classes.
        device: "cpu", "cuda" or "cuda:N"; not compared between runs.
        prepare: "auto" explains with a faster copy of the model, "none" with the model as it is.

    Raises:
        ValueError: an unknown method, or a setting that it does not have.
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
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name, methods in _BELONGS.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"{name}: {self.method} has none; it is a setting of {', '.join(methods)}")
        for name in ("steps", "samples", "tile", "max_gradients"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if (self.steps or self.samples) and (self.radius is not None or self.rho == "auto"):
            raise ValueError("steps, samples: fixed steps need a rho that is a number, not radius or rho auto")
        if (self.steps or self.samples) and self.max_gradients:
            raise ValueError("max_gradients: steps and samples fix how many there are; leave it out, or them")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected 64 bits, got {self.seed}")
        check_precision(self.precision)
        if self.prepare not in ("auto", "none"):
            raise ValueError(f"prepare: expected 'auto' or 'none', got {self.prepare!r}")

    @property
    def solves(self) -> bool:
        """Whether the method solves a problem, so that its inputs converge or not."""
        return self.method in _SOLVED

    @property
    def target_column(self) -> str | None:
        """The column of the source that holds targets."""
        return None if isinstance(self.target, int) or self.target == "predicted" else self.target

    def load(self) -> tuple[nn.Module, Preprocess | None]:
        """The model on its device, and what is done to its inputs.

        Raises:
            ValueError, ImportError, FileNotFoundError: as :func:`load_model`; a device that is not there.
        """
        device = torch.device(self.device)
        if device.type == "cuda" and (
            not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
        ):
            raise ValueError(f"--device {self.device}: torch finds no such CUDA device")
        model, found = load_model(self.model, self.weights)
        return model.to(device), found if self.preprocess is None else load_preprocess(self.preprocess)

    def explainer(self, model: Any) -> Any:
        """The explainer of a model, or of the prepared copy of one."""
        given = ("rho", "radius", "eta", "eta_ratio", "support", "sigma", "noise_level")
        settings: dict[str, Any] = {n: getattr(self, n) for n in given if getattr(self, n) is not None}
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
        if self.steps or self.samples:
            fixed: dict[str, Any] = {"max_steps": self.steps, "num_samples": self.samples, "tol": self.tol}
            step_size = _STEP * (self.rho if isinstance(self.rho, (int, float)) else 1.0)
            return ProximalGradient(step_size=step_size, **{k: v for k, v in fixed.items() if v is not None})
        adaptive: dict[str, Any] = {"tol": self.tol, "max_gradients": self.max_gradients}
        return AdaptiveProximalGradient(**{k: v for k, v in adaptive.items() if v is not None})

    def ready(
        self, model: nn.Module, example: Tensor, chosen: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any] | None]:
        """(the explainer, what was chosen by the clock or by what memory was free).

        Args:
            model: on its device.
            example: inputs to prepare with, on the CPU.
            chosen: what the first run chose; None lets this one choose.

        Raises:
            ValueError: the model cannot be prepared as in the first run.
        """
        floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)
        example = example.to(torch.device(self.device), floating)
        if self.prepare == "none":
            return settled(self.explainer(model), example, chosen)
        if chosen is None:
            ready = prepare(model, example, precision=self.precision)
            layout = "channels_last" if ready.memory_format == torch.channels_last else "preserve"
            return self.explainer(ready), {
                "levers": [lever.name for lever in ready.report if lever.applied],
                "layout": layout,
                "max_batch": ready.max_batch,
            }
        # Nothing is timed here: the same copy with the same rows per pass gives the same bits.
        again = prepare(
            model,
            example,
            channels_last="channels_last" in chosen["levers"],
            max_batch=chosen["max_batch"],
            memory_budget=1 << 62,
            probe=False,
            precision=self.precision,
        )
        levers = [lever.name for lever in again.report if lever.applied]
        if levers != chosen["levers"]:
            raise ValueError(
                f"prepare: the first run's copy of the model had {', '.join(chosen['levers'])}, but here it has "
                f"{', '.join(levers)}. Likely cause: another version of torch; give a new --out, or --prepare none"
            )
        fastest = torch.channels_last if chosen["layout"] == "channels_last" else torch.preserve_format
        return self.explainer(dataclasses.replace(again, memory_format=fastest)), chosen

    def record(self, model: nn.Module, preprocess: Preprocess | None) -> dict[str, Any]:
        """What is compared between runs: every setting but the device, and what files hold instead of their names."""
        settings = dataclasses.asdict(self)
        for name in ("device", "weights", "preprocess"):
            del settings[name]
        return {
            **settings,
            "weights": fingerprint(model)["weights"],
            "preprocess": None if preprocess is None else preprocess.record(),
        }
