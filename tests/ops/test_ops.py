"""Every operation against its specification: dtypes x odd sizes x layouts x penalties, poisoned outputs, tracing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moreau_ext import Labels, Pixels, Tiles, _core, ops
from moreau_ext.ops import reference
from moreau_ext.ops.layout import memory_layout
from moreau_ext.ops.noise import Noise, noise_keys
from moreau_ext.ops.partition import Partition

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (0, 4),
    (2, 0),
    (1,),
    (3, 1),
    (2, 33),
    (1, 111),
    (2, 1023),
    (3, 4097),
    (2, 3, 7, 5),
    (2, 3, 40, 50),
    (1, 150, 3, 3),
    (2, 5, 9),
]
# Sums of m values and of Box-Muller's last bits, against float64 in the specification.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def close(actual: Tensor, expected: Tensor) -> None:
    if actual.dtype in TOLERANCE:
        t = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=t, atol=t)
    else:
        torch.testing.assert_close(actual, expected)  # one rounding to half precision: torch's default for the dtype


def close_statistics(actual: Tensor, expected: Tensor, state: torch.dtype) -> None:
    t = TOLERANCE[state]
    scale = expected[:, 1:4].amax(1, keepdim=True) if expected.numel() else expected
    torch.testing.assert_close(actual / scale, expected / scale, rtol=4 * t, atol=4 * t, equal_nan=True)


def laid_out(t: Tensor, channels_last: bool) -> Tensor:
    if not channels_last or t.dim() < 3:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def make_noise(batch: int, state: torch.dtype, samples: int = 3, **kwargs: Any) -> Noise:
    sigma = torch.rand(batch, dtype=state)
    return Noise(noise_keys(3, torch.arange(batch)), torch.tensor([7]), sigma, samples, **kwargs)


def step_case(
    shape: tuple[int, ...], dtype: torch.dtype, penalty: str, channels_last: bool = False, samples: int = 5
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(buffers that are written, the other arguments)."""
    state, batch = ops.state_dtype(dtype), shape[0]

    def make(rows: int = batch, dtype: torch.dtype = state) -> Tensor:
        return laid_out(torch.randn(rows, *shape[1:]).to(dtype), channels_last)

    x = make(dtype=dtype)
    noise = make_noise(batch, state, antithetic=True, element_offset=2, sample_offset=1)
    out = laid_out(torch.full((batch * noise.num_samples, *shape[1:]), float("nan"), dtype=dtype), channels_last)
    written = {"gradient": make(), "displacement": make(), "total": make(), "out": out}
    others: dict[str, Any] = {
        "gradients": make(batch * samples, dtype),
        "count": 2 * samples,
        "carry": True,
        "rho": torch.rand(batch, dtype=state) + 0.5,
        "step_size": torch.rand(batch, dtype=state) + 0.1,
        "x": x,
        "noise": noise,
    }
    if penalty != "none":
        others["eta"] = torch.rand(batch, dtype=state)
    if penalty == "l1 per feature":
        others["eta"] = laid_out(torch.rand(shape, dtype=state), channels_last)
    if penalty == "l1 shared feature":
        others["eta"] = laid_out(torch.rand(1, *shape[1:], dtype=state), channels_last)
    if penalty == "tiles":
        others["groups"] = Tiles(3, "sqrt").partition(x, state)
    if penalty == "pixels":
        others["groups"] = Pixels().partition(x, state)
    if penalty == "labels":
        others["groups"] = Labels(torch.randint(0, 4, shape[1:])).partition(x, state)
    if penalty == "labels per input":
        others["groups"] = Labels(torch.randint(-2, 9, shape)).partition(x, state)
    return written, others


PENALTIES = ["none", "l1", "l1 per feature", "l1 shared feature", "tiles", "pixels", "labels", "labels per input"]


def call(module: Any, written: dict[str, Tensor], others: dict[str, Any]) -> Tensor:
    buffers = dict(written)
    arguments = dict(others)
    statistics: Tensor = module.prox_step(
        arguments.pop("gradients"), buffers.pop("gradient"), buffers.pop("displacement"), **buffers, **arguments
    )
    return statistics


