"""What a call must leave as it was: buffers, weights, generators, flags; also when it is interrupted."""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moreau_ext import Gradient, GroupSparseMoreauGrad, MoreauGrad, ProximalGradient, SmoothGrad, SparseMoreauGrad
from moreau_ext.model import modes, precision
from moreau_ext.model.memory import same_random_numbers
from moreau_ext.model.restore import Change, leaves_as_found

SOLVER = ProximalGradient(num_samples=4, max_steps=5, step_size=0.05)


class Stateful(nn.Module):
    def __init__(self, change: Callable[[Stateful, Tensor], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.full((6,), 0.5))
        self.register_buffer("lazy", None)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        self.change(self, x)
        return self.linear((x - self.mean).tanh())


def replace_buffer(m: Stateful, x: Tensor) -> None:
    m.mean = 0.9 * m.mean + 0.1


def fill_lazy(m: Stateful, x: Tensor) -> None:
    m.lazy = torch.ones(3)


def new_buffer(m: Stateful, x: Tensor) -> None:
    m.register_buffer("other", torch.ones(3))


CHANGES: dict[str, Callable[[Stateful, Tensor], Any]] = {
    "in place": lambda m, x: m.mean.mul_(0.9).add_(0.1),
    "through data": lambda m, x: m.mean.data.mul_(0.9),
    "counter": lambda m, x: m.mean.add_(1e-3),
    "replaced": replace_buffer,
    "filled": fill_lazy,
    "new": new_buffer,
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_buffers_come_back(change: str, wrapped: bool) -> None:
    model, x = Stateful(CHANGES[change]).eval(), torch.randn(3, 6)
    names, before, ids = set(dict(model.named_buffers())), copy.deepcopy(model.state_dict()), id(model.mean)
    MoreauGrad((lambda x: model(x)) if wrapped else model, rho=0.1, solver=SOLVER).attribute(x, 0)
    assert set(dict(model.named_buffers())) == names
    assert id(model.mean) == ids
    assert model.lazy is None
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("change", ["in place", "replaced", "counter"])
def test_every_pass_begins_with_the_buffers_given(change: str) -> None:
    """So the map is that of one function, which plain autograd differentiates."""
    model, x = Stateful(CHANGES[change]).eval(), torch.randn(3, 6)
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(copy.deepcopy(model)(leaf)[:, 1].sum(), leaf)[0]
    for e in (Gradient(model), SmoothGrad(model, sigma=0.0, num_samples=8, max_batch=4)):
        for _ in range(2):
            torch.testing.assert_close(e.attribute(x, 1), want)


def test_a_running_mean_of_the_batch() -> None:
    """A state that depends on the rows of a pass: it comes back, and the call says that passes are not its own."""

    def running(m: Stateful, x: Tensor) -> None:
        m.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))

    model = Stateful(running).eval()
    before = model.mean.clone()
    with pytest.warns(UserWarning, match="passes cannot be repeated"):
        MoreauGrad(model, rho=0.1, solver=SOLVER).attribute(torch.randn(3, 6) + 3, 0)
    assert torch.equal(model.mean, before)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_are_rescaled(kind: Any) -> None:
    table = kind(10, 6, max_norm=0.5)
    before = table.weight.detach().clone()

    def model(x: Tensor, ids: Tensor) -> Any:
        words = table(ids)
        return (x * (words if words.dim() == 2 else words.mean(1))).sum(1)

    ids = torch.randint(0, 10, (4, 3))
    with torch.no_grad():
        words = copy.deepcopy(table)(ids)
    found = Gradient(model).attribute(torch.randn(4, 6), None, ids)
    torch.testing.assert_close(found, words if words.dim() == 2 else words.mean(1))
    assert torch.equal(table.weight, before)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: nn.functional.dropout(x, 0.3, training=True),
    "torch.rand": lambda x: x * torch.rand(len(x), 1),
    "numpy": lambda x: x * float(np.random.rand()),  # noqa: NPY002  models draw from the legacy generator
    "python": lambda x: x * random.random(),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.filterwarnings("ignore:the model's passes cannot be repeated")
