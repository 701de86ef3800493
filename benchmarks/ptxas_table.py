"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them. Needs nvcc, no GPU.

    python benchmarks/ptxas_table.py [--architectures 75,90,120]

Exits with 1 if a kernel spills: nearly all are bound by memory, and a spill is more of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    mangled: str
    registers: int
    spilled: int  # bytes, stores and loads
    stack: int
    shared: int  # static

    @property
    def name(self) -> str:
        """kernel<type, ...>; nvcc's own demangler is not everywhere."""
        name = re.search(r"[a-z][a-z_]*_kernel", self.mangled)
        if name is None:
            return self.mangled
        arguments = []
        match = re.match(r"I(f|d|6__half|13__nv_bfloat16)?((?:L\w\d+E)*)", self.mangled[name.end() :])
        if match:
            arguments += [TYPES[match.group(1)]] if match.group(1) else []
            arguments += re.findall(r"L\w(\d+)E", match.group(2))
        return f"{name.group()}<{', '.join(arguments)}>"


def nvcc() -> str | None:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).exists() else None


def compiled(source: Path, sm: str, cubin: Path) -> Iterator[Kernel]:
    """Compiles one source for one architecture as CMakeLists.txt does, to `cubin`."""
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("nvcc was not found: put it on PATH or set CUDACXX")
    command = [compiler, "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xptxas", "-v"]
    command += ["--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    # What CMakeLists.txt defines for error messages.
    command += ['-DMOREAU_CUDA_VERSION="?"', '-DMOREAU_CUDA_ARCHITECTURES="?"', "-fmad=false"]
    done = subprocess.run([*command, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    for block in re.split(r"Compiling entry function '", done.stderr)[1:]:
        stack, stores, loads = (
            int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", block)[:3]
        )
        registers = int(re.findall(r"Used (\d+) registers", block)[0])
        shared = re.search(r"(\d+) bytes smem", block)
        memory = int(shared.group(1)) if shared else 0
        yield Kernel(block.partition("'")[0], registers, stores + loads, stack, memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", default="75,80,86,89,90,100,120")
    architectures = parser.parse_args().architectures.split(",")
    print("| source | kernel | sm | registers | spilled bytes | stack | shared |\n|---|---|---|---|---|---|---|")
    spilled = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            for sm in architectures:
                for k in compiled(source, sm, Path(folder) / "out.cubin"):
                    print(f"| {source.name} | {k.name} | {sm} | {k.registers} | {k.spilled} | {k.stack} | {k.shared} |")
                    if k.spilled:
                        spilled.append(f"{k.name} on sm_{sm}")
    if spilled:
        print(f"\nspills: {', '.join(spilled)}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
