"""Precision of the model's passes: what each mode computes, and that torch's flags are as they were."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Gradient, MoreauGrad, ProximalGradient, SmoothGrad, SparseMoreauGrad, make_explainer, zoo
from moreau_ext.model.bind import bind_score
from moreau_ext.model.precision import PRECISIONS, _Flags, flags, resolution
from moreau_ext.preparation.prepare import prepare

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Seen(nn.Module):
    """Notes the dtype in which a linear layer multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(64, 16), nn.Linear(16, 4)
        self.inputs, self.products = list[torch.dtype](), list[torch.dtype]()

    def forward(self, x: Tensor) -> Any:
        h = self.linear(x.flatten(1))
        self.inputs.append(x.dtype)
        self.products.append(h.dtype)
        return self.head(torch.tanh(h))


def state() -> dict[str, Any]:
    """Every flag, by both of torch's interfaces; None where one cannot be read."""
    b: Any = torch.backends

    def legacy(read: Any) -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    places = {"all": b, "cuda": b.cudnn, "conv": b.cudnn.conv, "rnn": b.cudnn.rnn, "matmul": b.cuda.matmul}
    places |= {"mkldnn": b.mkldnn.matmul}
    return {
        **{name: place.fp32_precision for name, place in places.items()},
        "cudnn": legacy(lambda: b.cudnn.allow_tf32),
        "cublas": legacy(lambda: b.cuda.matmul.allow_tf32),
        "words": legacy(torch.get_float32_matmul_precision),
        "enabled": b.cudnn.enabled,
    }


@pytest.fixture(autouse=True)
def _flags_as_found() -> Any:
    before = state()
    yield
    b: Any = torch.backends
    b.fp32_precision = b.cudnn.fp32_precision = "none"
    b.cudnn.allow_tf32, b.cudnn.enabled = True, True
    torch.set_float32_matmul_precision("highest")
    b.cuda.matmul.fp32_precision = b.mkldnn.matmul.fp32_precision = "none"
    assert state() == before


def use_legacy_on() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def use_legacy_off() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def use_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def use_new() -> None:
    b: Any = torch.backends
    b.cudnn.conv.fp32_precision = "ieee"
    b.cuda.matmul.fp32_precision = "tf32"


def use_newest() -> None:
    b: Any = torch.backends
    b.fp32_precision = "ieee"


def use_cudnn_off() -> None:
    torch.backends.cudnn.enabled = False


CALLERS = [lambda: None, use_legacy_on, use_legacy_off, use_medium, use_new, use_newest, use_cudnn_off]


