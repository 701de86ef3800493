"""The command line as ``python -m moreau_ext``, for when the ``moreau-ext`` script is not on the path."""

from __future__ import annotations

import os
import sys

# Python puts the current folder first. It may be a data set, and a file torch.py in it would run in torch's place.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from .cli import main

sys.exit(main())
