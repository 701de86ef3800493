"""Fixed features: a region explained alone is the problem restricted to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers import close, drawn
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    Gradient,
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    Pixels,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    Solution,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    Tiles,
    make_explainer,
)
from moreau_ext._errors import EmptyMapWarning
from moreau_ext.solvers.errors import Errors

B, T, E, FREE = 3, 6, 4, 3


def net(activation: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(T * E, 16), activation, nn.Linear(16, 5)).double().eval()


def tokens() -> Tensor:
    """[B, T, E]; the fixed half is larger than the free one, and would show in a range."""
    x = drawn(B, T, E).double()
    x[:, FREE:] *= 5
    return x


# The last tokens: elements keep their numbers, and so their noise, in the restricted problem.
REGION = (torch.arange(T) >= FREE)[:, None]


def restricted(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The model of the first tokens, given the others."""
    return lambda x, rest: model(torch.cat([x, rest], 1))


def values(value: Any) -> list[Tensor]:
    return [*vars(value).values()] if isinstance(value, Errors) else [value]


def same_problem(whole: Solution, part: Solution) -> None:
    """All of a solution is that of the restricted problem, and zero elsewhere."""
    for f in fields(Solution):
        if f.name == "fixed":
            continue
        for one, other in zip(values(getattr(whole, f.name)), values(getattr(part, f.name)), strict=True):
            if one.dim() == 3 and f.name != "eta":
                rest, one = one[:, FREE:], one[:, :FREE]
                assert bool((rest.isnan() if f.name == "p_value" else rest == 0).all()), f.name
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True, msg=f.name)
    assert torch.equal(whole.significant()[:, :FREE], part.significant())
    assert not bool(whole.significant()[:, FREE:].any())


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "moreau": (MoreauGrad, {}),
    "fresh": (MoreauGrad, {"rho": 0.3, "solver": ProximalGradient(6, 30)}),
    "fixed bank": (SparseMoreauGrad, {"solver": ProximalGradient(4, 25, noise="fixed", tol=0.1)}),
    "paper": (SparseMoreauGrad, {"solver": ProximalGradient.paper(2, 105)}),
    "rho auto": (MoreauGrad, {"rho": "auto"}),
    "radius": (SparseMoreauGrad, {"radius_ratio": 0.4}),
    "ratio": (SparseMoreauGrad, {"eta_ratio": 0.3, "max_batch": 7}),
    "count": (SparseMoreauGrad, {"support": 5}),
    "fraction": (SparseMoreauGrad, {"support": 0.25, "radius": 0.2}),
    "all": (SparseMoreauGrad, {"support": 1.0}),
    "pixels": (GroupSparseMoreauGrad, {"groups": Pixels(channel_axis=-1), "eta_ratio": 0.4}),
    "tiles": (GroupSparseMoreauGrad, {"groups": Tiles(2, "sqrt", -1), "support": 1}),
    "all tiles": (GroupSparseMoreauGrad, {"groups": Tiles(2, "sqrt", -1), "support": 1.0}),
    "ragged": (GroupSparseMoreauGrad, {"groups": Tiles(2, "sqrt", -1), "solver": ProximalGradient(4, 20), "eta": 0.02}),
    "gradient": (Gradient, {}),
    "smoothgrad": (SmoothGrad, {"num_samples": 8}),
    "st_smoothgrad": (SoftThresholdedSmoothGrad, {"num_samples": 8, "support": 0.5}),
    "sparsified": (SparsifiedSmoothGrad, {"num_samples": 8, "keep": 0.3, "clip": 0.1}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_region_explained_alone_is_the_restricted_problem(name: str) -> None:
    kind, settings = METHODS[name]
    model, x = net(nn.SiLU()), tokens()
    whole = kind(model, **settings).attribute(x, 1, fixed=REGION, return_solution=True)
    part = kind(restricted(model), **settings).attribute(x[:, :FREE], 1, x[:, FREE:], return_solution=True)
    assert torch.equal(whole.fixed, REGION.expand_as(x))
    same_problem(whole, part)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()])
@pytest.mark.parametrize("groups", [None, Tiles(2, "sqrt", -1)])
def test_certificates_derivatives_and_paths_are_those_of_the_restricted_problem(
    activation: nn.Module, groups: Any
) -> None:
    model, x = net(activation), tokens()

    def of(f: Any) -> Any:
        return SparseMoreauGrad(f, eta_ratio=0.2) if groups is None else GroupSparseMoreauGrad(f, groups=groups)

    explainer, other, rest = of(model), of(restricted(model)), x[:, FREE:]
    whole = explainer.eta_path(x, [0.1, 0.5], 1, fixed=REGION)
    part = other.eta_path(x[:, :FREE], [0.1, 0.5], 1, rest)
    for one, alone in zip(whole, part, strict=True):
        same_problem(one, alone)
    one = explainer.certificate(x, whole[0], num_samples=256, num_hvp_samples=64)
    alone = other.certificate(x[:, :FREE], part[0], None, rest, num_samples=256, num_hvp_samples=64)
    assert one.curvature_method == alone.curvature_method
    # One more step of Lanczos than there are free features ends in rounding.
    for f in fields(one):
        if f.type == "Tensor":
            torch.testing.assert_close(getattr(one, f.name), getattr(alone, f.name), rtol=1e-5, atol=1e-9, msg=f.name)
    solved, v = explainer.attribute(x, 1, fixed=REGION, return_solution=True), torch.ones_like(x)
    derivative = explainer.vjp(x, solved, v, num_samples=64)
    alone = other.attribute(x[:, :FREE], 1, rest, return_solution=True)
    assert not bool(derivative[:, FREE:].any())
    expected = other.vjp(x[:, :FREE], alone, v[:, :FREE], None, rest, num_samples=64)
    torch.testing.assert_close(derivative[:, :FREE], expected, rtol=1e-6, atol=1e-9)


