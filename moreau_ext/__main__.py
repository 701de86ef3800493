"""The command line as ``python -m moreau_ext``, for when the ``moreau-ext`` script is not on the path."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
