"""Devices: which have compiled kernels, what was compiled, private CUDA streams."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch

from ._register import _core


def has_kernels(device: torch.device) -> bool:
    """Whether the compiled kernels run on a device, rather than the reference in plain PyTorch."""
    return device.type == "cpu" or (device.type == "cuda" and _core.cuda_version is not None)


# Streams of private_stream() that nobody has any more, by device. None is ever destroyed: torch's allocator remembers
# the streams that it gave memory to, and waits for them.
_spare_streams: defaultdict[int, list[int]] = defaultdict(list)


def private_stream(device: torch.device) -> Any:
    """A torch.cuda.Stream that nobody else has, as long as the object lives.

    Those of ``torch.cuda.Stream()`` are 32 per device, dealt out in turn: the 33rd is the first again, and torch lends
    cuBLAS one workspace per stream, in a capture and at once.

    Args:
        device: of the stream.

    Raises:
        RuntimeError: CUDA could not create it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    spare = _spare_streams[index]
    try:
        address = spare.pop()
    except IndexError:
        address = _core.make_stream(index)
    stream: Any = torch.cuda.ExternalStream(address, device=device)  # type: ignore[no-untyped-call]  # torch's
    weakref.finalize(stream, spare.append, address).atexit = False
    return stream


def build_info() -> dict[str, str | None]:
    """What was compiled: compiler, vector instructions that this CPU runs, CUDA version and architectures (or None)."""
    return {
        "compiler": _core.compiler,
        "cpu": _core.cpu_capability,
        "cuda": _core.cuda_version,
        "cuda_architectures": _core.cuda_architectures,
    }
