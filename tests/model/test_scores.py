"""Scores and targets: every form of a target, every score against autograd by hand, and troublesome models."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import in_threads, others
from torch import Tensor, nn

from moreau_ext.model import modes
from moreau_ext.model.bind import bind_score
from moreau_ext.model.modes import evaluating
from moreau_ext.model.score import Score, check_score_settings
from moreau_ext.ops.layout import row_chunks

B, D, CLASSES = 4, 6, 5
SCORES = ("logit", "log_prob", "prob", "margin")


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.SiLU(), nn.Linear(8, CLASSES)).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, D, dtype=torch.float64)


def by_hand(output: Tensor, target: list[int], score: str) -> Tensor:
    """The definition of each score, input by input."""
    values = []
    for row, t in zip(output, target, strict=True):
        if score == "logit":
            values.append(row[t])
        elif score == "margin":
            values.append(row[t] - torch.cat([row[:t], row[t + 1 :]]).max())
        else:
            probability = row.exp()[t] / row.exp().sum()
            values.append(probability if score == "prob" else probability.log())
    return torch.stack(values)


def gradient_by_hand(net: nn.Module, x: Tensor, target: list[int], score: str) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(by_hand(net(leaf), target, score).sum(), leaf)[0]


# --- the four scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_gradients_are_those_of_autograd(net: nn.Module, x: Tensor, name: Any) -> None:
    target = [0, 4, 2, 2]
    score, value = bind_score(net, (x,), target, score=name)
    torch.testing.assert_close(value, by_hand(net(x), target, name).detach(), rtol=1e-12, atol=1e-12)
    values, gradient = score.gradient((x,))
    torch.testing.assert_close(values, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score.value((x,))[0], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, gradient_by_hand(net, x, target, name), rtol=1e-12, atol=1e-12)
    assert not values.requires_grad
    assert not value.requires_grad


@pytest.mark.parametrize("name", SCORES)
def test_higher_rank_outputs_compare_along_axis_1(x: Tensor, name: Any) -> None:
    """An output [B, classes, h, w] and (class, i, j): the score of that pixel's classes."""
    weight = torch.randn(D, CLASSES * 2 * 3, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return (x @ weight).view(-1, CLASSES, 2, 3)

    target = [(0, 1, 2), (4, 0, 0), (1, 1, 1), (2, 0, 2)]
    score, value = bind_score(model, (x,), target, score=name)
    pixels = torch.stack([model(x)[b, :, i, j] for b, (_, i, j) in enumerate(target)])
    expected = by_hand(pixels, [t[0] for t in target], name)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    _, gradient = score.gradient((x,))
    for b, (c, i, j) in enumerate(target):
        one, _ = bind_score(lambda x, i=i, j=j: model(x)[:, :, i, j], (x[b : b + 1],), c, score=name)
        torch.testing.assert_close(gradient[b], one.gradient((x[b : b + 1],))[1][0], rtol=1e-12, atol=1e-12)


def test_margin_of_ties() -> None:
    """At a tie the margin is 0 and its gradient finite, shared among the rivals as amax shares it."""
    x = torch.tensor([[2.0, 2.0, 2.0]], requires_grad=True)
    score, value = bind_score(lambda x: x * 1, (x.detach(),), 0, score="margin")
    assert value.item() == 0
    _, gradient = score.gradient((x.detach(),))
    assert gradient.tolist() == [[1.0, -0.5, -0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities_are_formed_in_float32(dtype: torch.dtype) -> None:
    """log softmax of logits that float16 itself would round to nothing."""
    logits = torch.tensor([[12.0, 0.0, -3.0]]).to(dtype)
    _, value = bind_score(lambda x: x * 1, (logits,), 0, score="log_prob")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.log_softmax(logits.float(), 1)[:, 0])
    assert value.item() < 0
    _, value = bind_score(lambda x: x * 1, (logits,), 0, score="logit")
    assert value.dtype == dtype


# --- targets -------------------------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "list": [1, 0, 3, 2],
    "tensor": torch.tensor([1, 0, 3, 2]),
    "int32 tensor": torch.tensor([1, 0, 3, 2], dtype=torch.int32),
    "column": torch.tensor([[1], [0], [3], [2]]),
    "numpy": np.array([1, 0, 3, 2]),
    "numpy uint8": np.array([1, 0, 3, 2], dtype=np.uint8),
    "numpy column": np.array([[1], [0], [3], [2]]),
    "list of numpy ints": list(np.array([1, 0, 3, 2])),
    "list of tensors": list(torch.tensor([1, 0, 3, 2])),
    "list of tuples": [(1,), (0,), (3,), (2,)],
    "callable": lambda output: output.gather(1, torch.tensor([[1], [0], [3], [2]])[: len(output)]).squeeze(1),
    "callable column": lambda output: output.gather(1, torch.tensor([[1], [0], [3], [2]])[: len(output)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_target(net: nn.Module, x: Tensor, form: str) -> None:
    _, value = bind_score(net, (x,), FORMS[form])
    torch.testing.assert_close(value, by_hand(net(x), [1, 0, 3, 2], "logit").detach(), rtol=0, atol=0)


@pytest.mark.parametrize("target", [3, np.int64(3), torch.tensor(3), np.array(3), (3,)], ids=repr)
def test_one_target_for_all(net: nn.Module, x: Tensor, target: Any) -> None:
    _, value = bind_score(net, (x,), target)
    assert torch.equal(value, net(x)[:, 3])


def test_none_is_the_predicted_class(net: nn.Module, x: Tensor) -> None:
    score, value = bind_score(net, (x,), None)
    assert torch.equal(value, net(x).amax(1))
    # Fixed at x: it does not follow the prediction to other points.
    other = torch.randn_like(x)
    assert torch.equal(score.value((other,))[0], net(other).gather(1, net(x).argmax(1, keepdim=True)).squeeze(1))


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("target", [None, 0])
def test_a_model_with_one_output(x: Tensor, shape: tuple[int, ...], target: int | None) -> None:
    """[B] and [B, 1] are explained themselves; class 0 of [B, 1] may be said."""

    def model(x: Tensor) -> Tensor:
        return x.square().sum(1).view(shape)

    if target == 0 and shape == (-1,):
        with pytest.raises(ValueError, match=r"target: the model returns one number per input, \(4,\); leave"):
            bind_score(model, (x,), target)
        return
    score, value = bind_score(model, (x,), target)
    assert torch.equal(value, x.square().sum(1))
    torch.testing.assert_close(score.gradient((x,))[1], 2 * x)


def test_one_tuple_serves_all_inputs(x: Tensor) -> None:
    def model(x: Tensor) -> Tensor:
        return x.view(-1, 3, 2)

    _, value = bind_score(model, (x,), (2, 1))
    assert torch.equal(value, x[:, 5])


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            CLASSES,
            ValueError,
            r"target: 5 of input 0 is out of range for an output of shape \(4, 5\): expected 0 <= ",
        ),
        (-1, ValueError, r"target: -1 of input 0 is out of range .*expected 0 <= target < 5"),
        ([0, 1, 9, 0], ValueError, r"target: 9 of input 2 is out of range"),
        ([0, 1], ValueError, r"target: expected one per input, 4, got 2"),
        ([], ValueError, r"target: expected one per input, 4, got 0"),
        (torch.zeros(B, 2, dtype=torch.long), ValueError, r"target: expected shape \[4\] or \[4, 1\], got \(4, 2\)"),
        (torch.zeros(1, B, dtype=torch.long), ValueError, r"target: expected shape \[4\] or \[4, 1\], got \(1, 4\)"),
        ((1, 2), ValueError, r"target: an output of shape \(4, 5\) needs 1 indices per input, got 2"),
        ((), ValueError, r"target: an output of shape \(4, 5\) needs 1 indices per input, got 0"),
        ([(1,), (2,)], ValueError, r"target: expected one per input, 4, got 2"),
        ([(1,), (2, 0), (1,), (1,)], ValueError, r"target: the tuples of a list must all have the same length"),
        ([(1,), 2, 3, 4], TypeError, r"target: expected a list of tuples, got \[\(1,\), 2, 3, 4\]"),
        ((1.0,), TypeError, r"target: expected a tuple of integers, got \(1.0,\)"),
        (1.0, TypeError, r"target: expected integers, got torch.float32"),
        (torch.zeros(B), TypeError, r"target: expected integers, got torch.float32"),
        (np.zeros(B), TypeError, r"target: expected integers, got torch.float64"),
        (torch.ones(B, dtype=torch.bool), TypeError, r"target: expected integers, got torch.bool"),
        (True, TypeError, r"target: expected a class index, got True"),
        ("cat", TypeError, r"target: expected None, an int, .* or a callable, got 'cat'"),
        (["cat"] * B, TypeError, r"target: expected None, an int, .* or a callable, got \['cat'"),
        ([[1, 2], [0], [1], [1]], TypeError, r"target: expected None, an int, .* or a callable, got \[\[1, 2\]"),
        ({"class": 1}, TypeError, r"target: expected None, an int, .* or a callable, got \{'class': 1\}"),
        (lambda o: o, ValueError, r"target: the callable must return one score per row, \[4\], got \(4, 5\)"),
        (lambda o: o.sum(), ValueError, r"target: the callable must return one score per row, \[4\], got \(\)"),
        (lambda o: 3.0, ValueError, r"target: the callable must return one score per row, \[4\], got float"),
    ],
    ids=lambda value: None if isinstance(value, (type, str)) else repr(value)[:24],
)
def test_bad_targets(net: nn.Module, x: Tensor, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bind_score(net, (x,), target)


def test_higher_rank_targets_that_do_not_fit(x: Tensor) -> None:
    def model(x: Tensor) -> Tensor:
        return x.view(-1, 3, 2)

    with pytest.raises(ValueError, match=r"an output of shape \(4, 3, 2\) needs one, a tuple of 2 indices"):
        bind_score(model, (x,), None)
    with pytest.raises(ValueError, match=r"an output of shape \(4, 3, 2\) needs 2 indices per input, got 1"):
        bind_score(model, (x,), 1)
    with pytest.raises(ValueError, match=r"target: \(2, 2\) of input 0 is out of range .* expected .* < \(3, 2\)"):
        bind_score(model, (x,), (2, 2))


@pytest.mark.parametrize("name", ["log_prob", "prob", "margin"])
def test_scores_that_compare_classes_need_some(x: Tensor, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"score: '{name}' compares classes, but the model returns one number"):
        bind_score(lambda x: x.sum(1), (x,), None, score=name)
    with pytest.raises(ValueError, match=rf"score: '{name}' compares the classes of axis 1.*\(4, 1, 6\) has one"):
        bind_score(lambda x: x[:, None], (x,), (0, 2), score=name)


def test_settings_by_name() -> None:
    check_score_settings("margin", "zero")
    with pytest.raises(ValueError, match=r"score: expected one of logit, log_prob, prob, margin, got 'logits'"):
        check_score_settings("logits", "zero")
    with pytest.raises(ValueError, match=r"unused_inputs: expected 'raise' or 'zero', got None"):
        check_score_settings("logit", None)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_take_repeats_targets_and_arguments(x: Tensor) -> None:
    """Rows may repeat, as the noisy copies of an input do; only arguments per input follow."""
    per_input, shared = torch.randn(B, 1, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    seen: list[tuple[Any, ...]] = []

    def model(x: Tensor, *args: Any) -> Tensor:
        seen.append(args)
        return x * args[0] + args[1] + args[2]

    args = (per_input, shared, 3.0, "text", None)
    score, value = bind_score(model, (x,), [0, 1, 2, 3], additional_forward_args=args)
    index = torch.tensor([2, 2, 0, 3, 3])
    taken = score.take(index)
    assert torch.equal(taken.value((x[index],))[0], value[index])
    assert torch.equal(taken.take(torch.tensor([3, 0])).value((x[[3, 2]],))[0], value[[3, 2]])
    got = seen[-2]
    assert torch.equal(got[0], per_input[index])
    assert torch.equal(got[1], shared)
    assert got[2:] == (3.0, "text", None)


def test_a_lone_argument_needs_no_tuple(x: Tensor) -> None:
    _, value = bind_score(lambda x, a: (x * a).sum(1), (x,), None, additional_forward_args=torch.full((B, 1), 2.0))
    assert torch.equal(value, (x * 2).sum(1))


def test_binding_respects_max_batch_and_copies(x: Tensor) -> None:
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        x.mul_(2)  # spoils its input
        return x

    before = x.clone()
    score, value = bind_score(model, (x,), 1, max_batch=3)
    assert sizes == [3, 3, 1, 1]  # autograd refuses the change of a leaf, a copy of it may be changed
    assert torch.equal(x, before)
    assert torch.equal(value, 2 * before[:, 1])
    assert isinstance(score, Score)


def test_row_chunks() -> None:
    cpu = torch.device("cpu")
    assert [c.tolist() for c in row_chunks(5, 2, cpu)] == [[0, 1], [2, 3], [4]]
    assert [c.tolist() for c in row_chunks(2, None, cpu)] == [[0, 1]]
    assert [c.tolist() for c in row_chunks(2, 9, cpu)] == [[0, 1]]


# --- outputs -------------------------------------------------------------------------------------------------------


def test_logits_are_found(net: nn.Module, x: Tensor) -> None:
    _, value = bind_score(lambda x: SimpleNamespace(logits=net(x), loss=None), (x,), 2)
    assert torch.equal(value, net(x)[:, 2])


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: {"a": x}, TypeError, r"model: expected a tensor \(or an object with .logits\) as output, got dict"),
        (
            lambda x: (x, x),
            TypeError,
            r"model: expected a tensor .* got tuple of Tensor, Tensor; give output_fn.* or a callable target",
        ),
        (lambda x: x.sum(), ValueError, r"model: expected an output with one row per input, \[4, ...\], got \(\)"),
        (lambda x: x[:1], ValueError, r"model: expected an output with one row per input, \[4, ...\], got \(1, 6\)"),
    ],
)
def test_bad_outputs(x: Tensor, model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bind_score(model, (x,), None)


@pytest.mark.parametrize(
    "model",
    [lambda x: x.detach().sum(1), lambda x: torch.ones(len(x)), lambda x: nn.Linear(2, 1)(torch.ones(len(x), 2))],
    ids=["detached", "constant", "trained constant"],
)
def test_a_score_that_ignores_its_input(x: Tensor, model: Any) -> None:
    score, _ = bind_score(model, (x,), None)
    with pytest.raises(ValueError, match=r"model: the score does not depend on inputs\. Likely causes.*'zero'"):
        score.gradient((x,))
    score, value = bind_score(model, (x,), None, unused_inputs="zero")
    values, gradient = score.gradient((x,))
    assert torch.equal(gradient, torch.zeros_like(x))
    assert values.shape == value.shape == (B,)


def test_one_of_two_inputs_ignored(x: Tensor) -> None:
    score, _ = bind_score(lambda a, b: a.sum(1), (x, x), None)
    with pytest.raises(ValueError, match=r"model: the score does not depend on inputs\[1\]"):
        score.gradient((x, x))
    score, _ = bind_score(lambda a, b: a.sum(1), (x, x), None, unused_inputs="zero")
    _, *gradients = score.gradient((x, x))
    assert torch.equal(gradients[0], torch.ones_like(x))
    assert torch.equal(gradients[1], torch.zeros_like(x))


def test_only_input_gradients_are_computed(net: nn.Module, x: Tensor) -> None:
    x.requires_grad_()
    score, _ = bind_score(net, (x,), 0)
    with torch.no_grad():
        score.gradient((x,))
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())


