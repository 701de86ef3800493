"""Captured steps against the same steps one by one, on a tape that records what a CUDA graph would (tape.py).

What only a GPU can show (streams, memory pools, the capture itself) is in test_cuda.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import in_threads, others
from tape import Tape
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SparseMoreauGrad,
    Tiles,
    ops,
    zoo,
)
from moreau_ext.capture.records import Parts
from moreau_ext.capture.runner import GraphRunner, Graphs, PaddedRunner, Runner
from moreau_ext.capture.weights import Weights
from moreau_ext.solvers.errors import Errors

SOLVERS = {
    "auto": AdaptiveProximalGradient(),
    "long": AdaptiveProximalGradient(2e-3, 1200),
    "fixed": ProximalGradient(4, 47),
    "stops": ProximalGradient(8, 100, tol=0.2),
    "paper": ProximalGradient.paper(4, 130),
    "bank": ProximalGradient(4, 40, noise="fixed", average_last=1),
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures at the first use, so that the second explanation replays all there is."""
    monkeypatch.setattr("moreau_ext.capture.runner._WORTH", 1)


def on_tape(explainer: Any, mode: Any = "auto") -> list[Tape]:
    """Gives an explainer graphs on a tape; the tapes made for it."""
    tapes: list[Tape] = []

    def make(device: torch.device) -> Tape:
        tapes.append(Tape(device))
        return tapes[-1]

    object.__setattr__(explainer, "_graphs", Graphs(mode, make))
    return tapes


class OneByOne:
    """The sizes of replays, and nothing captured."""

    def runner(self, model: Any, device: torch.device) -> AbstractContextManager[Runner]:
        return nullcontext(PaddedRunner())


def one_by_one(explainer: Any) -> None:
    object.__setattr__(explainer, "_graphs", OneByOne())


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Errors):
        return list(vars(value).values())
    return [t for v in value for t in flat(v)] if isinstance(value, tuple) else [value]


def same(a: Any, b: Any) -> None:
    for f in fields(a):
        for u, v in zip(flat(getattr(a, f.name)), flat(getattr(b, f.name)), strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=0, equal_nan=True, msg=f.name)


def explainers(solver: Any) -> dict[str, Callable[[Any], Any]]:
    settings = {"rho": 0.1, "solver": solver, "cuda_graphs": "auto"}
    return {
        "moreau": lambda m: MoreauGrad(m, **settings),
        "sparse": lambda m: SparseMoreauGrad(m, eta_ratio=0.3, **settings),
        "sparse in chunks": lambda m: SparseMoreauGrad(m, eta=0.2, max_batch=19, **settings),
        "group": lambda m: GroupSparseMoreauGrad(m, eta_ratio=0.5, groups=Tiles(2), **settings),
        "score": lambda m: MoreauGrad(m, score="margin", **settings),
    }


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", explainers(None))
def test_replays_give_the_bits_of_steps_one_by_one(solver: str, name: str) -> None:
    """Twice, with other inputs, targets and ids: a graph that froze any of them would say so."""
    model = zoo.trained("digits_cnn")
    x = zoo.digits("test").inputs[:14]
    replayed, stepped = (explainers(SOLVERS[solver])[name](model) for _ in range(2))
    tapes = on_tape(replayed)
    one_by_one(stepped)
    captures = []
    for rows, target, ids in ((slice(0, 7), None, None), (slice(7, 14), 3, torch.arange(7) + 500)):
        a = replayed.attribute(x[rows], target, ids=ids, return_solution=True)
        b = stepped.attribute(x[rows], target, ids=ids, return_solution=True)
        same(a, b)
        captures.append(tapes[0].captures)
    assert tapes[0].replays > 8
    if solver in ("fixed", "paper", "bank"):
        # The first pass, and the stretches of an explanation: before averaging and while averaging, and the steps of
        # both that measure the variance.
        # Few steps measure: theirs may be worth a graph only in the second call.
        assert captures[0] <= captures[1] <= 5 * (2 if "chunks" in name else 1)


