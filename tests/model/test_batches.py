"""Arguments that follow the inputs, callable targets, and models whose batch is fixed or coupled."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Gradient, MoreauGrad, PerInput, ProximalGradient, Shared, SmoothGrad
from moreau_ext._errors import BatchWarning, MixingError

B, D = 4, 6
SOLVER = ProximalGradient(num_samples=4, max_steps=8, step_size=0.05)
METHODS: dict[str, Callable[..., Any]] = {
    "gradient": Gradient,
    "smoothgrad": lambda model, **k: SmoothGrad(model, sigma=0.0, num_samples=8, **k),
    "split": lambda model, **k: SmoothGrad(model, sigma=0.0, num_samples=8, max_batch=3, **k),
    "moreau": lambda model, **k: MoreauGrad(model, sigma=0.0, rho=1e-6, solver=ProximalGradient(4, 3, 1e-7), **k),
}


def row_by_row(model: Callable[..., Tensor], x: Tensor, column: int, *args: Callable[[int], Any]) -> Tensor:
    """The gradient of each input alone, by plain autograd."""
    found = []
    for i in range(len(x)):
        y = x[i : i + 1].clone().requires_grad_()
        found.append(torch.autograd.grad(model(y, *[a(i) for a in args])[:, column].sum(), y)[0])
    return torch.cat(found)


# --- arguments -------------------------------------------------------------------------------------------------------

PROTOTYPES = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(D, generator=torch.Generator().manual_seed(2))
MEMORY = torch.randn(B, D, generator=torch.Generator().manual_seed(3))
SHARED: dict[str, tuple[Callable[..., Any], Any]] = {
    "prototypes": (lambda x, p: x @ p.T, PROTOTYPES),
    "attention": (lambda x, p: (x @ p.T).softmax(1) @ p, MEMORY),
    "distances": (lambda x, p: -torch.cdist(x, p), PROTOTYPES),
    "classes": (lambda x, w: (x @ PROTOTYPES.T).tanh() * w, torch.rand(B)),
    "first row": (lambda x, p: x * p[0] + p[1], MEMORY),
    "mean": (lambda x, p: x * p.mean(0), MEMORY),
    "list of sizes": (lambda x, sizes: torch.cat([x * s for s in sizes], 1), [1.0, 2.0, 3.0, 4.0]),
    "array": (lambda x, p: x @ torch.from_numpy(p).T, PROTOTYPES.numpy()),
    "sparse": (lambda x, p: torch.sparse.mm(p, x.T).T.sin(), PROTOTYPES.to_sparse()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_argument_with_as_many_rows_as_inputs(name: str, method: str) -> None:
    model, value = SHARED[name]
    x = torch.randn(B, D)
    want = row_by_row(model, x, 1, lambda i: value)
    e = METHODS[method](model)
    torch.testing.assert_close(e.attribute(x, 1, (value,)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(e.attribute(x, 1, (Shared(value),)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(e.attribute(x[:3], 1, (value,)), want[:3], rtol=1e-4, atol=1e-5)


def packed(x: Tensor, lengths: Any) -> Any:
    keep = torch.arange(D) < torch.as_tensor(lengths)[:, None]
    return torch.stack([x.sin() * keep, x.cos() * keep], 1).sum(2)


def selected(x: Tensor, names: list[str]) -> Any:
    signs = torch.tensor([1.0 if name == "up" else -2.0 for name in names])
    return x * signs[:, None]


class Encoding(UserDict[str, Any]):
    pass


MASK = (torch.rand(B, D, generator=torch.Generator().manual_seed(4)) > 0.4).float() + 0.5
LENGTHS = [5, 2, 3, 6]
FOLLOWING: dict[str, tuple[Callable[..., Any], Any, Callable[[int], Any]]] = {
    "tensor": (packed, torch.tensor(LENGTHS), lambda i: torch.tensor(LENGTHS[i : i + 1])),
    "list": (packed, LENGTHS, lambda i: LENGTHS[i : i + 1]),
    "tuple": (packed, tuple(LENGTHS), lambda i: LENGTHS[i : i + 1]),
    "array": (packed, np.array(LENGTHS), lambda i: LENGTHS[i : i + 1]),
    "words": (selected, ["up", "down", "down", "up"], lambda i: ["up", "down", "down", "up"][i : i + 1]),
    "dict": (lambda x, e: x * e["mask"], {"mask": MASK}, lambda i: {"mask": MASK[i : i + 1]}),
    "ordered": (lambda x, e: x * e["mask"], OrderedDict(mask=MASK), lambda i: {"mask": MASK[i : i + 1]}),
    "encoding": (lambda x, e: x * e["mask"], Encoding(mask=MASK), lambda i: {"mask": MASK[i : i + 1]}),
    "list of masks": (lambda x, m: x * m[0] + m[1], [MASK, MASK.flip(0)], lambda i: [MASK[i], MASK.flip(0)[i]]),
    "sparse": (lambda x, m: x * m.to_dense(), MASK.to_sparse(), lambda i: MASK[i : i + 1].to_sparse()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FOLLOWING)
def test_an_argument_per_input(name: str, method: str) -> None:
    model, value, one = FOLLOWING[name]
    x = torch.randn(B, D)
    want = row_by_row(model, x, 1, one)
    e = METHODS[method](model)
    torch.testing.assert_close(e.attribute(x, 1, (value,)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(e.attribute(x, 1, (PerInput(value),)), want, rtol=1e-4, atol=1e-5)


def test_both_at_once() -> None:
    """Two ambiguous arguments, of which one is shared."""

    def model(x: Tensor, mask: Tensor, p: Tensor) -> Tensor:
        return (x * mask) @ p.T

    x = torch.randn(B, D)
    want = row_by_row(model, x, 2, lambda i: MASK[i : i + 1], lambda i: PROTOTYPES)
    torch.testing.assert_close(METHODS["smoothgrad"](model).attribute(x, 2, (MASK, PROTOTYPES)), want)


def test_a_mark_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"additional_forward_args\[1\]: PerInput, .* for 4 inputs"):
        Gradient(lambda x, a, b: x).attribute(torch.randn(B, D), 1, (1.0, PerInput(torch.ones(3))))


def test_the_state_of_an_lstm() -> None:
    """[layers, B, H] follows along its second axis: an error that says so, and the way that works."""
    rnn, x, h = nn.LSTM(3, 5, batch_first=True).eval(), torch.randn(3, 4, 3), torch.randn(1, 3, 5)

    def model(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return rnn(x, (h, c))[1][0][0]

    with pytest.raises(ValueError, match=r"additional_forward_args .*state of an LSTM as \[B, layers, H\]"):
        SmoothGrad(model, num_samples=4, sigma=0.0).attribute(x, 1, (h, h))

    def turned(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return model(x, h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())

    given = h.transpose(0, 1)
    found = SmoothGrad(turned, num_samples=4, sigma=0.0).attribute(x, 1, (given, given))
    want = row_by_row(turned, x, 1, lambda i: given[i : i + 1], lambda i: given[i : i + 1])
    torch.testing.assert_close(found, want)


# --- callable targets ------------------------------------------------------------------------------------------------

CLASSES = torch.tensor([0, 2, 1, 3])
MASKS = torch.rand(B, 5, generator=torch.Generator().manual_seed(5))
TARGETS: dict[str, Any] = {
    "prefix": lambda o: o[torch.arange(len(o)), CLASSES[: len(o)]],
    "repeat": lambda o: o[torch.arange(len(o)), CLASSES.repeat(len(o) // B or 1)[: len(o)]],
    "interleave": lambda o: o[torch.arange(len(o)), CLASSES.repeat_interleave(max(1, len(o) // B))[: len(o)]],
    "modulo": lambda o: o[torch.arange(len(o)), CLASSES[torch.arange(len(o)) % B]],
    "gather": lambda o: o.gather(1, CLASSES[:, None]),
    "list": lambda o: torch.stack([row[c] for row, c in zip(o, CLASSES.tolist(), strict=True)]),
    "weights": lambda o: (o * MASKS[:, :4]).sum(1),
    "callables": [lambda row, c=c: row[c] for c in CLASSES.tolist()],
}


@pytest.mark.parametrize("max_batch", ["auto", 2, 3, 16, None])
@pytest.mark.parametrize("name", TARGETS)
def test_a_callable_with_something_for_each_input(name: str, max_batch: Any) -> None:
    """As its sum for all inputs, or as the class of each, however the passes are cut."""
    net, x = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 4)).eval(), torch.randn(B, D)
    e = MoreauGrad(net, rho=0.5, sigma=0.3, solver=SOLVER, max_batch=max_batch)
    if name == "weights":
        arguments = MoreauGrad(lambda x, m: (net(x) * m).sum(1), rho=0.5, sigma=0.3, solver=SOLVER)
        want = arguments.attribute(x, None, MASKS[:, :4].clone())
    else:
        want = MoreauGrad(net, rho=0.5, sigma=0.3, solver=SOLVER).attribute(x, CLASSES)
    torch.testing.assert_close(e.attribute(x, TARGETS[name]), want, rtol=1e-4, atol=1e-5)


def test_a_list_of_callables_sees_rows_alone() -> None:
    """As pytorch-grad-cam's targets: also of images, in certificates, and on a part of the inputs."""
    seen = set()

    def of(weights: Tensor) -> Callable[[Tensor], Tensor]:
        def target(row: Tensor) -> Tensor:
            seen.add(tuple(row.shape))
            return (row * weights).sum().reshape(1)

        return target

    net, x = nn.Conv2d(1, 2, 3, padding=1).eval(), torch.randn(B, 1, 4, 5)
    masks = torch.rand(B, 2, 4, 5)
    e = MoreauGrad(nn.Sequential(net, nn.Tanh()).eval(), rho=0.5, sigma=0.3, solver=SOLVER)
    targets = [of(m) for m in masks]
    found = e.attribute(x, targets, return_solution=True)
    want = e.attribute(x, lambda o: (o * masks).flatten(1).sum(1))
    torch.testing.assert_close(found.attribution, want, rtol=1e-4, atol=1e-5)
    assert seen == {(2, 4, 5)}
    assert bool(e.certificate(x, found, targets, num_samples=8).residual.isfinite().all())
    with pytest.raises(ValueError, match="target: expected one callable per input, 3, got 4"):
        e.attribute(x[:3], targets)
    with pytest.raises(ValueError, match=r"target: callable 0 of the list must return one number, got \(4, 5\)"):
        e.attribute(x, [lambda row: row[0]] * B)
    with pytest.raises(ValueError, match="score: 'prob' needs a class as target"):
        MoreauGrad(net, rho=0.5, score="prob").attribute(x, targets)


