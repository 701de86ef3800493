"""The noise bank: golden values, statistics with seeded bounds, and what it must not depend on."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import CXX, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moreau_ext import ops
from moreau_ext.ops import reference
from moreau_ext.ops.noise import Noise, noise_keys

GOLDEN_KEYS = [5197578548964807871, -7061257010553836809, -954060565643939712, 4136705488814653760]
GOLDEN_NORMALS = [
    [
        [1.63962671, -2.22756426, 1.31728565, 0.11832995, 0.34280535, 0.42181388],
        [-2.12316126, 0.09209717, -0.47567469, 0.51868454, -0.94225732, -0.59751393],
    ],
    [
        [0.59371638, -1.82193621, 1.48683456, 1.18166896, 0.04356304, -1.10441162],
        [-1.12408436, -2.08399809, 0.6399809, -0.15882118, 0.10816401, 0.78412425],
    ],
]


def bank(
    ids: torch.Tensor,
    features: int,
    *,
    seed: int = 0,
    step: int = 0,
    samples: int = 4,
    dtype: torch.dtype = torch.float32,
    **kwargs: int,
) -> torch.Tensor:
    """z [B, samples, features], read off perturb at x = 0, σ = 1."""
    batch = ids.shape[0]
    noise = Noise(noise_keys(seed, ids), torch.tensor([step]), torch.ones(batch, dtype=dtype), samples, **kwargs)
    return ops.perturb(torch.zeros(batch, features, dtype=dtype), None, noise).view(batch, samples, features)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(key: int, counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Known answers of the Random123 distribution."""
    words = reference.philox(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_mapping_version_1() -> None:
    """Changing the mapping changes every published result: these values stand for version 1."""
    keys = noise_keys(0, torch.tensor([0, 1, -1, 2**63 - 1]))
    assert keys.tolist() == GOLDEN_KEYS
    z = bank(torch.tensor([0, 7]), 6, seed=3, step=2, samples=2, dtype=torch.float64)
    torch.testing.assert_close(z, torch.tensor(GOLDEN_NORMALS, dtype=torch.float64), rtol=0, atol=5e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_equals_the_specification(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 5, -3])
    z = bank(ids, 4097, seed=9, step=123, samples=3, dtype=dtype, element_offset=3, sample_offset=1)
    noise = Noise(noise_keys(9, ids), torch.tensor([123]), None, 3, False, 3, 1)
    expected = reference.normals(noise, 4097)
    # Box-Muller in float32: a few units in the last place of |z| <= 6.8.
    torch.testing.assert_close(z.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=3e-7)


@pytest.mark.skipif(CXX is None, reason="needs the C++ compiler that built the package")
def test_the_normals_of_a_gpu_keep_their_bound(tmp_path: Path) -> None:
    """philox.h's formulas for a GPU on this machine; what the GPU's own log2 and root may add is set aside."""
    source, program = ROOT / "tests/cpp/normals.cpp", tmp_path / "normals"
    subprocess.run([str(CXX), "-std=c++17", "-O2", "-ffp-contract=off", str(source), "-o", str(program)], check=True)
    fast, exact, bound, intrinsics = map(float, subprocess.check_output([program], text=True).split())
    assert fast <= bound - intrinsics
    # No worse than what a CPU draws: the normals of a GPU are faster, not coarser.
    assert fast <= 1.05 * exact


def test_moments_and_distribution() -> None:
    z = bank(torch.arange(8), 4096, samples=32).double().flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > 1e-3
    assert float(z.abs().max()) < 6.77  # sqrt(-2 ln 2^-33)


def test_tails_are_those_of_a_normal() -> None:
    z = bank(torch.arange(16), 65536, samples=16).flatten()
    n = z.numel()
    for limit in (3.0, 4.0):
        p = 2 * stats.norm.sf(limit)
        assert abs(int((z.abs() > limit).sum()) - n * p) < 4 * math.sqrt(n * p)


@pytest.mark.parametrize("axis", ["element", "lane", "sample", "id", "step", "seed"])
def test_independence(axis: str) -> None:
    """Correlations of neighbours along every coordinate vanish like 1/√n."""
    ids = torch.arange(64)
    z = bank(ids, 512, samples=8).double()
    other = {
        "element": lambda: (z[..., :-1], z[..., 1:]),
        "lane": lambda: (z[..., 0::4], z[..., 1::4]),
        "sample": lambda: (z[:, :-1], z[:, 1:]),
        "id": lambda: (z[:-1], z[1:]),
        "step": lambda: (z, bank(ids, 512, samples=8, step=1).double()),
        "seed": lambda: (z, bank(ids, 512, samples=8, seed=1).double()),
    }[axis]
    a, b = other()
    for power in (1, 2):  # of values, and of magnitudes: Box-Muller partners share a radius
        u, v = a.flatten() ** power, b.flatten() ** power
        r = float(torch.corrcoef(torch.stack([u, v]))[0, 1])
        assert abs(r) < 4 / math.sqrt(u.numel())


def test_the_pair_of_box_muller_is_independent() -> None:
    z = bank(torch.arange(256), 512).double()
    angle = torch.atan2(z[..., 1::4], z[..., 0::4]).flatten() / (2 * math.pi) + 0.5
    assert stats.kstest(angle[:100_000].numpy(), "uniform").pvalue > 1e-3


def test_antithetic_pairs() -> None:
    z = bank(torch.arange(3), 37, samples=5, antithetic=True)
    assert torch.equal(z[:, 1], -z[:, 0])
    assert torch.equal(z[:, 3], -z[:, 2])
    plain = bank(torch.arange(3), 37, samples=5)
    assert torch.equal(z[:, 0::2], plain[:, 0::2])
    shifted = bank(torch.arange(3), 37, samples=4, antithetic=True, sample_offset=1)
    assert torch.equal(shifted, z[:, 1:])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 6),
    features=st.integers(1, 300),
    samples=st.integers(1, 9),
    split=st.data(),
    antithetic=st.booleans(),
)
def test_bits_do_not_depend_on_batch_chunk_or_offset(
    batch: int, features: int, samples: int, split: st.DataObject, antithetic: bool
) -> None:
    ids = torch.arange(batch) * 1000 - 3
    whole = bank(ids, features, samples=samples, antithetic=antithetic)
    at = split.draw(st.integers(0, batch))
    parts = [bank(part, features, samples=samples, antithetic=antithetic) for part in (ids[:at], ids[at:]) if len(part)]
    assert torch.equal(torch.cat(parts), whole)
    cut = split.draw(st.integers(0, samples))
    chunks = [
        bank(ids, features, samples=n, antithetic=antithetic, sample_offset=o)
        for o, n in ((0, cut), (cut, samples - cut))
        if n
    ]
    assert torch.equal(torch.cat(chunks, 1), whole)
    # A tuple's second tensor continues the numbering of the first.
    first = split.draw(st.integers(0, features - 1))
    rest = bank(ids, features - first, samples=samples, antithetic=antithetic, element_offset=first)
    assert torch.equal(rest, whole[..., first:])