def test_replays_agree_with_an_explainer_without_graphs() -> None:
    x = zoo.digits("test").inputs[:13]
    for solver in SOLVERS.values():
        plain, replayed = (
            SparseMoreauGrad(zoo.trained("digits_cnn_softplus"), rho=0.1, eta_ratio=0.3, solver=solver)
            for _ in range(2)
        )
        on_tape(replayed)
        a, b = (e.attribute(x, return_solution=True) for e in (plain, replayed))
        torch.testing.assert_close(a.attribution, b.attribution, rtol=1e-3, atol=1e-5)
        assert torch.equal(a.steps, b.steps)


def test_found_settings_tuples_and_arguments() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor, scale: Tensor, more: dict[str, Tensor]) -> Tensor:
            return (a.tanh().sum((1, 2)) * b.sin().sum(1) * scale + more["shift"] * a.mean((1, 2)))[:, None]

    class Photos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    generator = torch.Generator().manual_seed(1)
    digits = zoo.digits("test").inputs[:9]
    for made, calls in (
        (
            lambda: SparseMoreauGrad(Two().eval(), eta_ratio=0.1, rho=0.3, solver=ProximalGradient(4, 30)),
            [
                (
                    (torch.randn(4, 2, 3, generator=generator), torch.randn(4, 5, generator=generator)),
                    (torch.rand(4, generator=generator), {"shift": torch.tensor(float(i))}),
                )
                for i in range(3)
            ],
        ),
        (
            lambda: SparseMoreauGrad(zoo.trained("digits_cnn"), radius=0.5, support=9),
            [(digits, None), (digits.flip(0), None)],
        ),
        (
            lambda: SparseMoreauGrad(zoo.trained("digits_cnn"), support=9, solver=ProximalGradient(8, 60), rho=0.1),
            [(digits, None), (digits.flip(0), None)],
        ),
        (
            lambda: MoreauGrad(Photos().eval(), rho="auto"),
            [
                (torch.rand(3, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last), None)
                for _ in range(2)
            ],
        ),
    ):
        torch.manual_seed(0)
        replayed = made()
        stepped = copy.deepcopy(replayed)
        tapes = on_tape(replayed)
        one_by_one(stepped)
        for x, arguments in calls:
            same(
                replayed.attribute(x, None, arguments, return_solution=True),
                stepped.attribute(x, None, arguments, return_solution=True),
            )
        assert tapes[0].replays > 0


def test_fixed_features_replay() -> None:
    """A graph that froze a mask, or the values of fixed features, would say so."""
    x = zoo.digits("test").inputs[:9]
    replayed = GroupSparseMoreauGrad(zoo.trained("digits_cnn"), groups=Tiles(2, "sqrt"), support=4, rho=0.1)
    stepped = copy.deepcopy(replayed)
    tapes = on_tape(replayed)
    one_by_one(stepped)
    for inputs, fixed in ((x, x < 0.5), (x.flip(0), x.flip(0) < 0.2)):
        same(
            replayed.attribute(inputs, fixed=fixed, return_solution=True),
            stepped.attribute(inputs, fixed=fixed, return_solution=True),
        )
    assert tapes[0].replays > 0


def test_the_path_replays() -> None:
    x = zoo.digits("test").inputs[:5]
    replayed, stepped = (SparseMoreauGrad(zoo.trained("digits_cnn"), rho=0.1) for _ in range(2))
    tapes = on_tape(replayed)
    one_by_one(stepped)
    for a, b in zip(replayed.eta_path(x, [0.9, 0.3]), stepped.eta_path(x, [0.9, 0.3]), strict=True):
        same(a, b)
    assert tapes[0].replays > 0


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)).eval()


