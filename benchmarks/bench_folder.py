"""How fast is a folder of JPEG files explained, and what does a job wait for?

    OMP_NUM_THREADS=1 python benchmarks/bench_folder.py --device cuda --net resnet50

A job of `moreau_ext.batch`, which is what `moreau-ext explain` runs, on files of 256 x 256 pixels (windows of
scikit-learn's two photographs), resized and cropped to the net's inputs, against the same explainer on tensors that lie
on the device, in batches of 32: `gradient` on all files, `sparse` at 480 gradients on a share of them. On a GPU sparse
steps are captured in both.

Seconds of the job's own thread, in order: "decoding" waits for the processes that read and decode; "copying" hands the
inputs to the device; "passes" is the explainer; "results" copies the maps back and makes rows; "writing" waits for the
thread that writes, whose own seconds are "writer busy"; "beginning and end" is the rest. "decoding, one process" is the
time of reading and decoding alone. Last, the whole command `moreau-ext explain` for `gradient`, from the start of
Python.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nets import NETS
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import parser, report, save

from moreau_ext import Gradient, ProximalGradient, SparseMoreauGrad
from moreau_ext.batch import Preprocess, explain_dataset, open_source
from moreau_ext.batch import local as job
from moreau_ext.batch.engine import Engine
from moreau_ext.batch.sink import Output
from moreau_ext.preparation.prepare import prepare

EDGE = 256
# Files that differ; further ones are links to these.
DIFFERENT = 64
BATCH = 32
STEPS, SAMPLES = 60, 8


def jpegs(folder: Path, count: int) -> Path:
    """Files of EDGE x EDGE pixels."""
    folder.mkdir()
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i >= DIFFERENT:
            os.link(folder / f"{i % DIFFERENT:06d}.jpg", path)
            continue
        image = photographs[i % len(photographs)]
        # Where the window lies: along the longer edge, then along the shorter one.
        x, y = 7 * i % (image.width - EDGE), 5 * i % (image.height - EDGE)
        image.crop((x, y, x + EDGE, y + EDGE)).save(path, quality=90)
    return folder


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Seconds of the parts of a job."""
    seconds: Counter[str] = Counter()

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **settings)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    def reading(*args: Any) -> Iterator[Any]:
        batches = read(*args)
        end = object()
        following = timed("decoding", lambda: next(batches, end))
        while (found := following()) is not end:
            yield found

    read = job.read_batches
    parts = [
        (Engine, "to_model", "copying"),
        (Engine, "rows", "rows"),
        (job._Writer, "put", "writing"),
        (job._Writer, "close", "writing"),
        (Output, "write", "writer busy"),
        (Gradient, "attribute", "passes"),
        (SparseMoreauGrad, "attribute", "passes"),
    ]
    with mock.patch.object(job, "read_batches", reading):
        patches = [mock.patch.object(kind, name, timed(part, getattr(kind, name))) for kind, name, part in parts]
        for patch in patches:
            patch.start()
        try:
            yield seconds
        finally:
            for patch in patches:
                patch.stop()
    # Rows are made of passes too.
    seconds["results"] = seconds.pop("rows") - seconds["passes"] - seconds["copying"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--net", choices=sorted(NETS), help="default: resnet50 on a GPU, resnet20 on a CPU")
    options.add_argument("--images", type=int, help="files. default: 1024 on a GPU, 64 on a CPU")
    options.add_argument("--share", type=float, default=1 / 16, help="of the files that sparse explains")
    options.add_argument("--workers", type=int, help="processes that read. default: one per core but one, 8 at most")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    device, cuda = arguments.device, arguments.device == "cuda"
    net = NETS[arguments.net or ("resnet50" if cuda else "resnet20")]
    images = arguments.images or (1024 if cuda else 64)
    workers = arguments.workers or max(1, min(8, (os.cpu_count() or 1) - 1))
    rounds = 1 if arguments.quick else 3
    preprocess = Preprocess(resize=round(net.edge / 0.875), crop=net.edge)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = jpegs(work / "images", images)
        source = open_source(folder, preprocess=preprocess)
        start = time.perf_counter()
        few = min(images, 2 * BATCH)
        if source.load(0, few).inputs is None:
            raise RuntimeError("no file could be read")
        decoding = (time.perf_counter() - start) / few
        tensors = torch.cat([source.load(at, min(at + BATCH, images)).inputs for at in range(0, images, BATCH)])
        tensors = tensors.to(device)
        ids = torch.tensor([source.id(row) for row in range(images)])
        ready = prepare(net.made().to(device), tensors[:8])
        solver = ProximalGradient(num_samples=SAMPLES, max_steps=STEPS, step_size=0.1, tol=0.0)
        some = max(1, round(images * arguments.share))
        shared = work / "some"
        shared.mkdir()
        for path in sorted(folder.iterdir())[:some]:
            os.link(path, shared / path.name)
        cases: dict[str, tuple[Any, int, Path]] = {
            "gradient": (Gradient(ready), images, folder),
            f"sparse, {STEPS * SAMPLES} gradients": (
                SparseMoreauGrad(ready, solver=solver, cuda_graphs="auto" if cuda else False),
                some,
                shared,
            ),
        }
        for method, (explainer, count, files) in cases.items():
            seconds: dict[str, list[float]] = {"bare": [], "job": []}
            parts: Counter[str] = Counter()
            explainer.attribute(tensors[: min(BATCH, count)], ids=ids[: min(BATCH, count)])
            for turn in range(rounds):
                start = time.perf_counter()
                for at in range(0, count, BATCH):
                    found = explainer.attribute(
                        tensors[at : min(at + BATCH, count)], ids=ids[at : min(at + BATCH, count)]
                    )
                float(found.sum())  # waits for the device
                seconds["bare"].append(time.perf_counter() - start)
                out = work / f"{method[:6]}-{turn}"
                start = time.perf_counter()
                with watched() as seen:
                    explain_dataset(explainer, files, out, preprocess=preprocess, batch=BATCH, workers=workers)
                seconds["job"].append(time.perf_counter() - start)
                parts.update(seen)
            bare, whole = (statistics.median(values) for values in seconds.values())
            shares = ("decoding", "copying", "passes", "results", "writing", "writer busy")
            rows.append(
                {
                    "net": net.title,
                    "method": method,
                    "images": count,
                    "workers": workers,
                    "bare images/s": count / bare,
                    "job images/s": count / whole,
                    "ratio": statistics.median(b / j for b, j in zip(*seconds.values(), strict=True)),
                    "job seconds": whole,
                    **{part: parts[part] / rounds for part in shares},
                    "beginning and end": whole - sum(parts[part] for part in shares[:-1]) / rounds,
                    "decoding, one process": decoding * count,
                }
            )
            save("folder", device, rows, arguments.json)
        out = work / "command"
        settings = work / "preprocess.toml"
        settings.write_text(f"resize = {round(net.edge / 0.875)}\ncrop = {net.edge}\n")
        model = f"{net.make.__module__}:{net.make.__name__}"
        command = [sys.executable, "-m", "moreau_ext", "explain", str(folder), "--model", model, "--method", "gradient"]
        command += ["--preprocess", str(settings), "--device", device, "--batch", str(BATCH), "--out", str(out)]
        command += ["--workers", str(workers)]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=work, env={**os.environ, "PYTHONPATH": path})
        whole = time.perf_counter() - start
        rows.append({"command": "moreau-ext explain --method gradient", "images": images, "seconds": whole})
    report("folder", device, rows, arguments.json)


if __name__ == "__main__":
    main()
