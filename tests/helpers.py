"""Small models, inputs, comparisons and places that several test files use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moreau_ext import ConvergenceWarning, _core
from moreau_ext.ops.noise import Noise, noise_keys
from moreau_ext.ops.reference import normals

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sysconfig.get_path("scripts")) / "moreau-ext"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
DEVICE = torch.device("cuda", 0)


def _cuda_missing() -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build of torch may warn where there is no driver
        if not torch.cuda.is_available():
            return "no CUDA device"
    return "built without CUDA kernels" if _core.cuda_version is None else None


CUDA_MISSING = _cuda_missing()

# float32: 32 roundings, for sums over 40 features and a dozen steps' worth of error that contraction leaves.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 32 * torch.finfo(torch.float32).eps}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within the tolerance of a dtype, which is that of ``actual`` unless given."""
    t = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=t, atol=t)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that do not depend on torch's global state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """[batch, 2, 5, 4]: the same numbers in every dtype."""
    return torch.randn(batch, 2, 5, 4, dtype=torch.float64).to(dtype)


def smooth(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A smooth classifier of :func:`images`, with four classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.SiLU(), nn.Linear(8, 4)).to(dtype).eval()


def smooth_net(features: int = 24) -> nn.Module:
    """A smooth classifier of vectors in float64, with three classes."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(features, 48), nn.SiLU(), nn.Linear(48, 3)).double().eval()


class Quadratic(nn.Module):
    """f(x) = ½ xᵀQx + b·x with the eigenvalues of Q given."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        n = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.register_buffer("q", basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T)
        self.register_buffer("b", torch.randn(n, generator=generator, dtype=torch.float64))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x @ self.q) * x).sum(1) + x @ self.b


def bank(seed: int, ids: Tensor, samples: int, shape: Sequence[int], antithetic: bool = False, step: int = 0) -> Tensor:
    """Noise by the specification: z [B, samples, *shape] in float64."""
    noise = Noise(noise_keys(seed, ids), torch.tensor([step]), None, samples, antithetic)
    return normals(noise, torch.Size(shape).numel()).view(len(ids), samples, *shape)


def in_threads(work: Callable[[Any], object], *arguments: Any) -> None:
    """Calls ``work`` with each argument in a thread of its own, side by side, and waits for all."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start(command: Sequence[object], **how: Any) -> subprocess.Popen[str]:
    """Starts a process with pipes that SIGINT interrupts, also if this one ignores it, as in the background of a shell.

    A handler of ours becomes the default in the child; "ignore" would be inherited.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, command)], **pipes, **how)
    finally:
        signal.signal(signal.SIGINT, before)


class Malicious:
    """Unpickling it creates a file, by a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def read_maps(out: Path) -> np.ndarray[Any, Any]:
    """The maps of a batch job, [N, *features]."""
    from moreau_ext.batch import read

    maps: np.ndarray[Any, Any] = read(out)["map"].combine_chunks().to_numpy_ndarray()
    return maps


def same_results(one: Path, other: Path) -> None:
    """All columns of two batch jobs are equal, the maps to the bit."""
    from moreau_ext.batch import COLUMNS, read

    a, b = read(one), read(other)
    for name in COLUMNS:
        assert a[name].equals(b[name]), name
    np.testing.assert_array_equal(read_maps(one), read_maps(other))


def others(record: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """The warnings beside the one that too few gradients were taken."""
    return [w for w in record if w.category is not ConvergenceWarning]
