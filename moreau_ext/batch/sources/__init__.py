"""Where inputs come from: image files, arrays, Parquet columns, torch's data sets. One stable id each.

A source is a list of rows that is cut the same way in every run. An input that cannot be read becomes a row with a
reason.
"""

from .base import Loaded, Source, Unreadable, path_id
from .datasets import Stream
from .open import open_source

__all__ = ["Loaded", "Source", "Stream", "Unreadable", "open_source", "path_id"]
