"""The command line as ``python -m moreau_ext.cli``."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
