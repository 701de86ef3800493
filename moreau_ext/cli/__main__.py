"""``python -m moreau_ext.cli`` is the command line too."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
