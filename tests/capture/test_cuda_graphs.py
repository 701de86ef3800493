"""Captured steps on a real GPU. Skipped where there is no CUDA device; test_graphs.py has what a tape can show."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CUDA_MISSING, DEVICE, in_threads, others
from test_graphs import SOLVERS, explainers, one_by_one, same
from torch import Tensor, nn

from moreau_ext import AdaptiveProximalGradient, MoreauGrad, ProximalGradient, SparseMoreauGrad, zoo
from moreau_ext.capture.runner import Runner

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(CUDA_MISSING is not None, reason=str(CUDA_MISSING))]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures at the first use, so that the second explanation replays all there is."""
    monkeypatch.setattr("moreau_ext.capture.runner._WORTH", 1)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def net() -> nn.Module:
    return zoo.trained("digits_cnn").to(DEVICE)


def digits(count: int) -> Tensor:
    return zoo.digits("test").inputs[:count].to(DEVICE)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", explainers(None))
def test_replays_give_the_bits_of_steps_one_by_one(solver: str, name: str) -> None:
    model, x = net(), digits(22)
    replayed, stepped = (explainers(SOLVERS[solver])[name](model) for _ in range(2))
    one_by_one(stepped)
    for rows, target, ids in ((slice(0, 11), None, None), (slice(11, 22), 3, torch.arange(11) + 500)):
        a = replayed.attribute(x[rows], target, ids=ids, return_solution=True)
        b = stepped.attribute(x[rows], target, ids=ids, return_solution=True)
        same(a, b)
    assert replayed._graphs._captured


@pytest.mark.parametrize("name", ["sparse", "group"])
def test_maps_are_those_of_the_cpu_to_rounding(name: str) -> None:
    x = digits(6)
    make = explainers(ProximalGradient(4, 40))[name]
    here, there = make(zoo.trained("digits_cnn_softplus")), make(zoo.trained("digits_cnn_softplus").to(DEVICE))
    torch.testing.assert_close(there.attribute(x).cpu(), here.attribute(x.cpu()), rtol=1e-3, atol=1e-4)


def test_a_stream_of_the_callers_and_work_that_is_still_to_come() -> None:
    """What the caller's stream has not yet written is read when it has, and what is given out is ready on it."""
    explainer = SparseMoreauGrad(net(), rho=0.1, solver=ProximalGradient(4, 40), cuda_graphs="auto")
    x = digits(6)
    expected = explainer.attribute(x)
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        maps = explainer.attribute(late)
        doubled = maps * 2
    stream.synchronize()
    assert torch.equal(maps, expected)
    assert torch.equal(doubled, expected * 2)


def test_two_explainers_on_two_streams_and_one_on_two_threads() -> None:
    x = digits(12)
    explainers = [
        SparseMoreauGrad(net(), rho=r, solver=ProximalGradient(4, 60), cuda_graphs="auto") for r in (0.1, 0.2)
    ]
    expected = [e.attribute(x) for e in explainers]
    wrong: list[int] = []

    def work(which: int) -> None:
        stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(stream):
            maps = [explainers[which].attribute(x) for _ in range(10)]
            wrong.extend(which for a in maps if not torch.equal(a, expected[which]))

    torch.cuda.synchronize(DEVICE)
    in_threads(work, 0, 1, 0, 1)
    assert wrong == []


def test_a_capture_disturbs_no_other_thread() -> None:
    """Another thread allocates and waits all the while. It must not draw from torch's generator of the device, which
    any capture has to itself; a generator of its own may."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def other() -> None:
        try:
            stream, generator = torch.cuda.Stream(DEVICE), torch.Generator(DEVICE)
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    t = torch.randn(1 << 20, device=DEVICE, generator=generator)
                    float(t.sum())
                    torch.cuda.empty_cache()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for batch in range(1, 6):
            explainer = MoreauGrad(net(), rho=0.1, solver=ProximalGradient(4, 30), cuda_graphs="auto")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                explainer.attribute(digits(batch))
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_a_model_that_waits_for_a_value_runs_one_by_one() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(1) if float(x.detach().mean()) < 100 else x.sum(1)

    x = torch.randn(3, 5, device=DEVICE)
    explainer = MoreauGrad(Waits().eval(), solver=ProximalGradient(4, 40), cuda_graphs="auto")
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph") as said:
        maps = explainer.attribute(x)
    assert len(others(said)) == 1
    plain = MoreauGrad(Waits().eval(), solver=ProximalGradient(4, 40), cuda_graphs=False)
    assert torch.equal(maps, plain.attribute(x))
    # The device is as good as before.
    other = MoreauGrad(net(), rho=0.1, solver=ProximalGradient(4, 40), cuda_graphs="auto")
    other.attribute(digits(3))
    assert other._graphs._captured


def test_an_autocast_of_the_callers_that_comes_again() -> None:
    """Its weights are cast anew each time, and the last ones may be anything by then."""
    explainer, x = MoreauGrad(net(), rho=0.1, solver=ProximalGradient(4, 40), cuda_graphs="auto"), digits(6)
    plain = MoreauGrad(net(), rho=0.1, solver=ProximalGradient(4, 40), cuda_graphs=False)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found, expected = explainer.attribute(x), plain.attribute(x)
        assert torch.equal(found, expected)
        spoil = [torch.full((n,), float("nan"), device=DEVICE) for n in (1 << 10, 1 << 14, 1 << 18) for _ in range(40)]
        del spoil


def test_a_number_of_the_cpu_is_not_frozen() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return (x.tanh() * scale).sum(1)

    x = torch.randn(3, 5, device=DEVICE)
    explainer = MoreauGrad(Scaled().eval(), solver=ProximalGradient(4, 40), cuda_graphs="auto")
    plain = MoreauGrad(Scaled().eval(), solver=ProximalGradient(4, 40), cuda_graphs=False)
    for scale in (torch.tensor(1.0), torch.tensor(2.0)):
        assert torch.equal(explainer.attribute(x, None, scale), plain.attribute(x, None, scale))


def test_what_is_lent_to_cublas_outlives_other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the workspaces of a stream back when a graph that was captured there is destroyed, and all of them
    when told to; graphs that go on must not write to what is then somebody else's memory, nor read it."""
    monkeypatch.setattr("moreau_ext.capture.runner._KEPT", 2)
    torch.manual_seed(0)
    # Long rows and few of them: products that are split and added up in a workspace.
    model = nn.Sequential(nn.Linear(16384, 64), nn.Softplus(), nn.Linear(64, 10)).eval().to(DEVICE)
    x = torch.rand(8, 16384, device=DEVICE)
    make = explainers(ProximalGradient(4, 40))["sparse"]
    replayed, stepped = make(model), make(model)
    one_by_one(stepped)
    expected = {count: stepped.attribute(x[:count]) for count in (1, 2, 4, 8)}
    for _ in range(2):
        for count in (1, 2, 4, 8):  # each drives another out
            assert torch.equal(replayed.attribute(x[:count]), expected[count])
            make(model).attribute(x[:count])  # captures too, and is gone
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            theirs = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(8)]
            assert torch.equal(replayed.attribute(x[:count]), expected[count])
            assert all(bool(t.isnan().all()) for t in theirs)
    assert replayed._graphs._captured


