"""The CUDA kernels against the specification and against the CPU kernels. Skipped where there is no CUDA device.

Products and sums are not contracted on either side (CMakeLists.txt), so an elementwise operation gives the bits of the
CPU, but for noise: the words of Philox are the same, and what is made of them agrees to the bound of philox.h.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from helpers import CUDA_MISSING, DEVICE
from test_ops import (
    CASES,
    DTYPES,
    LAYOUTS,
    MOMENTUM_SHAPES,
    call,
    check_momentum,
    close,
    close_statistics,
    laid_out,
    make_noise,
    mapped,
    momentum_arguments,
    momentum_case,
    step_case,
)
from torch import Tensor

from moreau_ext import Labels, Pixels, Tiles, ops
from moreau_ext.ops import reference
from moreau_ext.ops.layout import memory_layout
from moreau_ext.ops.noise import Noise, noise_keys
from moreau_ext.ops.partition import Partition

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(CUDA_MISSING is not None, reason=str(CUDA_MISSING))]


def there(value: Any, device: torch.device = DEVICE) -> Any:
    """A copy on the device, whatever it is made of; strides are kept."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Noise | Partition):
        return replace(value, **{f.name: there(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, dict):
        return {name: there(v, device) for name, v in value.items()}
    return value


def step_on_both(written: dict[str, Tensor], others: dict[str, Any], module: Any) -> tuple[Tensor, Tensor]:
    """Statistics of the device and of `module` on the CPU; `written` has become the latter's, "cuda" is beside it."""
    device = there(written)
    arrivals = there(torch.zeros(written["displacement"].shape[0], dtype=torch.int32))
    statistics = call(ops, device, {**there(others), "arrivals": arrivals})
    wanted = call(module, written, others)
    assert not arrivals.any()
    for name, t in device.items():
        assert memory_layout(t) == memory_layout(written[name])
    written.update({f"cuda {name}": t.cpu() for name, t in device.items()})
    return statistics.cpu(), wanted


def buffers(written: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, of the device, of the CPU)."""
    return [(n[5:], t, written[n[5:]]) for n, t in written.items() if n.startswith("cuda ")]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, save for the payload of NaN."""
    return a.dtype == b.dtype and bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


# kFastError of philox.h, relative to max(|z|, 1) <= 6.8.
FAST_ERROR = 6e-7


def close_copies(actual: Tensor, expected: Tensor) -> None:
    """Noisy copies for σ < 1: the bound of the GPU's normals, the CPU's own error below half of it, and a rounding."""
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1.2e-7, atol=1.5 * 6.8 * FAST_ERROR)
    else:
        close(actual, expected)


# Sizes whose quads are whole and travel as vectors, ones that fill several blocks, and a batch beyond 65535.
LARGE = [
    ((1, 4), False, "l1"),
    ((3, 256), False, "none"),
    ((2, 4096), False, "l1"),
    ((70_000, 3), False, "l1"),
    ((70_000, 3), False, "labels"),
    ((2, 3, 64, 64), False, "l1 per feature"),
    ((2, 3, 64, 64), True, "l1 per feature"),
    ((2, 3, 64, 64), False, "tiles"),
    ((2, 3, 64, 64), True, "tiles"),
    ((1, 3, 224, 224), False, "l1"),
    ((1, 3, 224, 224), True, "l1"),
    ((1, 3, 224, 224), False, "labels per input"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("element_offset", "sample_offset"), [(0, 0), (2, 1)])
@pytest.mark.parametrize(("shape", "channels_last", "penalty"), CASES + LARGE, ids=str)
def test_prox_step(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channels_last: bool,
    penalty: str,
    element_offset: int,
    sample_offset: int,
) -> None:
    written, others = step_case(shape, dtype, penalty, channels_last)
    others["noise"] = replace(others["noise"], element_offset=element_offset, sample_offset=sample_offset)
    others["total_of"] = "displacement" if penalty == "l1" else "gradient"
    poisoned = {name: t if name != "out" else torch.full_like(t, float("nan")) for name, t in written.items()}
    statistics, wanted = step_on_both(poisoned, others, reference)
    for name, actual, expected in buffers(poisoned):
        (close_copies if name == "out" else close)(actual, expected)
    close_statistics(statistics[:, :4], wanted[:, :4], ops.state_dtype(dtype))
    # A value within rounding of the threshold may fall on either side of it.
    assert bool(((statistics[:, 4] - wanted[:, 4]).abs() <= 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("penalty", ["none", "l1", "l1 per feature", "tiles", "pixels", "labels per input"])
def test_a_step_gives_what_the_cpu_gives(dtype: torch.dtype, penalty: str, channels_last: bool) -> None:
    for shape in ((2, 3, 40, 50), (2, 3, 33, 31)):
        written, others = step_case(shape, dtype, penalty, channels_last)
        statistics, wanted = step_on_both(written, others, ops)
        for name, actual, expected in buffers(written):
            if name == "out":
                close_copies(actual, expected)
            elif penalty in ("none", "l1", "l1 per feature"):
                assert same(actual, expected)
            else:
                close(actual, expected)
        torch.testing.assert_close(statistics[:, :4], wanted[:, :4], rtol=1e-5 if "groups" in others else 1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS + [((2, 4096), False), ((1, 3, 224, 224), True)], ids=str)
def test_perturb(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    state = ops.state_dtype(dtype)
    x = laid_out(torch.randn(shape).to(dtype), channels_last)
    displacement = laid_out(torch.randn(shape, dtype=state), channels_last)
    for samples in (0, 1, 4, 5):
        for kwargs in ({}, {"antithetic": True}, {"sample_offset": 3, "element_offset": 5, "antithetic": True}):
            noise = make_noise(shape[0], state, samples, **kwargs)
            out = laid_out(torch.full((shape[0] * samples, *shape[1:]), float("nan"), dtype=dtype), channels_last)
            moved = there(out)
            ops.perturb(there(x), there(displacement), there(noise), out=moved)
            close_copies(moved.cpu(), reference.perturb(x, displacement, noise))
            close_copies(moved.cpu(), ops.perturb(x, displacement, noise))
    still = there(Noise(noise.keys, noise.step, None, 2))
    copies = ops.perturb(there(x), None, still).cpu().view(shape[0], 2, *shape[1:])
    assert torch.equal(copies[:, 0], x)
    assert torch.equal(copies[:, 1], x)


@pytest.mark.parametrize(("state", "tolerance"), [(torch.float32, FAST_ERROR), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("element_offset", [0, 1, (1 << 34) + 6])
def test_normals_are_those_of_the_specification(state: torch.dtype, tolerance: float, element_offset: int) -> None:
    """To float64's last digits, which needs the same integers; in float32 to the bound of philox.h."""
    noise = Noise(noise_keys(5, torch.arange(3)), torch.tensor([41]), torch.ones(3, dtype=state), 9)
    noise = replace(noise, element_offset=element_offset, sample_offset=2)
    z = ops.perturb(there(torch.zeros(3, 5001, dtype=state)), None, there(noise)).cpu()
    expected = reference.normals(noise, 5001).view(27, 5001)
    assert float(((z.double() - expected).abs() / expected.abs().clamp(min=1)).max()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_antithetic_copies_mirror_each_other(dtype: torch.dtype) -> None:
    noise = Noise(noise_keys(5, torch.arange(3)), torch.tensor([41]), torch.ones(3), 6, True)
    z = ops.perturb(there(torch.zeros(3, 5000, dtype=dtype)), None, there(noise)).view(3, 6, 5000)
    assert torch.equal(z[:, 0::2], -z[:, 1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), [c for c in LAYOUTS if len(c[0]) > 1], ids=str)
def test_accumulate(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    """The bits of the specification for every number of rows, whole or in chunks."""
    state, batch = ops.state_dtype(dtype), shape[0]
    for samples in (1, 2, 3, 7, 8, 9, 33):
        gradients = torch.randn(batch, samples, *shape[1:]).to(dtype)
        rows = laid_out(gradients.flatten(0, 1), channels_last)
        poisoned = laid_out(torch.full(shape, float("nan"), dtype=state), channels_last)
        expected = reference.accumulate(rows, poisoned.clone(), carry=False)
        whole, parts = there(poisoned), there(poisoned)
        ops.accumulate(there(rows), whole, carry=False)
        assert same(whole.cpu(), expected)
        for start in range(0, samples, 2):
            chunk = laid_out(gradients[:, start : start + 2].flatten(0, 1), channels_last)
            ops.accumulate(there(chunk), parts, carry=start > 0)
        assert same(parts.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norms_and_shrink(dtype: torch.dtype, channels_last: bool) -> None:
    """Groups of 1 to 5000 members: for a lane, a warp, a block, and blocks that own none."""
    v = laid_out(torch.randn(3, 4, 40, 39, dtype=dtype), channels_last)
    v[1] = 0
    eta = torch.tensor([0.7, 0.5, 0.0], dtype=dtype)
    one_large = torch.zeros(4, 40, 39, dtype=torch.int64)
    one_large[:, 30:] = torch.arange(390).view(10, 39)
    per_input = Labels(torch.randint(0, 6, (3, 1, 40, 39)))
    for groups in (Tiles(3), Tiles((8, 13), "sqrt"), Pixels(), per_input, Labels(one_large)):
        partition = groups.partition(v, dtype)
        norms = ops.group_norms(there(v), there(partition)).cpu()
        close(norms, reference.group_norms(v, partition))
        shrunk = ops.shrink(there(v), there(eta), there(partition)).cpu()
        close(shrunk, reference.shrink(v, eta, partition))
        assert torch.equal(shrunk[2], v[2])  # η = 0 is the identity, to the bit
        assert not shrunk[1].any()  # a zero group is zero, not 0/0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [*MOMENTUM_SHAPES, [(2, 150_528)], [(70_000, 3)]], ids=str)
def test_a_momentum_step_gives_what_the_cpu_gives(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    for case in (
        momentum_case(shapes, dtype),
        momentum_case(shapes, dtype, channels_last=True),
        {**momentum_case(shapes, dtype, kept=()), "first": True},
    ):
        device, arrivals = mapped(case, there), torch.zeros(shapes[0][0], dtype=torch.int32, device=DEVICE)
        products = ops.momentum_step(**device, arrivals=arrivals)
        wanted = ops.momentum_step(**case)
        assert not arrivals.any()
        check_momentum(mapped(device, Tensor.cpu), case, products.cpu(), wanted)


def test_a_momentum_step_repeats_at_any_address_and_in_any_batch() -> None:
    case = mapped(momentum_case([(40, 5000)], torch.float32), there)
    one, two, moved = (mapped(case, Tensor.clone) for _ in range(3))
    last = mapped(case, lambda t: t[39:].clone())
    products = ops.momentum_step(**one)
    shifted = torch.zeros(40 * 5000 + 1, device=DEVICE)[1:].view(40, 5000)
    shifted.copy_(moved["x"][0])
    moved["x"] = (shifted,)
    for other in (two, moved):
        assert torch.equal(ops.momentum_step(**other), products)
        for name, tensors in one.items():
            if isinstance(tensors, tuple):
                assert torch.equal(tensors[0], other[name][0])
    assert torch.equal(ops.momentum_step(**last), products[39:])


def test_groups_without_members() -> None:
    labels = torch.tensor([[5, 5, 2, 9, 2]])
    order, offsets = labels.argsort(stable=True).int(), torch.tensor([[0, 0, 0, 2, 2, 2, 4, 4, 4, 4, 5, 5]]).int()
    partition = Partition(labels.int(), order, offsets, torch.ones(1, 11))
    v = torch.randn(4, 5)
    norms = ops.group_norms(there(v), there(partition)).cpu()
    close(norms, reference.group_norms(v, partition))


@pytest.mark.parametrize("penalty", ["none", "l1", "tiles", "labels per input"])
def test_runs_repeat_and_an_input_does_not_depend_on_its_batch(penalty: str) -> None:
    """Statistics too, though 300 inputs leave the threads of a block other shares of the work than one does."""
    written, others = step_case((300, 3, 17, 20), torch.float32, penalty)
    first, second = there(written), there(written)
    statistics = call(ops, first, there(others))
    assert torch.equal(statistics, call(ops, second, there(others)))
    for name in written:
        assert torch.equal(first[name], second[name])
    noise, n = others["noise"], others["noise"].num_samples
    for i in (0, 299):
        index = torch.tensor([i])
        one = {
            **others,
            "gradients": others["gradients"][5 * i : 5 * i + 5],
            "rho": others["rho"][index],
            "step_size": others["step_size"][index],
            "x": others["x"][index],
            "noise": replace(noise, keys=noise.keys[index], sigma=noise.sigma[index]),
        }
        if "eta" in others:
            one["eta"] = others["eta"][index]
        if "groups" in others:
            one["groups"] = others["groups"].take(index)
        alone = there({name: t[n * i : n * i + n] if name == "out" else t[index] for name, t in written.items()})
        assert torch.equal(call(ops, alone, there(one))[0], statistics[i])
        for name in written:
            assert torch.equal(alone[name], first[name][n * i : n * i + n] if name == "out" else first[name][index])


@pytest.mark.parametrize("penalty", ["l1", "tiles"])
@pytest.mark.parametrize("shape", [(3, 3, 20, 20), (3, 3, 19, 21)], ids=str)
def test_chunks_do_not_change_a_bit(penalty: str, shape: tuple[int, ...]) -> None:
    """Neither of the gradients that come in nor of the noisy copies that go out, from any sample on."""
    written, others = step_case(shape, torch.float32, penalty, samples=6)
    others.update(carry=False, count=6)
    bank = replace(others["noise"], num_samples=7, sample_offset=0, element_offset=0)
    out = torch.full((3 * 7, *shape[1:]), float("nan"))
    whole = there({**written, "out": out})
    statistics = call(ops, whole, there({**others, "noise": bank}))
    chunked = there({name: t for name, t in written.items() if name != "out"})
    gradients = others["gradients"].view(3, 6, *shape[1:])
    ops.accumulate(there(gradients[:, :4].flatten(0, 1)), chunked["gradient"], carry=False)
    rest = {**others, "gradients": gradients[:, 4:].flatten(0, 1), "carry": True, "noise": None, "x": None}
    assert torch.equal(call(ops, chunked, there(rest)), statistics)
    for name in chunked:
        assert torch.equal(chunked[name], whole[name])
    rows = whole["out"].view(3, 7, *shape[1:])
    for start, count in ((0, 3), (3, 2), (5, 2), (1, 6)):
        part = ops.perturb(there(others["x"]), chunked["displacement"], there(bank.chunk(start, count)))
        assert torch.equal(part.view(3, count, *shape[1:]), rows[:, start : start + count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_are_no_multiple_of_a_vector(dtype: torch.dtype) -> None:
    written, others = step_case((2, 64), dtype, "l1 per feature")
    others["noise"] = replace(others["noise"], element_offset=0)

    def shifted(t: Tensor) -> Tensor:
        base = there(torch.zeros(t.numel() + 1, dtype=t.dtype))
        view = base[1:].view(t.shape)
        view.copy_(t)
        return view

    expected = there(written)
    wanted = call(ops, expected, there(others))
    for name in (*written, "gradients", "x", "eta"):
        device, rest = there(written), there(others)
        place = device if name in device else rest
        place[name] = shifted(place[name])
        assert torch.equal(call(ops, device, rest), wanted)
        for other in written:
            assert same(device[other], expected[other])


@pytest.mark.parametrize("penalty", ["none", "l1", "l1 per feature", "tiles"])
def test_nan_is_seen(penalty: str) -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, penalty)
    others["gradients"][3, 1, 2, 2] = float("nan")
    device = there(written)
    statistics = call(ops, device, there(others))
    assert statistics[0].isnan().any()
    assert statistics[1].isfinite().all()
    assert device["displacement"][0, 1, 2, 2].isnan()
    assert device["displacement"][1].isfinite().all()


@pytest.mark.parametrize("penalty", ["l1", "tiles"])
def test_a_captured_graph_replays_the_bits_of_eager_steps(penalty: str) -> None:
    """With fresh noise at every replay, since the step counter advances on the device."""
    written, others = step_case((2, 3, 32, 32), torch.float32, penalty)
    captured, eager = there(written), there(written)
    arguments = there(others)
    arrivals = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    arguments.update(carry=False, count=5, arrivals=arrivals)

    def step(buffers: dict[str, Tensor]) -> Tensor:
        statistics = call(ops, buffers, arguments)
        arguments["noise"].step.add_(1)
        return statistics

    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        step(captured)  # loads the kernel, which capture does not allow
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        statistics = step(captured)

    for name, t in there(written).items():
        captured[name].copy_(t)
    arguments["noise"].step.fill_(7)
    replayed = []
    for _ in range(4):
        graph.replay()
        replayed.append((statistics.clone(), captured["displacement"].clone(), captured["out"].clone()))
    arguments["noise"].step.fill_(7)
    for statistics_then, displacement_then, out_then in replayed:
        assert torch.equal(step(eager), statistics_then)
        assert torch.equal(eager["displacement"], displacement_then)
        assert torch.equal(eager["out"], out_then)
    assert not torch.equal(replayed[0][2], replayed[1][2])
    assert not arrivals.any()


def test_private_streams_are_nobody_elses() -> None:
    pooled = {torch.cuda.Stream(DEVICE).cuda_stream for _ in range(64)}
    private = [ops.private_stream(torch.device(DEVICE)) for _ in range(64)]
    addresses = {stream.cuda_stream for stream in private}
    assert len(addresses) == 64
    assert not addresses & pooled
    with torch.cuda.stream(private[0]):
        t = torch.ones(5, device=DEVICE) * 2
    private[0].synchronize()
    assert float(t.sum()) == 10


def test_work_goes_to_the_current_stream() -> None:
    """A step behind a long wait on another stream sees what that stream wrote before it."""
    written, others = step_case((2, 3, 64, 64), torch.float32, "l1")
    expected = there(written)
    arguments = there(others)
    wanted = call(ops, expected, arguments)
    device = there(written)
    gradients = arguments["gradients"]
    late = torch.full_like(gradients, float("nan"))
    torch.cuda.synchronize(DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(gradients)
        statistics = call(ops, device, {**arguments, "gradients": late})
    stream.synchronize()
    assert torch.equal(statistics, wanted)
    for name in written:
        assert torch.equal(device[name], expected[name])


def test_group_steps_that_wait_for_their_blocks_share_the_card() -> None:
    """The blocks of a group step wait for others of the same input, also where four launches want the card at once."""
    cases = [step_case((48, 3, 96, 96), torch.float32, penalty) for penalty in ("tiles", "labels per input") * 2]
    alone, together = ([(there(w), there(o)) for w, o in cases] for _ in range(2))
    expected = [call(ops, *case) for case in alone]
    streams = [torch.cuda.Stream(DEVICE) for _ in cases]
    torch.cuda.synchronize(DEVICE)
    found = []
    for stream, case in zip(streams, together, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # until all are waiting
            found.append(call(ops, *case))
    torch.cuda.synchronize(DEVICE)
    for i, statistics in enumerate(found):
        assert torch.equal(statistics, expected[i])
        for name, t in alone[i][0].items():
            assert torch.equal(t, together[i][0][name])


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    written, others = step_case((2, 3, 8, 8), torch.float32, "tiles")
    expected = there(written)
    call(ops, expected, there(others))
    second = torch.device("cuda", 1)
    device = there(written, second)
    call(ops, device, there(others, second))
    assert torch.cuda.current_device() == 0
    for name in written:
        assert torch.equal(device[name].cpu(), expected[name].cpu())


def test_tensors_of_two_devices_are_refused() -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, "l1")
    with pytest.raises(ValueError, match="gradients: expected a tensor on cuda:0"):
        call(ops, there(written), {**there(others), "gradients": others["gradients"]})
    with pytest.raises(ValueError, match="total: expected a tensor on cuda:0"):
        call(ops, {**there(written), "total": written["total"]}, there(others))
    noise = make_noise(2, torch.float32)
    with pytest.raises(ValueError, match=r"noise\.keys: expected a tensor on cuda:0"):
        ops.perturb(there(torch.zeros(2, 3)), None, noise)


@pytest.mark.parametrize("penalty", ["none", "l1", "l1 per feature", "tiles"])
def test_opcheck_prox_step(penalty: str) -> None:
    written, others = step_case((2, 3, 8, 8), torch.float32, penalty)
    w, a = there(written), there(others)
    g: Partition | None = a.get("groups")
    parts = (None, None, None, None) if g is None else (g.labels, g.order, g.offsets, g.weights)
    n = a["noise"]
    torch.library.opcheck(
        torch.ops.moreau_ext.prox_step.default,
        (
            a["gradients"], w["gradient"], w["displacement"], a["count"], True, a["rho"], a["step_size"], a.get("eta"),
            *parts, w["total"], False, a["x"], n.keys, n.step, n.sigma, n.num_samples, n.element_offset,
            n.sample_offset, n.antithetic, w["out"], None,
        ),
    )  # fmt: skip


def test_opcheck_the_others() -> None:
    n = there(make_noise(2, torch.float32))
    x = there(torch.randn(2, 3, 8, 8))
    torch.library.opcheck(
        torch.ops.moreau_ext.perturb.default,
        (there(torch.zeros(6, 3, 8, 8)), x, None, n.keys, n.step, n.sigma, 3, 0, 0, True),
    )
    torch.library.opcheck(torch.ops.moreau_ext.accumulate.default, (x, there(torch.randn(6, 3, 8, 8)), True))
    p = there(Tiles(3).partition(torch.zeros(2, 3, 8, 8), torch.float32))
    torch.library.opcheck(torch.ops.moreau_ext.group_norms.default, (x, p.labels, p.order, p.offsets, p.weights))


def test_opcheck_momentum_step() -> None:
    for shapes in ([(2, 3)], [(2, 3), (2, 5)]):
        case = mapped(momentum_case(shapes, torch.float32), there)
        torch.library.opcheck(torch.ops.moreau_ext.momentum_step.default, momentum_arguments(case))
