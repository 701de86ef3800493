"""The shared nets and data: shapes, quality, determinism, and a cache that can fail without harm."""

from __future__ import annotations

import doctest
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moreau_ext import zoo

ACTIVATIONS = ("relu", "gelu", "softplus", "silu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moreau_ext"


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# --- data ----------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    data = zoo.digits()
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert data.inputs.dtype == torch.float32
    assert (data.inputs.min(), data.inputs.max()) == (0, 1)
    assert data.targets.dtype == torch.int64
    assert data.targets[:10].tolist() == list(range(10))
    assert data.names == tuple("0123456789")


def test_breast_cancer() -> None:
    data, seen = zoo.breast_cancer(), zoo.breast_cancer("train").inputs
    assert data.inputs.shape == (569, 30)
    assert data.inputs.dtype == torch.float32
    torch.testing.assert_close(seen.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(30), atol=1e-5, rtol=0)
    assert data.targets.bincount().tolist() == [212, 357]
    assert data.names == ("malignant", "benign")


@pytest.mark.parametrize(("load", "total", "train"), [(zoo.digits, 1797, 1437), (zoo.breast_cancer, 569, 455)])
def test_splits_share_no_row_and_miss_none(load, total, train) -> None:
    parts = load("train"), load("test")
    assert [len(p.inputs) for p in parts] == [train, total - train]
    # Whole rows with their class; real tables may repeat one, so they are counted.
    rows = [tuple(row) for p in parts for row in torch.cat([p.inputs.flatten(1), p.targets[:, None]], 1).tolist()]
    whole = load()
    expected = torch.cat([whole.inputs.flatten(1), whole.targets[:, None]], 1).tolist()
    assert sorted(rows) == sorted(map(tuple, expected))


def test_the_split_never_changes() -> None:
    # Weights in caches and numbers in documents rest on it.
    assert zoo.digits("test").targets[:20].tolist() == [1, 2, 5, 7, 8, 0, 4, 5, 8, 0, 4, 7, 2, 0, 1, 7, 3, 3, 6, 6]


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        zoo.digits("validation")


@pytest.mark.parametrize("load", [zoo.digits, zoo.breast_cancer])
def test_missing_scikit_learn_names_the_extra(load, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"moreau_ext\[demo\]\""):
        load()


# --- nets ----------------------------------------------------------------------------------------------------------

NETS = {
    **{f"digits_cnn-{a}": (lambda seed, a=a: zoo.digits_cnn(a, seed), (1, 8, 8), 10) for a in ACTIVATIONS},
    **{f"tabular_mlp-{a}": (lambda seed, a=a: zoo.tabular_mlp(activation=a, seed=seed), (30,), 2) for a in ACTIVATIONS},
    "resnet20": (lambda seed: zoo.resnet20(seed=seed), (3, 32, 32), 10),
    "resnet20-100": (lambda seed: zoo.resnet20(100, seed), (3, 32, 32), 100),
    "tiny_vit": (lambda seed: zoo.tiny_vit(seed=seed), (3, 32, 32), 10),
    "tiny_vit-digits": (lambda seed: zoo.tiny_vit(8, 2, channels=1, seed=seed), (1, 8, 8), 10),
}


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    make, shape, classes = NETS[name]
    before = torch.get_rng_state()
    model = make(0)
    assert torch.equal(before, torch.get_rng_state())
    assert same(model, make(0))
    assert not same(model, make(1))
    assert not any(m.training for m in model.modules())
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())

    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(x)
    assert logits.shape == (3, classes)
    assert 1e-2 < logits.std() < 1e2
    logits[:, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("name", NETS)
def test_nets_treat_inputs_one_by_one(name: str) -> None:
    make, shape, _ = NETS[name]
    model, x = make(0), torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)


def test_weights_do_not_depend_on_the_callers_settings() -> None:
    expected = zoo.digits_cnn()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            got = zoo.digits_cnn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(got, expected)
    assert not any(p.is_inference() for p in got.parameters())


