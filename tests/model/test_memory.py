"""Memory: what is predicted, what is planned for, and what happens when it does not suffice."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_threads, others
from torch import Tensor, nn

from moreau_ext import (
    AdaptiveProximalGradient,
    Gradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    SoftThresholdedSmoothGrad,
    SparseMoreauGrad,
    SparsifiedSmoothGrad,
    make_explainer,
    zoo,
)
from moreau_ext._errors import MemoryWarning
from moreau_ext.model import memory
from moreau_ext.model.bind import bind_score
from moreau_ext.model.memory import BytesAlive, Footprint, attempt, budget, measure_footprint, out_of_memory
from moreau_ext.model.passes import PassRunner
from moreau_ext.preparation.prepare import prepare
from moreau_ext.solvers.loop import in_groups
from moreau_ext.solvers.problem import Problem
from moreau_ext.solvers.solution import Solution

CPU = torch.device("cpu")
FIXED = ProximalGradient(num_samples=8, max_steps=5, step_size=0.05, tol=0.0)
# The least that they take.
SHORT, SHORT_TUNED = AdaptiveProximalGradient(max_gradients=224), AdaptiveProximalGradient(max_gradients=336)

METHODS: dict[str, Callable[..., Any]] = {
    "adaptive": lambda model, **k: SparseMoreauGrad(model, rho=0.1, solver=SHORT, **k),
    "tuned": lambda model, **k: GroupSparseMoreauGrad(model, radius=0.3, support=3, solver=SHORT_TUNED, **k),
    "fixed": lambda model, **k: MoreauGrad(model, rho=0.1, solver=FIXED, **k),
    "gradient": Gradient,
    "smoothgrad": lambda model, **k: SmoothGrad(model, num_samples=12, **k),
    "st_smoothgrad": lambda model, **k: SoftThresholdedSmoothGrad(model, num_samples=12, **k),
    "sparsified_smoothgrad": lambda model, **k: SparsifiedSmoothGrad(model, num_samples=12, **k),
}
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.SiLU(), nn.Linear(12, 4)).to(dtype).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return made


def images(batch: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


class Small:
    """A model on a device that takes so many rows at once."""

    def __init__(self, model: Callable[..., Any], rows: int, error: Callable[[], Exception] = MemoryError) -> None:
        self.model, self.rows, self.error = model, rows, error
        self.seen, self.failed = list[int](), 0

    def __call__(self, x: Tensor, *args: Any) -> Any:
        if len(x) > self.rows:
            self.failed += 1
            raise self.error()
        self.seen.append(len(x))
        return self.model(x, *args)


# --- passes that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_pass_that_does_not_fit_is_split(method: str, rows: int, error: str) -> None:
    x = images()
    expected = METHODS[method](net(), max_batch=64).attribute(x, 1, return_solution=True)
    model = Small(net(), rows, ERRORS[error])
    with pytest.warns(UserWarning, match=r"out of memory with \d+ rows in a pass; went on with \d") as said:
        found = METHODS[method](model, max_batch=64).attribute(x, 1, return_solution=True)
    assert len([w for w in said if "out of memory" in str(w.message)]) == 1
    torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-11)
    assert torch.equal(found.gradient_evaluations, expected.gradient_evaluations)
    # Halved, 60, 30, ... : a size that failed is not tried again.
    assert model.failed <= 7
    assert max(model.seen) <= rows


def test_the_next_call_knows() -> None:
    model, x = Small(net(), 3), images()
    e = SmoothGrad(model, num_samples=12, max_batch=64)
    with pytest.warns(UserWarning, match="out of memory"):
        first = e.attribute(x, 1)
    failed = model.failed
    assert torch.equal(e.attribute(x, 1), first)
    assert model.failed == failed


def test_an_image_of_another_size_is_another_matter() -> None:
    model = Small(lambda x: x.flatten(1).sum(1), 1000)
    model.model = lambda x: Small(lambda y: y.flatten(1).sum(1), 64 // x.shape[1])(x)
    e = SmoothGrad(model, num_samples=16, max_batch=64)
    with pytest.warns(UserWarning, match="out of memory"):
        e.attribute(torch.ones(1, 16))
    e.attribute(torch.ones(4, 1))  # 64 rows of it fit


def test_one_row_that_does_not_fit() -> None:
    with pytest.raises(MemoryError, match=r"model: a pass of one input, of shape \(2, 4, 4\), does not fit .* cpu"):
        Gradient(Small(net(), 0), max_batch=8).attribute(images(), 1)


def test_targets_arguments_and_tuples_are_split_with_the_rows() -> None:
    x, y = images(), images().flip(0)
    scale, shift = torch.rand(5, 1, dtype=torch.float64) + 0.5, torch.tensor(0.25, dtype=torch.float64)
    inner = net()

    def model(a: Tensor, b: Tensor, scale: Tensor, shift: Tensor, name: str) -> Tensor:
        return inner(a * b + shift) * scale

    settings: dict[str, Any] = {"rho": 0.1, "solver": FIXED}
    call = ((x, y), [0, 1, 2, 3, 0], (scale, shift, "name"))
    expected = SparseMoreauGrad(model, max_batch=64, **settings).attribute(*call)
    small: Any = Small(model, 3)
    with pytest.warns(UserWarning, match="out of memory"):
        found = SparseMoreauGrad(small, max_batch=64, **settings).attribute(*call)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hessian", ["autograd", "stein", "auto"])
def test_certificate_and_vjp(hessian: Any) -> None:
    x = images(2)
    settings: dict[str, Any] = {"rho": 0.1, "sigma": 0.3, "solver": FIXED, "max_batch": 64}
    e = SparseMoreauGrad(net(), **settings)
    s = e.attribute(x, 1, return_solution=True)
    counts: dict[str, Any] = {"num_samples": 64, "num_hvp_samples": 64, "lanczos_steps": 3, "hessian": hessian}
    proof, v = e.certificate(x, s, 1, **counts), e.vjp(x, s, torch.ones_like(x), 1, num_samples=16, hessian=hessian)
    small = SparseMoreauGrad(Small(net(), 5), **settings)
    with pytest.warns(UserWarning, match="out of memory"):
        again = small.certificate(x, s, 1, **counts)
    torch.testing.assert_close(again.residual, proof.residual, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(again.smoothness, proof.smoothness, rtol=1e-6, atol=1e-9)
    assert again.curvature_method == proof.curvature_method
    w = small.vjp(x, s, torch.ones_like(x), 1, num_samples=16, hessian=hessian)  # knows its limit by now
    torch.testing.assert_close(w, v, rtol=1e-6, atol=1e-9)


def test_paths_and_measured_rho() -> None:
    x = images(2)
    settings: dict[str, Any] = {"rho": "auto", "sigma": 0.3, "solver": SHORT, "max_batch": 64}
    expected = SparseMoreauGrad(net(), **settings).eta_path(x, [0.5, 0.2], 1)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = SparseMoreauGrad(Small(net(), 5), **settings).eta_path(x, [0.5, 0.2], 1)
    assert len(others(said)) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.attribution, b.attribution, rtol=1e-6, atol=1e-9)


def test_integrated_gradients() -> None:
    pytest.importorskip("captum", reason="Integrated Gradients are captum's")
    x = images()
    expected = make_explainer("integrated_gradients", net(), n_steps=8).attribute(x, 1)
    with pytest.warns(UserWarning, match="out of memory"):
        found = make_explainer("integrated_gradients", Small(net(), 3), n_steps=8, max_batch=64).attribute(x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_threads_share_an_explainer() -> None:
    x = images()
    expected = SmoothGrad(net(), num_samples=12, max_batch=64).attribute(x, 1)
    e = SmoothGrad(Small(net(), 3), num_samples=12, max_batch=64)
    found = list[Tensor]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_threads(lambda given: found.append(e.attribute(given, 1)), x, x, x, x)
    assert len(found) == 4
    for a in found:
        torch.testing.assert_close(a, expected, rtol=1e-9, atol=1e-11)


def test_the_failed_pass_is_freed_before_the_next() -> None:
    """An exception holds its frames, and they their tensors; the pass that follows must not stand beside them."""
    alive: list[Any] = []

    class Big(Tensor):
        pass

    def model(x: Tensor) -> Tensor:
        gc_free = sum(r() is not None for r in alive)
        held = torch.ones(1000).as_subclass(Big)
        alive.append(__import__("weakref").ref(held))
        assert gc_free == 0
        if len(x) > 2:
            raise MemoryError
        return x.sum(1) + held.sum().as_subclass(Tensor)

    gc.disable()
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            Gradient(model, max_batch=8).attribute(torch.ones(8, 3))
    finally:
        gc.enable()
    assert len(alive) > 3


def test_other_errors_are_not_memory() -> None:
    for error in (RuntimeError("boom"), ValueError("allocate memory")):
        assert not out_of_memory(error)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        Gradient(broken, max_batch=4).attribute(images(), 1)


def test_a_probe_of_prepare_and_its_checks() -> None:
    class Module(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.net, self.rows = net(torch.float32), rows

        def forward(self, x: Tensor) -> Any:
            if len(x) > self.rows:
                raise torch.OutOfMemoryError("out of memory")
            return self.net(x)

    for rows in (1, 2, 5):
        ready = prepare(Module(rows).eval(), images(dtype=torch.float32))
        assert ready.max_batch <= rows
        assert {lever.name: lever.applied for lever in ready.report}["freeze"]


# --- groups that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [None, 64])
@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_does_not_fit_is_solved_in_halves(
    method: str, max_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noisy copies of more than a few rows cannot be allocated."""
    from moreau_ext.solvers import samples

    x = images()
    expected = METHODS[method](net(), max_batch=64).attribute(x, 1, return_solution=True)
    real, asked = samples.rows_like, list[int]()

    def small(like: Tensor, rows: int) -> Tensor:
        asked.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(like, rows)

    monkeypatch.setattr(samples, "rows_like", small)
    e = METHODS[method](net(), max_batch=max_batch)
    with pytest.warns(UserWarning, match=r"out of memory with 5 inputs at once; went on with half of them") as said:
        found = e.attribute(x, 1, return_solution=True)
    assert len(others(said)) == 1
    torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-11)
    assert torch.equal(found.gradient_evaluations, expected.gradient_evaluations)


