"""How does a job scale from one Ray worker to two, on one machine?

    OMP_NUM_THREADS=1 python benchmarks/bench_ray.py

Digits in one array, sparse, 480 gradients each, a worker per core with one thread. Seconds are of the job: from handing
out the first shard to the last row, the start of the actors included, that of Ray not.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from timing import parser, report

from moreau_ext import zoo
from moreau_ext.batch import Config, explain_config
from moreau_ext.batch.ray import explain


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=3584)
    arguments = options.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    count = 1024 if arguments.quick else arguments.images
    zoo.trained("digits_cnn")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        np.save(work / "x.npy", zoo.digits().inputs.numpy().repeat(-(-count // 1797), 0)[:count])
        config = Config(
            model='moreau_ext.zoo:trained("digits_cnn")', method="sparse", rho=0.1, steps=60, samples=8, prepare="none"
        )
        rows: list[dict[str, Any]] = []
        done = explain_config(config, work / "x.npy", work / "alone", workers=0, shard_rows=128)
        rows.append({"run": "one process, no Ray", "images": count, "images/s": count / done.seconds, "speed-up": 1.0})
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for workers in (1, 2):
            done = explain(
                work / "x.npy", config, work / f"ray-{workers}", concurrency=workers, num_cpus=0.75, shard_rows=128
            )
            speed = count / done.seconds
            rows.append(
                {
                    "run": f"Ray, {workers} worker(s)",
                    "images": count,
                    "images/s": speed,
                    "speed-up": speed / rows[0]["images/s"],
                }
            )
        ray.shutdown()
    report("ray", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
