"""The image reader."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Pillow warns above this and refuses twice as many: 89 million pixels, a quarter of a gigabyte in RGB.
MAX_PIXELS = 89_478_485

# The formats that are decoded, and the suffixes by which a folder is searched for them. All have a signature, and
# Pillow decodes them in its own process: EPS starts an interpreter, and TGA takes nearly any bytes for a picture.
FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".mpo"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "ICO": (".ico",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".bw"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)


@functools.cache
def _formats() -> list[str]:
    """The formats that this Pillow has."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_pixels(width: int, height: int, what: str = "has") -> None:
    """Raises ValueError for more than :data:`MAX_PIXELS` pixels; ``what`` begins the reason."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what} {width} x {height} pixels, more than {MAX_PIXELS:,}")


def read_image(file: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of an image file, turned upright by its EXIF orientation, in the file's own mode.

    Raises:
        ImportError: Pillow is missing.
        ValueError: more than :data:`MAX_PIXELS` pixels.
        OSError, SyntaxError, ...: the file is damaged or has none of :data:`FORMATS`, whatever its suffix; decoders
            raise nearly anything.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            f'images are read by Pillow ({error}); install it with: pip install "moreau_ext[batch]"'
        ) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large images
        try:
            opened = Image.open(file, formats=_formats())
        except UnidentifiedImageError as error:
            raise UnidentifiedImageError(f"is no image of a known format ({', '.join(_formats())})") from error
        with opened as image:
            check_pixels(image.width, image.height)
            image.load()
            return ImageOps.exif_transpose(image)
