"""Models that are no nn.Module by themselves: their modules are found, explained in eval mode and left as they were."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import others
from torch import Tensor, nn

from moreau_ext import Gradient, MoreauGrad, ProximalGradient
from moreau_ext._errors import TrainModeWarning
from moreau_ext.model.modules import modules_of

SOLVER = ProximalGradient(num_samples=4, max_steps=20, step_size=0.01)
GLOBAL: dict[str, Any] = {}


class Slots:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Any:
        return self.net(x)


class Caller:
    def __init__(self, held: Any, call: Callable[[Any, Tensor], Any]) -> None:
        self.held, self._call = held, call

    def __call__(self, x: Tensor) -> Any:
        return self._call(self.held, x)

    def predict(self, x: Tensor) -> Any:
        return self(x)


class Unregistered(nn.Module):
    def __init__(self, held: Any, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.held, self._call = held, call

    def forward(self, x: Tensor) -> Any:
        return self._call(self.held, x)


def by_default(net: nn.Module) -> Callable[[Tensor], Any]:
    def model(x: Tensor, net: nn.Module = net) -> Any:
        return net(x)

    return model


def by_global(net: nn.Module) -> Callable[[Tensor], Any]:
    GLOBAL["net"] = net
    return lambda x: GLOBAL["net"](x)


def cached(net: nn.Module) -> Callable[[Tensor], Any]:
    return functools.lru_cache(maxsize=1)(lambda x: net(x))


def decorated(net: nn.Module) -> Callable[[Tensor], Any]:
    @functools.wraps(net.forward)
    def model(x: Tensor) -> Any:
        return net(x) * 1

    return model


class Local:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def model(self) -> Callable[[Tensor], Any]:
        return functools.partial(lambda scale, x: self.net(x) * scale, 1.0)


WRAPPERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "closure": lambda net: lambda x: net(x),
    "closure in a closure": lambda net: (lambda f: lambda x: f(x))(lambda x: net(x)),
    "bound method": lambda net: net.forward,
    "method of an object": lambda net: Caller(net, lambda held, x: held(x)).predict,
    "object": lambda net: Caller(net, lambda held, x: held(x)),
    "object with slots": Slots,
    "object with a dict": lambda net: Caller({"a": [net]}, lambda held, x: held["a"][0](x)),
    "object of an object": lambda net: Caller(SimpleNamespace(net=net), lambda held, x: held.net(x)),
    "partial": lambda net: functools.partial(lambda f, x: f(x), net),
    "partial by name": lambda net: functools.partial(lambda x, f: f(x), f=net),
    "partial of a method": lambda net: Local(net).model(),
    "default argument": by_default,
    "global": by_global,
    "lru_cache": cached,
    "wrapped": decorated,
    "unregistered in a list": lambda net: Unregistered([net], lambda held, x: held[0](x)).eval(),
    "unregistered in a dict": lambda net: Unregistered({"net": (net,)}, lambda held, x: held["net"][0](x)).eval(),
    "unregistered behind a function": lambda net: Unregistered(lambda x: net(x), lambda held, x: held(x)).eval(),
    "weak reference": lambda net: Unregistered(weakref.ref(net), lambda held, x: held()(x)).eval(),
}


def trained() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    for _ in range(5):
        net(torch.randn(32, 6) * 2 + 1)
    return net


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_explained_in_eval_mode(name: str) -> None:
    net, x = trained(), torch.randn(4, 6)
    want = MoreauGrad(copy.deepcopy(net).eval(), rho=0.1, sigma=0.1, solver=SOLVER).attribute(x, 0)
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    model = WRAPPERS[name](net)
    assert {id(m) for m in net.modules()} <= {id(m) for m in modules_of(model)}
    with pytest.warns(TrainModeWarning, match="train mode") as said:
        found = MoreauGrad(model, rho=0.1, sigma=0.1, solver=SOLVER).attribute(x, 0)
    assert len(others(said)) == 1
    assert said[0].filename == __file__
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in net.modules()] == flags


def test_a_wrapped_gradient_is_that_of_autograd() -> None:
    net, x = trained(), torch.randn(4, 6)
    ready = copy.deepcopy(net).eval()
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(ready(leaf)[:, 1].sum(), leaf)[0]
    with pytest.warns(TrainModeWarning):
        found = Gradient(lambda x: net(x)).attribute(x, 1)
    torch.testing.assert_close(found, want)


def test_what_has_one_mode_is_not_warned_of() -> None:
    """A layer in a function, whose flag nobody ever looks at."""
    linear = nn.Linear(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Gradient(lambda x: linear(x)).attribute(torch.randn(2, 6), 1)


def test_the_search_ends() -> None:
    """Circles, large containers, deep nesting and objects that resist."""

    class Odd(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError

    circle: list[Any] = []
    circle.append(circle)
    deep: Any = nn.Linear(2, 2)
    for _ in range(100):
        deep = [deep]
    held = [circle, deep, Odd(), range(10**9), {i: i for i in range(10**5)}, torch, int, object()]
    assert modules_of(lambda x: held) == []


def test_a_model_whose_module_cannot_be_found() -> None:
    """Hidden behind a name: two equal passes differ, and that is said."""
    hidden = {"dropout": nn.Dropout(0.5)}
    made = {"find": compile("hidden['dropout']", "", "eval")}

    def model(x: Tensor) -> Any:
        return eval(made["find"], {"hidden": _HIDDEN})(x) @ torch.ones(6, 3)

    _HIDDEN.update(hidden)
    with pytest.warns(UserWarning, match="passes cannot be repeated: it draws random numbers"):
        Gradient(model).attribute(torch.randn(4, 6), 0)


class _Opaque(dict[str, Any]):
    def values(self) -> Any:
        return ()


_HIDDEN = _Opaque()
