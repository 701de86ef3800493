"""Is `max_batch="auto"` as fast as the best number of rows, and SmoothGrad as fast as captum's?

    OMP_NUM_THREADS=1 python benchmarks/bench_rows.py --json benchmarks/results/cpu-rows.json

One input of every net, by SmoothGrad with 1, 2, 4, ..., 1024 rows per pass, as far as the samples go; sizes that take
half as long again as the best are measured once. Then the same number of samples at "auto", by captum's
NoiseTunnel(Saliency) as it is, which makes one pass of all of them, and by captum in passes of as many rows as "auto"
takes. Minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from captum.attr import NoiseTunnel, Saliency
from timing import Timer, interleaved, parser, report
from torch import nn

from moreau_ext import SmoothGrad, zoo

SIZES = [1 << k for k in range(11)]
# Slower sizes are measured once.
CLOSE = 1.5
# Name: the net, an input's shape, samples.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "tabular_mlp": (zoo.tabular_mlp, (30,), 1024),
    "digits_cnn": (zoo.digits_cnn, (1, 8, 8), 1024),
    "digits_cnn, softplus": (partial(zoo.digits_cnn, "softplus"), (1, 8, 8), 1024),
    "tiny_vit": (zoo.tiny_vit, (3, 32, 32), 1024),
    "resnet20": (zoo.resnet20, (3, 32, 32), 1024),
    "efficientnet_lite0": (zoo.efficientnet_lite0, (3, 224, 224), 32),
}


def main() -> None:
    options = parser(__doc__)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 3 if arguments.quick else 7
    rows: list[dict[str, Any]] = []
    for name, (make, shape, samples) in CASES.items():
        model = make().eval().to(device)
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        auto = SmoothGrad(model, num_samples=samples)
        chosen = auto.rows_per_pass(x) or samples

        def smoothgrad(size: Any, model: nn.Module = model, samples: int = samples, x: torch.Tensor = x) -> Any:
            return partial(SmoothGrad(model, num_samples=samples, max_batch=size).attribute, x, 0)

        runs = {size: smoothgrad(size) for size in SIZES if size <= samples}
        once, timer = {}, Timer(device)
        for size, run in runs.items():
            run()
            once[size] = timer(run, 1)
        least = min(once.values())
        close = {str(size): run for size, run in runs.items() if once[size] < CLOSE * least or size == chosen}
        seconds = interleaved(close, device, rounds)
        best = min(seconds, key=seconds.__getitem__)

        tunnel, sigma = NoiseTunnel(Saliency(model)), float(0.1 * (x.max() - x.min()))

        def captum(size: int | None, tunnel: Any = tunnel, x: Any = x, samples: int = samples, s: float = sigma) -> Any:
            settings = {"nt_type": "smoothgrad", "nt_samples": samples, "nt_samples_batch_size": size, "stdevs": s}
            return partial(tunnel.attribute, x, target=0, abs=False, **settings)

        rivals = {
            "auto": partial(auto.attribute, x, 0),
            "captum": captum(None),
            "captum, our rows": captum(min(chosen, samples)),
        }
        against = interleaved(rivals, device, rounds)
        rows.append(
            {
                "model": name,
                "samples": samples,
                "auto": chosen,
                "best": int(best),
                "auto / best": seconds[str(min(chosen, samples))] / seconds[best],
                "most rows / best": once[samples] / least,
                "milliseconds a sample": 1e3 * against["auto"] / samples,
                "auto / captum": against["auto"] / against["captum"],
                "auto / captum in as many rows": against["auto"] / against["captum, our rows"],
            }
        )
        print(rows[-1], flush=True)
    report("rows", device, rows, arguments.json)


if __name__ == "__main__":
    main()
