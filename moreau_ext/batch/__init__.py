"""Maps of whole data sets, from image files, arrays or tables to Parquet, on one machine or a cluster.

    from moreau_ext.batch import explain_dataset, read

    explain_dataset(explainer, "photographs/", "maps/", preprocess=Preprocess(resize=256, crop=224))
    table = read("maps/")

:mod:`moreau_ext.batch.ray` runs the same job on a cluster.
"""

from ..data.manifest import Differs
from .config import Config
from .job import Summary
from .models import load_model, load_preprocess
from .preprocess import Preprocess
from .run import explain_config, explain_dataset
from .sink import COLUMNS, dense, manifest, read
from .sources.base import Source, path_id
from .sources.datasets import Stream
from .sources.open import open_source

__all__ = [
    "COLUMNS",
    "Config",
    "Differs",
    "Preprocess",
    "Source",
    "Stream",
    "Summary",
    "dense",
    "explain_config",
    "explain_dataset",
    "load_model",
    "load_preprocess",
    "manifest",
    "open_source",
    "path_id",
    "read",
]
