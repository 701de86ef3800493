"""What does each lever of `prepare` save, and how far does it move the outputs and gradients?

    OMP_NUM_THREADS=1 python benchmarks/bench_prepare.py

Forward and backward passes with respect to the input, 32 rows each, on trained nets where training takes seconds and on
untrained ones with BatchNorm statistics as after training otherwise. Every lever alone and all together, interleaved
with the model as it was given; then the chunk that the probe chooses, against one pass of 32 rows; and what preparing
itself takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, parser, report
from torch import Tensor, nn

from moreau_ext import zoo
from moreau_ext.preparation.prepare import prepare
from moreau_ext.preparation.report import Prepared

ROWS = 32
OFF: dict[str, Any] = {"fold_batchnorm": False, "channels_last": False, "freeze": False, "probe": False}
LEVERS: dict[str, dict[str, Any]] = {
    "fold_batchnorm": {"fold_batchnorm": True},
    "channels_last": {"channels_last": True},
    "freeze": {"freeze": True},
    "all": {"fold_batchnorm": True, "channels_last": "auto", "freeze": True},
}


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm that does something: as it is made it changes nothing, and folding it would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
                part.running_mean.normal_(std=0.3, generator=generator)
                part.running_var.uniform_(0.5, 2.0, generator=generator)
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(std=0.2, generator=generator)
    return model


def passes(model: Callable[..., Any], x: Tensor, chunk: int | None = None) -> Callable[[], None]:
    """Forward and backward of all rows, in chunks."""
    weights = torch.randn(model(x[:1]).shape[1:], generator=torch.Generator().manual_seed(1)).to(x.device)

    def run() -> None:
        for rows in x.split(chunk or len(x)):
            leaf = rows.detach().requires_grad_()
            torch.autograd.grad((model(leaf) * weights).sum(), leaf)

    return run


def in_format(prepared: Prepared, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=prepared.memory_format) if prepared.memory_format != torch.preserve_format else x


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--compile", action="store_true", help="torch.compile too (up to a minute a net)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 5 if arguments.quick else 15
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, nn.Module, Tensor]] = [
        ("digits_cnn", zoo.trained("digits_cnn"), zoo.digits("test").inputs[:ROWS]),
        ("resnet20", with_statistics(zoo.resnet20()), torch.rand(ROWS, 3, 32, 32, generator=generator)),
        ("tiny_vit", zoo.tiny_vit(), torch.rand(ROWS, 3, 32, 32, generator=generator)),
        ("tabular_mlp", zoo.trained("tabular_mlp"), zoo.breast_cancer("test").inputs[:ROWS]),
    ]
    levers = LEVERS | ({"compile": {"compile": True}} if arguments.compile else {})
    rows: list[dict[str, Any]] = []
    chunks: list[dict[str, Any]] = []
    for name, model, x in cases:
        model, x = model.to(device), x.to(device)
        if arguments.compile:
            # Dynamo counts the variants of a function over all models, and gives up at eight.
            torch.compiler.reset()
        ready = {lever: prepare(model, x, **(OFF | settings)) for lever, settings in levers.items()}
        runs = {"given": passes(model, x)}
        runs |= {lever: passes(made.model, in_format(made, x)) for lever, made in ready.items()}
        seconds = interleaved(runs, device, rounds)
        for lever, made in ready.items():
            parts = [
                part
                for part in made.report
                if part.name in OFF | {"compile": None} and part.output_difference is not None
            ]
            used = [part for part in parts if part.applied]
            last = used[-1] if used else None
            memory = 1.0
            for part in used:
                memory *= part.memory_ratio or 1.0
            rows.append(
                {
                    "model": name,
                    "lever": lever,
                    "used": ", ".join(part.name for part in used) or "-",
                    "time": seconds[lever] / seconds["given"],
                    "memory": memory,
                    "output difference": last.output_difference if last else 0.0,
                    "gradient difference": last.gradient_difference if last else 0.0,
                    "milliseconds given": 1e3 * seconds["given"],
                }
            )
        start = time.perf_counter()
        made = prepare(model, x)
        spent = time.perf_counter() - start
        # Four chunks, or one pass of the published size repeated as often, so that all run the same rows.
        many = x.repeat(-(-4 * max(made.max_batch, ROWS) // ROWS), *(1,) * (x.dim() - 1))
        many_prepared = in_format(made, many)
        seconds = interleaved(
            {
                "given": passes(model, many, ROWS),
                "prepared": passes(made.model, many_prepared, ROWS),
                "chunk": passes(made.model, many_prepared, made.max_batch),
            },
            device,
            max(3, rounds // 3),
        )
        chunks.append(
            {
                "model": name,
                "used": ", ".join(
                    part.name for part in made.report if part.applied and part.output_difference is not None
                ),
                "chunk": made.max_batch,
                "prepared in 32s": seconds["prepared"] / seconds["given"],
                "prepared in chunks": seconds["chunk"] / seconds["given"],
                "bytes a row": made.row_bytes,
                "seconds to prepare": spent,
            }
        )
    report("prepare", device, rows + chunks, arguments.json)


if __name__ == "__main__":
    main()
