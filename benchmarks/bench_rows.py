"""Is `max_batch="auto"` as fast as the best number of rows, and SmoothGrad as fast as captum's?

    OMP_NUM_THREADS=1 python benchmarks/bench_rows.py --json benchmarks/results/cpu-rows.json

One input of every net, by SmoothGrad with 1, 2, 4, ..., 1024 rows per pass (EfficientNet-Lite0: to 32); sizes that take
half as long again as the best are measured once. Then one number of samples at "auto", by captum's
NoiseTunnel(Saliency) as it is, which makes one pass of all of them, and by captum in passes of as many rows as "auto"
takes. Interleaved medians of the process's own seconds, which other work on the machine disturbs less. Minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from captum.attr import NoiseTunnel, Saliency
from timing import parser, report
from torch import Tensor, nn

from moreau_ext import SmoothGrad, zoo

# Slower sizes are measured once.
CLOSE = 1.5
# Name: the net, an input's shape, the most rows, the samples of a comparison, the fewest of a measurement.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "tabular_mlp": (zoo.tabular_mlp, (30,), 1024, 2048, 1024),
    "digits_cnn": (zoo.digits_cnn, (1, 8, 8), 1024, 2048, 1024),
    "digits_cnn, softplus": (partial(zoo.digits_cnn, "softplus"), (1, 8, 8), 1024, 2048, 1024),
    "tiny_vit": (zoo.tiny_vit, (3, 32, 32), 1024, 512, 128),
    "resnet20": (zoo.resnet20, (3, 32, 32), 1024, 256, 64),
    "efficientnet_lite0": (zoo.efficientnet_lite0, (3, 224, 224), 32, 32, 8),
}


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def medians(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Hashable, float]:
    """Median seconds of each, A B A B ..., after one run of each."""
    found: dict[Hashable, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in found.items()}


def smoothgrad(model: nn.Module, x: Tensor, samples: int, rows: Any) -> Callable[[], Any]:
    return partial(SmoothGrad(model, num_samples=samples, max_batch=rows).attribute, x, 0)


def captum(model: nn.Module, x: Tensor, samples: int, rows: int | None) -> Callable[[], Any]:
    settings = {"nt_type": "smoothgrad", "nt_samples": samples, "nt_samples_batch_size": rows, "abs": False}
    sigma = float(0.1 * (x.max() - x.min()))
    return partial(NoiseTunnel(Saliency(model)).attribute, x, target=0, stdevs=sigma, **settings)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name, (make, shape, most, samples, fewest) in CASES.items():
        model = make().eval()
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        auto = SmoothGrad(model).rows_per_pass(x) or most
        sizes = [1 << k for k in range(most.bit_length())]
        runs = {size: smoothgrad(model, x, max(size, fewest), size) for size in sizes}
        smoothgrad(model, x, fewest, fewest)()
        once = {size: seconds(run) / max(size, fewest) for size, run in runs.items()}
        near = [size for size in sizes if once[size] < CLOSE * min(once.values()) or size == auto]
        found = medians({size: runs[size] for size in near}, 5 if arguments.quick else 15)
        each = {size: found[size] / max(size, fewest) for size in near}
        best = min(each, key=each.__getitem__)
        rivals = medians(
            {
                "auto": smoothgrad(model, x, samples, "auto"),
                "captum": captum(model, x, samples, None),
                "captum in our rows": captum(model, x, samples, auto),
            },
            3 if arguments.quick else 7,
        )
        rows.append(
            {
                "model": name,
                "auto": auto,
                "best": best,
                "auto / best": each[auto] / each[best],
                "1024 / best": (each.get(most) or once[most]) / each[best] if most == 1024 else None,
                "samples": samples,
                "milliseconds a sample": 1e3 * rivals["auto"] / samples,
                "auto / captum": rivals["auto"] / rivals["captum"],
                "auto / captum in as many rows": rivals["auto"] / rivals["captum in our rows"],
                "all / best": {str(size): each.get(size, once[size]) / each[best] for size in sizes},
            }
        )
        print(rows[-1], flush=True)
    report("rows", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
