"""The identity of a model: equal for equal models in any process; what it leaves out is said."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moreau_ext._errors import MoreauWarning
from moreau_ext.model.fingerprint import fingerprint


class Extra(nn.Linear):
    def __init__(self, state: Any) -> None:
        super().__init__(2, 2)
        self.extra = state

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Buffer(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


def linear() -> nn.Linear:
    made = nn.Linear(2, 2)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    return made


def quantised(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)


def per_channel(values: torch.Tensor) -> torch.Tensor:
    scales = torch.tensor([0.1, 0.2], dtype=torch.float64)
    return torch.quantize_per_channel(values, scales, torch.tensor([0, 1]), 0, torch.qint8)


A = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
C = torch.tensor([[1.0, 0.0], [0.5, 3.0]])
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "dense": (lambda: Buffer(A), lambda: Buffer(C)),
    "complex": (lambda: Buffer(A + 1j), lambda: Buffer(A.to(torch.complex64).conj() - 1j)),
    "bfloat16": (lambda: Buffer(A.bfloat16()), lambda: Buffer(C.bfloat16())),
    "sparse": (lambda: Buffer(A.to_sparse()), lambda: Buffer(C.to_sparse())),
    "csr": (lambda: Buffer(A.to_sparse_csr()), lambda: Buffer(C.to_sparse_csr())),
    "quantised": (lambda: Buffer(quantised(A)), lambda: Buffer(quantised(C))),
    "per channel": (lambda: Buffer(per_channel(A)), lambda: Buffer(per_channel(C))),
    "number": (lambda: Extra(1.0), lambda: Extra(2.0)),
    "dict": (lambda: Extra({"b": 1, "a": [A, "x"]}), lambda: Extra({"b": 1, "a": [C, "x"]})),
    "array": (lambda: Extra(np.arange(3)), lambda: Extra(np.arange(3.0))),
    "bytes": (lambda: Extra(io.BytesIO(b"one")), lambda: Extra(io.BytesIO(b"two"))),
    "dtype": (lambda: Extra(torch.qint8), lambda: Extra(torch.quint8)),
}


def seeded(make: Callable[[], nn.Module]) -> dict[str, str]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        warnings.filterwarnings("ignore", ".*quantiz")
        return fingerprint(make())


@pytest.mark.parametrize("name", PAIRS)
def test_equal_models_have_equal_fingerprints(name: str) -> None:
    one, other = PAIRS[name]
    assert seeded(one) == seeded(one)
    assert seeded(one)["weights"] != seeded(other)["weights"]
    assert "left_out" not in seeded(one)


def test_what_is_left_out_is_said() -> None:
    class Thing:
        pass

    for model, key in (
        (Extra(Thing()), "_extra_state"),
        (Extra({"a": {1, 2}}), "_extra_state.a"),
        (nn.LazyLinear(3), "bias, weight"),
        (nn.Linear(3, 2, device="meta"), "bias, weight"),
    ):
        with pytest.warns(MoreauWarning, match="the fingerprint of the model leaves out"):
            found = fingerprint(model)
        assert found["left_out"] == key
        assert found["weights"]


def test_a_function_is_known_by_its_modules() -> None:
    net, other = linear(), linear()
    with torch.no_grad():
        other.weight[0, 0] = 9

    def wrap(held: nn.Module) -> Any:
        return lambda x: held(x)

    assert fingerprint(wrap(net)) == fingerprint(wrap(copy.deepcopy(net)))
    assert fingerprint(wrap(net))["weights"] != fingerprint(wrap(other))["weights"]
    assert fingerprint(wrap(net))["weights"] == fingerprint(net)["weights"]
    assert set(fingerprint(torch.sin)) == {"name"}


def test_other_processes_agree(tmp_path: Path) -> None:
    """With another seed of Python's hashes."""
    script = """
import torch
from moreau_ext.model.fingerprint import fingerprint
class Extra(torch.nn.Module):
    def get_extra_state(self): return {"zeta": 1, "alpha": {"x": [1, 2.5, None], "y": b"z"}}
    def set_extra_state(self, state): pass
print(fingerprint(Extra())["weights"])
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
