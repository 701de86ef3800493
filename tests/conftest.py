"""What the tests share."""

from __future__ import annotations

import os

# Set before torch is imported: with two threads on a busy machine, OpenMP's spinning makes tiny calls 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
