"""Explainers as an ``explain_func`` of Quantus's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import SettingError
from ..explainers.inputs import Ids, Mask
from ..explainers.registry import make_explainer
from ..model.target import Target
from ..solvers.solution import Solution

Array = np.ndarray[Any, np.dtype[Any]]


def explain_func(
    model: Callable[..., object],
    inputs: Array,
    targets: Target,
    *,
    method: str = "moreau",
    device: str | torch.device | None = None,
    empty: Literal["raise", "keep"] = "raise",
    ids: Ids = 0,
    fixed: Mask = None,
    **settings: object,
) -> Array:
    """The maps of a batch, as Quantus's metrics ask for them.

    Args:
        model: the model, as Quantus hands it over.
        inputs: [B, *features], of any dtype; they are explained in the dtype of the model's first parameter.
        targets: the classes, in any form of :meth:`moreau_ext.Explainer.attribute`.
        method: a name of :data:`moreau_ext.METHODS`.
        device: where to explain; that of the model's first parameter by default.
        empty: for a map that is zero everywhere: "raise", since Quantus has no notion of one (Sparseness calls it not
            sparse at all, Complexity gives NaN, and a batch of nothing else is an AssertionError), or "keep", with the
            package's warning.
        ids: as in :meth:`moreau_ext.Explainer.attribute`; by default one noise for all inputs, so that metrics of
            robustness do not measure the noise.
        fixed: as in :meth:`moreau_ext.Explainer.attribute`; one mask for all inputs.
        settings: arguments of the explainer, such as ``eta_ratio=0.2``.

    Returns:
        The maps, shaped as ``inputs``, in their dtype where it is of floating point, else in float32.

    Raises:
        ValueError: maps that are zero everywhere; an unknown method.
        ValueError, TypeError: see :meth:`moreau_ext.Explainer.attribute`.

    Example:
        >>> import numpy, torch
        >>> from moreau_ext.integrations.quantus import explain_func
        >>> model = torch.nn.Linear(3, 2).eval()
        >>> explain_func(model=model, inputs=numpy.ones((4, 3)), targets=numpy.zeros(4, int), method="sparse").shape
        (4, 3)

    Source: Hedström et al., arXiv 2202.06861; its metrics take ``explain_func`` and ``explain_func_kwargs``.
    """
    if empty not in ("raise", "keep"):
        raise SettingError("empty", f"expected 'raise' or 'keep', got {empty!r}")
    given = np.asarray(inputs)
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
    where = device if device is not None else first.device if first is not None else "cpu"
    x = torch.as_tensor(given, device="cpu").to(where, dtype)
    solution: Solution = make_explainer(method, model, **settings).attribute(
        x, targets, ids=ids, fixed=fixed, return_solution=True
    )
    if empty == "raise" and bool(solution.empty.any()):
        rows = solution.empty.nonzero().flatten().tolist()
        raise ValueError(
            f"explain_func: the maps of inputs {rows[:10]}{' and others' * (len(rows) > 10)} of {len(given)} are zero "
            "everywhere, which Quantus would score like any other. Likely causes: eta is too large (give support=0.05, "
            "which keeps features wherever the score has a slope, or a smaller eta_ratio), or the score is flat there "
            "(leave the input out). empty='keep' hands such maps on"
        )
    maps = solution.attribution
    if not isinstance(maps, Tensor):
        raise TypeError("explain_func: expected one array of inputs")
    kept = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float32)
    found: Array = maps.double().cpu().numpy().astype(kept)
    return found
