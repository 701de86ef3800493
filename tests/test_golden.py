"""No bit of any Solution has changed since tests/golden.json was recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator

import golden
import pytest
import torch


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_no_bit_differs_from_what_was_recorded() -> None:
    known = json.loads(golden.COMMITTED.read_text())
    if known["machine"] != golden.machine():
        pytest.skip(f"recorded on {known['machine']}, this is {golden.machine()}")
    assert golden.differences(known["hashes"], golden.hashes()) == []
