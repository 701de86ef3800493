"""What type checkers see: run by pytest, and checked by mypy in CI."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

from moreau_ext import Gradient, MoreauGrad, Solution, SparseMoreauGrad


def energy(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def of_two(x: Tensor, y: Tensor) -> Tensor:
    return energy(x) + energy(y)


def test_attribute_returns_what_its_signature_says() -> None:
    x, flag = torch.ones(2, 3), bool(torch.tensor(True))
    maps = assert_type(Gradient(energy).attribute(x), Tensor)
    pair = assert_type(Gradient(of_two).attribute((x, x)), tuple[Tensor, ...])
    solution = assert_type(MoreauGrad(energy, rho=0.1).attribute(x, return_solution=True), Solution)
    either = assert_type(
        Gradient(energy).attribute(x, return_solution=flag), Tensor | tuple[Tensor, ...] | dict[str, Tensor] | Solution
    )
    fixed = SparseMoreauGrad(energy).attribute(x, fixed=torch.tensor([True, False, False]))
    assert torch.equal(maps, pair[0])
    assert isinstance(solution, Solution)
    assert isinstance(either, Solution)
    assert not fixed[:, 0].any()
