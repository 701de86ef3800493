"""``moreau-ext show``: maps drawn over their images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._errors import SettingError
from .common import Refused, integer, need, number, positive, say, seed, write

# The formats that matplotlib writes without further packages, by suffix.
_FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="draw maps of moreau-ext explain over their images",
        description="Draws rows of the results in OUT: the image, the map, and the map over the image, with a colour "
        "bar and a legend. A row of a table is drawn as bars.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the output folder of moreau-ext explain")
    parser.add_argument(
        "--id",
        type=integer,
        action="append",
        dest="ids",
        metavar="ID",
        help="draw the row with this id; may be repeated",
    )
    parser.add_argument(
        "--rows",
        choices=("first", "random", "class"),
        default="first",
        dest="choice",
        help="the rows without --id: the first ones, random ones, or the first of each explained class. default: "
        "%(default)s",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of --rows random. default: %(default)s")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="number of rows without --id. default: 4, or 20 of --rows class"
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="the images: their folder, one file, or the .npy, .npz or Parquet file. default: maps without images",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="names of the classes, one per line, class 0 first. default: those that the model or the folders have",
    )
    parser.add_argument(
        "--norms", action="store_true", help="draw each tile of --method group as one colour, the length of its values"
    )
    parser.add_argument(
        "--blur",
        type=number,
        default=0.0,
        metavar="PIXELS",
        help="over the image, draw |map| blurred by a Gaussian of this deviation, as heat. default: none",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="the picture, in the format of its suffix. default: OUT's name with .png in the current folder, with a "
        "number where that is taken",
    )
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    need("show", "batch", "pyarrow", "PIL", "matplotlib")
    from ..batch.show import pick, picture

    to: Path = arguments.to or _free(arguments.out)
    form = to.suffix.removeprefix(".").lower()
    if form not in _FORMATS:
        raise Refused(f"--to {to}: expected a suffix of {', '.join(_FORMATS)}, got {to.suffix or 'none'}")
    if not to.parent.is_dir():
        raise Refused(f"--to {to}: the folder {to.parent} is not there")
    if arguments.norms and arguments.blur:
        raise Refused("--norms: one colour for a tile leaves nothing to --blur; leave one of the two out")
    rows = pick(arguments.out, arguments.ids, arguments.choice, arguments.limit, arguments.seed)
    figure = picture(
        arguments.out,
        rows,
        source=arguments.source,
        names=None if arguments.names is None else _names(arguments.names),
        norms=arguments.norms,
        blur=arguments.blur,
    )
    write(to, lambda file: figure.savefig(file, format=form, dpi=100))
    say(f"wrote {to}: {', '.join(row['source'] for row in rows)}")


def _free(out: Path) -> Path:
    """A name that no file has, after the folder of the results."""
    stem = out.resolve().name or "maps"
    number, path = 1, Path(f"{stem}.png")
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}.png")
    return path


def _names(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise SettingError("names", f"{path} cannot be read ({why})") from error