def test_weights_may_change_and_may_move() -> None:
    model, x = small(), torch.randn(4, 6)
    explainer = MoreauGrad(model, solver=ProximalGradient(4, 20))
    tapes = on_tape(explainer)

    def right() -> bool:
        plain = MoreauGrad(model, solver=ProximalGradient(4, 20))
        return torch.equal(explainer.attribute(x, 0), plain.attribute(x, 0))

    assert right()
    captures = tapes[0].captures
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert right()
    assert tapes[0].captures == captures, "values in place need no new graph"
    model[0].weight.data = model[0].weight.data * 2
    assert right()
    assert len(tapes) == 2, "other memory does"
    model[2] = nn.Linear(8, 3).eval()
    assert right()
    assert len(tapes) == 3
    model.load_state_dict(small().state_dict())
    assert right()
    assert len(tapes) == 3


@pytest.mark.parametrize("solver", [ProximalGradient(4, 40), AdaptiveProximalGradient()])
def test_a_model_that_waits_for_a_value_runs_one_by_one(solver: Any) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(1) if float(x.detach().mean()) < 100 else x.sum(1)

    x = torch.randn(3, 5)
    explainer, plain = (MoreauGrad(Waits().eval(), solver=solver) for _ in range(2))
    tapes = on_tape(explainer)
    with pytest.warns(UserWarning, match=r"cannot be captured as a CUDA graph \(.*_local_scalar_dense") as said:
        maps = explainer.attribute(x)
    assert len(others(said)) == 1
    assert torch.equal(maps, plain.attribute(x))
    assert torch.equal(explainer.attribute(x), maps)  # and does not try again: warnings are errors here
    assert tapes[0].replays == 0


