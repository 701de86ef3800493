"""Tables: which features of a row a model's output rests on, in the units of the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import ConvergenceWarning, EmptyMapWarning, without
from ..explainers.base import Explainer, warn_empty, warn_unconverged
from ..explainers.inputs import Ids
from ..explainers.registry import Model, make_explainer
from ..model.restore import leaves_as_found
from ..model.target import Target
from ..plots import bars, features
from ..solvers.solution import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Array = np.ndarray[Any, np.dtype[np.float64]]


class Frame(Protocol):
    """A DataFrame of numbers, of pandas or another package."""

    @property
    def columns(self) -> Iterable[object]:
        """The names of the features."""

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """[B, F]."""


class Transformer(Protocol):
    """A fitted transformer of scikit-learn, or a pipeline of them."""

    def transform(self, X: Any) -> Any:
        """The table as the model takes it."""


# A table [B, F] of numbers.
Table = Frame | Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False, repr=False)
class TabularExplanation:
    """Which features of the rows of a table an output rests on.

    Args:
        names: of the F features.
        values: the table x, float64 [B, F].
        slopes: the map in the units of the table: the change of the output per unit of a feature; float64 [B, F].
        scores: slope · (x − m), in units of the output: positive where the feature's value raises it against the
            background m; float64 [B, F].
        standard_error: of the scores, by sampling; float64 [B, F].
        solution: of the rows as the model takes them.
    """

    names: tuple[str, ...]
    values: Tensor
    slopes: Tensor
    scores: Tensor
    standard_error: Tensor
    solution: Solution

    def significant(self, q: float = 0.1) -> Tensor:
        """The features that are in the map of each row beyond sampling noise, bool [B, F]; see
        :meth:`Solution.significant`."""
        found: Tensor = self.solution.significant(q)
        return found

    def columns(self, row: int | None = None) -> dict[str, Sequence[str | float]]:
        """A table of the features, the largest score first: ``pandas.DataFrame(found.columns(0))`` is a frame.

        Args:
            row: which row; all of them by default.

        Returns:
            Of one row ``feature``, ``value``, ``slope``, ``score`` and ``error``, its standard error by sampling.
            Of all rows ``feature``, ``mean |score|``, ``error``, the standard error of that mean over the rows (NaN for
            one), ``mean score``, and ``share``, of the rows in whose map the feature is.
        """
        count = len(self.values)
        if row is None:
            size = self.scores.abs()
            error = size.std(0) / math.sqrt(count) if count > 1 else torch.full_like(size[0], math.nan)
            share = (self.slopes != 0).double().mean(0)
            found = {"mean |score|": size.mean(0), "error": error, "mean score": self.scores.mean(0), "share": share}
            order = found["mean |score|"].argsort(descending=True, stable=True)
        else:
            found = {"value": self.values, "slope": self.slopes, "score": self.scores, "error": self.standard_error}
            found = {name: of_rows[row] for name, of_rows in found.items()}
            order = found["score"].abs().argsort(descending=True, stable=True)
        named: dict[str, Sequence[str | float]] = {"feature": [self.names[i] for i in order.tolist()]}
        return named | {name: column[order].tolist() for name, column in found.items()}

    def to_text(self, row: int | None = None) -> str:
        """:meth:`columns` as lines."""
        columns = self.columns(row)
        names = columns.pop("feature")
        size = max(len("feature"), *(len(str(name)) for name in names))
        lines = [f"{'feature':<{size}}" + "".join(f"  {title:>12}" for title in columns)]
        for name, *numbers in zip(names, *columns.values(), strict=True):
            lines.append(f"{name:<{size}}" + "".join(f"  {number:>12.4g}" for number in numbers))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.to_text(0 if len(self.values) == 1 else None)

    def plot(self, row: int | None = None, *, title: str = "", limit: int = 20) -> Figure:
        """The features with the largest scores, with one standard error to both sides.

        Args:
            row: whose signed scores are drawn as bars, hollow where they are not significant; by default the means of
                |score| over all rows are drawn as points.
            title: of a row's figure.
            limit: number of features.

        Returns:
            A matplotlib Figure; write it with ``figure.savefig(path)``.

        Raises:
            ImportError: matplotlib is missing.
        """
        if row is not None:
            error, sure = self.standard_error[row], self.significant()[row]
            return features(self.scores[row], self.names, title, errors=error, significant=sure, limit=limit)
        columns = self.columns()
        shown: dict[str, tuple[float, float, float]] = {}
        for name, size, spread in zip(columns["feature"], columns["mean |score|"], columns["error"], strict=True):
            mean, half = float(size), float(spread) if len(self.values) > 1 else 0.0
            shown[str(name)] = (mean, mean - half, mean + half)
        shown = dict([*shown.items()][:limit])
        return bars({"mean |score| ± one standard error": {f"{len(self.values)} rows": shown}})


class TabularExplainer:
    """Explains what a model makes of the rows of a table, feature by feature, in the units of the table.

    A transformer z = T(x) that a model was trained behind is undone: the map A is that of z, where the features are of
    one scale, as noise and penalty ask for. Each feature is transformed by itself, z_j = a_j·x_j + c_j, so that

        slope_j = a_j·A_j,    score_j = slope_j·(x_j − m_j),

    with the background m: to first order, the change of the output if x_j were m_j, taken back. Scores are what
    :class:`moreau_ext.TextExplainer` gives for words.

    Args:
        model: takes rows [B, F] as T makes them, in the dtype and on the device of its first parameter.
        transformer: fitted, of scikit-learn: StandardScaler, MinMaxScaler, ..., or a pipeline of them; none by default.
        feature_names: by default those of a DataFrame's columns, or numbers.
        background: a table whose column means are m; by default the row that T maps to 0, for a StandardScaler the
            means of the table that it was fitted on.
        method: a name of :data:`moreau_ext.METHODS`.
        settings: of the method's explainer.

    Raises:
        TypeError, ValueError: a setting, by name.

    Example:
        >>> import numpy, torch
        >>> from moreau_ext import TabularExplainer
        >>> model = torch.nn.Linear(2, 1, bias=False).eval().requires_grad_(False)
        >>> _ = model.weight.copy_(torch.tensor([[2.0, -1.0]]))
        >>> names, means = ["age", "height"], [[40.0, 1.7]]
        >>> explainer = TabularExplainer(model, feature_names=names, background=means, method="moreau")
        >>> found = explainer.attribute(numpy.array([[50.0, 1.8]]))
        >>> found.slopes.round(decimals=4).tolist(), found.scores.round(decimals=4).tolist()
        ([[2.0, -1.0]], [[20.0, -0.1]])

    Transformers that mix features or make several of one (PCA, one-hot) are refused: their maps are those of the new
    features.
    """

    def __init__(
        self,
        model: Model,
        transformer: Transformer | None = None,
        feature_names: Sequence[str] | None = None,
        *,
        background: Table | None = None,
        method: str = "sparse",
        **settings: object,
    ) -> None:
        if transformer is not None and not callable(getattr(transformer, "transform", None)):
            raise TypeError(
                f"transformer: expected a fitted transformer of scikit-learn, got {type(transformer).__name__}; of a "
                "pipeline that ends in the model give pipeline[:-1]"
            )
        self.explainer: Explainer = make_explainer(method, model, **settings)
        self.transformer, self.background = transformer, background
        self.feature_names = None if feature_names is None else tuple(feature_names)

    @leaves_as_found
    def attribute(self, table: Table, target: Target = None, *, ids: Ids = None) -> TabularExplanation:
        """The explanation of some rows.

        Args:
            table: [B, F] in its own units, at least one row; a DataFrame where the transformer was fitted on one.
            target, ids: as in :meth:`moreau_ext.Explainer.attribute`.

        Raises:
            ValueError: a table of another shape, or a transformer that does not treat each feature by itself.
            ValueError, TypeError: see :meth:`moreau_ext.Explainer.attribute`.
        """
        x = _numbers("table", table)
        count = x.shape[1]
        named = self.feature_names or tuple(str(c) for c in getattr(table, "columns", range(count)))
        if len(named) != count:
            raise ValueError(f"feature_names: expected one per column, {count}, got {len(named)}")
        z, factor, offset = self._transformed(table, x)
        if self.background is not None:
            origin = _numbers("background", self.background).mean(0)
            if origin.shape != factor.shape:
                raise ValueError(f"background: expected {count} columns, as in the table, got {len(origin)}")
        else:
            origin = np.divide(-offset, factor, out=np.zeros(count), where=factor != 0)
        module = self.explainer._module
        first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
        inputs = torch.as_tensor(z, device="cpu").to("cpu" if first is None else first.device, dtype)
        with without(EmptyMapWarning, ConvergenceWarning):
            solution = self.explainer.attribute(inputs, target, ids=ids, return_solution=True)
        warn_empty([solution])
        warn_unconverged([solution], *self.explainer._claim)
        scale, moved = torch.from_numpy(factor), torch.from_numpy(x - origin)
        slopes = solution.attribution.double().cpu() * scale
        error = solution.standard_error.double().cpu() * (scale * moved).abs()
        return TabularExplanation(named, torch.from_numpy(x), slopes, slopes * moved + 0.0, error, solution)

    def _transformed(self, table: Table, x: _Array) -> tuple[_Array, _Array, _Array]:
        """(z, a, c) of z = a·x + c, by transforming the first row with each feature moved in turn."""
        count = x.shape[1]
        if self.transformer is None:
            return x, np.ones(count), np.zeros(count)
        moves = np.maximum(np.abs(x).max(0), 1.0)
        rows: Any = np.concatenate([x[:1], x[:1] + np.diag(moves)])
        if hasattr(table, "columns"):
            frame: Any = type(table)
            rows = frame(rows, columns=table.columns)
        z, probes = (np.asarray(self.transformer.transform(t)) for t in (table, rows))
        if z.ndim == 2 and z.shape == x.shape and np.issubdtype(z.dtype, np.number):
            z, probes = z.astype(np.float64), probes.astype(np.float64)
            slope = (probes[1:] - probes[0]) / moves[:, None]
            factor = slope.diagonal().copy()
            offset = probes[0] - factor * x[0]
            straight = np.allclose(factor * x + offset, z, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(z).max()))
            if straight and np.allclose(slope, np.diag(factor), atol=1e-9 * max(1.0, np.abs(slope).max())):
                return z, factor, offset
        raise ValueError(
            f"transformer: {type(self.transformer).__name__} does not scale and shift each feature by itself; explain "
            "the table that it makes, without a transformer"
        )


def _numbers(name: str, table: Table) -> _Array:
    """A table as float64 [B, F]."""
    try:
        given: Any = table.detach().cpu() if isinstance(table, Tensor) else table
        x = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers [rows, features], got {type(table).__name__}") from None
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: expected [rows, features], got shape {x.shape}")
    return x.copy()
