"""The noise bank: which standard normals an operation draws.

z is a pure function of (seed, id, step, sample, element). Philox4x32-10 turns a 64-bit key, made here from the seed and
the id of an input, and the counter (element block low, element block high, sample, step) into four words, which
Box-Muller turns into the normals of four consecutive elements. ``reference.normals`` is the specification. So an
input's noise depends neither on the batch it came in nor on chunks, threads or workers; between a CPU and a GPU only
by the last digits, since the integers behind it are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on the bits of int64: a bijection, so ids never collide."""

    # int64 shifts copy the sign; a mix needs zeros, hence the masks.
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _FIRST
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _SECOND
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def noise_keys(seed: int, ids: Tensor) -> Tensor:
    """The Philox key of each input: mix(mix(seed + c) xor id), with c the golden-ratio word of SplitMix64.

    Args:
        seed: any integer; taken modulo 2⁶⁴.
        ids: int64 [B], the names of the inputs. Equal ids draw equal noise.

    Returns:
        int64 [B] on the device of ``ids``; different for different ids under one seed.
    """
    start = torch.tensor(_signed(int(seed) + 0x9E3779B97F4A7C15), dtype=torch.int64, device=ids.device)
    return _mix(_mix(start) ^ ids)


@dataclass(frozen=True)
class Noise:
    """Which normals to draw, and how strong.

    Args:
        keys: int64 [B], from :func:`noise_keys`.
        step: int64 [1]; on the device, so that a captured graph can advance it. A fixed bank is step 0 always.
        sigma: standard deviation in the input's unit, a number or state dtype [B]; None draws nothing (copies of
            x + displacement).
        num_samples: copies per input.
        antithetic: sample 2k+1 is minus sample 2k.
        element_offset: number of the tensor's first feature within the input (the tensors of a tuple are numbered one
            after the other).
        sample_offset: number of the first sample, when an input's samples are made in chunks.
    """

    keys: Tensor
    step: Tensor
    sigma: Tensor | float | None
    num_samples: int
    antithetic: bool = False
    element_offset: int = 0
    sample_offset: int = 0

    def chunk(self, sample_offset: int, num_samples: int) -> Noise:
        """The same bank, restricted to some of the samples."""
        return replace(self, sample_offset=self.sample_offset + sample_offset, num_samples=num_samples)