def test_a_group_that_never_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from moreau_ext.solvers import samples

    def never(like: Tensor, rows: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples, "rows_like", never)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        MoreauGrad(net(), rho=0.1, solver=FIXED, max_batch=64).attribute(images(), 1)


# --- prediction ------------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval(), torch.rand(6, 3, 16, 16)),
    "tabular_mlp": lambda: (zoo.tabular_mlp(), torch.rand(6, 30)),
    "digits_cnn": lambda: (zoo.digits_cnn(), torch.rand(6, 1, 8, 8)),
    "softplus": lambda: (zoo.digits_cnn("softplus"), torch.rand(6, 1, 8, 8)),
    "vit": lambda: (zoo.tiny_vit(image_size=8, patch=2, dim=32, depth=2, channels=1), torch.rand(6, 1, 8, 8)),
    "resnet20": lambda: (zoo.resnet20(), torch.rand(2, 3, 32, 32)),
}
# Rows of each input in a pass that is as large as it gets, in these settings.
FULL = {"adaptive": 16, "fixed": 8, "gradient": 1, "smoothgrad": 12, "sparsified_smoothgrad": 12}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [*((name, torch.float32, "float32") for name in NETS)]
    + [
        (name, *how)
        for name in ("linear", "digits_cnn")
        for how in ((torch.float64, "float32"), (torch.float32, "bfloat16"))
    ],
)
def test_a_call_takes_what_is_predicted(name: str, dtype: torch.dtype, precision: Any) -> None:
    """Never more, and not much less where the passes are full: everything that the call makes is counted."""
    model, x = NETS[name]()
    model, x = model.to(dtype), x.to(dtype)
    for method, most in FULL.items():
        for batch in (1, len(x)):
            for rows in (1, 4, 16) if name in ("linear", "tabular_mlp") else (8,):
                e = METHODS[method](model, max_batch=rows, precision=precision)
                found = e.footprint(x[:1])
                with BytesAlive() as counter:
                    e.attribute(x[:batch], 1)
                predicted = found.peak(min(rows, batch * most), batch)
                assert counter.peak <= predicted, (method, batch, rows)
                # A linear model's pass is no larger than what is held beside it, and that is bounded for the worst
                # of the methods.
                assert predicted <= (6 if name in ("linear", "tabular_mlp") else 2.5) * counter.peak, (
                    method,
                    batch,
                    rows,
                    predicted / counter.peak,
                )


