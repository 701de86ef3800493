"""What the machine code of the CUDA kernels says of their speed. Needs nvcc and nvdisasm, no GPU.

    python benchmarks/sass_table.py [--architectures 90] [--sources prox_step,perturb] [--json FILE]

nvdisasm is looked for on PATH, beside nvcc, in the package nvidia-cuda-nvdisasm, and in triton.

The columns: registers; warps that a multiprocessor holds at large sizes, and their share of what it could hold; 16-byte
loads and stores, and accesses to local memory, in the whole kernel; loads of gradients that a thread issues before it
waits for one; instructions for each noisy feature written, in the loop that draws independent normals and in the loop
of antithetic pairs. Those are all instructions of the loop, both ways of a branch too, so a warp issues no more.

Exits with 1 if a kernel that works on vectors touches local memory, or has no 16-byte load.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ptxas_table import SOURCES, Kernel, compiled, nvcc

# Threads of a block at large sizes, and bytes of dynamic shared memory for each byte of a feature: see the launches.
BLOCKS = {
    "prox_step_kernel": (64, 0),
    "prox_step_group_kernel": (64, 0),
    "perturb_kernel": (128, 0),
    "accumulate_kernel": (128, 0),
    "group_norms_kernel": (256, 0),
    "momentum_step_products_kernel": (256, 0),
    "momentum_step_update_kernel": (256, 0),
}
SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
# Warps, blocks and bytes of shared memory of a multiprocessor (CUDA C++ Programming Guide, technical specifications).
LIMITS = {
    "75": (32, 16, 64),
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
# 0xD2511F53 of Philox, as nvdisasm may print it: ten times in a call, of which the compiler moves one out of the loop.
MULTIPLIER = re.compile(r"0xd2511f53|-0x2daee0ad")
# A load of so many bits to a register, whose line is the first to leave the caches.
READ_ONCE = re.compile(r"\bLDG\.E\.EF(?:\.(64|128))?\S*\s+R(\d+)")


@dataclass(frozen=True)
class Row:
    kernel: str
    sm: str
    registers: int
    spilled: int
    warps: int
    occupancy: float
    loads: int  # of 16 bytes
    stores: int
    local: int
    in_flight: int
    independent: float | None  # instructions a feature
    antithetic: float | None


def nvdisasm() -> str | None:
    beside = [Path(found).with_name("nvdisasm") for found in [nvcc()] if found]
    # Of the package, and the copy that comes with CUDA builds of torch.
    folders = ("nvidia/cu13/bin", "nvidia/cuda_nvdisasm/bin", "triton/backends/nvidia/bin")
    candidates = beside + [Path(p) / folder / "nvdisasm" for p in sys.path for folder in folders]
    return shutil.which("nvdisasm") or next((str(p) for p in candidates if p.exists()), None)


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of one kernel and where its labels stand among them."""
    found: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(found)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            found.append(code.group(1))
    return found, labels


def inner_loops(code: list[str], labels: dict[str, int], pattern: re.Pattern[str], least: int) -> list[list[str]]:
    """The innermost of the loops, by backward branches, in which a pattern is found so often."""
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*\((\.L_\w+)\)", instruction)
        start = labels.get(target.group(1), end + 1) if target else end + 1
        if start <= end and sum(bool(pattern.search(i)) for i in code[start : end + 1]) >= least:
            loops.append((start, end))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [code[a : b + 1] for a, b in inner]


def drawing_loops(code: list[str], labels: dict[str, int]) -> list[list[str]]:
    """The innermost loops with a call of Philox; those with fewer stores first."""
    return sorted(inner_loops(code, labels, MULTIPLIER, 8), key=lambda loop: sum("STG" in i for i in loop))


def in_flight(code: list[str], labels: dict[str, int]) -> int:
    """The most loads marked as read once that a loop issues before an instruction needs what one of them brings."""
    most = 0
    for loop in inner_loops(code, labels, READ_ONCE, 1):
        issued, awaited = 0, set[int]()
        for instruction in loop:
            if load := READ_ONCE.search(instruction):
                first, words = int(load.group(2)), int(load.group(1) or 32) // 32
                awaited.update(range(first, first + words))
                issued += 1
                most = max(most, issued)
            elif awaited.intersection(int(r) for r in re.findall(r"\bR(\d+)", instruction)):
                issued, awaited = 0, set()
    return most


def occupancy(kernel: Kernel, sm: str) -> tuple[int, float]:
    """Warps on a multiprocessor, and as a share of its most. Registers come in units of 256 a warp."""
    name, _, rest = kernel.name.partition("<")
    threads, staged = BLOCKS[name]
    warps, blocks, kilobytes = LIMITS[sm]
    by_registers = 65536 // (-(-kernel.registers * 32 // 256) * 256) * 32 // threads
    shared = kernel.shared + staged * SIZES[rest.split(",")[0].rstrip(">")] + (0 if sm == "75" else 1024)
    held = min(by_registers, blocks, warps * 32 // threads, kilobytes * 1024 // shared if shared else blocks)
    return held * threads // 32, held * threads / 32 / warps


def rows(source: Path, sm: str, folder: Path) -> list[Row]:
    cubin = folder / "out.cubin"
    kernels = list(compiled(source, sm, cubin))
    tool = nvdisasm()
    if tool is None:
        raise SystemExit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
    sass = subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    bodies = dict(re.findall(r"\n\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", sass, re.DOTALL))
    found = []
    for kernel in kernels:
        code, labels = instructions(bodies[kernel.mangled])
        loops = drawing_loops(code, labels)
        calls = [max(1, round(sum(bool(MULTIPLIER.search(i)) for i in loop) / 10)) for loop in loops]
        each = [len(loop) / (4 * calls[i] * (i + 1)) for i, loop in enumerate(loops)]
        found.append(
            Row(
                kernel.name,
                sm,
                kernel.registers,
                kernel.spilled,
                *occupancy(kernel, sm),
                sum(bool(re.search(r"\bLDG\.E\S*\.128", i)) for i in code),
                sum(bool(re.search(r"\bSTG\.E\S*\.128", i)) for i in code),
                sum(bool(re.search(r"\b(LDL|STL)\b", i)) for i in code),
                in_flight(code, labels),
                *(each if len(each) == 2 else [None, None]),
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="90")
    parser.add_argument("--sources", default=",".join(sorted(p.stem for p in SOURCES.glob("*.cu"))))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            row
            for source in arguments.sources.split(",")
            for sm in arguments.architectures.split(",")
            for row in rows(SOURCES / f"{source}.cu", sm, Path(folder))
        ]
    columns = list(asdict(found[0]))
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in found:
        values = ("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in asdict(row).values())
        print("| " + " | ".join(values) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    wrong = [f"{r.kernel} on sm_{r.sm}" for r in found if r.kernel.endswith(", 1>") and (r.local or not r.loads)]
    if wrong:
        print(f"\nlocal memory, or no 16-byte load: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
