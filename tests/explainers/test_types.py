"""What type checkers see: run by pytest, and checked by mypy and pyright in CI, both strict."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

from moreau_ext import (
    Gradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    PerInput,
    Pixels,
    Solution,
    SparseMoreauGrad,
    TabularExplainer,
    make_explainer,
)


def energy(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def of_two(x: Tensor, y: Tensor) -> Tensor:
    return energy(x) + energy(y)


def test_attribute_returns_what_its_signature_says() -> None:
    x, flag = torch.ones(2, 3), bool(torch.tensor(True))
    maps = assert_type(Gradient(energy).attribute(x), Tensor)
    pair = assert_type(Gradient(of_two).attribute((x, x)), tuple[Tensor, ...])
    named = assert_type(Gradient(of_two).attribute({"x": x, "y": x}), dict[str, Tensor])
    either = Gradient(energy).attribute(x, return_solution=flag)
    assert_type(either, Tensor | tuple[Tensor, ...] | dict[str, Tensor] | Solution)
    fixed = SparseMoreauGrad(energy).attribute(x, fixed=torch.tensor([True, False, False]))
    assert torch.equal(maps, pair[0])
    assert torch.equal(maps, named["y"])
    assert isinstance(either, Solution)
    assert not fixed[:, 0].any()


def test_a_solution_has_the_form_of_its_inputs() -> None:
    x, explainer = torch.ones(2, 3), MoreauGrad(energy, rho=0.1)
    solution = assert_type(explainer.attribute(x, return_solution=True), Solution[Tensor])
    marked = assert_type(solution[:1].significant(), Tensor)
    assert marked.shape == assert_type(solution.attribution, Tensor)[:1].shape
    of_both = MoreauGrad(of_two, rho=0.1).attribute((x, x), return_solution=True)
    first, second = assert_type(of_both, Solution[tuple[Tensor, Tensor]]).attribution
    assert torch.equal(first, second)
    assert assert_type(explainer.vjp(x, solution, x), Tensor).shape == x.shape
    (one,) = SparseMoreauGrad(energy, rho=0.1).eta_path(x, [0.5])
    assert assert_type(one.attribution, Tensor).shape == x.shape


def test_methods_by_name_have_their_types() -> None:
    """And targets, arguments and settings are taken in their forms."""
    net = nn.Linear(3, 2).eval()
    explainer = assert_type(make_explainer("group", net, groups=Pixels(), seed=1), GroupSparseMoreauGrad)
    assert assert_type(explainer.seed, int) == 1
    x = torch.ones(2, 3)
    for target in (1, [0, 1], torch.tensor([0, 1]), [(0,), (1,)]):
        assert Gradient(net).attribute(x, target).shape == x.shape
    assert torch.equal(
        Gradient(net).attribute(x, lambda rows: rows[:, 0]),
        Gradient(net).attribute(x, [lambda row: row[0], lambda row: row[0]]),
    )

    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).sum(1)

    maps = Gradient(scaled).attribute(x, None, PerInput(torch.ones(2, 3)))
    assert torch.equal(maps, x)
    found = TabularExplainer(net, method="gradient").attribute([[1.0, 2.0, 3.0]], 0)
    assert assert_type(found.slopes, Tensor).shape == (1, 3)