# --- eval mode -----------------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    """Train and eval flags side by side, and a module that is met twice."""
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Dropout(), nn.Sequential(shared, nn.ReLU()))
    model[2].eval()
    return model


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_evaluating_switches_and_restores_every_module() -> None:
    model = mixed()
    before = flags(model)
    inside = []

    def nested() -> None:
        with evaluating(model):
            inside.append(flags(model))
            with evaluating(model[3]), evaluating(model):  # no second warning
                inside.append(flags(model))
            inside.append(flags(model))

    with pytest.warns(UserWarning, match="the model is in train mode") as record:
        nested()
    assert len(others(record)) == 1
    assert not any(flag for seen in inside for flag in seen)
    assert flags(model) == before
    model.eval()
    with evaluating(model):
        pass
    assert not any(flags(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_evaluating_restores_after(error: type[BaseException]) -> None:
    model = mixed()
    before = flags(model)

    def interrupted() -> None:
        with pytest.warns(UserWarning, match="train mode"), evaluating(model):
            raise error

    with pytest.raises(error):
        interrupted()
    assert flags(model) == before


def test_evaluating_restores_when_the_warning_is_an_error() -> None:
    model = mixed()
    before = flags(model)

    def enter() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with evaluating(model):
                pytest.fail("not reached")

    with pytest.raises(UserWarning, match="train mode"):
        enter()
    assert flags(model) == before


def test_evaluating_uses_the_flag_alone() -> None:
    """train() may be overridden, say to keep a layer frozen; it must not run."""

    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> Frozen:
            raise AssertionError("train() ran")

    model = Frozen(2, 2)
    model.training = True
    with pytest.warns(UserWarning, match="train mode"), evaluating(model):
        assert not model.training
    assert model.training


def test_evaluating_takes_any_callable() -> None:
    with evaluating(lambda x: x):
        pass


@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_evaluating_between_threads() -> None:
    """The first switches, the last restores, whoever leaves first."""
    model = mixed()
    before = flags(model)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with evaluating(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with evaluating(model):
        assert not any(flags(model))
    assert not any(flags(model))  # still needed
    leave.set()
    thread.join()
    assert flags(model) == before


@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_evaluating_between_many_threads() -> None:
    model = mixed()
    before = flags(model)
    wrong = []

    def work(_: int) -> None:
        for _ in range(200):
            with evaluating(model):
                if any(flags(model)):
                    wrong.append(1)

    in_threads(work, *range(4))
    assert not wrong
    assert flags(model) == before


def test_nothing_is_kept_of_a_model() -> None:
    with evaluating(nn.Linear(2, 2).eval()):
        pass
    assert len(evaluating._users) == 0


def test_evaluating_passes_over_modules_without_a_mode() -> None:
    frozen = nn.Linear(3, 3)
    del frozen.training
    model = nn.Sequential(nn.Dropout(), frozen, nn.Dropout())
    with pytest.warns(UserWarning, match="train mode"), evaluating(model):
        assert not any(model[i].training for i in (0, 2))
    assert all(model[i].training for i in (0, 2))


def test_plain_attention_is_restored_by_the_last_of_two_threads() -> None:
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with modes.plain_attention():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with modes.plain_attention():
        thread.start()
        assert inside.wait(30)
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.flash_sdp_enabled()
    leave.set()
    thread.join()
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
