"""Small nets and data that the demo, the tests, the benchmarks and the evaluation share.

The data are real tables that scikit-learn ships, so nothing is downloaded. Every net is a function of its arguments:
weights come from a generator of their own, and the global random state is neither read nor moved.
"""

from .data import Dataset, breast_cancer, digits, digits32
from .nets import digits_cnn, resnet20, tabular_mlp, tiny_vit
from .training import NAMES, accuracy, cache_folder, train, trained

__all__ = [
    "NAMES",
    "Dataset",
    "accuracy",
    "breast_cancer",
    "cache_folder",
    "digits",
    "digits32",
    "digits_cnn",
    "resnet20",
    "tabular_mlp",
    "tiny_vit",
    "train",
    "trained",
]