def test_the_first_call_draws_as_the_next(draw: str) -> None:
    net = nn.Linear(6, 3)
    for e in (
        MoreauGrad(lambda x: net(DRAWS[draw](x)), rho=0.1, solver=SOLVER),
        Gradient(lambda x: net(DRAWS[draw](x))),
    ):
        maps = []
        for _ in range(3):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002  models draw from the legacy generator
            random.seed(0)
            maps.append(e.attribute(torch.ones(2, 6), 0))
        assert torch.equal(maps[0], maps[1])
        assert torch.equal(maps[1], maps[2])


def test_generators_are_given_back() -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002  models draw from the legacy generator
    with same_random_numbers(torch.device("cpu")), same_random_numbers(torch.device("cpu")):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002  models draw from the legacy generator
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]  # noqa: NPY002  models draw from the legacy generator


def test_threads_take_turns_with_the_generators() -> None:
    log, inside = list[str](), threading.Event()

    def other() -> None:
        with same_random_numbers(torch.device("cpu")):
            log.append("other")

    thread = threading.Thread(target=other)
    with same_random_numbers(torch.device("cpu")):
        thread.start()
        inside.wait(0.05)
        log.append("first")
    thread.join(10)
    assert log == ["first", "other"]


# --- interrupts ------------------------------------------------------------------------------------------------------


class Half(Change):
    """Fails at a step of its own."""

    def __init__(self, state: list[int], fails: str) -> None:
        self.state, self.fails = state, fails

    def do(self) -> None:
        self.state.append(1)
        if self.fails == "do":
            raise KeyboardInterrupt

    def undo(self) -> None:
        if self.fails == "undo":
            self.fails = ""
            raise KeyboardInterrupt
        self.state.clear()


@pytest.mark.parametrize("fails", ["do", "undo", "body"])
def test_changes_are_undone(fails: str) -> None:
    state: list[int] = []

    @leaves_as_found
    def call() -> None:
        torch._C._set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        with Half(state, fails):
            if fails == "body":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert state == []
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def surroundings() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    flags = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    modes_on = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    cast = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), flags, cast, len(modes_on)


@pytest.mark.filterwarnings("ignore:the model is in train mode", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment() -> None:
    """Ctrl-C by a timer, in models in train mode with buffers that move, of every kind of call."""
    model = nn.Sequential(Stateful(CHANGES["in place"]), *[nn.Identity() for _ in range(100)]).train()
    model[0].eval()
    x, flags = torch.randn(2, 6), [m.training for m in model.modules()]
    before, random_state, base = model[0].mean.clone(), torch.get_rng_state(), surroundings()
    e = SparseMoreauGrad(model, rho=0.1, solver=SOLVER)
    s = e.attribute(x, 0, return_solution=True)
    calls: list[Callable[[], Any]] = [
        lambda: SparseMoreauGrad(model, rho=0.1, solver=SOLVER).attribute(x),
        lambda: MoreauGrad(model, rho=0.1, precision="bfloat16", solver=SOLVER).attribute(x),
        lambda: GroupSparseMoreauGrad(lambda x: model(x.flatten(1)), rho=0.1, solver=SOLVER).attribute(x[:, :, None]),
        lambda: e.certificate(x, s, num_samples=64, num_hvp_samples=64, lanczos_steps=2, hessian="autograd"),
    ]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    rng, hit, handler = random.Random(1), 0, signal.signal(signal.SIGALRM, stop)
    try:
        for k in range(60):
            call = calls[k % len(calls)]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.02))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hit += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert [m.training for m in model.modules()] == flags, k
            assert torch.equal(model[0].mean, before)
            assert torch.equal(torch.get_rng_state(), random_state)
            assert surroundings() == base
            assert not modes.evaluating._users
            assert not modes.evaluating._lock.locked()
            assert not modes.plain_attention._users
            assert not precision._flags.turns._users
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert hit > 20
