"""The fused operations on tensors.

Each has the name and the signature of its specification in :mod:`moreau_ext.ops.reference`, where arguments and
formulas are described. All work in place on buffers of the caller, allocate next to nothing and never synchronise. On
devices without a kernel (a build without CUDA, or another accelerator) the reference runs.

They are registered with torch.library, so ``torch.compile(fullgraph=True)`` takes them; they carry no autograd rule.
"""

from .accumulate import accumulate
from .device import build_info, has_kernels, private_stream
from .group_norms import group_norms, shrink
from .layout import state_dtype
from .momentum_step import momentum_step
from .noise import Noise
from .perturb import perturb
from .prox_step import prox_step
from .reference import PRODUCTS, STATISTICS, SUMS, soft_threshold

__all__ = [
    "PRODUCTS",
    "STATISTICS",
    "SUMS",
    "Noise",
    "accumulate",
    "build_info",
    "group_norms",
    "has_kernels",
    "momentum_step",
    "perturb",
    "private_stream",
    "prox_step",
    "shrink",
    "soft_threshold",
    "state_dtype",
]
