"""Inputs that people have: each is explained, or refused with a cure that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Gradient, SmoothGrad, SparseMoreauGrad, zoo

ROWS = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rows_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).eval()


class Structured(nn.Module):
    """A model whose output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = rows_net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"classes": self.net(x), "inputs": x}


# The input, the error, and the cure that it names.
FORMS: dict[str, tuple[Callable[[], nn.Module], Any, type[Exception], str]] = {
    "array": (rows_net, ROWS.numpy(), TypeError, "torch.tensor(x, dtype=torch.float32)"),
    "table": (rows_net, pd.DataFrame(ROWS.numpy()), TypeError, "torch.tensor(x.to_numpy(), dtype=torch.float32)"),
    "list": (rows_net, list(ROWS), TypeError, "torch.stack(x)"),
    "float64": (rows_net, ROWS.double(), TypeError, "x.to(torch.float32)"),
    "row": (rows_net, ROWS[0], ValueError, "x[None]"),
    "float64 row": (rows_net, ROWS[0].double(), ValueError, "x[None].to(torch.float32)"),
    "image": (zoo.digits_cnn, IMAGES[0], ValueError, "x[None]"),
    "gray image": (zoo.digits_cnn, IMAGES[0, 0], ValueError, "x[None, None]"),
    "gray images": (zoo.digits_cnn, IMAGES[:, 0], ValueError, "x[:, None]"),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_form_is_refused_with_its_cure(form: str) -> None:
    make, x, error, cure = FORMS[form]
    model = make()
    with pytest.raises(error, match=rf"^inputs: .*{re.escape(cure)}(;|,| |\.)") as caught:
        Gradient(model).attribute(x, 1)
    assert "\n" not in str(caught.value)
    assert Gradient(model).attribute(eval(cure, {"torch": torch, "x": x}), 1).dtype == torch.float32


def test_what_no_form_cures_is_the_models_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Gradient(rows_net()).attribute(torch.rand(3, 7))
    with pytest.raises(TypeError, match="a tuple of ndarray"):
        Gradient(rows_net()).attribute((np.zeros(3),))
    # The model takes them, with or without a further axis: it is the target that is wrong.
    with pytest.raises(ValueError, match="target: 7 of input 0 is out of range"):
        Gradient(rows_net()).attribute(ROWS, 7)


@pytest.mark.parametrize("method", [Gradient, lambda m: SmoothGrad(m, num_samples=4), SparseMoreauGrad])
def test_a_callable_target_reads_any_output(method: Callable[..., Any]) -> None:
    """As the class of the tensor within, in the first call and in later ones."""
    model = Structured().eval()
    e = method(model)
    expected = method(model.net).attribute(ROWS, 1)
    for _ in range(2):
        assert torch.equal(e.attribute(ROWS, lambda out: out["classes"][:, 1]), expected)
    # Other scores of the same model, and a wrong one.
    assert e.attribute(ROWS, lambda out: out["classes"][:, :1]).shape == ROWS.shape
    with pytest.raises(ValueError, match=r"target: the callable must return one score per row, \[3\], got \(3, 2\)"):
        e.attribute(ROWS, lambda out: out["classes"])
    with pytest.raises(
        TypeError,
        match=r"model: expected a tensor .*, got dict of classes, inputs; give output_fn.* or a callable target",
    ):
        e.attribute(ROWS, 1)
