"""What the benchmarks share: interleaved medians, the machine's description, and where results go."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moreau_ext import ops

RESULTS = Path(__file__).parent / "results"


def said(*command: str) -> str | None:
    """What a command printed, or None where it failed or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """Who ran this: processor, threads, versions, commit."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    build = ops.build_info()
    about: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "vectors": build["cpu"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": build["compiler"],
        "cuda_build": build["cuda"],
        "commit": said("git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


class Timer:
    """Seconds of one call, waiting for the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], Any], repeat: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            return (time.perf_counter() - start) / repeat
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeat):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat


def replayed(run: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """The launches of one call, captured in a CUDA graph.

    Args:
        run: the call; its results are not used.
        pool: memory that graphs may share, since no two of them are replayed at once.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()  # what is loaded, chosen or compiled at first cannot be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A stream of its own, as long as the graph lives: see CudaDevice in moreau_ext/capture/cuda.py.
    private = ops.private_stream(torch.device("cuda"))
    with torch.cuda.graph(graph, pool=pool, stream=private):
        run()

    def replay() -> None:
        graph.replay()

    replay.of = run, private  # a graph keeps no tensor that it works on
    return replay


def interleaved(
    runs: dict[str, Callable[[], Any]], device: str = "cpu", rounds: int = 15, each: float = 0.02
) -> dict[str, float]:
    """Median seconds of every candidate: A B C A B C ..., so that a machine that changes speed changes it for all.

    Args:
        runs: the candidates.
        device: "cpu" or "cuda".
        rounds: how many times each is measured.
        each: seconds that one measurement should last, by repetition; 0 does not repeat.
    """
    timer = Timer(device)
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, int(each / max(timer(run, 1), 1e-7))) if each else 1
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timer(run, repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    made.add_argument("--json", type=Path, help="where to write the results")
    return made


def report(name: str, device: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints a Markdown table, and writes JSON where asked."""
    about = machine(device)
    print(f"\n{name} on {about.get('gpu', about['cpu'])}, {about['threads']} thread(s), torch {about['torch']}\n")
    for columns in dict.fromkeys(tuple(row) for row in rows):
        print("| " + " | ".join(columns) + " |")
        print("|" + "---|" * len(columns))
        for row in rows:
            if tuple(row) == columns:
                print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
        print()
    save(name, device, rows, path)


def save(name: str, device: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Writes JSON where asked: also what there is before the end, which may not come."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "machine": machine(device), "rows": rows}, indent=2) + "\n")
