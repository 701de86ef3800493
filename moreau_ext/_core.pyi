# Compiled from csrc/bindings.cpp: opaque records, and functions on addresses that ops.py alone calls.
from typing import Any

def __getattr__(name: str) -> Any: ...