@pytest.mark.parametrize("name", NETS)
def test_a_pass_takes_what_is_predicted(name: str) -> None:
    model, x = NETS[name]()
    bound, _ = bind_score(model, (x,), 1, precision="bfloat16")
    found = bound.pass_footprint((x,))
    assert found is not None
    for rows in (1, 2, 5, 64):
        index = torch.zeros(rows, dtype=torch.int64)
        taken, given = bound.take(index), (x[index],)
        with BytesAlive() as counter:
            taken.gradient(given)
        assert counter.peak <= found.peak(rows) <= 2 * counter.peak


def test_what_does_not_grow_with_the_rows_is_fixed() -> None:
    """Copies of the weights, made in every pass: not per row, as the slope between two peaks would find, nor 0."""
    wide = torch.rand(100, 1000)

    def model(x: Tensor) -> Tensor:
        return (x @ (wide * 2).tanh()).exp().sum(1)

    bound, _ = bind_score(model, (torch.rand(1, 100),), None)
    found = bound.pass_footprint((torch.rand(1, 100),))
    assert found is not None
    assert 400_000 <= found.fixed <= 900_000
    assert 4000 <= found.per_row <= 40_000


def test_passes_of_other_operations_charge_every_row_all() -> None:
    found = measure_footprint(lambda rows: [torch.ones(10) for _ in range(1 if rows == 1 else 3)], CPU)
    assert found == Footprint(0, 60)


