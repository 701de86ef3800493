"""Does a job that is killed again and again end as one that was left alone?

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py

Explains 2,000 digits (PNG files, sparse, 480 gradients each) once undisturbed, and once with kill -9 of all its
processes at ten random moments, each followed by the same command. Then compares the two row for row.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from moreau_ext import zoo
from moreau_ext.batch import read


def digits_folder(folder: Path, count: int) -> None:
    """Digits as PNG files, one folder per class; the first ones again where 1,797 are too few."""
    data = zoo.digits()
    for i in range(count):
        row = i % len(data.inputs)
        path = folder / str(int(data.targets[row])) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.inputs[row, 0] * 255).round().numpy().astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--most-seconds", type=float, default=9.0, help="a life lasts up to this")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    zoo.trained("digits_cnn")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        digits_folder(work / "digits", arguments.images)
        (work / "gray.toml").write_text('mode = "L"\n')

        def command(out: str) -> list[str]:
            given = [
                "explain",
                "digits",
                "--model",
                'moreau_ext.zoo:trained("digits_cnn")',
                "--preprocess",
                "gray.toml",
            ]
            given += ["--method", "sparse", "--rho", "0.1", "--steps", "60", "--samples", "8", "--shard-rows", "64"]
            # What is measured when the model is prepared differs from run to run, so the two runs share no --prepare.
            return [sys.executable, "-m", "moreau_ext.cli", *given, "--prepare", "none", "--out", out]

        subprocess.run(command("whole"), cwd=work, check=True, stderr=subprocess.DEVNULL)
        for kill in range(arguments.kills):
            process = subprocess.Popen(
                command("killed"),
                cwd=work,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            life = draw.uniform(0.5, arguments.most_seconds)
            time.sleep(life)
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            left = sorted(p.name for p in (work / "killed").glob("*")) if (work / "killed").exists() else []
            shards = sum(name.startswith("shard") for name in left)
            print(f"kill {kill + 1} after {life:.1f} s: status {status}, {shards} shards", flush=True)
        subprocess.run(command("killed"), cwd=work, check=True, stderr=subprocess.DEVNULL)

        one, other = read(work / "whole"), read(work / "killed")
        for column in one.schema.names:
            if column == "map":
                maps = [t[column].combine_chunks().to_numpy_ndarray() for t in (one, other)]
                same = bool((maps[0].view(np.uint32) == maps[1].view(np.uint32)).all())
            else:
                same = one[column].equals(other[column])
            print(f"{column}: {'equal' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
        temporary = list((work / "killed").glob(".*"))
        print(f"{one.num_rows} rows equal, maps bit for bit; temporary files left: {len(temporary)}")
        if temporary or one.num_rows != arguments.images:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
