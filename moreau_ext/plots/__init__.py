"""Figures of maps and of metrics.

Every function returns a matplotlib Figure, which a notebook shows and ``figure.savefig(path)`` writes. None uses the
global state of pyplot, so they work in servers and threads. The first call imports matplotlib.
"""

from .charts import bands, bars, features
from .heat import gaussian_blur, heat_gallery
from .maps import gallery, overlay
from .sentences import words

__all__ = ["bands", "bars", "features", "gallery", "gaussian_blur", "heat_gallery", "overlay", "words"]