def test_errors_of_the_model_are_its_own() -> None:
    class Fails(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            if self.passes > 2:
                raise KeyError("of the model")
            return x.square().sum(1)

    explainer = MoreauGrad(Fails().eval(), solver=ProximalGradient(2, 20))
    on_tape(explainer)
    with pytest.raises(KeyError, match="of the model"):
        explainer.attribute(torch.randn(2, 3))
    # The lock is free again.
    with explainer._graphs.runner(small(), torch.device("cpu")) as runner:
        assert type(runner) is GraphRunner


def test_what_is_not_captured() -> None:
    """Functions, unless asked for; models with hooks, which a replay would leave out; anything, when switched off."""
    x = torch.randn(2, 6)
    seen: list[int] = []
    hooked = small()
    hooked[0].register_forward_hook(lambda *_: seen.append(1))
    model = small()
    for subject, mode, expected in (
        (model, "auto", True),
        (model, False, False),
        (hooked, "auto", False),
        (lambda x: model(x), "auto", False),
        (lambda x: model(x), True, True),
    ):
        explainer = MoreauGrad(subject, solver=ProximalGradient(2, 20))
        tapes = on_tape(explainer, mode)
        explainer.attribute(x, 0)
        assert bool(tapes) == expected
    assert len(seen) == 23  # 20 steps, one pass for f(x), two that measure memory
    for wrong in ("always", 1, None):
        with pytest.raises(ValueError, match="cuda_graphs: expected 'auto', True or False"):
            MoreauGrad(model, cuda_graphs=wrong)


def test_a_change_shows_in_every_module() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = [1.0]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factors[0]

    model = nn.Sequential(*(Scale() for _ in range(9)), nn.Linear(6, 3)).eval()
    known = Weights(model)
    assert known.unmoved(model)
    for module in model[:9]:
        module.factors[0] = 2.0
        assert not known.unmoved(model)
        module.factors[0] = 1.0
        assert known.unmoved(model)


def test_a_model_with_a_sparse_buffer_runs_step_by_step() -> None:
    model = small()
    model.register_buffer("kept", torch.eye(3).to_sparse())
    explainer = MoreauGrad(model, solver=ProximalGradient(2, 20))
    tapes = on_tape(explainer)
    x = torch.randn(2, 6)
    assert torch.equal(explainer.attribute(x, 0), explainer.attribute(x, 0))
    assert not tapes


def test_what_a_replay_would_freeze_is_not_captured() -> None:
    """Objects whose insides nobody sees, unless asked for; a model whose numbers or modules have changed."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factor, self.table = small(), 1.0, torch.ones(3)
            self.config = SimpleNamespace(scales=[1.0, {"last": 1.0}])

        def forward(self, x: Tensor) -> Tensor:
            first, last = self.config.scales
            return self.net(x) * self.factor * self.table * first * last["last"]

    class Which:
        index = 0

        def __call__(self, output: Tensor) -> Tensor:
            return output[:, self.index]

    x, target = torch.randn(2, 6), Which()
    model = Scale().eval()
    explainer = MoreauGrad(model, solver=ProximalGradient(2, 20))
    tapes = on_tape(explainer)

    def right(target: Any) -> bool:
        found = explainer.attribute(x, target)
        return torch.equal(found, MoreauGrad(model, solver=ProximalGradient(2, 20)).attribute(x, target))

    assert right(target)
    target.index = 1
    assert right(target)
    assert not tapes
    for change in (
        lambda: None,
        lambda: setattr(model, "factor", 3.0),
        lambda: setattr(model, "table", torch.full((3,), 2.0)),
        lambda: model.config.scales.__setitem__(0, 3.0),
        lambda: model.config.scales[1].update(last=0.5),
        lambda: model.net.__setitem__(1, nn.Tanh().eval()),
    ):
        change()
        assert right(0)
        replays = tapes[-1].replays
        assert right(0)
        assert tapes[-1].replays > replays
    assert len(tapes) == 6
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert right(0)
    assert len(tapes) == 6


def test_in_bfloat16() -> None:
    x = zoo.digits("test").inputs[:7]
    for solver in (SOLVERS["auto"], SOLVERS["fixed"]):
        replayed, stepped = (
            SparseMoreauGrad(zoo.trained("digits_cnn"), rho=0.1, solver=solver, precision="bfloat16") for _ in range(2)
        )
        tapes = on_tape(replayed)
        one_by_one(stepped)
        same(replayed.attribute(x, return_solution=True), stepped.attribute(x, return_solution=True))
        assert tapes[0].replays > 8


def test_rows_that_were_found_to_fit_are_part_of_a_capture() -> None:
    """Calls that know the same limit share graphs; a pass that had to be halved is captured in halves from then on."""
    rows: list[int] = []

    class Tight(nn.Module):
        """Has memory for 12 rows, once it is tight."""

        def __init__(self) -> None:
            super().__init__()
            self.net = zoo.trained("digits_cnn")
            self.most = 1000

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            rows.append(len(x))
            found: Tensor = self.net(x)
            return found

    model, x = Tight().eval(), zoo.digits("test").inputs[:5]
    explainer = MoreauGrad(model, rho=0.1, solver=ProximalGradient(4, 40))
    tapes = on_tape(explainer)
    expected = explainer.attribute(x)
    once = tapes[0].captures
    torch.testing.assert_close(explainer.attribute(x), expected, rtol=0, atol=0)
    assert tapes[0].captures == once
    model.most = 12
    explainer._graphs._forget()
    with pytest.warns(UserWarning, match="out of memory with 20 rows in a pass"):
        torch.testing.assert_close(explainer.attribute(x), expected, rtol=1e-4, atol=1e-6)
    replays = tapes[-1].replays
    rows.clear()
    torch.testing.assert_close(explainer.attribute(x), expected, rtol=1e-4, atol=1e-6)
    assert max(rows) <= 10
    assert tapes[-1].replays > replays


def test_threads_share_an_explainer() -> None:
    """One replays, the others step meanwhile; all get the same bits."""
    x = zoo.digits("test").inputs[:6]
    explainer = SparseMoreauGrad(zoo.trained("digits_cnn"), rho=0.1, solver=ProximalGradient(4, 40))
    expected = explainer.attribute(x)
    on_tape(explainer)
    found: list[Tensor] = []
    in_threads(lambda given: found.append(explainer.attribute(given)), x, x, x, x)
    assert len(found) == 4
    assert all(torch.equal(maps, expected) for maps in found)


def test_two_explainers_do_not_share() -> None:
    model, x = small(), torch.randn(4, 6)
    one, two = (MoreauGrad(model, rho=r, solver=ProximalGradient(4, 30)) for r in (0.5, 1.0))
    alone = [MoreauGrad(model, rho=r, solver=ProximalGradient(4, 30)).attribute(x, 0) for r in (0.5, 1.0)]
    on_tape(one)
    on_tape(two)
    for _ in range(2):
        assert torch.equal(one.attribute(x, 0), alone[0])
        assert torch.equal(two.attribute(x, 0), alone[1])


def test_what_is_given_out_stays() -> None:
    """No field of a solution is memory that a later replay writes."""
    x = zoo.digits("test").inputs[:8]
    for solver in SOLVERS.values():
        explainer = SparseMoreauGrad(zoo.trained("digits_cnn"), rho=0.1, eta_ratio=0.2, solver=solver)
        on_tape(explainer)
        first = explainer.attribute(x, return_solution=True)
        kept = copy.deepcopy(first)
        explainer.attribute(x.flip(0), 2)
        same(first, kept)


def test_memory_goes_with_the_explainer_and_old_graphs_with_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moreau_ext.capture.runner._KEPT", 9
    )  # three a size: the first pass, steps, and a measuring one
    model = small()
    explainer = MoreauGrad(model, solver=ProximalGradient(2, 20, average_last=1))
    on_tape(explainer)
    captured: list[weakref.ref[Any]] = []
    for batch in range(1, 7):
        explainer.attribute(torch.randn(batch, 6), 0)
        captured.append(weakref.ref(next(reversed(explainer._graphs._captured.values()))))
    gc.collect()
    assert [r() is not None for r in captured] == [False, False, False, True, True, True]
    assert len(explainer._graphs._uses) == 9
    del explainer
    gc.collect()
    assert all(r() is None for r in captured)


def test_results() -> None:
    """A result is the caller's: neither the graph's memory nor the record's, and nothing of the record has changed."""

    @dataclass
    class Record:
        a: Tensor

    def body(record: Record) -> dict[str, Any]:
        return {"sum": (record.a * 2 + 1, record.a), "n": 3}

    graphs = Graphs("auto", Tape)
    found, given = [], []
    with graphs.runner(small(), torch.device("cpu")) as runner:
        for i in range(4):
            record = Record(torch.full((3,), float(i)))
            given.append(record)
            found.append(runner.call(body, record))
    assert len(graphs._captured) == 1
    for i, (record, result) in enumerate(zip(given, found, strict=True)):
        assert torch.equal(result["sum"][0], torch.full((3,), 2.0 * i + 1))
        assert torch.equal(result["sum"][1], torch.full((3,), float(i)))
        assert torch.equal(record.a, torch.full((3,), float(i)))
        assert i == 0 or result["sum"][1] is not record.a
        assert result["n"] == 3


def test_the_tensors_that_a_body_writes_are_found() -> None:
    """By aten's operations, by those of this package, and in tensors of a list; what is only read stays as it is."""

    @dataclass
    class Record:
        read: Tensor
        written: Tensor
        total: Tensor
        many: list[Tensor]

    def body(record: Record, *, factor: float) -> None:
        record.written += factor * record.read
        ops.accumulate(record.read, record.total, carry=True)
        record.many[1].copy_(record.written)

    graphs = Graphs("auto", Tape)
    with graphs.runner(small(), torch.device("cpu")) as runner:
        for factor in (2.0, 3.0):
            for _ in range(3):
                record = Record(
                    torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), [torch.ones(2, 3) for _ in "ab"]
                )
                runner.repeat(body, record, 2, factor=factor)
                assert torch.equal(record.read, torch.ones(2, 3))
                assert torch.equal(record.written, torch.full((2, 3), 2 * factor))
                assert torch.equal(record.total, torch.full((2, 3), 2.0))
                assert torch.equal(record.many[0], torch.ones(2, 3))
                assert torch.equal(record.many[1], record.written)
    assert len(graphs._captured) == 2, "one for each value of the option"
    assert [graph._written for graph in graphs._captured.values()] == [[1, 2, 4]] * 2