def test_bits_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bank(torch.arange(4), 50_000, samples=8)
        torch.set_num_threads(2)
        assert torch.equal(bank(torch.arange(4), 50_000, samples=8), one)
    finally:
        torch.set_num_threads(before)


def test_channels_last_draws_the_noise_of_the_logical_element() -> None:
    for shape in [(2, 3, 5, 7), (2, 3, 64, 64), (1, 200, 3, 3), (1, 2500, 2, 2), (2, 5, 9)]:
        x = torch.randn(shape)
        noise = Noise(noise_keys(1, torch.arange(shape[0])), torch.tensor([4]), torch.ones(shape[0]), 3)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        assert torch.equal(ops.perturb(last, None, noise), ops.perturb(x, None, noise))


def test_blocks_beyond_32_bits() -> None:
    """A block number that carries into the counter's second word."""
    ids = torch.arange(1)
    offset = 4 * (2**32 - 2)
    z = bank(ids, 64, samples=2, dtype=torch.float64, element_offset=offset)
    noise = Noise(noise_keys(0, ids), torch.zeros(1, dtype=torch.int64), None, 2, element_offset=offset)
    torch.testing.assert_close(z, reference.normals(noise, 64), rtol=1e-13, atol=1e-13)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), a=st.integers(-(2**63), 2**63 - 1), b=st.integers(-(2**63), 2**63 - 1))
def test_keys_differ_when_ids_do(seed: int, a: int, b: int) -> None:
    first, second = noise_keys(seed, torch.tensor([a, b])).tolist()
    assert (first == second) == (a == b)