def test_the_counter_does_not_count_what_was_there() -> None:
    x = torch.ones(1000)
    with BytesAlive() as counter:
        y = x.view(10, 100).t()
        z = y + 1
        del z
        w = y * 2
    assert counter.peak == w.numel() * 4


def test_rows_are_a_power_of_two() -> None:
    assert [Footprint(100, 10).rows(b) for b in (0, 109, 119, 120, 199, 10_000)] == [1, 1, 1, 2, 8, 512]


@pytest.mark.parametrize(("per_row", "rows"), [(1, 1024), (1 << 18, 256), (3 << 20, 16), (1 << 28, 4)])
def test_rows_that_the_cpu_is_fast_with(per_row: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB a pass and thread, four rows at least, whatever memory is free, as long as it holds them."""
    monkeypatch.setattr(memory, "budget", lambda device: 1 << 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Footprint(1 << 30, per_row).fast_rows(CPU, 1024) == rows
    assert Footprint(0, per_row).fast_rows(torch.device("cuda"), 1024) == min(1024, (1 << 40) // per_row)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert Footprint(0, per_row).fast_rows(CPU, 1024) == min(1024, rows if rows == 4 else 16 * rows)
    monkeypatch.setattr(memory, "budget", lambda device: 2 * per_row)
    assert Footprint(0, per_row).fast_rows(CPU, 1024) == 2


# --- "auto" ----------------------------------------------------------------------------------------------------------


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 1, 8, 8)
    e = SparseMoreauGrad(zoo.digits_cnn())
    assert e.rows_per_pass(x) == 1024  # as it was before anything was measured
    found = e.footprint(x)
    assert found is not None
    for rows in (1, 2, 100, 512):
        monkeypatch.setattr(memory, "budget", lambda device, rows=rows: found.peak(rows))
        assert SparseMoreauGrad(zoo.digits_cnn()).rows_per_pass(x) == 1 << rows.bit_length() - 1
    assert e.rows_per_pass(x) == 1024  # remembered
    assert SparseMoreauGrad(zoo.digits_cnn(), max_batch=7).rows_per_pass(x) == 7
    assert SparseMoreauGrad(zoo.digits_cnn(), max_batch=None).rows_per_pass(x) is None
    assert SparseMoreauGrad(prepare(zoo.digits_cnn(), x, max_batch=4)).rows_per_pass(x) <= 4


def test_auto_is_kept_by_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(net(), 1000)
    expected = SmoothGrad(net(), num_samples=12).attribute(images(), 1)
    monkeypatch.setattr(memory, "budget", lambda device: 1)
    found = SmoothGrad(model, num_samples=12).attribute(images(), 1)
    assert model.seen[:2] == [1, 2]  # the probe
    assert max(model.seen[2:]) == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_probe_leaves_no_trace() -> None:
    model, x = nn.Sequential(net(), nn.Dropout()), images()
    model.train()
    before, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    e = SmoothGrad(model, num_samples=12)
    with pytest.warns(UserWarning, match="train mode"):
        s = e.attribute(x, 1, return_solution=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert s.gradient_evaluations.tolist() == [12] * 5


def test_the_probe_runs_once_and_only_for_auto() -> None:
    x = images()
    for setting, passes in (("auto", 2), (64, 0), (None, 0)):
        model: Any = Small(net(), 1000)
        e = Gradient(model, max_batch=setting)
        e.attribute(x, 1)
        assert len(model.seen) == passes + 2  # the inputs as they are, and their gradient
        e.attribute(x, 1)
        assert len(model.seen) == passes + 4


def test_a_model_that_does_not_run_under_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no dispatch modes here")

    monkeypatch.setattr(BytesAlive, "__torch_dispatch__", refuse)
    e = SmoothGrad(net(), num_samples=12)
    assert e.footprint(images()) is None
    assert e.rows_per_pass(images()) == memory.BLIND_ROWS


def test_a_probe_that_does_not_fit() -> None:
    """Two rows do not: one then. One does not: the call itself says so."""
    assert SmoothGrad(Small(net(), 1), num_samples=12).rows_per_pass(images()) == 1
    with pytest.raises(MemoryError, match="a pass of one input"):
        Gradient(Small(net(), 0)).attribute(images(), 1)


def test_what_a_model_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Gradient(nn.Linear(3, 2).eval()).attribute(torch.ones(2, 4))


# --- what there is ---------------------------------------------------------------------------------------------------


def test_the_budget_of_the_cpu() -> None:
    assert 1 << 20 < budget(CPU) < memory._available()


V2 = {"memory.max": "1000000", "memory.current": "700000", "memory.stat": "anon 5\ninactive_file 100000\n"}
V1 = {
    "memory.limit_in_bytes": "1000000",
    "memory.usage_in_bytes": "700000",
    "memory.stat": "inactive_file 3\ntotal_inactive_file 100000\n",
}


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job/one", "job/one", V2),
        ("0::/job/one", "job", V2),  # a limit of what it is part of
        ("0::/job/one", "", V2),  # a container's own root
        ("4:memory:/job", "memory/job", V1),
        ("4:cpu,memory:/elsewhere", "memory", V1),
    ],
)
def test_limits_of_cgroups(
    line: str, folder: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    real = Path.read_text

    def read(path: Path, *a: Any, **k: Any) -> str:
        return f"1:name=systemd:/\n{line}\n" if str(path) == "/proc/self/cgroup" else real(path, *a, **k)

    monkeypatch.setattr(Path, "read_text", read)
    assert list(memory._left_by_cgroups()) == [400_000]
    assert budget(CPU) == 100_000


def test_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert list(memory._left_by_cgroups()) == []


# --- parts -----------------------------------------------------------------------------------------------------------


def test_attempt() -> None:
    def fail() -> int:
        raise MemoryError

    assert attempt(lambda: 3, CPU, last=False) == 3
    assert attempt(fail, CPU, last=False) is None
    with pytest.raises(MemoryError):
        attempt(fail, CPU, last=True)


def test_rows_per_pass_only_fall() -> None:
    for start in (None, 32):
        passes = PassRunner(start)
        assert not passes.lowered
        passes.lower(8)
        passes.lower(16)
        assert passes.max_rows == 8
        assert passes.lowered


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS, which makes memory end, is Linux's")
def test_a_real_limit() -> None:
    """256 MiB beyond what the process has: passes of 512 rows of 4 MiB fail, in torch's allocator, and smaller ones do
    what they would."""
    script = """
import resource, warnings, torch
from moreau_ext import SmoothGrad
torch.set_num_threads(1)
def model(x):
    return (x.repeat(1, 1 << 16).tanh().square()).sum(1)
x = torch.rand(1, 4)
e = SmoothGrad(model, num_samples=512, sigma=0.1, max_batch=512)
expected = SmoothGrad(model, num_samples=512, sigma=0.1, max_batch=16).attribute(x)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = e.attribute(x)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
print([str(w.message).split(";")[0] for w in said])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['out of memory with 512 rows in a pass']" in done.stdout


def test_measuring_neither_reads_nor_moves_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    SmoothGrad(lambda x: x.square().sum(1)).attribute(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_call_that_fails_leaves_the_next_ones_as_fast() -> None:
    def model(x: Tensor, mode: str) -> Tensor:
        if mode != "good":
            raise RuntimeError("this mode is unknown")
        return x.square().sum(1)

    x = torch.rand(2, 3)
    explainer = Gradient(model)
    with pytest.raises(RuntimeError, match="this mode is unknown"):
        explainer.attribute(x, None, "bad")
    with pytest.raises(RuntimeError, match="this mode is unknown"):
        explainer.footprint(x, "bad")
    assert explainer.rows_per_pass(x[:0], "good") == explainer.rows_per_pass(x, "good") == 1024
    with pytest.raises(ValueError, match="at least one"):
        explainer.footprint(x[:0], "good")


def test_a_path_keeps_to_max_batch() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return (x * torch.tensor([3.0, 2.0, 1.0])).sum(1)

    x = torch.rand(7, 3)
    few = SparseMoreauGrad(model, max_batch=2).eta_path(x, [0.5])[0]
    assert max(seen) == 2
    torch.testing.assert_close(few.attribution, SparseMoreauGrad(model).eta_path(x, [0.5])[0].attribution)


def test_groups_that_do_not_fit_lower_the_rows_once() -> None:
    """Four groups of the size that fails: the others are split with the first, and the rows are halved once, not four
    times; every input is solved once, in its place."""
    explainer = MoreauGrad(net(), rho=0.1, solver=FIXED, max_batch=32)
    problem = explainer.problem(images(16), 1)
    asked: list[int] = []

    def solve(some: Problem) -> Solution:
        asked.append(some.batch)
        if some.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return explainer._solve(some)

    with pytest.warns(MemoryWarning, match="out of memory with 4 inputs at once"):
        found = in_groups(problem, 8, solve)
    assert asked == [4] + [2] * 8
    assert problem.passes.max_rows == 16
    assert found.ids.tolist() == list(range(16))