def test_a_graph_is_made_for_what_comes_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moreau_ext.capture.runner._WORTH", 4)
    explainer = MoreauGrad(small(), solver=ProximalGradient(2, 4, average_last=1))
    tapes = on_tape(explainer)
    x = torch.randn(2, 6)
    expected = [explainer.attribute(x, 0) for _ in range(6)]
    assert all(torch.equal(maps, expected[0]) for maps in expected)
    # Each has a first pass, captured in the fourth, and three more steps, of which the fourth is captured.
    assert tapes[0].captures == 3  # the last step is one that measures
    assert tapes[0].replays == 2 + 2 + 9


def test_copies_and_pickles_begin_anew() -> None:
    explainer = MoreauGrad(small(), solver=ProximalGradient(2, 20))
    tapes = on_tape(explainer)
    x = torch.randn(2, 6)
    maps = explainer.attribute(x, 0)
    other = copy.deepcopy(explainer)
    assert torch.equal(other.attribute(x, 0), maps)
    assert other._graphs is not explainer._graphs
    assert len(tapes) == 2
    plain = pickle.loads(pickle.dumps(MoreauGrad(small(), solver=ProximalGradient(2, 20))))
    assert torch.equal(plain.attribute(x, 0), maps)


def test_settings_that_would_be_frozen_get_their_own_graphs() -> None:
    explainer = MoreauGrad(small(), solver=ProximalGradient(2, 20, average_last=1))
    tapes = on_tape(explainer)
    x = torch.randn(2, 6)
    plain = explainer.attribute(x, 0)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(explainer.attribute(x, 0), plain)
    finally:
        torch.use_deterministic_algorithms(False)
    assert tapes[0].captures == 3 * 2  # the first step, those that measure, all others
    with torch.autocast("cpu", torch.bfloat16):  # does not count
        assert torch.equal(explainer.attribute(x, 0), plain)
    assert tapes[0].captures == 3 * 2  # the first step, those that measure, all others


