"""The command line as ``python -m moreau_ext.cli``."""

from __future__ import annotations

import os
import sys

# As in moreau_ext/__main__.py: the current folder is no place for packages.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from . import main

sys.exit(main())
