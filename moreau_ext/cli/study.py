"""``moreau-ext study``: a small study of an open question, with its numbers, plot and findings."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .common import need, output_folder, positive, say

# The names of STUDIES, repeated because the parser is made before torch is imported.
_NAMES = ("consistency", "regularised", "perturbation", "tabular")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="a small study of an open question: its numbers, its plot, its finding",
        description="consistency: across seeds and architectures; regularised: weight decay and input-convex nets; "
        "perturbation: occlusion restricted to a sparse map's support; tabular: the L1 envelope on a table. Writes "
        "NAME.md, NAME.csv and NAME.png.",
    )
    parser.add_argument("name", choices=(*_NAMES, "all"), metavar="NAME", help=f"{', '.join(_NAMES)}, or all")
    parser.add_argument("--limit", type=positive, metavar="N", help="inputs. default: the study's own, 60 to 200")
    parser.add_argument("--out", type=Path, default=Path("moreau-studies"), metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=_study)


def _study(arguments: argparse.Namespace) -> None:
    need("study", "evaluation", "matplotlib", "sklearn", "captum")
    from ..data.progress import report
    from ..evaluation.studies import STUDIES

    with output_folder(arguments.out):
        for name in _NAMES if arguments.name == "all" else (arguments.name,):
            report(f"running {name}", sys.stderr.isatty())
            began = time.perf_counter()
            settings = {} if arguments.limit is None else {"limit": arguments.limit}
            found = STUDIES[name](**settings)
            found.save(arguments.out)
            say(found.text())
            say(f"wrote {arguments.out / name}.md, .csv and .png in {time.perf_counter() - began:.0f} s\n")
