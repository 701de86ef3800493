"""Small nets and data for the demo, the tests, the benchmarks and the evaluation.

The data are those of scikit-learn and scikit-image; nothing is downloaded. A net depends only on its arguments: its
weights come from a generator of their own, or from a package for the one with ImageNet weights, and the global random
state is neither read nor changed.
"""

from .data import Dataset, breast_cancer, digits, digits32
from .imagenet import efficientnet_lite0, photographs
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
    "efficientnet_lite0",
    "photographs",
    "resnet20",
    "tabular_mlp",
    "tiny_vit",
    "train",
    "trained",
]