def test_a_mask_for_each_input_is_that_input_alone() -> None:
    """Scattered masks of other sizes. Elements have other numbers in the restricted problems, and so other noise, also
    in what measures ρ: there is none."""
    model, x = net(nn.SiLU()), tokens()
    mask = (
        torch.rand(B, T, E, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.2, 0.5, 0.8])[:, None, None]
    )
    labels = torch.arange(T * E).view(1, T, E).expand(B, -1, -1) // 3
    for settings in ({"eta_ratio": 0.3}, {"support": 0.4}, {"groups": Labels(labels, "sqrt"), "support": 0.5}):

        def of(f: Any, some: dict[str, Any]) -> Any:
            return (GroupSparseMoreauGrad if "groups" in some else SparseMoreauGrad)(f, sigma=0.0, rho=0.5, **some)

        whole = of(model, settings).attribute(x, 1, fixed=mask, return_solution=True)
        for row in range(B):
            free = ~mask[row]

            def alone(u: Tensor, row: int = row, free: Tensor = free) -> Tensor:
                rows = x[row].expand(len(u), -1, -1).clone()
                rows[:, free] = u
                return model(rows)

            some = settings | ({"groups": Labels(labels[row][free], "sqrt")} if "groups" in settings else {})
            part = of(alone, some).attribute(x[row][free][None], 1, return_solution=True)
            close(whole.attribution[row][free], part.attribution[0])
            assert not bool(whole.attribution[row][mask[row]].any())
            assert int(whole.support[row]) == int(part.support)


def test_the_model_sees_fixed_features_as_they_are_and_the_rest_keeps_its_noise() -> None:
    seen = []
    x = drawn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:] = True

    def model(x: Tensor) -> Tensor:
        seen.append(x[..., mask].detach())
        return x.square().sum((1, 2, 3)) / 2

    some = SmoothGrad(model, sigma=0.5, num_samples=4).attribute(x, fixed=mask)
    for rows in seen:
        assert bool((rows[:, None] == x[..., mask]).flatten(2).all(2).any(1).all())
    whole = SmoothGrad(lambda x: x.square().sum((1, 2, 3)) / 2, sigma=0.5, num_samples=4).attribute(x)
    assert torch.equal(some, torch.where(mask, 0.0, whole))


def test_tuples_and_their_masks() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return (a.sum(1).sin() + b.square().sum(1) * a[:, 0]).sin()

    a, b = drawn(2, 3), drawn(2, 4, seed=1)
    b[:] = b[:, :1]  # constant: without free features its range is no one's noise
    explainer = SparseMoreauGrad(model, solver=AdaptiveProximalGradient(max_gradients=400))
    whole = explainer.attribute((a, b), fixed=(None, torch.tensor(True)), return_solution=True)
    part = SparseMoreauGrad(model, solver=explainer.solver).attribute(a, None, b, return_solution=True)
    assert torch.equal(whole.attribution[0], part.attribution)
    assert torch.equal(whole.relative_residual, part.relative_residual)
    assert not bool(whole.attribution[1].any())
    assert bool(whole.fixed[1].all())


@pytest.mark.parametrize("settings", [{"rho": "auto"}, {"support": 1}, {"radius_ratio": 1.0}])
def test_an_input_without_free_features_has_an_empty_map(settings: dict[str, Any]) -> None:
    model, x = net(nn.ReLU()), tokens()
    mask = torch.zeros(B, 1, 1, dtype=torch.bool)
    mask[1] = True
    with pytest.warns(EmptyMapWarning):
        found = SparseMoreauGrad(model, **settings).attribute(x, fixed=mask, return_solution=True)
    assert found.empty.tolist() == [False, True, False]
    assert not bool(found.significant()[1].any())
    assert bool(found.converged[1])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (torch.zeros(T, 1), (TypeError, "fixed: expected bool")),
        ("all", (TypeError, "fixed: expected")),
        (torch.zeros(B, T, dtype=torch.bool), (ValueError, r"fixed: expected a shape that broadcasts to \(6, 4\)")),
        (torch.zeros(2, T, 1, dtype=torch.bool), (ValueError, "fixed: expected a shape")),
        (torch.zeros(T, 1, dtype=torch.bool, device="meta"), (ValueError, "fixed: expected a mask on cpu")),
    ],
)
def test_wrong_masks_are_named(given: Any, error: tuple[type[Exception], str]) -> None:
    with pytest.raises(error[0], match=error[1]) as caught:
        Gradient(net(nn.ReLU())).attribute(tokens(), fixed=given)
    assert "\n" not in str(caught.value)


def test_wrong_masks_of_tuples_are_named() -> None:
    explainer, x = make_explainer("gradient", lambda a, b: a.sum(1) + b.sum(1)), torch.ones(2, 3)
    for given, text in ((torch.tensor(True), "a mask for each of the 2"), ((None, x), r"fixed\[1\]: expected bool")):
        with pytest.raises(TypeError, match=text):
            explainer.attribute((x, x), fixed=given)


def test_footprints_count_the_mask() -> None:
    explainer, x = Gradient(net(nn.ReLU())), tokens()
    held = explainer.footprint(x, fixed=REGION)
    free = explainer.footprint(x)
    assert held is not None
    assert free is not None
    assert held.peak(64, 3) > free.peak(64, 3)
    assert explainer.rows_per_pass(x, fixed=REGION)