def test_resnet20_has_twenty_layers() -> None:
    model = zoo.resnet20()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(272_000, rel=0.02)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: zoo.digits_cnn("tanh"), "activation must be one of relu, gelu, softplus, silu, got 'tanh'"),
        (lambda: zoo.tiny_vit(image_size=8, patch=3), "patches of 3 in images of 8"),
        (lambda: zoo.tiny_vit(dim=64, heads=5), "5 heads for a width of 64"),
        (lambda: zoo.trained("resnet20"), "name must be one of digits_cnn, .* got 'resnet20'"),
        (lambda: zoo.train(zoo.tabular_mlp(), zoo.breast_cancer(), epochs=0), "got 569, 0 and 64"),
        (
            lambda: zoo.accuracy(zoo.tabular_mlp(), zoo.Dataset(torch.empty(0, 30), torch.empty(0).long(), ())),
            "got none",
        ),
    ],
)
def test_errors_say_what_came(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- training and the cache ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("digits_cnn", 0.97),
        ("digits_cnn_gelu", 0.97),
        ("digits_cnn_softplus", 0.97),
        ("digits_cnn_silu", 0.97),
        ("digits_vit", 0.94),
        ("digits32_resnet20", 0.97),
        ("tabular_mlp", 0.95),
        ("tabular_mlp_gelu", 0.95),
    ],
)
def test_trained_nets_are_good(name: str, least: float) -> None:
    data = {"tabular": zoo.breast_cancer, "digits32": zoo.digits32}.get(name.split("_")[0], zoo.digits)
    test = data("test")
    before = torch.get_rng_state()
    model = zoo.trained(name, cache=False)
    assert torch.equal(before, torch.get_rng_state())
    assert zoo.accuracy(model, test) >= least
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_every_recipe_is_tested() -> None:
    tested = {row[0] for mark in test_trained_nets_are_good.pytestmark if mark.args for row in mark.args[1]}
    assert tested == set(zoo.NAMES)


def test_training_repeats_and_ignores_the_callers_mode() -> None:
    model = zoo.trained("tabular_mlp", cache=False)
    torch.rand(1)
    with torch.inference_mode():
        again = zoo.trained("tabular_mlp", cache=False)
    assert same(model, again)
    assert not same(model, zoo.trained("tabular_mlp", seed=1, cache=False))


def test_training_seeds_dropout_and_restores_the_generator() -> None:
    def model() -> nn.Module:
        net = zoo.tabular_mlp()
        assert isinstance(net, nn.Sequential)
        return nn.Sequential(nn.Dropout(0.2), *net)

    data = zoo.breast_cancer("train")
    first = zoo.train(model(), data, 1)
    before = torch.get_rng_state()
    assert same(first, zoo.train(model(), data, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_accuracy_counts_and_leaves_the_flags() -> None:
    data = zoo.breast_cancer()
    always_one = nn.Sequential(nn.Dropout(), nn.Linear(30, 2)).train()
    always_one[0].eval()
    with torch.no_grad():
        always_one[1].weight.zero_()
        always_one[1].bias.copy_(torch.tensor([0.0, 1.0]))
    assert zoo.accuracy(always_one, data) == 357 / 569
    assert [m.training for m in always_one.modules()] == [True, False, True]


def test_the_cache_is_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.trained("tabular_mlp")
    (file,) = cache.iterdir()
    assert file.name.startswith("tabular_mlp-")
    monkeypatch.setattr(zoo.training, "train", None)
    again = zoo.trained("tabular_mlp")
    assert same(model, again)
    assert not again.training


def test_the_files_name_depends_on_what_sets_the_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.trained("tabular_mlp")
    zoo.trained("tabular_mlp", seed=1)
    monkeypatch.setattr(zoo.training, "_RECIPE_VERSION", -1)
    zoo.trained("tabular_mlp")
    monkeypatch.setattr(torch, "__version__", "0.0")
    zoo.trained("tabular_mlp")
    assert len(list(cache.iterdir())) == 4


def other_net() -> bytes:
    path = zoo.cache_folder() / "other"
    torch.save(zoo.digits_cnn().state_dict(), path)
    return path.read_bytes()


def not_finite() -> bytes:
    path = zoo.cache_folder() / "other"
    torch.save({k: v * float("nan") for k, v in zoo.tabular_mlp().state_dict().items()}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"no weights",
        lambda: pickle.dumps(Path("code")),
        other_net,
        not_finite,
    ],
    ids=["empty", "text", "code", "other net", "NaN"],
)
def test_a_damaged_file_is_replaced(cache: Path, content) -> None:
    model = zoo.trained("tabular_mlp")
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(content())
    assert same(model, zoo.trained("tabular_mlp"))
    assert file.read_bytes() == good


def test_an_unwritable_cache_warns_once_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    with pytest.warns(UserWarning, match="trained anew each time") as said:
        model = zoo.trained("tabular_mlp")
    assert len(said) == 1
    assert said[0].filename == __file__
    assert same(model, zoo.trained("tabular_mlp", cache=False))


def test_a_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        zoo.trained("tabular_mlp")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_cache_folder_without_a_valid_setting(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / ".cache" / "moreau_ext"


def test_examples() -> None:
    assert doctest.testmod(zoo).failed == 0