def test_a_callable_of_rows_sees_any_rows() -> None:
    """Called as it is, with as many rows as a pass has."""
    seen: list[int] = []

    def target(o: Tensor) -> Tensor:
        seen.append(len(o))
        return o[:, 1] - o[:, 0]

    x = torch.randn(B, D)
    SmoothGrad(nn.Linear(D, 4).eval(), num_samples=8, max_batch=64).attribute(x, target)
    assert seen[-1] == 8 * B


@pytest.mark.parametrize(
    "target", [lambda o: o.softmax(0)[:, 1], lambda o: o[:, 1] - o[:, 1].mean(), lambda o: o[:, 1].cumsum(0)]
)
def test_a_callable_that_mixes_rows(target: Any) -> None:
    with pytest.raises(ValueError, match="target: the callable mixes the rows of the outputs"):
        SmoothGrad(nn.Linear(D, 4).eval(), num_samples=8).attribute(torch.randn(B, D), target)


def test_masks_certificates_and_derivatives() -> None:
    net, x = nn.Conv2d(1, 2, 3, padding=1).eval(), torch.randn(2, 1, 5, 5)
    masks = torch.zeros(2, 5, 5)
    masks[0, :2], masks[1, 3:] = 1, 1

    def target(o: Tensor) -> Tensor:
        return (o[:, 1].square() * masks).sum((1, 2))

    e = MoreauGrad(net, rho=0.1, sigma=0.1, solver=SOLVER)
    s = e.attribute(x, target, return_solution=True)
    by_argument = MoreauGrad(lambda x, m: (net(x)[:, 1].square() * m).sum((1, 2)), rho=0.1, sigma=0.1, solver=SOLVER)
    torch.testing.assert_close(s.attribution, by_argument.attribute(x, None, masks), rtol=1e-4, atol=1e-5)
    counts: dict[str, Any] = {"num_samples": 64, "num_hvp_samples": 64, "lanczos_steps": 2, "hessian": "autograd"}
    ours, theirs = e.certificate(x, s, target, **counts), by_argument.certificate(x, s, None, masks, **counts)
    torch.testing.assert_close(ours.residual, theirs.residual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", [torch.tensor([2]), torch.tensor([[2]]), np.array([2]), torch.tensor(2)])
def test_one_element_is_for_all(form: Any) -> None:
    net, x = nn.Linear(D, 4).eval(), torch.randn(B, D)
    assert torch.equal(Gradient(net).attribute(x, form), Gradient(net).attribute(x, 2))
    with pytest.raises(ValueError, match="target: expected one per input"):
        Gradient(net).attribute(x, [2])


# --- batches ---------------------------------------------------------------------------------------------------------

NET = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def exported(rows: int) -> Any:
    return torch.export.export(NET, (torch.rand(rows, D),)).module()


def asserted(x: Tensor) -> Any:
    assert len(x) == 1, "one at a time"
    return NET(x)


def squeezed(x: Tensor) -> Any:
    return NET(x.reshape(D))[None]


FIXED: dict[str, tuple[Callable[[], Any], int]] = {
    "exported": (lambda: exported(1), 1),
    "folded at the end": (lambda: lambda x: NET(x).reshape(1, -1), 1),
    "folded at the start": (lambda: lambda x: NET(x.reshape(1, D)), 1),
    "asserted": (lambda: asserted, 1),
    "squeezed": (lambda: squeezed, 1),
    "exported with four": (lambda: exported(4), 4),
    "viewed as four": (lambda: lambda x: NET(x.view(2, 2, D)).view(4, 3), 4),
}


@pytest.mark.filterwarnings("ignore:the model is in train mode", "ignore:the model does not take")
@pytest.mark.parametrize("max_batch", ["auto", 1, 4, 64, None])
@pytest.mark.parametrize("name", FIXED)
def test_a_batch_of_one_size(name: str, max_batch: Any) -> None:
    make, rows = FIXED[name]
    x = torch.randn(4, D)
    want = row_by_row(NET, x, 1)
    for e in (Gradient(make(), max_batch=max_batch), SmoothGrad(make(), sigma=0.0, num_samples=3, max_batch=max_batch)):
        if rows == 4 and max_batch == 1:
            with pytest.raises((RuntimeError, AssertionError)):
                e.attribute(x, 1)
            continue
        torch.testing.assert_close(e.attribute(x, 1), want)
        torch.testing.assert_close(e.attribute(x, 1), want)  # as it is known by then
        if rows == 1:
            torch.testing.assert_close(e.attribute(x[:1], 1), want[:1])


def test_a_fixed_size_is_said_once() -> None:
    e = SmoothGrad(asserted, sigma=0.0, num_samples=3)
    with pytest.warns(BatchWarning, match="does not take 2 rows in a pass .*one at a time.* of 1"):
        e.attribute(torch.randn(2, D), 1)
    e.attribute(torch.randn(2, D), 1)


EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 0, 3, 2, 2]])


