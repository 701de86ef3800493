"""Argument checks."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ._errors import SettingError


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises SettingError unless ``value`` is a positive integer, or None where it is ``optional``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise SettingError(name, f"expected a positive integer{' or None' * optional}, got {value!r}")
