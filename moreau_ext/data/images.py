"""The image reader."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Pillow warns above this and refuses twice as many: 89 million pixels, a quarter of a gigabyte in RGB.
MAX_PIXELS = 89_478_485

# Formats that are searched for in a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2")


def read_image(file: str | Path | IO[bytes]) -> Image.Image:
    """The first frame of an image file, turned upright by its EXIF orientation, in the file's own mode.

    Raises:
        ImportError: Pillow is missing.
        ValueError: more than :data:`MAX_PIXELS` pixels.
        OSError, SyntaxError, ...: the file is damaged; decoders raise nearly anything.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            f'images are read by Pillow ({error}); install it with: pip install "moreau_ext[batch]"'
        ) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large images
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            return ImageOps.exif_transpose(image)
