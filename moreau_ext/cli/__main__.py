"""The command line as ``python -m moreau_ext.cli``."""

from __future__ import annotations

from .. import __main__ as __main__
