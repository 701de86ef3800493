"""``Engine``: explains loaded rows, for local jobs, streams and Ray's actors alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import SettingError
from ..explainers.base import Explainer
from ..preparation.report import Prepared
from ..solvers.solution import Solution
from .sink import COLUMNS, Rows
from .sources.base import Loaded, Source, Unreadable, reason, shape_differs
from .sources.datasets import Stream

# Rows that show the shape of an input, and whether the model takes it.
EXAMPLE = 8


class Engine:
    """Explains loaded rows.

    Args:
        explainer: any of the package.
        target: "predicted", a class, or any other text for the targets that come with the rows.
        shape: of an input.
        map_dtype: of the maps in memory.

    Raises:
        SettingError: an explainer of a layer.
    """

    def __init__(self, explainer: Explainer, target: str | int, shape: tuple[int, ...], map_dtype: str):
        self.explainer, self.target, self.shape, self.map_dtype = explainer, target, shape, map_dtype
        if explainer.layer is not None:
            raise SettingError("explainer", "has a layer, and the maps of a job are those of its inputs")
        model: Any = explainer.model
        self._module = model.model if isinstance(model, Prepared) else model
        tensors = (
            [*self._module.parameters(), *self._module.buffers()] if isinstance(self._module, torch.nn.Module) else []
        )
        self.device = tensors[0].device if tensors else torch.device("cpu")
        # Arrays are often float64, models hardly ever.
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        self._worked = False

    def to_model(self, inputs: Tensor) -> Tensor:
        """The inputs on the device and in the dtype of the model."""
        return inputs.to(self.device, self.dtype or inputs.dtype, non_blocking=True)

    def rows(self, loaded: Loaded) -> Rows:
        """The results of loaded rows, in their order.

        If the model fails on a batch, the batch is halved until the failing inputs are alone. These become rows with
        the error.

        Raises:
            Exception: of the model, if it fails on every input of the first batch.
        """
        count = len(loaded)
        seed = getattr(self.explainer, "seed", None)
        columns: dict[str, list[Any]] = {name: [None] * count for name in COLUMNS}
        columns["id"], columns["source"] = list(loaded.ids), list(loaded.names)
        columns["seed"] = [None if seed is None else int(seed)] * count
        rows = Rows(columns, np.full((count, *self.shape), np.nan, self.map_dtype))
        errors = dict(loaded.errors)
        if loaded.inputs is not None:
            if tuple(loaded.inputs.shape[1:]) != self.shape:
                errors |= dict.fromkeys(loaded.good, shape_differs(loaded.inputs.shape[1:], self.shape))
            else:
                last = self._attempt(loaded, list(range(len(loaded.good))), rows, errors)
                if not self._worked and last is not None:
                    raise last
        for position, error in errors.items():
            columns["error"][position] = error
            columns["converged"][position] = False
            rows.maps[position] = np.nan
        return rows

    def _attempt(self, loaded: Loaded, good: list[int], rows: Rows, errors: dict[int, str]) -> Exception | None:
        """Explains some of the good rows, and returns the last error of the model.

        Args:
            loaded: the rows.
            good: positions in ``loaded.good``.
            rows: filled in.
            errors: by position; those of the model are added.
        """
        try:
            self._explain(loaded, good, rows, errors)
            self._worked = True
            return None
        except Exception as error:
            # After a failure a GPU fails on everything.
            if isinstance(error, torch.AcceleratorError):
                raise
            if len(good) == 1:
                errors[loaded.good[good[0]]] = reason(error)
                return error
            last = error
        middle = len(good) // 2
        for half in (good[:middle], good[middle:]):
            last = self._attempt(loaded, half, rows, errors) or last
        return last

    def _explain(self, loaded: Loaded, good: list[int], rows: Rows, errors: dict[int, str]) -> None:
        if loaded.inputs is None:
            return
        positions = [loaded.good[i] for i in good]
        x = self.to_model(loaded.inputs if len(good) == len(loaded.good) else loaded.inputs[good])
        ids = torch.tensor([loaded.ids[p] for p in positions], dtype=torch.int64)
        targets: Any = self.target
        if isinstance(self.target, str):
            targets = None if self.target == "predicted" else [loaded.targets[p] for p in positions]
        found: Solution = self.explainer.attribute(x, targets, ids=ids, return_solution=True)
        target = None if found.target is None else found.target.squeeze(1)
        predicted = target if targets is None else self._predicted(x)
        values = found.attribution.detach().float().cpu().numpy()
        if self.map_dtype == "float16":
            large = np.abs(values.reshape(len(values), -1)).max(1) > np.finfo(np.float16).max
            errors |= {
                p: "the map has values above float16's 65504" for p, bad in zip(positions, large, strict=True) if bad
            }
            values = np.where(large.reshape(-1, *[1] * (values.ndim - 1)), 0, values)
        rows.maps[positions] = values
        numbers: dict[str, Tensor | None] = {
            "score": found.score,
            "residual": found.residual,
            "relative_residual": found.relative_residual,
            "converged": found.converged,
            "steps": found.steps,
            "gradient_evaluations": found.gradient_evaluations,
            "nnz": found.nnz,
            "support": found.support,
            # Null, like the residual, for methods that solve no problem.
            "rho": torch.where(found.relative_residual.isnan(), torch.nan, found.rho),
            "sigma": found.sigma,
            "predicted": predicted,
            "target": target,
            # Null if there is one per feature.
            "eta": found.eta if found.eta.dim() == 1 else None,
        }
        for name, tensor in numbers.items():
            if tensor is not None:
                for position, value in zip(positions, tensor.tolist(), strict=True):
                    rows.columns[name][position] = None if value != value else value

    def _predicted(self, x: Tensor) -> Tensor | None:
        """The class of every input; None for one output."""
        target = self.explainer.problem(x).score.target
        return target.squeeze(1) if isinstance(target, Tensor) else None


def example_of(source: Source | Stream) -> Tensor:
    """The first readable inputs of a source, :data:`EXAMPLE` at most.

    Raises:
        Unreadable: there are none; the text has the reason of the first one.
    """
    first = None
    for _, loaded in source.batches(EXAMPLE):
        if loaded.inputs is not None:
            return loaded.inputs
        first = first or f"{loaded.names[0]} {loaded.errors[0]}"
    raise Unreadable(f"source: none of the inputs can be read; {first or 'there are none'}")
