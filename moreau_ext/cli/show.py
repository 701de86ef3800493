"""``moreau-ext show``: maps drawn over their images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import integer, need, positive, say, write


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="draw maps of moreau-ext explain over their images",
        description="Draws rows of --out's results: the image, the map, and the map over the image.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the output of moreau-ext explain")
    parser.add_argument(
        "--id",
        type=integer,
        action="append",
        dest="ids",
        metavar="ID",
        help="a row; may be repeated. default: the first",
    )
    parser.add_argument(
        "--limit", type=positive, default=4, metavar="N", help="rows without --id. default: %(default)s"
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="where the images are. default: gray without them")
    parser.add_argument("--to", type=Path, default=Path("maps.png"), metavar="FILE", help="default: %(default)s")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    need("show", "batch", "pyarrow", "PIL", "matplotlib")
    from ..batch.show import overlays, pick

    rows, shape = pick(arguments.out, arguments.ids, arguments.limit)
    figure = overlays(rows, shape, arguments.source, arguments.out)
    write(arguments.to, lambda file: figure.savefig(file, format="png", dpi=90))
    say(f"wrote {arguments.to}: {', '.join(row['source'] for row in rows)}")