def test_memory_is_returned_with_the_explainer() -> None:
    model, x = net(), digits(32)
    MoreauGrad(model, rho=0.1, cuda_graphs="auto").attribute(x)  # what libraries keep
    gc.collect()
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    explainer = MoreauGrad(model, rho=0.1, cuda_graphs="auto")
    explainer.attribute(x)
    assert torch.cuda.memory_allocated(DEVICE) > before[0]
    del explainer
    gc.collect()
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(DEVICE) == before[0]
    # A block or two may stay in the cache of another stream.
    assert torch.cuda.memory_reserved(DEVICE) <= before[1] + (4 << 20)


def test_200_calls_of_changing_sizes_leave_the_memory_as_it_was() -> None:
    """Explainers and their graphs are dropped in between, or live on beside new ones."""
    model, x = net(), digits(64)
    make = explainers(ProximalGradient(4, 8))
    names, sizes = ("moreau", "sparse", "group"), (4, 64, 1, 16, 33, 64, 7)
    expected: dict[tuple[str, int], Tensor] = {}
    for name in names:
        stepped = make[name](model)
        one_by_one(stepped)
        expected |= {(name, size): stepped.attribute(x[:size]) for size in sizes}
    alive: dict[str, Any] = {}
    memory: list[int] = []
    for turn in range(200):
        name, size = names[turn % 3], sizes[turn % 7]
        if turn % 5 == 0:
            alive.pop(name, None)
        if name not in alive:
            alive[name] = make[name](model)
        assert torch.equal(alive[name].attribute(x[:size]), expected[name, size])
        if turn % 50 == 49:
            alive.clear()
            gc.collect()
            torch.cuda.synchronize(DEVICE)
            torch.cuda.empty_cache()
            memory.append(torch.cuda.memory_allocated(DEVICE))
    assert memory[1:] == memory[:1] * 3


def test_64_inputs_after_4_of_a_deep_net() -> None:
    """The calls of the benchmark that once ended with a segmentation fault at its second size, in one process."""
    for count in (4, 64):
        model = zoo.resnet20().eval().to(DEVICE)
        x = torch.rand(count, 3, 32, 32, device=DEVICE)
        made: list[Any] = []
        for kind in (MoreauGrad, SparseMoreauGrad):
            for solver in (ProximalGradient(8, 20, tol=0.0), AdaptiveProximalGradient(0.01, 224)):
                made += [kind(model, rho=1.0, solver=solver, cuda_graphs="auto") for _ in range(2)]
                one_by_one(made[-1])
        for _ in range(3):
            maps = [explainer.attribute(x, 0) for explainer in made]
        for captured, stepped in zip(maps[::2], maps[1::2], strict=True):
            assert torch.equal(captured, stepped)


@pytest.mark.parametrize("solver", ["auto", "fixed"])
def test_no_step_waits_for_the_device(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither replayed nor one by one; nor the end of a level."""

    def waiting(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode(mode)

    def strictly(inner: Any) -> Any:
        def strict(*args: Any, **kwargs: Any) -> Any:
            waiting("error")
            try:
                return inner(*args, **kwargs)
            finally:
                waiting("default")

        return strict

    for name in ("repeat", "call"):
        monkeypatch.setattr(Runner, name, strictly(getattr(Runner, name)))
    explainer = SparseMoreauGrad(net(), rho=0.1, eta_ratio=0.2, solver=SOLVERS[solver], cuda_graphs=False)
    explainer.attribute(digits(4))
