"""Attacks: budgets and predictions are kept, derivatives are right, and the adaptive attack is the stronger one."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import AdaptiveProximalGradient, ProximalGradient, make_explainer, zoo
from moreau_ext.evaluation import ATTACKS, Attack, attacks, derivatives, explainer_vjp, find_hessian, topk_intersection
from moreau_ext.evaluation.methods import DEFAULT, Settings, methods

KINDS = ["gaussian", "frozen", "adaptive"]
ATTACKED = [name for name in DEFAULT if name != "random"]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = zoo.trained("digits_cnn"), zoo.digits("test").inputs[:12]
    return model, x, model(x).argmax(1)


def explainer(name: str, model: nn.Module, x: Tensor, budget: int = 224):
    return methods(Settings(budget=budget))[name].build(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_and_the_prediction_are_kept(digits, kind: str, norm: str) -> None:
    model, x, target = digits
    radius = 1.5 if norm == "l2" else 0.2
    attack = Attack(kind, radius, norm, steps=4, num_samples=32, published_step=False)
    for name in ("moreau", "gradient"):
        found = attack.run(explainer(name, model, x), model, x, target)
        distance = found.distance_l2 if norm == "l2" else found.distance_linf
        assert (distance <= radius * (1 + 1e-5)).all()
        assert found.kept.all()
        assert torch.equal(model(found.inputs).argmax(1), target)
        moved = (found.inputs - x).flatten(1).double()
        torch.testing.assert_close(found.distance_l2, moved.norm(dim=1))
        torch.testing.assert_close(found.distance_linf, moved.abs().amax(1))
        if kind == "gaussian":
            assert found.share_before.isnan().all()
            assert found.gradients == 0
        else:
            assert (found.share_after <= found.share_before).all()
            assert (found.share_after < found.share_before).double().mean() > 0.5
            assert found.gradients > 4 * 32


def test_the_published_attack_takes_ten_sign_steps_of_a_hundredth(digits) -> None:
    model, x, target = digits
    found = Attack("frozen", 1.0, num_samples=32).run(explainer("sparse", model, x), model, x, target)
    steps = (found.inputs - x).flatten(1) * 100
    # Every feature has moved by a whole number of hundredths, ten at most.
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 10 + 1e-3
    assert (found.distance_linf <= 0.1 + 1e-6).all()


@pytest.mark.parametrize("kind", ["frozen", "adaptive"])
def test_an_attack_does_not_depend_on_the_batch(digits, kind: str) -> None:
    model, x, target = digits
    model = zoo.trained("digits_cnn_silu").double()
    x, ids = x.double(), torch.arange(12)
    target = model(x).argmax(1)
    attack = Attack(kind, 0.3, steps=2, num_samples=8, hessian="autograd")
    e = make_explainer("moreau", model, rho=0.1, solver=ProximalGradient(8, 10, 0.01, tol=0.0))
    whole = attack.run(e, model, x, target, ids=ids).inputs
    part = attack.run(e, model, x[5:7], target[5:7], ids=ids[5:7]).inputs
    torch.testing.assert_close(whole[5:7], part, atol=1e-7, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moreau", "sparse", "group"])
def test_adaptive_is_at_least_as_strong_as_frozen(name: str) -> None:
    model, x = zoo.trained("digits_cnn"), zoo.digits("test").inputs[:16]
    target = model(x).argmax(1)
    e = explainer(name, model, x)
    clean = e.attribute(x, target, return_solution=True)
    left = {}
    for kind in ("frozen", "adaptive"):
        found = Attack(kind, 0.5).run(e, model, x, target, clean=clean)
        maps = e.attribute(found.inputs, target)
        left[kind] = topk_intersection(clean.attribution, maps).mean()
    assert left["adaptive"] <= left["frozen"] - 0.03


def test_a_relu_net_needs_stein(digits) -> None:
    model, x, target = digits
    assert find_hessian(model, x) == "stein"
    assert find_hessian(zoo.trained("digits_cnn_silu"), x) == "autograd"
    e = explainer("moreau", model, x)
    # Its automatic second derivative is zero: with that, the attack would see a perfectly robust map.
    blind = Attack("adaptive", 0.5, steps=3, hessian="autograd", num_samples=32).run(e, model, x, target)
    assert torch.equal(blind.inputs, x)
    seeing = Attack("adaptive", 0.5, steps=3, hessian="stein").run(e, model, x, target)
    assert (seeing.distance_l2 > 0).double().mean() > 0.8


# --- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gradient", "smoothgrad", "st_smoothgrad", "sparsified_smoothgrad", "integrated_gradients", "moreau"]
)
def test_derivatives_are_those_of_differences(name: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Softplus(beta=2), nn.Linear(16, 3)).double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    target, v = torch.tensor([0, 1, 2]), torch.randn(3, 6, dtype=torch.float64)
    settings: dict[str, object] = {} if name in ("gradient", "integrated_gradients") else {"sigma": 0.3}
    if name in ("smoothgrad", "st_smoothgrad"):
        settings |= {"num_samples": 20_000, "antithetic": True}
    if name == "sparsified_smoothgrad":
        settings |= {"num_samples": 20_000, "keep": 0.5, "clip": 0.3}
    if name == "integrated_gradients":
        settings |= {"n_steps": 200}
    if name == "st_smoothgrad":
        settings |= {"eta": 0.02}
    if name == "moreau":
        settings |= {"rho": 0.2, "solver": ProximalGradient(2048, 100, 0.1, noise="fixed", tol=1e-8)}
    e = make_explainer(name, model, **settings)
    clean = e.attribute(x, target, return_solution=True)
    common = {"ids": torch.arange(3), "num_samples": 4096, "sigma": torch.full((3,), 0.1, dtype=torch.float64)}
    got = explainer_vjp(e, x, clean, v, target, hessian="autograd", **common)

    h = 1e-2
    columns = []
    for j in range(6):
        u = torch.zeros(6, dtype=torch.float64)
        u[j] = h
        difference = (e.attribute(x + u, target) - e.attribute(x - u, target)) / (2 * h)
        columns.append((difference * v).sum(1))
    expected = torch.stack(columns, dim=1)
    cosines = nn.functional.cosine_similarity(got, expected)
    # Independent noise, and for the sparsified map a Monte-Carlo derivative of a function with jumps.
    assert cosines.min() > (0.9 if name == "sparsified_smoothgrad" else 0.99)


def test_stein_agrees_with_second_derivatives_where_both_are_right() -> None:
    model, x = zoo.trained("digits_cnn_silu"), zoo.digits("test").inputs[:2]
    target = model(x).argmax(1)
    v = torch.randn_like(x)
    for name in ("smoothgrad", "integrated_gradients"):
        e = explainer(name, model, x)
        clean = e.attribute(x, target, return_solution=True)
        common = {"ids": torch.arange(2), "sigma": torch.full((2,), 0.1)}
        one, other = (
            explainer_vjp(e, x, clean, v, target, hessian=h, num_samples=n, **common)
            for h, n in (("autograd", 256), ("stein", 8192))
        )
        assert nn.functional.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.9


def test_other_explainers_have_no_derivative(digits) -> None:
    model, x, target = digits
    e = explainer("random", model, x)
    clean = e.attribute(x, target, return_solution=True)
    with pytest.raises(TypeError, match="expected one of moreau_ext's, whose derivative is known"):
        explainer_vjp(e, x, clean, x, target, ids=target, hessian="stein", num_samples=4, sigma=torch.ones(12))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "loud"}, "kind: expected 'gaussian'"),
        ({"radius": 0.0}, "radius: expected a positive number"),
        ({"norm": "l1"}, "norm: expected 'l2' or 'linf'"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"restarts": 0}, "restarts: expected a positive integer"),
    ],
)
def test_bad_settings(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Attack(**{"kind": "frozen", "radius": 1.0, **arguments})


@pytest.mark.slow
def test_strong_attacks_are_stronger(digits) -> None:
    model, x, target = digits
    e = make_explainer("smoothgrad", model, num_samples=32)
    weak, strong = (
        Attack(radius=0.5, num_samples=32, **{**ATTACKS[name], **more}).run(e, model, x, target)
        for name, more in (("adaptive", {}), ("adaptive_strong", {"steps": 30, "restarts": 2}))
    )
    assert (strong.share_after.mean() < weak.share_after.mean()).item()
    assert ATTACKS["adaptive_strong"]["steps"] == ATTACKS["frozen_strong"]["steps"] == 100


def test_every_default_method_has_the_budget(digits) -> None:
    model, x, target = digits
    table = methods(Settings())
    for name in DEFAULT:
        found = table[name].build(model, x).attribute(x, target, return_solution=True)
        spent = found.gradient_evaluations
        assert spent.max() <= table[name].gradients
        if name not in ("gradient", "random"):
            assert table[name].gradients == 480
            assert spent.double().mean() >= (300 if name.startswith(("moreau", "sparse", "group")) else 480)
    assert isinstance(table["moreau"].build(model, x).solver, AdaptiveProximalGradient)


def test_examples() -> None:
    for module in (attacks, derivatives):
        assert doctest.testmod(module).failed == 0