# Channels_last, tiles and pixels need a channel and a position axis; without features [1] is one eta per input.
LAYOUTS = [(shape, last) for shape in SHAPES for last in (False, True) if not last or len(shape) > 2]
CASES = [
    (*case, penalty)
    for case in LAYOUTS
    for penalty in PENALTIES
    if len(case[0]) > 2 or (penalty not in ("tiles", "pixels") and (len(case[0]) > 1 or penalty != "l1 shared feature"))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last", "penalty"), CASES, ids=str)
def test_prox_step(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, penalty: str) -> None:
    written, others = step_case(shape, dtype, penalty, channels_last)
    expected = {name: t.clone() for name, t in written.items()}
    total_of = "displacement" if penalty == "l1" else "gradient"
    statistics = call(ops, written, {**others, "total_of": total_of})
    wanted = call(reference, expected, {**others, "total_of": total_of})
    for name in written:
        assert memory_layout(written[name]) == memory_layout(expected[name])
        close(written[name], expected[name])
    close_statistics(statistics[:, :4], wanted[:, :4], ops.state_dtype(dtype))
    # A value within rounding of the threshold may fall on either side of it.
    assert bool(((statistics[:, 4] - wanted[:, 4]).abs() <= 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS, ids=str)
def test_perturb(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    state = ops.state_dtype(dtype)
    x = laid_out(torch.randn(shape).to(dtype), channels_last)
    displacement = laid_out(torch.randn(shape, dtype=state), channels_last)
    for samples in (0, 1, 4, 5):
        for kwargs in ({}, {"antithetic": True}, {"sample_offset": 3, "element_offset": 5, "antithetic": True}):
            noise = make_noise(shape[0], state, samples, **kwargs)
            out = torch.full((shape[0] * samples, *shape[1:]), float("nan"), dtype=dtype)
            out = laid_out(out, channels_last)
            assert ops.perturb(x, displacement, noise, out=out) is out
            close(out, reference.perturb(x, displacement, noise))
    still = Noise(noise.keys, noise.step, None, 2)
    copies = ops.perturb(x, None, still).view(shape[0], 2, *shape[1:])
    assert torch.equal(copies[:, 0], x)
    assert torch.equal(copies[:, 1], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_accumulate_does_not_depend_on_the_chunks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state, batch, samples = ops.state_dtype(dtype), shape[0], 7
    gradients = torch.randn(batch, samples, *shape[1:]).to(dtype)
    whole = torch.full(shape, float("nan"), dtype=state)
    ops.accumulate(gradients.flatten(0, 1), whole, carry=False)
    assert torch.equal(whole, reference.accumulate(gradients.flatten(0, 1), torch.empty_like(whole), carry=False))
    parts = torch.full(shape, float("nan"), dtype=state)
    for start in range(0, samples, 2):
        chunk = gradients[:, start : start + 2].flatten(0, 1).contiguous()
        ops.accumulate(chunk, parts, carry=start > 0)
    assert torch.equal(parts, whole)


OVER_FEATURES = ("y", "y_prev", "x", "x_prev", "gradient", "last_gradient", "last_step")
KEPT = ("squares", "points", "gradients")


def momentum_case(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, channels_last: bool = False, kept: tuple[str, ...] = KEPT
) -> dict[str, Any]:
    """Arguments of a momentum step, of which all but the gradient are written."""
    case: dict[str, Any] = {
        name: tuple(laid_out(torch.randn(shape, dtype=dtype), channels_last) for shape in shapes)
        for name in (*OVER_FEATURES, *kept)
    }
    batch = shapes[0][0]
    case["sums"] = torch.randn(batch, len(ops.SUMS), dtype=torch.float64)
    case["statistics"] = torch.rand(batch, len(ops.STATISTICS), dtype=torch.float64)
    return {**case, "samples": 6, "momentum": 0.4}


def mapped(case: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with every tensor changed."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(change(t) for t in value)
        return change(value) if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in case.items()}


def check_momentum(case: dict[str, Any], other: dict[str, Any], products: Tensor, wanted: Tensor) -> None:
    """What is elementwise has the bits of the specification; sums agree to float64's rounding."""
    torch.testing.assert_close(products, wanted, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(case["sums"], other["sums"], rtol=1e-12, atol=1e-10)
    for name, tensors in case.items():
        if isinstance(tensors, tuple):
            for mine, theirs in zip(tensors, other[name], strict=True):
                assert memory_layout(mine) == memory_layout(theirs)
                assert torch.equal(mine, theirs), name


MOMENTUM_SHAPES = [[(0, 4)], [(2, 0)], [(3,)], [(2, 33)], [(2, 5000)], [(2, 3, 7, 5)], [(3, 2, 9, 4), (3, 11)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", MOMENTUM_SHAPES, ids=str)
def test_momentum_step(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    for channels_last in (False, True):
        for kept in ((), KEPT, KEPT[:1], KEPT[1:]):
            for first in (False, True):
                if first and "squares" in kept:
                    continue
                case = {**momentum_case(shapes, dtype, channels_last, kept), "first": first}
                other = mapped(case, Tensor.clone)
                check_momentum(case, other, ops.momentum_step(**case), reference.momentum_step(**other))


def test_momentum_goes_on_or_restarts() -> None:
    """By hand: the first input moves on along its step, the second has turned against it."""
    tensors = {name: (torch.zeros(2, 1, dtype=torch.float64),) for name in OVER_FEATURES}
    tensors["y"][0][:] = torch.tensor([[3.0], [1.0]])
    tensors["y_prev"][0][:] = torch.tensor([[1.0], [2.0]])
    tensors["x"][0][:] = torch.tensor([[2.0], [0.5]])
    statistics, sums = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    products = ops.momentum_step(**tensors, sums=sums, statistics=statistics, samples=1, momentum=0.5)
    assert products[:, 0].tolist() == [-2.0, 0.5]
    assert tensors["y"][0].flatten().tolist() == [4.0, 1.0]
    assert tensors["last_step"][0].flatten().tolist() == [2.0, -1.0]
    assert tensors["x_prev"][0].flatten().tolist() == [2.0, 0.5]


def test_neither_threads_nor_the_batch_change_a_bit_of_momentum() -> None:
    threads = torch.get_num_threads()
    case = momentum_case([(3, 150_000)], torch.float32)
    one, two, third = mapped(case, Tensor.clone), mapped(case, Tensor.clone), mapped(case, lambda t: t[2:].clone())
    try:
        torch.set_num_threads(1)
        products = ops.momentum_step(**one)
        torch.set_num_threads(2)
        assert torch.equal(products, ops.momentum_step(**two))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.momentum_step(**third), products[2:])
    for name in (*OVER_FEATURES, *KEPT):
        assert torch.equal(one[name][0], two[name][0])
        assert torch.equal(one[name][0][2:], third[name][0])


def test_momentum_refuses() -> None:
    def refuse(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            ops.momentum_step(**{**momentum_case([(2, 3)], torch.float32), **changes})

    x = torch.zeros(2, 3)
    refuse("y: expected at least one", **dict.fromkeys((*OVER_FEATURES, *KEPT), ()))
    refuse("x_prev: expected 1 tensors, as in y, got 2", x_prev=(x, x.clone()))
    refuse("x: expected shape", x=(torch.zeros(2, 4),))
    refuse("last_step: expected torch.float32", TypeError, last_step=(x.double(),))
    refuse("y: expected float32 or float64", TypeError, y=(x.half(),))
    refuse("points, gradients: give both", points=())
    refuse("squares: a first step", first=True)
    refuse("samples: expected at least 1", samples=0)
    refuse("sums: expected shape", sums=torch.zeros(2, 5, dtype=torch.float64))
    refuse("share memory", y=(x,), x=(x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norms_and_shrink(dtype: torch.dtype, channels_last: bool) -> None:
    v = laid_out(torch.randn(3, 4, 11, 9, dtype=dtype), channels_last)
    v[1] = 0
    eta = torch.tensor([0.7, 0.5, 0.0], dtype=dtype)
    for groups in (Tiles(4), Tiles((2, 5), "sqrt"), Pixels(), Labels(torch.randint(0, 6, (3, 1, 11, 9)))):
        partition = groups.partition(v, dtype)
        norms = ops.group_norms(v, partition)
        close(norms, reference.group_norms(v, partition))
        shrunk = ops.shrink(v, eta, partition)
        close(shrunk, reference.shrink(v, eta, partition))
        assert memory_layout(shrunk) == memory_layout(v)
        assert torch.equal(shrunk[2], v[2])  # η = 0 is the identity, to the bit
        assert not shrunk[1].any()  # a zero group is zero, not 0/0
    close(ops.shrink(v, eta), reference.shrink(v, eta))
    per_feature = laid_out(torch.rand(1, 4, 11, 9, dtype=dtype), channels_last)
    close(ops.shrink(v, per_feature), reference.shrink(v, per_feature))


def test_numbers_stand_for_one_per_input() -> None:
    written, others = step_case((3, 2, 5, 5), torch.float32, "l1")
    other = {name: t.clone() for name, t in written.items()}
    noise = others["noise"]
    numbers = {"rho": 0.5, "step_size": 0.25, "eta": 0.1}
    tensors = {name: torch.full((3,), value) for name, value in numbers.items()}
    for module in (ops, reference):
        one, two = ({name: t.clone() for name, t in other.items()} for _ in range(2))
        a = call(module, one, {**others, **numbers, "noise": Noise(noise.keys, noise.step, 0.5, 3)})
        b = call(module, two, {**others, **tensors, "noise": Noise(noise.keys, noise.step, torch.full((3,), 0.5), 3)})
        assert torch.equal(a, b)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_chunked_step_gives_the_bits_of_a_whole_one() -> None:
    written, others = step_case((3, 3, 20, 20), torch.float32, "tiles", samples=6)
    others.update(carry=False, count=6)
    chunked = {name: t.clone() for name, t in written.items()}
    call(ops, written, others)
    gradients = others["gradients"].view(3, 6, 3, 20, 20)
    ops.accumulate(gradients[:, :4].flatten(0, 1), chunked["gradient"], carry=False)
    call(ops, chunked, {**others, "gradients": gradients[:, 4:].flatten(0, 1), "carry": True})
    for name in written:
        assert torch.equal(written[name], chunked[name])


def test_an_input_does_not_depend_on_its_batch() -> None:
    for penalty in ("none", "l1", "tiles", "labels per input"):
        written, others = step_case((5, 3, 17, 19), torch.float32, penalty)
        alone = {name: t.clone() for name, t in written.items()}
        statistics = call(ops, written, others)
        for i in range(5):
            index = torch.tensor([i])
            noise = others["noise"]
            one = {
                **others,
                "gradients": others["gradients"][5 * i : 5 * i + 5],
                "rho": others["rho"][index],
                "step_size": others["step_size"][index],
                "x": others["x"][index],
                "noise": Noise(noise.keys[index], noise.step, noise.sigma[index], 3, True, 2, 1),
            }
            if "eta" in others:
                one["eta"] = others["eta"][index]
            if "groups" in others:
                one["groups"] = others["groups"].take(index)
            buffers = {name: t[3 * i : 3 * i + 3] if name == "out" else t[index] for name, t in alone.items()}
            assert torch.equal(call(ops, buffers, one)[0], statistics[i])
            for name in written:
                mine = written[name][3 * i : 3 * i + 3] if name == "out" else written[name][index]
                assert torch.equal(buffers[name], mine)


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    try:
        for penalty in ("l1", "tiles"):
            written, others = step_case((2, 3, 200, 211), torch.float32, penalty)
            other = {name: t.clone() for name, t in written.items()}
            torch.set_num_threads(1)
            one = call(ops, written, others)
            torch.set_num_threads(2)
            two = call(ops, other, others)
            assert torch.equal(one, two)
            for name in written:
                assert torch.equal(written[name], other[name])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="reads the run time of threads from /proc")
def test_small_work_opens_no_parallel_region() -> None:
    """Under 1e5 elements a thread the sleeping worker is not woken; with more work it is."""
    program = """
import os, time, torch
from moreau_ext import ops
from moreau_ext.ops.noise import Noise, noise_keys
torch.set_num_threads(2)
def run_times(threads):
    return [open(t).read().split()[0] for t in threads]
def slept(features):
    noise = Noise(noise_keys(0, torch.arange(1)), torch.zeros(1, dtype=torch.int64), torch.ones(1), 8)
    x, out = torch.zeros(1, features), torch.empty(8, features)
    others = [f"/proc/self/task/{t}/schedstat" for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
    # On a busy machine a thread that was woken before may not yet have gone back to sleep.
    before = None
    while before != run_times(others):
        before = run_times(others)
        time.sleep(0.1)
    ops.perturb(x, None, noise, out=out)
    return before == run_times(others)
print(slept(24_000), slept(24_000), slept(400_000))
"""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[1:] == ["True", "False"]


def test_zero_groups_zero_gradients_and_groups_of_one_are_exact() -> None:
    x = torch.zeros(1, 2, 4, 4)
    eta = torch.ones(1)
    for groups in (Tiles(2), Pixels(), Labels(torch.arange(32).view(2, 4, 4))):
        partition = groups.partition(x, torch.float32)
        gradient, displacement = torch.zeros_like(x), torch.zeros_like(x)
        statistics = ops.prox_step(
            torch.zeros(3, 2, 4, 4), gradient, displacement, count=3, rho=eta, step_size=eta, eta=eta, groups=partition
        )
        assert torch.equal(statistics, torch.zeros(1, 5, dtype=torch.float64))
        assert not displacement.any()
    # A group of one is soft-thresholding.
    partition = Labels(torch.arange(32).view(2, 4, 4)).partition(x, torch.float32)
    v = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(ops.shrink(v, eta, partition), ops.shrink(v, eta))


@pytest.mark.parametrize("penalty", ["none", "l1", "l1 per feature", "tiles"])
def test_nan_is_seen(penalty: str) -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, penalty)
    others["gradients"][3, 1, 2, 2] = float("nan")
    statistics = call(ops, written, others)
    assert statistics[0].isnan().any()
    assert statistics[1].isfinite().all()
    assert written["displacement"][0, 1, 2, 2].isnan()
    assert written["displacement"][1].isfinite().all()


def test_halves_convert_like_torch() -> None:
    """Every float16 and bfloat16 pattern in, and many floats out, through copies without noise."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    still = Noise(noise_keys(0, torch.arange(1)), torch.zeros(1, dtype=torch.int64), None, 1)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)[None]
        total = torch.empty(1, x.shape[1])
        ops.accumulate(x, total, carry=False)
        expected = torch.zeros(1, x.shape[1]) + x.float()
        assert torch.equal(total.isnan(), expected.isnan())
        assert torch.equal(total.nan_to_num(0.0), expected.nan_to_num(0.0))
        wide = torch.randn(1, 100_000) * torch.exp(12 * torch.randn(1, 100_000))
        edges = [0.0, -0.0, 65504, 65519.9, 65520, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, float("inf")]
        special = torch.tensor([[*edges, *[-e for e in edges]]])
        wide = torch.cat([wide, special, special * (1 + 2**-11)], dim=1)
        zero = torch.zeros_like(wide, dtype=dtype)
        assert torch.equal(ops.perturb(zero, wide, still), wide.to(dtype))


# --- what is refused -----------------------------------------------------------------------------------------------


def refuse(match: str, error: type[Exception] = ValueError, /, drop: str | None = None, **changes: Any) -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, "l1")
    for name, value in changes.items():
        (written if name in written else others)[name] = value
    if drop:
        del others[drop]
    with pytest.raises(error, match=match):
        call(ops, written, others)


def test_wrong_arguments_are_named() -> None:
    refuse("displacement: expected shape|gradient: expected shape", displacement=torch.zeros(2, 3, 8, 9))
    refuse("gradient: expected torch.float32, got torch.float64", TypeError, gradient=torch.zeros(2, 3, 8, 8).double())
    refuse("gradients: torch.float64 goes with", TypeError, gradients=torch.zeros(10, 3, 8, 8).double())
    refuse("gradients: expected shape", gradients=torch.zeros(11, 3, 8, 8))
    refuse("rho: expected shape", rho=torch.ones(3))
    refuse("rho: expected a tensor on cpu", rho=torch.ones(2, device="meta"))
    refuse("eta: expected shape", eta=torch.ones(3))
    refuse("eta: expected shape", eta=torch.ones(2, 3, 8, 1))
    refuse("count: expected", count=0)
    refuse("noise: writing noisy copies needs x", drop="x")
    refuse("out: expected shape", out=torch.zeros(5, 3, 8, 8))
    refuse("x: expected the dtype", TypeError, x=torch.zeros(2, 3, 8, 8).half())
    refuse("memory layout differs", x=torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    refuse("contiguous or channels_last", x=torch.zeros(2, 3, 8, 8).transpose(2, 3))
    five = torch.zeros(5, 3, 8, 8)
    refuse("made for 5 inputs", groups=Labels(five.long()).partition(five, torch.float32))
    shared = torch.zeros(2, 3, 8, 8)
    refuse("share memory", displacement=shared, gradient=shared)
    whole = torch.zeros(8, 3, 8, 8)
    refuse("share memory", out=whole[:6], x=whole[5:7])
    with pytest.raises(ValueError, match="carry=True"):
        ops.prox_step(None, shared, shared.clone(), count=1, rho=torch.ones(2), step_size=torch.ones(2))
    with pytest.raises(TypeError, match=r"x: expected float32, float64, float16 or bfloat16, got torch\.int64"):
        ops.perturb(torch.zeros(2, 3, dtype=torch.int64), None, make_noise(2, torch.float32))


@pytest.mark.slow
def test_64_bit_indexing() -> None:
    """More than 2^31 elements of noisy copies; float16 keeps it at 4.6 GB, and the tail is checked."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if memory < 8 << 30:
        pytest.skip(f"needs 8 GiB of free memory, found {memory >> 30}")
    features, samples = 1 << 20, 2200
    x = torch.zeros(1, features, dtype=torch.float16)
    noise = Noise(noise_keys(0, torch.arange(1)), torch.zeros(1, dtype=torch.int64), torch.ones(1), samples)
    out = torch.empty(samples, features, dtype=torch.float16)
    ops.perturb(x, None, noise, out=out)
    last = ops.perturb(x, None, noise.chunk(samples - 1, 1))
    assert torch.equal(out[-1], last[0])
    total = torch.empty(1, features)
    ops.accumulate(out, total, carry=False)
    assert abs(float(total.mean())) < 4 * (samples / features) ** 0.5


# --- registration --------------------------------------------------------------------------------------------------


def operator_arguments(penalty: str) -> tuple[Any, ...]:
    written, o = step_case((2, 3, 8, 8), torch.float32, penalty)
    n: Noise = o["noise"]
    g: Partition | None = o.get("groups")
    parts = (None,) * 4 if g is None else (g.labels, g.order, g.offsets, g.weights)
    return (
        o["gradients"], written["gradient"], written["displacement"], o["count"], o["carry"], o["rho"], o["step_size"],
        o.get("eta"), *parts, written["total"], False, o["x"], n.keys, n.step, n.sigma, n.num_samples,
        n.element_offset, n.sample_offset, n.antithetic, torch.zeros_like(written["out"]), None,
    )  # fmt: skip


@pytest.mark.parametrize("penalty", ["none", "l1", "l1 per feature", "tiles"])
def test_opcheck_prox_step(penalty: str) -> None:
    torch.library.opcheck(torch.ops.moreau_ext.prox_step.default, operator_arguments(penalty))


def test_opcheck_the_others() -> None:
    n = make_noise(2, torch.float32)
    x = torch.randn(2, 3, 8, 8)
    torch.library.opcheck(
        torch.ops.moreau_ext.perturb.default,
        (torch.zeros(6, 3, 8, 8), x, None, n.keys, n.step, n.sigma, 3, 0, 0, True),
    )
    torch.library.opcheck(torch.ops.moreau_ext.accumulate.default, (x, torch.randn(6, 3, 8, 8), True))
    p = Tiles(3).partition(x, torch.float32)
    torch.library.opcheck(torch.ops.moreau_ext.group_norms.default, (x, p.labels, p.order, p.offsets, p.weights))


def momentum_arguments(case: dict[str, Any]) -> tuple[Any, ...]:
    lists = [list(case.get(name, ())) for name in (*OVER_FEATURES, *KEPT)]
    return (*lists, case["sums"], case["statistics"], case["samples"], case["momentum"], False, None)


def test_opcheck_momentum_step() -> None:
    for shapes in ([(2, 3)], [(2, 3), (2, 5)]):
        arguments = momentum_arguments(momentum_case(shapes, torch.float32))
        torch.library.opcheck(torch.ops.moreau_ext.momentum_step.default, arguments)


@pytest.mark.parametrize("penalty", ["l1", "tiles"])
def test_compiles_into_one_graph(penalty: str) -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, penalty)
    expected = {name: t.clone() for name, t in written.items()}
    wanted = call(ops, expected, others)

    def step(written: dict[str, Tensor]) -> Tensor:
        statistics = call(ops, written, others)
        ops.accumulate(written["out"], written["total"], carry=True)
        return statistics + ops.perturb(others["x"], None, others["noise"]).sum()

    expected_sum = wanted + ops.perturb(others["x"], None, others["noise"]).sum()
    ops.accumulate(expected["out"], expected["total"], carry=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(written), expected_sum)
    for name in written:
        assert torch.equal(written[name], expected[name])
    torch._dynamo.reset()


def test_one_libgomp_and_no_torch_in_the_core() -> None:
    """The core shares the thread pool of torch, and links nothing of torch."""
    program = "import moreau_ext.ops; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1
    printed = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    # Names and paths alone: a load address, 0x00007fc10..., may hold "c10".
    linked = " ".join(word for word in printed.split() if not word.startswith("(0x"))
    assert "libgomp.so.1" in linked
    assert not any(name in linked for name in ("torch", "c10", "cudart"))
    ctypes.CDLL(_core.__file__)


def test_a_build_without_cuda_says_so() -> None:
    if _core.cuda_version is not None:
        pytest.skip("is about builds without CUDA kernels; this one has them")
    extents = _core.Extents(batch=1, channels=1, positions=1)
    with pytest.raises(RuntimeError, match=r"accumulate: .* no CUDA kernels"):
        _core.accumulate(
            dtype=_core.Dtype.f32,
            extents=extents,
            gradients=0,
            samples=0,
            sum=0,
            carry=False,
            device=0,
            stream=0,
        )


@pytest.mark.parametrize("make", [lambda t: torch.stack([t, -t], 1)[:, 0], lambda t: t[:1].expand(3)])
def test_numbers_per_input_may_lie_anywhere(make: Any) -> None:
    x, keys, step = torch.zeros(3, 5), noise_keys(0, torch.arange(3)), torch.zeros(1, dtype=torch.int64)
    numbers = make(torch.tensor([1.0, 2.0, 4.0]))
    assert not numbers.is_contiguous()
    dense = numbers.clone(memory_format=torch.contiguous_format)
    copies = [ops.perturb(x, None, Noise(keys, step, sigma, 2)) for sigma in (numbers, dense)]
    assert torch.equal(*copies)
    results = []
    for rho in (numbers, dense):
        displacement = torch.ones(3, 5)
        ops.prox_step(torch.ones(3, 5), torch.zeros(3, 5), displacement, count=1, rho=rho, step_size=0.1)
        results.append(displacement)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="keys: expected a contiguous tensor"):
        ops.perturb(x, None, Noise(torch.stack([keys, keys], 1)[:, 0], step, 0.1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("noisy", [False, True])
def test_inputs_of_another_dtype_are_refused_before_an_address_is_taken(dtype: torch.dtype, noisy: bool) -> None:
    """The type of x decides how the kernel reads all buffers: float64 would write beyond those of float32."""
    guarded = torch.full((3 * 4096,), 7.0)
    gradient, displacement = guarded[:4096].view(1, -1), torch.zeros(1, 4096)
    x = torch.zeros(1, 4096, dtype=dtype)
    settings: dict[str, Any] = {"count": 2, "rho": 1.0, "step_size": 0.1, "x": x}
    if noisy:
        noise = Noise(noise_keys(0, torch.arange(1)), torch.zeros(1, dtype=torch.int64), 0.1, 2)
        settings |= {"noise": noise, "out": torch.empty(2, 4096, dtype=dtype)}
    if dtype == torch.float64:
        with pytest.raises(
            TypeError, match=r"x: torch\.float64 goes with a displacement of torch\.float64, got torch\.float32"
        ):
            ops.prox_step(None, gradient, displacement, carry=True, **settings)
    with pytest.raises(TypeError, match="x: "):
        ops.prox_step(torch.ones(2, 4096), gradient, displacement, **settings)
    assert bool((guarded == 7.0).all())
    with pytest.raises(ValueError, match=r"x: expected shape \(1, 4096\)"):
        ops.prox_step(None, gradient, displacement, carry=True, **settings | {"x": torch.zeros(1, 9)})
    assert bool((guarded == 7.0).all())
