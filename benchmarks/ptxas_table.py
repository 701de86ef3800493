"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them. Needs nvcc, no GPU.

    python benchmarks/ptxas_table.py [--architectures 75,90,120]

Exits with 1 if an elementwise kernel spills: those are bound by memory, and a spill is more of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def nvcc() -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise SystemExit("nvcc was not found: put it on PATH or set CUDACXX")
    return found


def readable(mangled: str) -> str:
    """kernel<type, ...> of a mangled name; nvcc's own demangler is not everywhere."""
    name = re.search(r"[a-z][a-z_]*_kernel", mangled)
    if name is None:
        return mangled
    template = mangled[name.end() :]
    arguments = []
    match = re.match(r"I(f|d|6__half|13__nv_bfloat16)?((?:L\w\d+E)*)", template)
    if match:
        arguments += [TYPES[match.group(1)]] if match.group(1) else []
        arguments += re.findall(r"L\w(\d+)E", match.group(2))
    return f"{name.group()}<{', '.join(arguments)}>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", default="75,80,86,89,90,100,120")
    architectures = parser.parse_args().architectures.split(",")
    print("| source | kernel | sm | registers | spilled bytes | stack | shared |\n|---|---|---|---|---|---|---|")
    spilled = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            for sm in architectures:
                command = [nvcc(), "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xptxas", "-v"]
                command += ["--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
                # What CMakeLists.txt defines for error messages.
                command += ['-DMOREAU_CUDA_VERSION="?"', '-DMOREAU_CUDA_ARCHITECTURES="?"', "-fmad=false"]
                command += ["-c", str(source), "-o", str(Path(folder) / "out.o")]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                for block in re.split(r"Compiling entry function '", done.stderr)[1:]:
                    kernel = readable(block.partition("'")[0])
                    stack, store, loads = re.search(
                        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
                    ).groups()
                    registers = re.search(r"Used (\d+) registers", block).group(1)
                    shared = re.search(r"(\d+) bytes smem", block)
                    spill = int(store) + int(loads)
                    memory = shared.group(1) if shared else 0
                    print(f"| {source.name} | {kernel} | {sm} | {registers} | {spill} | {stack} | {memory} |")
                    if spill and "group" not in kernel:
                        spilled.append(f"{kernel} on sm_{sm}")
    if spilled:
        print(f"\nspills: {', '.join(spilled)}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