@pytest.mark.parametrize("without_cudnn", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("caller", CALLERS)
def test_flags_are_set_inside_and_restored(caller: Any, precision: str, without_cudnn: bool) -> None:
    """The flags exist in a build without CUDA too, so what a pass there would see can be tested anywhere."""
    caller()
    before = state()
    with flags(precision, CUDA, without_cudnn):
        inside = state()
        for name in ("conv", "rnn", "matmul"):
            assert (inside[name] == "tf32") == (precision == "tf32")
        assert inside["enabled"] == (before["enabled"] and not without_cudnn)
        # What could be read before, can be inside: torch.backends.cudnn.flags in a model does.
        for name in ("cudnn", "cublas"):
            assert inside[name] in (before[name] and None, precision == "tf32")
            assert (inside[name] is None) <= (before[name] is None)
    assert state() == before


def test_flags_inherited_go_on_to_be() -> None:
    b: Any = torch.backends
    with flags("tf32", CUDA, False):
        pass
    b.fp32_precision = "tf32"
    assert b.cuda.matmul.fp32_precision == "tf32"


def test_flags_are_restored_after_an_exception() -> None:
    before = state()
    with pytest.raises(KeyError), flags("tf32", CUDA, True):
        raise KeyError
    assert state() == before


def test_the_cpu_touches_no_flags() -> None:
    before = state()
    for precision in PRECISIONS:
        with flags(precision, CPU, True):
            assert state() == before


def test_threads_with_other_flags_wait() -> None:
    ours, log, inside = _Flags(), list[str](), threading.Barrier(2)
    before = state()

    def same() -> None:
        with ours(True, False):
            inside.wait(10)  # only passes with the same flags can both be here
            log.append(state()["matmul"])

    def other() -> None:
        with ours(False, False):
            log.append(state()["conv"])

    first = [threading.Thread(target=same) for _ in range(2)]
    with ours(True, False):
        late = threading.Thread(target=other)
        late.start()
        for thread in first:
            thread.start()
        for thread in first:
            thread.join(10)
        assert log == ["tf32", "tf32"]
    late.join(10)
    assert log == ["tf32", "tf32", "ieee"]
    assert state() == before


# --- passes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["logit", "log_prob", "prob", "margin"])
def test_bfloat16_runs_the_model_and_keeps_the_rest_in_float32(score: Any) -> None:
    model = Seen().eval()
    bound, value = bind_score(model, (X,), 1, score=score, precision="bfloat16")
    found, gradient = bound.gradient((X,))
    (product,) = bound.hvp((X,), (torch.ones_like(X),))
    assert set(model.inputs) == {torch.float32}
    assert set(model.products) == {torch.bfloat16}
    assert {t.dtype for t in (value, found, bound.value((X,))[0], gradient, product)} == {torch.float32}
    exact, _ = bind_score(model, (X,), 1, score=score)
    f, g = exact.gradient((X,))
    h = exact.hvp((X,), (torch.ones_like(X),))[0]
    for ours, theirs in ((found, f), (gradient, g), (product, h)):
        difference = float((ours - theirs).norm() / theirs.norm())
        assert 1e-6 < difference < 0.1


def test_the_default_is_what_it_was() -> None:
    """float32 and, without CUDA, tf32: the same bits as no setting."""
    model, e = zoo.digits_cnn(), ProximalGradient(4, 5)
    maps = [MoreauGrad(model, rho=1.0, solver=e, **k).attribute(X, 1) for k in ({}, {"precision": "tf32"})]
    assert torch.equal(maps[0], maps[1])
    assert MoreauGrad(model).precision == "float32"


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_callers_autocast_does_not_count(precision: Any) -> None:
    """What ``precision`` says is what runs, in every pass of a call and in what is done with its numbers."""
    model = Seen().eval()
    e = SparseMoreauGrad(model, rho=0.1, precision=precision, solver=ProximalGradient(4, 3, 0.05))
    s = e.attribute(X, 1, return_solution=True)
    proof = e.certificate(X, s, num_samples=64, num_hvp_samples=64, lanczos_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        t = e.attribute(X, 1, return_solution=True)
        again = e.certificate(X, s, num_samples=64, num_hvp_samples=64, lanczos_steps=2)
        e.vjp(X, s, torch.ones_like(X), num_samples=8, hessian="autograd", max_steps=2)
        assert torch.is_autocast_enabled("cpu")
    assert set(model.products) == {torch.float32}
    assert torch.equal(s.attribution, t.attribution)
    assert t.score.dtype == torch.float32
    assert torch.equal(proof.residual, again.residual)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["digits_cnn", "digits_cnn_gelu"])
def test_bfloat16_moves_maps_by_little(net: str) -> None:
    """Median 0.2 % and at most 1.1 % of the map's length on eight digits; 5 % would be another map."""
    model, x = zoo.trained(net), zoo.digits("test").inputs[:4]
    exact = SparseMoreauGrad(copy.deepcopy(model).double(), rho=0.1).attribute(x.double())
    found = SparseMoreauGrad(model, rho=0.1, precision="bfloat16").attribute(x, return_solution=True)
    assert found.attribution.dtype == found.displacement.dtype == torch.float32
    error = (found.attribution - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(error.max()) < 0.05
    assert found.converged.all()


def test_certificate_and_vjp_run_in_the_precision() -> None:
    model = Seen().eval()
    e = MoreauGrad(model, rho=0.1, sigma=0.3, precision="bfloat16", solver=ProximalGradient(4, 3, 0.05))
    s = e.attribute(X, 1, return_solution=True)
    e.certificate(X, s, 1, num_samples=64, num_hvp_samples=64, lanczos_steps=2)
    e.vjp(X, s, torch.ones_like(X), 1, num_samples=8, hessian="autograd", max_steps=2)
    assert set(model.products) == {torch.bfloat16}


def test_a_prepared_model_works_with_any() -> None:
    model = zoo.digits_cnn()
    ready = prepare(model, X, max_batch=8, precision="bfloat16", channels_last=True)
    found = SmoothGrad(ready, num_samples=4, precision="bfloat16").attribute(X, 1)
    exact = SmoothGrad(model, num_samples=4).attribute(X, 1)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.1


def test_integrated_gradients() -> None:
    pytest.importorskip("captum", reason="Integrated Gradients are captum's")
    model = Seen().eval()
    make_explainer("integrated_gradients", model, n_steps=4, precision="bfloat16").attribute(X, 1)
    assert set(model.products) == {torch.bfloat16}


def test_rounding() -> None:
    x = torch.empty(1)
    assert resolution("float32", x) == resolution("tf32", x) == torch.finfo(torch.float32).eps
    assert resolution("bfloat16", x) == torch.finfo(torch.bfloat16).eps


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_precision() -> None:
    message = "precision: expected one of float32, tf32, bfloat16, got 'float16'"
    with pytest.raises(ValueError, match=message):
        Gradient(zoo.digits_cnn(), precision="float16")
    with pytest.raises(ValueError, match=message):
        prepare(zoo.digits_cnn(), X, precision="float16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_inputs_of_another_dtype(precision: Any, dtype: torch.dtype) -> None:
    model = zoo.digits_cnn().to(dtype)
    with pytest.raises(ValueError, match=rf"precision: '{precision}' is a way to run float32 models, and inputs is"):
        Gradient(model, precision=precision).attribute(X.to(dtype), 1)
    with pytest.raises(ValueError, match=r"and example is torch"):
        prepare(model, X.to(dtype), precision=precision)


def test_one_precision_within_another_is_refused_not_waited_for() -> None:
    flags = _Flags()
    with flags(False, False):
        with flags(False, False):
            pass
        with pytest.raises(RuntimeError, match="a pass at one precision began within"), flags(True, False):
            pass
    with flags(True, False):
        pass