def graph(x: Tensor, edges: Tensor) -> Any:
    return x[:, :3] + torch.zeros(len(x), 3).index_add(0, edges[1], x[edges[0], :3])


MIXING: dict[str, tuple[Callable[..., Any], Any]] = {
    "graph": (graph, EDGES),
    "softmax of the batch": (lambda x: NET(x).softmax(0), None),
    "statistics of the batch": (lambda x: NET(nn.functional.batch_norm(x, None, None, training=True)), None),
    "attention over the batch": (lambda x: NET((x @ x.T).softmax(1) @ x), None),
    "largest of the batch": (lambda x: NET(x / x.abs().max()), None),
    "similarities": (lambda x: x @ x.T, None),
    "the row before": (lambda x: NET(x + 0.1 * x.roll(1, 0)), None),
}


@pytest.mark.parametrize("max_batch", ["auto", 64])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_its_inputs(name: str, max_batch: Any) -> None:
    model, args = MIXING[name]
    for e in (Gradient(model, max_batch=max_batch), SmoothGrad(model, num_samples=4, max_batch=max_batch)):
        with pytest.raises(MixingError, match="model: mixes the inputs of a batch"):
            e.attribute(torch.randn(4, D), 1, args)


BIAS = torch.randn(B, D)


@pytest.mark.parametrize(
    "model",
    [lambda x: NET(x * BIAS[: len(x)]), lambda x: NET(x) * len(x), lambda x: NET(x - x.detach().mean(0))],
    ids=["place", "number", "detached mean"],
)
def test_a_model_that_knows_places_or_numbers(model: Any) -> None:
    with pytest.raises(ValueError, match="changes with its place in a pass or with the number of rows"):
        Gradient(model).attribute(torch.randn(4, D), 1)


@pytest.mark.filterwarnings("ignore:4 of 4 maps are zero everywhere", "ignore:1 of 1 maps")
def test_what_is_no_mixing() -> None:
    """Rows of the same numbers, rows that do not count, rounding that turns a decision, and one row."""
    x = torch.ones(4, D)
    for model in (
        NET,
        lambda x: x.detach() @ torch.ones(D, 3),
        lambda x: (NET(x) * 8).round() + NET(x),
        lambda x: x.pow(2),
    ):
        Gradient(model, unused_inputs="zero").attribute(x, 1)


def test_one_input_of_a_model_that_mixes() -> None:
    """It has a map of its own, in passes of one row; with another input it has none."""

    def model(x: Tensor) -> Any:
        return NET(x - x.mean(0) / 2)

    x = torch.randn(1, D)
    e = SmoothGrad(model, num_samples=4, sigma=0.0)
    with pytest.warns(BatchWarning, match="explained in passes of one row"):
        found = e.attribute(x, 1)
    torch.testing.assert_close(found, row_by_row(model, x, 1))
    torch.testing.assert_close(e.attribute(x, 1), found)
