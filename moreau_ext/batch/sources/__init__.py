"""Sources of inputs: image files, arrays, Parquet columns, torch's data sets.

A source is a sequence of rows in a fixed order, each with a stable id. An input that cannot be read becomes a row with
an error.
"""

from .base import Loaded, Source, Unreadable, path_id
from .datasets import Stream
from .open import open_source

__all__ = ["Loaded", "Source", "Stream", "Unreadable", "open_source", "path_id"]
