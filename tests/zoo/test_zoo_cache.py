"""A cached net is used only if its recipe and its accuracy are those of the net that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moreau_ext import zoo
from moreau_ext.zoo import training

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Epochs of every training from here on."""
    found: list[int] = []
    train = training.train

    def noting(model: Any, data: Any, epochs: int, *more: Any, **named: Any) -> Any:
        found.append(epochs)
        return train(model, data, epochs, *more, **named)

    monkeypatch.setattr(training, "train", noting)
    return found


def file() -> Path:
    (path,) = zoo.cache_folder().iterdir()
    return path


def test_the_file_carries_the_recipe_and_the_accuracy() -> None:
    net = zoo.trained("tabular_mlp", seed=3)
    kept = torch.load(file(), weights_only=True)
    made = {"name": "tabular_mlp", "epochs": 20, "seed": 3, "learning_rate": 3e-3, "torch": str(torch.__version__)}
    assert made.items() <= kept["settings"].items()
    assert kept["accuracy"] == zoo.accuracy(net, zoo.breast_cancer("test"))


def test_a_net_of_another_training_is_made_anew(monkeypatch: pytest.MonkeyPatch, trainings: list[int]) -> None:
    with monkeypatch.context() as patched:
        short = training.train
        patched.setattr(
            training, "train", lambda model, data, epochs, *more, **named: short(model, data, 2, *more, **named)
        )
        zoo.trained("tabular_mlp")
    zoo.trained("tabular_mlp")
    zoo.trained("tabular_mlp")
    assert trainings == [2, 20]


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept["settings"].update(epochs=19),
        lambda kept: kept["settings"].pop("seed"),
        lambda kept: kept.update(accuracy=kept["accuracy"] - 1 / 114),
        lambda kept: kept.pop("accuracy"),
    ],
    ids=["recipe", "part of the recipe", "accuracy", "no accuracy"],
)
def test_a_file_that_differs_is_replaced(change: Callable[[Any], Any], trainings: list[int]) -> None:
    zoo.trained("tabular_mlp")
    good = torch.load(file(), weights_only=True)
    kept = torch.load(file(), weights_only=True)
    change(kept)
    torch.save(kept, file())
    zoo.trained("tabular_mlp")
    assert trainings == [20, 20]
    again = torch.load(file(), weights_only=True)
    assert (again["settings"], again["accuracy"]) == (good["settings"], good["accuracy"])


def test_a_net_whose_code_changed_is_made_anew(monkeypatch: pytest.MonkeyPatch, trainings: list[int]) -> None:
    """The same parameters in another function, which the accuracy reveals."""
    zoo.trained("tabular_mlp")
    recipe = training._RECIPES["tabular_mlp"]

    def other(seed: int) -> torch.nn.Module:
        net = zoo.tabular_mlp(seed=seed)
        net.register_forward_hook(lambda module, inputs, output: -output)
        return net

    monkeypatch.setitem(training._RECIPES, "tabular_mlp", recipe._replace(make=other))
    net = zoo.trained("tabular_mlp")
    assert trainings == [20, 20]
    assert zoo.accuracy(net, zoo.breast_cancer("test")) > 0.9


def test_a_cached_net_needs_no_data(monkeypatch: pytest.MonkeyPatch, trainings: list[int]) -> None:
    def missing(split: str) -> Any:
        raise ImportError("scikit-learn")

    zoo.trained("tabular_mlp")
    recipe = training._RECIPES["tabular_mlp"]
    monkeypatch.setitem(training._RECIPES, "tabular_mlp", recipe._replace(data=missing))
    zoo.trained("tabular_mlp")
    assert trainings == [20]
