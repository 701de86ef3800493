"""``moreau-ext info``: versions, the build, and the kernels that run on this machine."""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING, Any

from .common import versions

if TYPE_CHECKING:
    import torch


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, the build, and the kernels of this machine",
        description="Prints versions, the build, and the kernels that run on this machine.",
    )
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> None:
    import torch

    from .. import ops, zoo

    build = ops.build_info()
    cuda = "none"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    built = "not built"
    if build["cuda"] is not None:
        built = f"built with nvcc {build['cuda']} for architectures {build['cuda_architectures']}"
    try:
        cache = str(zoo.cache_folder())
    except RuntimeError as error:
        cache = f"none ({error})"
    about = versions()
    lines = {
        "moreau_ext": about["moreau_ext"],
        "torch": f"{about['torch']} (CUDA {torch.version.cuda or 'no'})",
        "numpy": about["numpy"],
        "Python": f"{about['python']}, {platform.system()} {platform.machine()}",
        "CPU kernels": f"built with {build['compiler']}, running as {build['cpu']}",
        "CUDA kernels": built,
        "CUDA device": cuda,
        "runs on cpu": _runner(torch.device("cpu")),
        "runs on cuda": _runner(torch.device("cuda"))
        if torch.cuda.is_available()
        else "nothing: torch finds no device",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "cache": cache,
    }
    width = max(map(len, lines))
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items()))


def _runner(device: torch.device) -> str:
    from .. import ops

    return "compiled kernels" if ops.has_kernels(device) else "the reference in plain PyTorch (slow)"
