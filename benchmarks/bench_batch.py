"""What does a job cost beside its explainer? Does its memory stay flat? How soon does it begin?

    OMP_NUM_THREADS=1 python benchmarks/bench_batch.py

Throughput: a ResNet-20-like net on a folder of JPEG files (scikit-learn's two photographs, cut into pieces of 64 x 64,
brought to 32 x 32), against the same explainer on tensors in memory, in turn. Memory: `gradient` of 10,000 such files,
resident memory of the explaining process and of the one that reads. Start-up: from the start of Python to the first
batch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import parser, report

from moreau_ext import Gradient, ProximalGradient, SparseMoreauGrad, zoo
from moreau_ext.batch import Preprocess, explain_dataset, open_source
from moreau_ext.preparation.prepare import prepare

PREPROCESS = Preprocess(resize=32)
BATCH = 16
TO_FIRST_BATCH = """
import sys, time
from moreau_ext.batch import engine
def first(self, loaded):
    print(time.time(), flush=True)
    raise KeyboardInterrupt
engine.Engine.rows = first
from moreau_ext import cli
cli.main(sys.argv[1:])
"""


def jpegs(folder: Path, count: int) -> Path:
    """Pieces of the two photographs as JPEG files; from the 120th on hard links to these."""
    folder.mkdir()
    pieces = []
    for image in load_sample_images().images:
        photograph = Image.fromarray(image)
        pieces += [photograph.crop((x, y, x + 64, y + 64)) for y in range(0, 364, 64) for x in range(0, 577, 64)]
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < len(pieces):
            pieces[i].save(path, quality=90)
        else:
            os.link(folder / f"{i % len(pieces):06d}.jpg", path)
    return folder


def resident(process: int) -> float:
    """MiB of a process and of its children."""
    total = 0.0
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for each in (str(process), *children):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        # Proportional: pages that parent and child share count once.
        total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    return total


def throughput(work: Path, images: int, rounds: int) -> list[dict[str, Any]]:
    folder = jpegs(work / "some", images)
    source = open_source(folder, preprocess=PREPROCESS)
    tensors = source.load(0, images).inputs
    if tensors is None:
        raise RuntimeError("no tensors")
    ready = prepare(zoo.resnet20().eval(), tensors[:8])
    solver = ProximalGradient(num_samples=8, max_steps=60, step_size=0.1, tol=0.0)
    ids = torch.tensor([source.id(row) for row in range(images)])
    rows = []
    explainers = {"sparse, 480 gradients": SparseMoreauGrad(ready, solver=solver), "gradient": Gradient(ready)}
    for name, explainer in explainers.items():
        many = rounds if name.startswith("sparse") else 3 * rounds
        seconds: dict[str, list[float]] = {"bare": [], "job": []}
        for turn in range(many):
            start = time.perf_counter()
            for at in range(0, images, BATCH):
                explainer.attribute(tensors[at : at + BATCH], ids=ids[at : at + BATCH])
            seconds["bare"].append(time.perf_counter() - start)
            out = work / f"out-{name[:5]}-{turn}"
            start = time.perf_counter()
            explain_dataset(explainer, folder, out, preprocess=PREPROCESS, batch=BATCH, workers=1)
            seconds["job"].append(time.perf_counter() - start)
        bare, job = (statistics.median(values) for values in seconds.values())
        ratio = statistics.median(b / j for b, j in zip(*seconds.values(), strict=True))
        rows.append(
            {
                "method": name,
                "images": images,
                "bare images/s": images / bare,
                "job images/s": images / job,
                "ratio": ratio,
            }
        )
    return rows


def memory(work: Path, images: int) -> list[dict[str, Any]]:
    folder = jpegs(work / "many", images)
    out = work / "memory"
    seen: list[tuple[int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            done = 256 * len(list(out.glob("shard-*"))) if out.exists() else 0
            seen.append((done, resident(os.getpid())))

    thread = threading.Thread(target=watch)
    thread.start()
    explain_dataset(Gradient(zoo.resnet20().eval()), folder, out, preprocess=PREPROCESS, batch=BATCH, workers=1)
    over.set()
    thread.join()
    warm = [mib for done, mib in seen if 1000 <= done < images - 256]
    first = statistics.median(mib for done, mib in seen if 1000 <= done < 2000)
    last = statistics.median(mib for done, mib in seen if images - 1256 <= done < images - 256)
    return [
        {
            "images": images,
            "MiB at 1,000-2,000": first,
            "MiB in the last 1,000": last,
            "change": last / first - 1,
            "least": min(warm) / first - 1,
            "most": max(warm) / first - 1,
        }
    ]


def start_up(work: Path) -> list[dict[str, Any]]:
    given = [
        "explain",
        str(jpegs(work / "few", 32)),
        "--model",
        "moreau_ext.zoo:resnet20",
        "--preprocess",
        str(work / "p.toml"),
    ]
    (work / "p.toml").write_text("resize = 32\n")
    rows = []
    for choice in ("none", "auto"):
        seconds = []
        for turn in range(5):
            more = ["--prepare", choice, "--out", str(work / f"start-{choice}-{turn}")]
            start = time.time()
            done = subprocess.run([sys.executable, "-c", TO_FIRST_BATCH, *given, *more], capture_output=True, text=True)
            seconds.append(float(done.stdout.split()[0]) - start)
        rows.append(
            {"--prepare": choice, "seconds to the first batch": statistics.median(seconds), "most": max(seconds)}
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=32, help="of the throughput measurement")
    options.add_argument("--only", choices=["throughput", "start-up", "memory"])
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wanted = arguments.only
        rows: list[dict[str, Any]] = []
        if wanted in (None, "throughput"):
            rows += throughput(work, arguments.images, 1 if arguments.quick else 3)
        if wanted in (None, "start-up"):
            rows += start_up(work)
        if wanted in (None, "memory"):
            rows += memory(work, 3_000 if arguments.quick else 10_000)
    report("batch", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
