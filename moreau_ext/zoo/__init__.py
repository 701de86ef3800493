"""Small nets and data for the demo, the tests, the benchmarks and the evaluation.

The data are those of scikit-learn; nothing is downloaded. A net depends only on its arguments: its weights come from a
generator of their own, and the global random state is neither read nor changed.
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
