"""Explains loaded rows: the one mechanism that a local run, a stream and Ray's workers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..model.bind import bind_score
from ..model.modes import evaluating
from ..preparation.report import Prepared
from ..solvers.solution import Solution
from .sink import COLUMNS, Rows
from .sources.base import Loaded, Source, Unreadable, _other_shape, reason
from .sources.datasets import Stream

# Rows that show what a source holds: the shape of an input, and whether the model takes it.
EXAMPLE = 8


class Engine:
    """Explains loaded rows: the one mechanism that a local run, a stream and Ray's workers share.

    Args:
        explainer: any of ours.
        target: "predicted", a class, or anything else for the targets that came with the rows.
        shape: of an input.
        map_dtype: of the maps in memory.
    """

    def __init__(self, explainer: Explainer, target: str | int, shape: tuple[int, ...], map_dtype: str):
        self.explainer, self.target, self.shape, self.map_dtype = explainer, target, shape, map_dtype
        model: Any = explainer.model
        self._module = model.model if isinstance(model, Prepared) else model
        tensors = (
            [*self._module.parameters(), *self._module.buffers()] if isinstance(self._module, torch.nn.Module) else []
        )
        self.device = tensors[0].device if tensors else torch.device("cpu")
        # Arrays are often of float64, models hardly ever.
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        self._worked = False

    def ready(self, inputs: Tensor) -> Tensor:
        """Inputs where and as the model takes them."""
        return inputs.to(self.device, self.dtype or inputs.dtype, non_blocking=True)

    def rows(self, loaded: Loaded) -> Rows:
        """The results of loaded rows, in their order. A batch that the model fails on is halved until the inputs to
        blame stand alone; these become rows with the reason.

        Raises:
            Exception: the model's, where it fails on every input of the first batch: then it is the job.
        """
        count = len(loaded)
        columns: dict[str, list[Any]] = {name: [None] * count for name in COLUMNS}
        columns["id"], columns["source"] = list(loaded.ids), list(loaded.names)
        seed = getattr(self.explainer, "seed", None)
        columns["seed"] = [None if seed is None else int(seed)] * count
        maps = np.full((count, *self.shape), np.nan, self.map_dtype)
        errors = dict(loaded.errors)
        if loaded.inputs is not None:
            if tuple(loaded.inputs.shape[1:]) != self.shape:
                errors |= dict.fromkeys(loaded.good, _other_shape(loaded.inputs.shape[1:], self.shape))
            else:
                last = self._attempt(loaded, list(range(len(loaded.good))), columns, maps, errors)
                if not self._worked and last is not None:
                    raise last
        for position, error in errors.items():
            columns["error"][position] = error
            columns["converged"][position] = False
            maps[position] = np.nan
        return Rows(columns, maps)

    def _attempt(
        self,
        loaded: Loaded,
        these: list[int],
        columns: dict[str, list[Any]],
        maps: np.ndarray[Any, Any],
        errors: dict[int, str],
    ) -> Exception | None:
        """Explains some of the good rows; returns the last error."""
        positions = [loaded.good[i] for i in these]
        try:
            self._explain(loaded, these, positions, columns, maps, errors)
            self._worked = True
            return None
        except Exception as error:
            # A GPU that has failed fails on everything after it.
            if isinstance(error, torch.AcceleratorError):
                raise
            if len(these) == 1:
                errors[positions[0]] = reason(error)
                return error
            last = error
        middle = len(these) // 2
        for half in (these[:middle], these[middle:]):
            last = self._attempt(loaded, half, columns, maps, errors) or last
        return last

    def _explain(
        self,
        loaded: Loaded,
        these: list[int],
        positions: list[int],
        columns: dict[str, list[Any]],
        maps: np.ndarray[Any, Any],
        errors: dict[int, str],
    ) -> None:
        if loaded.inputs is None:
            return
        inputs = loaded.inputs if len(these) == len(loaded.good) else loaded.inputs[these]
        x = self.ready(inputs)
        ids = torch.tensor([loaded.ids[p] for p in positions], dtype=torch.int64)
        targets: Any = self.target
        if isinstance(self.target, str):
            targets = None if self.target == "predicted" else [loaded.targets[p] for p in positions]
        predicted = self._predicted(x, needed=targets is None)
        if targets is None and predicted is not None:
            targets = predicted
        found: Solution = self.explainer.attribute(x, targets, ids=ids, return_solution=True)
        values = found.attribution.detach().float().cpu().numpy()
        if self.map_dtype == "float16":
            large = np.abs(values.reshape(len(values), -1)).max(1) > np.finfo(np.float16).max
            errors |= {
                p: "the map has values above float16's 65504" for p, bad in zip(positions, large, strict=True) if bad
            }
            values = np.where(large.reshape(-1, *[1] * (values.ndim - 1)), 0, values)
        maps[positions] = values
        numbers: dict[str, Any] = {
            "score": found.score,
            "residual": found.residual,
            "relative_residual": found.relative_residual,
            "converged": found.converged,
            "steps": found.steps,
            "gradient_evaluations": found.gradient_evaluations,
            "nnz": found.nnz,
            "support": found.support,
            # Null, as the residual is, for methods that solve nothing.
            "rho": torch.where(found.relative_residual.isnan(), torch.nan, found.rho),
            "sigma": found.sigma,
            "predicted": predicted,
            "target": torch.as_tensor(targets).expand(len(these)) if targets is not None else None,
            # One per feature has no single number.
            "eta": found.eta if found.eta.dim() == 1 else None,
        }
        for name, tensor in numbers.items():
            if tensor is not None:
                for position, value in zip(positions, tensor.tolist(), strict=True):
                    columns[name][position] = None if value != value else value

    def _predicted(self, x: Tensor, needed: bool) -> Tensor | None:
        """The class of every input; None for one output, or for outputs of higher rank with a target of their own."""
        rows = self.explainer.rows_per_pass(x)
        with torch.inference_mode(False), torch.no_grad(), evaluating(self._module):
            try:
                bound, _ = bind_score(self._module, (x,), None, max_batch=rows, precision=self.explainer.precision)
            except ValueError:
                if needed:
                    raise
                return None
        return bound.target.squeeze(1).cpu() if isinstance(bound.target, Tensor) else None


def example_of(source: Source | Stream) -> Tensor:
    """The first readable inputs of a source, up to eight.

    Raises:
        Unreadable: there is none; says why the first one is not.
    """
    first = None
    batches = source.batches(EXAMPLE) if isinstance(source, Stream) else in_turn(source, EXAMPLE)
    for _, loaded in batches:
        if loaded.inputs is not None:
            return loaded.inputs
        first = first or f"{loaded.names[0]} {loaded.errors[0]}"
    raise Unreadable(f"source: none of the inputs can be read; {first or 'there are none'}")


def in_turn(source: Source, size: int) -> Iterator[tuple[int, Loaded]]:
    for start in range(0, len(source), size):
        yield start, source.load(start, min(start + size, len(source)))
