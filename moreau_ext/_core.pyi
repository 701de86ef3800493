# The compiled core, csrc/bindings.cpp: the structs and the operations of csrc/kernels.h, which explains every field.
# Nothing is checked; moreau_ext.ops is the only caller.
from typing import ClassVar, TypeAlias, final

# The address of a tensor's memory, 0 for none; or a cudaStream_t.
_Address: TypeAlias = int

compiler: str
cpu_capability: str
cuda_version: str | None
cuda_architectures: str | None

@final
class Dtype:
    f32: ClassVar[Dtype]
    f64: ClassVar[Dtype]
    f16: ClassVar[Dtype]
    bf16: ClassVar[Dtype]

@final
class Penalty:
    none: ClassVar[Penalty]
    l1: ClassVar[Penalty]
    group: ClassVar[Penalty]

@final
class Total:
    none: ClassVar[Total]
    gradient: ClassVar[Total]
    displacement: ClassVar[Total]

@final
class Phases:
    products: ClassVar[Phases]
    update: ClassVar[Phases]
    both: ClassVar[Phases]

@final
class Extents:
    def __init__(self, *, batch: int, channels: int, positions: int) -> None: ...

@final
class Noise:
    def __init__(
        self,
        *,
        keys: _Address,
        step: _Address,
        sigma: _Address,
        element_offset: int,
        sample_offset: int,
        samples: int,
        antithetic: bool,
    ) -> None: ...

@final
class Groups:
    def __init__(
        self,
        *,
        order: _Address,
        offsets: _Address,
        labels: _Address,
        weights: _Address,
        count: int,
        per_input: bool,
    ) -> None: ...

# The operations: the fields of their structs, then the device, -1 for the CPU (whose stream is 0). Keywords in this
# order are found fastest. RuntimeError: CUDA failed, or this build has no CUDA kernels.
def perturb(
    *,
    dtype: Dtype,
    extents: Extents,
    x: _Address,
    displacement: _Address,
    noise: Noise,
    noisy: _Address,
    device: int,
    stream: _Address,
) -> None: ...
def accumulate(
    *,
    dtype: Dtype,
    extents: Extents,
    gradients: _Address,
    samples: int,
    sum: _Address,
    carry: bool,
    device: int,
    stream: _Address,
) -> None: ...
def group_norms(
    *,
    dtype: Dtype,
    extents: Extents,
    v: _Address,
    groups: Groups,
    norms: _Address,
    device: int,
    stream: _Address,
) -> None: ...
def prox_step(
    *,
    dtype: Dtype,
    extents: Extents,
    gradients: _Address,
    samples: int,
    count: int,
    carry: bool,
    gradient: _Address,
    displacement: _Address,
    total: _Address,
    total_of: Total,
    rho: _Address,
    step_size: _Address,
    penalty: Penalty,
    eta: _Address,
    eta_input: int,
    eta_feature: int,
    groups: Groups,
    x: _Address,
    noise: Noise,
    noisy: _Address,
    statistics: _Address,
    partials: _Address,
    factors: _Address,
    arrivals: _Address,
    device: int,
    stream: _Address,
) -> None: ...
def momentum_step(
    *,
    phases: Phases,
    dtype: Dtype,
    batch: int,
    features: int,
    y: _Address,
    y_prev: _Address,
    x: _Address,
    x_prev: _Address,
    gradient: _Address,
    last_gradient: _Address,
    last_step: _Address,
    squares: _Address,
    points: _Address,
    gradients: _Address,
    products: _Address,
    sums: _Address,
    statistics: _Address,
    samples: float,
    momentum: float,
    first: bool,
    partials: _Address,
    arrivals: _Address,
    device: int,
    stream: _Address,
) -> None: ...

# Rows for each input of the scratch `partials`, on CUDA or on the CPU.
def prox_step_partials(*, extents: Extents, cuda: bool) -> int: ...
def momentum_step_partials(*, features: int, cuda: bool) -> int: ...

# Only in builds with CUDA.
def make_stream(device: int) -> _Address: ...
