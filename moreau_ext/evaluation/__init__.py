"""Judging maps: metrics, and later the protocols that use them."""

from .metrics import gini

__all__ = ["gini"]