def test_sizes_are_few() -> None:
    graphs = Graphs("auto", Tape)
    with graphs.runner(small(), torch.device("cpu")) as runner:
        assert [runner.bucket(n, 40, 1) for n in (40, 39, 21, 20, 11, 10, 9, 5, 3, 2, 1)] == [
            *(40, 40, 40, 20, 20, 10, 10, 5, 3, 2, 1)
        ]
        assert runner.bucket(21, 40, 1 << 23) == 21, "too large to be captured: none is filled up"
    assert Runner().bucket(21, 40, 1) == 21


def test_records() -> None:
    @dataclass
    class Inner:
        table: Tensor
        buffer: Tensor

    @dataclass
    class Record:
        inner: Inner
        state: tuple[Tensor, ...]
        other: Any

    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    record = Record(Inner(a, b), (c, b), {"a": [a, 1, "x"]})
    parts = Parts(record)
    assert [t is u for t, u in zip(parts.tensors, (a, b, c), strict=True)] == [True] * 3
    mine = parts.copied(record, [a + 10, b + 10, c + 10])
    assert isinstance(mine, Record)
    assert mine.inner.buffer is mine.state[1]
    assert mine.other["a"][0] is mine.inner.table
    assert mine.other["a"][1:] == [1, "x"]
    assert record.inner.table is a
    again = Record(Inner(a.clone(), b.clone()), (c.clone(), b), {"a": [a, 1, "x"]})
    assert Parts(again).signature != parts.signature, "one tensor fewer is shared"
    for other in (
        Record(Inner(a, b), (c, b), {"a": [a, 2, "x"]}),
        Record(Inner(a, b), (c.double(), b), {"a": [a, 1, "x"]}),
        Record(Inner(a, b), (c[None], b), {"a": [a, 1, "x"]}),
        Record(Inner(a, b), (c, b), {"a": [a, 1, "x", object()]}),
    ):
        assert Parts(other).signature != parts.signature
    assert Parts(copy.deepcopy(record)).signature == parts.signature
