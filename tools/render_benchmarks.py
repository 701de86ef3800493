"""Renders docs/benchmarks.md and its chart from benchmarks/results/*.json. Every number of the page comes from there.

    python tools/render_benchmarks.py            # writes both files
    python tools/render_benchmarks.py --check    # writes nothing; exits 1 where a committed file differs

Needs Python alone, so that CI can check the page before anything is built.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The first run on a GPU, whose notes speak of it alone.
H200 = "nvidia-h200-2026-11-26.json"
CHANGED = """**Changed since, and not measured on a GPU**: group steps are a new kernel that loads, draws and writes as
the one without groups does. A fused step takes 96 registers on sm_90 instead of the 122 of that run, so more warps stay
on a multiprocessor ([the table of machine code](../benchmarks/README.md)). First steps, last steps and the ends of
levels are captured too. In that run cuDNN could convolve in TF32 in the bare passes, as torch lets it, and not in the
explanations; now it may in neither."""
# The networks of benchmarks/gpu.sh, and all of its parts.
GPU_NETS = ("resnet50", "vit", "efficientnet", "convnext")
GPU_PARTS = (
    *("tests", "explainers", "ops", *GPU_NETS, "folder"),
    *("racecheck", "memcheck", "synccheck", "initcheck", "ncu", "precision"),
)
# The largest budget that bench_solver.py follows the solvers to.
FOLLOWED = 8192
# 300 steps of 32 samples: what the published schedule takes, whatever the input.
PUBLISHED = 9600

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text("utf-8"))
    return found


def rows(name: str) -> list[Row]:
    found: list[Row] = load(name)["rows"]
    return found


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def count(value: float) -> str:
    return f"{value:,.0f}"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def power(value: float) -> str:
    """Rounding errors: 0, 3e-07, or a percentage where it is large enough to read."""
    return "0" if value == 0 else percent(value, 1) if value >= 1e-3 else f"{value:.0e}"


def between(values: Iterable[float], form: Any = ratio) -> str:
    """The range of some values, or the one value that all of them round to."""
    found = sorted(values)
    low, high = form(found[0]), form(found[-1])
    return low if low == high else f"{low} to {high}"


def source(*names: str) -> str:
    """The files and the commits that they were measured at. A resumed benchmark has rows of more than one."""
    found = [load(name) for name in names]
    commits = sorted({part["commit"] for one in found for part in (one["machine"], *one["rows"]) if "commit" in part})
    return f"Data: {', '.join(f'`{name}`' for name in names)}, measured at {', '.join(commits)}."


def wrapped(text: str) -> str:
    """Paragraphs and lists in lines of 120 characters; tables, headings and pictures as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if not block.strip():
            continue
        if block[0] in "|!#<":
            blocks.append(block)
            continue
        items = block.split("\n- ") if block.startswith("- ") else [block]
        lines = [
            textwrap.fill(
                " ".join(("- " + item.removeprefix("- ") if block.startswith("- ") else item).split()),
                120,
                subsequent_indent="  " if block.startswith("- ") else "",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for item in items
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def solver_rows() -> list[Row]:
    return sorted(rows("cpu-solver.json"), key=lambda row: row["problem"])


def resolved(row: Row, tolerance: float) -> bool:
    """Whether the reference is accurate enough to tell when an answer is within a tolerance of it."""
    return bool(row["reference"] < tolerance)


def to_within(row: Row, who: str, tolerance: float) -> str:
    if not resolved(row, tolerance):
        return "?"
    gradients = row[f"{who} {100 * tolerance:.1f}%"]
    return "–" if gradients is None else count(gradients)


def solver() -> str:
    found, tolerances = solver_rows(), (0.01, 0.005, 0.002)

    def cells(row: Row) -> list[str]:
        honest = percent(row["honest"]) if row["converged"] else "–"
        return [
            f"{row['problem']} ({row['inputs']})",
            " / ".join(to_within(row, "auto to", t) for t in tolerances),
            " / ".join(to_within(row, "published stopped, to", t) for t in tolerances),
            " / ".join(count(row[f"average to {100 * t:.1f}%"]) for t in tolerances),
            f"{percent(row['converged'])}; {honest}",
            f"{row['published as written / auto']:.1f}; {row['published batched / auto']:.1f}",
        ]

    head = [
        "problem (inputs)",
        "default solver",
        "published, stopped in hindsight",
        "average at the solution",
        "converged at 1 %; of these truly ≤ 1 %",
        "published loop / default, seconds: one at a time; batched",
    ]
    clear = [row for row in found if resolved(row, 0.01)]
    noisy = [row for row in found if not resolved(row, 0.01)]
    reached = [row["auto to 1.0%"] for row in clear if row["auto to 1.0%"] is not None]
    honest = [row["honest"] for row in clear if row["converged"]]
    worse = [row["worse, auto at 0.5%"] for row in found if ", rho 1," not in row["problem"]]
    steep = [row["worse, auto at 0.5%"] for row in found if row["problem"].startswith("digits_cnn, rho 1,")]
    lines = "\n".join(
        f"- {row['problem']}: the published run ends at {percent(row['published error at 9600'], 1)}, the default at "
        f"1,920 gradients at {percent(row['auto error at 1920'], 1)}; an average alone needs "
        f"{count(row['average to 1.0%'])} gradients for 1 %; the reference itself is known to "
        f"{percent(row['reference'], 1)}."
        for row in noisy
    )
    return f"""## Gradients to a solution

![Gradients to within 1 % of a reference, default solver and published schedule](benchmarks.svg)

Median gradients per input until the map is within 1 / 0.5 / 0.2 % of a long reference run. The published schedule
always takes {count(PUBLISHED)}. A dash: more than {count(FOLLOWED)}. A question mark: the reference is not
accurate enough to tell.

{table(head, map(cells, found))}

`OMP_NUM_THREADS=1 python benchmarks/bench_solver.py --json benchmarks/results/cpu-solver.json`; the head of that file
defines every column. {source("cpu-solver.json")}

- *Average at the solution* is the number of gradients that a plain mean needs when the solution is already known. No
  solver gets far below it: it is the noise of the gradients themselves.
- Where the reference resolves 1 %, the default solver reaches it with {between(reached, count)} gradients.
- Of the inputs that are reported converged, {between(honest, percent)} have a residual of at most 1 % on 32,768 fresh
  samples.
- At `tol=5e-3` at most {percent(max(worse))} of a problem's inputs end at an objective that is worse than the published
  run's by 10⁻³·|F|; at ρ = 1 on `digits_cnn`, where the problem is not convex, {percent(max(steep))}. A second
  published run has up to {percent(max(row["worse, published again"] for row in found))}. At the default tolerance
  of 1 % the largest share is {percent(max(row["worse, auto"] for row in found))}.
- The solver's own arithmetic counts for tiny models: on the batched table rows the published loop is about as fast.

Networks that are too noisy for 1 %, none of whose inputs is reported converged:

{lines}
"""


def calibration() -> str:
    name = "cpu-calibration.json"
    found = rows(name)
    claimed = [row for row in found if row.get("converged")]
    none = [row["problem"] for row in found if not row.get("converged")]
    total = sum(row["converged"] for row in claimed)

    def over(row: Row, share: int) -> float:
        return float(row[f"over {share}"] * row["converged"])

    overall = {share: sum(over(row, share) for row in claimed) / total for share in (1, 2, 10)}
    broken = [row["problem"] for row in claimed if over(row, 2) > max(1.0, 0.01 * row["converged"])]
    body = [
        (
            row["problem"],
            f"{row['converged']} of {row['inputs']}",
            *(percent(row[f"over {share}"], 1) if row[f"over {share}"] else "0" for share in (1, 2, 10)),
            count(row["gradients"]),
        )
        for row in claimed
    ]
    head = ("problem", "converged", "over tol", "over 2 tol", "over 10 tol", "gradients, median")
    exceptions = f" The exceptions: {'; '.join(broken)}." if broken else ""
    default = "cpu-calibration-5-percent.json"
    wide = [row for row in rows(default) if row.get("converged")]
    many = sum(row["converged"] for row in wide)
    at_default = {share: sum(over(row, share) for row in wide) / many for share in (1, 2, 10)}
    return f"""## Is what converged solved?

Of the inputs that a solver calls converged at a tolerance of 1 %, the share whose true residual is larger. Scores made
of ridges have a smoothed gradient in closed form, so the residual is exact; of trained networks it is measured on
16,384 samples that the solver did not see, and counts as larger where the lower end of its 95 % interval is. The known
scores are made to be hard: kinks, narrow wells, plateaus, saddles, steps of which one sample in 1,000 sees the slope,
and ρ up to 100.

{table(head, body)}

Of all {count(total)} claims {percent(overall[1], 1)} are over the tolerance, {percent(overall[2], 2)} over twice, and
{percent(overall[10], 2)} over ten times. In {len(claimed) - len(broken)} of the {len(claimed)} problems with claims
at most one input, or 1 % of them, is over twice the tolerance.{exceptions} In {len(none)} further problems no claim was
made within 2,048 gradients: rightly, or for want of samples.

At the default tolerance of 5 % (`--tol 0.05`; {len(rows(default))} of these problems), of {count(many)} claims
{percent(at_default[1], 1)} are over the tolerance, {percent(at_default[2], 2)} over twice, and
{percent(at_default[10], 2)} over ten times. Data: `{default}`.

`OMP_NUM_THREADS=1 python benchmarks/bench_calibration.py --json benchmarks/results/{name}`

{source(name)}"""


def errors() -> str:
    name = "cpu-errors.json"
    found = rows(name)
    once = {(row["net"], row["samples"]): row for row in found}.values()
    head = ("net", "samples", "within 1.96 standard errors", "forecasts of 10 % within a factor of 1.5")
    covered = table(
        head,
        [(row["net"], count(row["samples"]), percent(row["coverage"], 1), percent(row["forecast"])) for row in once],
    )
    head = (
        "net",
        "samples",
        "map",
        "error, plain",
        "denoised",
        "marked: false",
        "found",
        "spread of η_max",
        "denoised",
    )
    body = [
        (
            row["net"],
            count(row["samples"]),
            row["map"],
            *(percent(row[key], 1) for key in ("plain", "denoised", "false", "found")),
            *(percent(row[f"eta_max, {key}"], 1) for key in ("plain", "denoised")),
        )
        for row in found
        if row["map"] != "dense"
    ]
    worst = max(row["denoised"] / row["plain"] for row in found)
    best = min(row["denoised"] / row["plain"] for row in found)
    return f"""## Error bars and denoising

Mean gradients at the input, the limit of SmoothGrad, against long references on independent noise. A standard error is
right where 95 % of the features lie within 1.96 of them.

{covered}

Errors are those of the thresholded map, with the reference's own noise taken out; `false` and `found` are of
`significant(0.1)`: marked features or groups that are not in the reference's map, and the share of the reference's map
that is marked. Denoising changed an error by a factor of {ratio(best)} to {ratio(worst)}.

{table(head, body)}

`OMP_NUM_THREADS=1 python benchmarks/bench_errors.py`. {source(name)}"""


def defaults() -> str:
    name = "cpu-defaults.json"
    found = rows(name)

    def of(which: str) -> list[Row]:
        return [row for row in found if row["table"] == which]

    noise = table(
        ("net", "noise level", "copies that keep the class", "gradients for 10 %", "cosine to the map of a near input"),
        [
            (
                row["net"],
                f"{row['noise level']:g}",
                percent(row["kept"]),
                count(row["gradients for 10 %"]),
                f"{row['cosine']:.3f}",
            )
            for row in of("noise")
        ],
    )
    rho = table(
        ("net", "ρ", "length of the displacement", "converged", "residual", "gradients", "cosine to the mean gradient"),
        [
            (
                row["net"],
                f"auto: {row['rho']:.2g}" if row["asked"] == "auto" else f"{row['asked']:g}",
                percent(row["length"], 1 if row["length"] < 0.1 else 0),
                percent(row["converged"]),
                percent(row["residual"], 1 if row["residual"] < 0.1 else 0),
                count(row["gradients"]),
                f"{row['cosine']:.2f}",
            )
            for row in of("rho")
        ],
    )
    nets = list(dict.fromkeys(row["net"] for row in of("tolerance")))
    near = {(row["net"], row["map"], row["error"]): row for row in of("tolerance")}
    levels = [level for level in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) if any(k[2] == level for k in near)]

    def cell(net: str, kind: str, level: float) -> str:
        row = near.get((net, kind, level))
        return "–" if row is None else f"{percent(row['shared'])}; {row['deletion']:.3f}"

    tolerance = table(
        ("net", "map", *(percent(level, 1 if level < 0.1 else 0) for level in levels)),
        [
            (net, kind, *(cell(net, kind, level) for level in levels))
            for net in nets
            for kind in dict.fromkeys(k[1] for k in near)
            if any((net, kind, level) in near for level in levels)
        ],
    )
    return f"""## Why the defaults are what they are

The defaults are noise of 0.05 of the range, `rho="auto"`, a tolerance of 5 % and at most 2,048 gradients: one rule that
holds on four networks. The published settings are `MoreauGrad(model, rho=1.0, noise_level=0.1,
solver=ProximalGradient.paper())`.

**Noise.** The smoothed score speaks of the prediction only while noisy copies keep their class. At 0.1 a third of the
copies of a photograph and a quarter of a digit's, in the transformer, are classified as something else, and an error of
10 % takes two to three times the gradients of 0.05. At 0.02 a near input (Gaussian noise of 1 % of the range) gets
another map.

{noise}

**ρ.** A number has units of x²/score: ρ = 1 moves a photograph by 4 % of its length and a digit by four times its own.
`"auto"` is half of what keeps the problem strongly convex at the input, where the solution is the only one, and it is
the only choice whose problems are solved on more than one network. (Tolerance 5 %, at most 2,048 gradients, and 64 more
for `"auto"`.) A larger ρ makes the map differ more from the mean gradient, and more robust where it can be solved
([evaluation](evaluation.md)).

{rho}

**Tolerance.** Maps at a relative error (the columns, within a factor of 1.4) against their limit: the share of the 5 %
largest features that both have (of sparse maps: Jaccard index of the supports), and the difference of the area under
the deletion curve, a mean probability. Near 5 % nine tenths or more are shared, and the areas differ by 0.01; from 12 %
on both get worse quickly, and smaller errors gain little.

{tolerance}

`OMP_NUM_THREADS=1 python benchmarks/bench_defaults.py`. {source(name)}"""


def explainers() -> str:
    found = rows("cpu-explainers.json")
    timed = [row for row in found if "method" in row]
    names = {"moreau": "MoreauGrad", "sparse": "sparse", "group": "group"}
    cases: dict[str, list[str]] = {}
    for row in timed:
        # The default solver's row follows the three with fixed steps of the same model and batch.
        if row["method"] in names:
            case = f"{row['model']}, {row['B x m x steps']}"
        cases.setdefault(case, []).append(ratio(row["ratio"]))
    speeds = [
        [
            f"{row['model']}, {row['B']} at once",
            *(f"{row[f'{who}, explanations/s']:.3g}" for who in ("as written", "batched", "ours", "default")),
            percent(row["default converged"]),
        ]
        for row in found
        if "default converged" in row
    ]

    single = next(row for row in timed if row["B x m x steps"] == "1 x 8 x 60")

    def cells(case: str) -> list[str]:
        return [case, *cases[case]]

    head = [
        "model",
        "published as written",
        "published, batched",
        "ours, same steps and samples",
        "default solver",
        "converged",
    ]
    return f"""## A whole explanation

Time of an explanation divided by the time of its model's bare forward and backward passes, with as many gradients in
passes of the same sizes. The columns: B inputs, m samples and a number of fixed steps; the default solver last.

{table(["model, B x m x steps", *names.values(), "sparse, default solver"], map(cells, cases))}

One pass of a single digit takes {1e3 * single["bare seconds"] / 60:.1f} ms, about as long as the solver's calls from
Python.

Explanations per second on random inputs, against the published loop (300 steps of 32 samples):

{table(head, speeds)}

On this CPU the ResNet's passes of 128 rows cost more per row than those of 32, for the published loop too; `prepare`
finds the better size. `OMP_NUM_THREADS=1 python benchmarks/bench_explainers.py`. {source("cpu-explainers.json")}
"""


def ops() -> str:
    found = rows("cpu-ops.json")
    bare = {row["[B,m,d]"]: row for row in found if "copy GB/s" in row}
    fused = [
        [
            row["[B,m,d]"],
            ratio(row["/ eager"]),
            ratio(row["/ independent eager"]),
            ratio(row["/ antithetic eager"]),
            f"{bare[row['[B,m,d]']]['without noise GB/s']:.1f}",
            f"{bare[row['[B,m,d]']]['copy GB/s']:.1f}",
        ]
        for row in found
        if "fused ms" in row
    ]
    head = [
        "[B, m, d]",
        "fused / eager",
        "antithetic fused / eager",
        "antithetic fused / antithetic eager",
        "without noise, GB/s of gradients",
        "a copy, GB/s",
    ]
    (normals,) = (row for row in found if "normals" in row)
    momentum = [row["/ eager"] for row in found if "fused µs" in row]
    return f"""## The fused step

One call averages m gradients, takes the proximal step, adds up the statistics, and writes m new noisy inputs. Time
divided by that of the best in-place eager PyTorch version of the same step:

{table(head, fused)}

- A normal costs {ratio(normals["ratio"])} of `torch.randn`'s.
- Without noise the step is bound by memory. The last two columns compare its rate with that of a copy, on buffers that
  no cache holds; the smallest size, half a megabyte, is bound by the checks of the call.
- The momentum step of the default solver takes {between(momentum)} of eager PyTorch's time.

`OMP_NUM_THREADS=1 python benchmarks/bench_ops.py`. {source("cpu-ops.json")}
"""


def gpu_file() -> str:
    """The newest result of benchmarks/gpu.sh."""
    found = [path.name for path in RESULTS.glob("*.json") if not path.name.startswith(("cpu-", "no-gpu-"))]
    return max(found, key=lambda name: (load(name)["date"], name))


def said(found: dict[str, Any], part: str) -> str:
    """The last line of a part, without times and separators."""
    return str(found[part][-1]).split(" in ")[0].split(": ")[-1].strip("= ")


def gpu(name: str, found: dict[str, Any]) -> str:
    """A result of benchmarks/gpu.sh, by its parts; any of them may be missing."""
    statuses = {part: about["status"] for part, about in found["parts"].items()}
    checks = [
        f"{part}: {said(found, part)}"
        for part in ("tests", "racecheck", "memcheck", "synccheck", "initcheck")
        if isinstance(found.get(part), list)
    ]
    missing = [part for part in GPU_PARTS if statuses.get(part) not in ("passed", "partial") and part not in found]
    parts = [
        f"""## On a GPU: {found["gpu"]}

One run of some minutes on {found["date"]}, at commit {(found["commit"] or "unknown")[:7]} (torch {found["torch"]},
driver {found["driver"]}, nvcc {found["nvcc"]}); `{name}`, by `benchmarks/gpu.sh`. {"; ".join(checks)}.
{f"Not run: {', '.join(missing)}." if missing else ""}"""
    ]
    if notes := found.get("notes"):
        parts.append("Notes of that run:\n\n" + "\n".join(f"- {note}." for note in notes))
    # A part that ended before its first row has none.
    rows = {part: found[part]["rows"] for part in GPU_PARTS if isinstance(found.get(part), dict)}
    if rows.get("ops"):
        parts.append(gpu_ops(found))
    if rows.get("explainers"):
        parts.append(gpu_explainers(rows["explainers"]))
    if real := [row for net in GPU_NETS for row in rows.get(net, [])]:
        parts += [gpu_networks(real), gpu_errors(real)]
    if rows.get("folder"):
        parts.append(gpu_folder(rows["folder"]))
    if rows.get("precision"):
        parts.append(gpu_precision(rows["precision"]))
    if name == H200:
        parts.append(CHANGED)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def gpu_ops(found: dict[str, Any]) -> str:
    every = found["ops"]["rows"]
    replayed = [row for row in every if "variant" in row]
    if not replayed:
        return ""
    called = [row for row in found.get("ops_called", {"rows": []})["rows"] if "variant" in row]
    small = [row for row in every if row.get("how") == "replayed"]
    momentum = [row["/ eager replayed"] for row in every if "/ eager replayed" in row]
    sizes = list(dict.fromkeys(row["[B,m,d]"] for row in replayed))

    def share(row: Row) -> float:
        # Of H200's run the copy beside the largest replay was slower than copies are: see that file's notes.
        same = [c for c in called if all(c[key] == row[key] for key in ("[B,m,d]", "dtype", "variant"))]
        return float(same[0]["share of copy"] if same and row["[B,m,d]"] == sizes[-1] else row["share of copy"])

    def of(dtype: str, variant: str) -> list[Row]:
        return [row for row in replayed if row["dtype"] == dtype and row["variant"] == variant]

    kinds = [
        (dtype, variant)
        for dtype in ("float32", "bfloat16")
        for variant in ("no noise", "noise", "antithetic")
        if of(dtype, variant)
    ]
    body = [
        [
            f"{dtype}, {variant}",
            ", ".join(ratio(share(row)) for row in of(dtype, variant)),
            between(row["eager / its"] for row in of(dtype, variant)),
            between(row["compile / its"] for row in of(dtype, variant)),
        ]
        for dtype, variant in kinds
    ]

    def slower(kind: str) -> str:
        return between(1 / row["L1's time / its"] for row in replayed if row["variant"].startswith(kind))

    lines = [
        f"- Groups beside L1 without groups: tiles take {slower('Tiles')} times as long, pixels {slower('Pixels')}.",
    ]
    whole = [
        (
            row["ms"] / max(loading["ms"], drawing["ms"]),
            row["ms"] / (loading["ms"] + drawing["ms"]),
        )
        for dtype in ("float32", "bfloat16")
        for row, loading, drawing in zip(of(dtype, "noise"), of(dtype, "no noise"), of(dtype, "perturb"), strict=False)
    ]
    if whole:
        lines.append(
            f"- A step with noise takes {between(w[0] for w in whole)} times as long as the longer of loading alone "
            f"and drawing alone, and {between(w[1] for w in whole)} of their sum. A first number of 1 is full overlap, "
            "a second one of 1 none."
        )
    if small:
        lines.append(
            f"- At small sizes a replay takes {between((row['fused µs'] for row in small), count)} µs; eager takes "
            f"{between(row['eager / fused'] for row in small)} and torch.compile "
            f"{between(row['compile / fused'] for row in small)} times as long."
        )
    if momentum:
        lines.append(
            f"- The default solver's momentum step takes {between(momentum)} of eager PyTorch's time, both replayed."
        )
    return f"""**The fused step** as a replayed graph at {", ".join(sizes)}: its share of a copy's bandwidth, one
number per size, and how many times as long eager PyTorch and torch.compile take for the same update with their noise on
the device:

{table(["step", "share of a copy", "eager / fused", "torch.compile / fused"], body)}

{chr(10).join(lines)}"""


def gpu_explainers(every: list[Row]) -> str:
    timed = [row for row in every if "method" in row]
    speeds = [row for row in every if "default converged" in row]
    failed = [row for row in every if "failed with" in row]
    cases: dict[str, list[Row]] = {}
    for row in timed:
        # The default solver's row follows those with fixed steps of the same model and batch.
        if "default" not in row["method"]:
            case = f"{row['model']}, {row['B x m x steps']}"
        cases.setdefault(case, []).append(row)

    def eager(row: Row) -> str:
        return f"; {ratio(row['eager ratio'])}" if "eager ratio" in row else ""

    def cells(case: str) -> list[str]:
        found = {row["method"]: row for row in cases[case]}
        return [
            case,
            *(
                f"{ratio(found[name]['ratio'])}{eager(found[name])}" if name in found else "–"
                for name in ("moreau", "sparse", "group", "sparse, default solver")
            ),
        ]

    head = ["model, B x m x steps", "MoreauGrad", "sparse", "group", "sparse, default solver"]
    text = f"""**An explanation** divided by its captured bare passes: with captured steps; without.

{table(head, map(cells, cases))}"""
    who = ("as written", "noise on the device", "batched", "batched, compiled", "ours", "default")
    names = ("published as written", "its noise on the device", "batched", "batched, compiled")
    head = ["model, B", *names, "ours, same steps and samples", "default solver"]

    def speed(row: Row, name: str) -> str:
        value = row.get(f"{name}, explanations/s")
        return "–" if value is None else f"{value:.3g}"

    if speeds:
        body = [[f"{row['model']}, {row['B']}", *(speed(row, name) for name in who)] for row in speeds]
        text += f"\n\nExplanations per second:\n\n{table(head, body)}"
    if failed:
        text += "\n\nFailed: " + "; ".join(f"{row['model']}, B = {row['B']}" for row in failed) + "."
    return text


def gpu_networks(real: list[Row]) -> str:
    timed = [row for row in real if "method" in row]
    body = []
    for net, precision, batch in dict.fromkeys((row["net"], row["precision"], row["B"]) for row in timed):
        # Of two slices the later one was measured beside its own bare passes.
        these = {
            row["method"]: row for row in timed if (row["net"], row["precision"], row["B"]) == (net, precision, batch)
        }
        rivals = {row["method"]: row["gradients/s"] for row in timed if (row["net"], row["B"]) == (net, batch)}

        def speed(name: str, these: dict[str, Row] = these) -> str:
            return count(these[name]["gradients/s"]) if name in these else "–"

        def beside(name: str, these: dict[str, Row] = these) -> str:
            return ratio(these[name]["of bare passes"]) if name in these else "–"

        def times(ours: str, rival: str, these: dict[str, Row] = these, rivals: dict[str, float] = rivals) -> str:
            if rival not in rivals or ours not in these:
                return "–"
            return ratio(these[ours]["gradients/s"] / rivals[rival])

        body.append(
            [
                f"{net}, {precision}, {batch}",
                *(speed(name) for name in ("SmoothGrad", "MoreauGrad", "sparse", "group")),
                f"{beside('sparse')}; {beside('sparse, eager')}",
                times("SmoothGrad", "captum"),
                times("SmoothGrad", "captum, without TF32"),
                times("published schedule by us", "published loop"),
            ]
        )
    head = [
        "network, precision, B",
        *(f"{name}, gradients/s" for name in ("SmoothGrad", "MoreauGrad", "sparse", "group")),
        "sparse / bare passes: captured; eager",
        "SmoothGrad / captum",
        "without TF32",
        "published schedule, ours / as written",
    ]
    return f"""**Networks of published sizes**, 3 × 224 × 224, prepared; random weights but for EfficientNet-Lite0. The
last columns are ratios of gradients per second: SmoothGrad against captum's in float32 in its fastest passes, as it is
and with TF32 switched off; and the published schedule against the published loop as written:

{table(head, body)}"""


def gpu_errors(real: list[Row]) -> str:
    of = [row for row in real if "error of" in row]
    if not of:
        return ""
    precisions = list(dict.fromkeys(row["precision"] for row in of))
    body = [
        [
            f"{net}, {method}",
            *(
                percent(row["error"], 1)
                for precision in precisions
                for row in of
                if (row["net"], row["error of"], row["precision"]) == (net, method, precision)
            ),
        ]
        for net, method in dict.fromkeys((row["net"], row["error of"]) for row in of)
    ]
    lines = []
    for net in dict.fromkeys(row["net"] for row in of):
        runs = [row for row in real if row["net"] == net and "convergence of" in row]
        theirs = [row for row in runs if row["convergence of"] == "published loop"]
        ours = [row for row in runs if row["convergence of"] == "MoreauGrad"]
        if not theirs or not ours:
            continue
        end = theirs[-1]
        reached = next((row for row in ours if row["error"] <= end["error"]), None)
        line = (
            f"- {net}: the published loop ends at {percent(end['error'], 1)} after {count(end['gradients'])} gradients "
            f"and {end['seconds']:.1f} s; MoreauGrad "
        )
        if reached:
            faster = ratio(end["seconds"] / reached["seconds"])
            lines.append(f"{line}is there with {count(reached['gradients'])} gradients, {faster} times as fast.")
        else:
            lines.append(f"{line}does not get there with {count(ours[-1]['gradients'])} gradients.")
    return f"""Relative error of one input's maps against a reference of 16 times the gradients in float32, with other
noise:

{table(["network, map", *precisions], body)}

{chr(10).join(lines)}"""


def gpu_folder(every: list[Row]) -> str:
    jobs = [row for row in every if "job images/s" in row]
    names = ("decoding", "copying", "passes", "results", "writing", "beginning and end")
    body = [
        [
            f"{row['net']}, {row['method']}, {count(row['images'])} images",
            f"{row['bare images/s']:.3g}",
            f"{row['job images/s']:.3g}",
            *(percent(row[name] / row["job seconds"], 1) for name in names),
        ]
        for row in jobs
    ]
    head = ["job", "explainer alone, images/s", "job, images/s", *names]
    return f"""**A folder of JPEG files** of 256 × 256 (readers: {jobs[0]["workers"]}): the job's speed beside its
explainer's on tensors on the device, and the shares of the job's time that its main thread waits for or spends on each
part:

{table(head, body)}"""


def gpu_precision(every: list[Row]) -> str:
    body = [
        [row["net"], row["solver"], row["precision"], power(row["error, median"]), f"{1e3 * row['seconds']:.0f}"]
        for row in every
    ]
    return f"""**Precision**: sparse maps against the float64 model on the same noise.

{table(["net", "solver", "precision", "error, median", "milliseconds"], body)}"""


def prepare() -> str:
    found = rows("cpu-prepare.json")
    every = {row["model"]: row for row in found if row.get("lever") == "all"}
    body = [
        [
            row["model"],
            row["used"],
            ratio(every[row["model"]]["time"]),
            f"{ratio(row['prepared in chunks'])} ({count(row['chunk'])})",
            ratio(every[row["model"]]["memory"]),
            power(every[row["model"]]["gradient difference"]),
            f"{row['seconds to prepare']:.1f}",
        ]
        for row in found
        if "chunk" in row
    ]
    head = [
        "model",
        "levers used",
        "time, 32 rows a pass",
        "time, chosen rows",
        "memory",
        "gradient differs by",
        "seconds to prepare",
    ]
    return f"""## A faster copy of the model

`prepare(model, x)` against the model as given: forward and backward passes of 32 rows, and of the number of rows that
the probe chose.

{table(head, body)}

`OMP_NUM_THREADS=1 python benchmarks/bench_prepare.py` has each lever alone. {source("cpu-prepare.json")}
"""


def imagenet() -> str:
    found, about = rows("cpu-imagenet.json"), load("cpu-imagenet.json")["machine"]
    each = {row["passes"]: row for row in found if "passes" in row}
    whole = {row["explanation"]: row for row in found if "explanation" in row}
    chosen = each["prepared, chosen rows"]
    head = ["passes", "milliseconds a gradient", f"of passes of {each['given, 32 rows']['rows in a pass']} as given"]
    body = [
        [
            name.replace("chosen rows", f"{row['rows in a pass']} rows"),
            f"{row['milliseconds a gradient']:.0f}",
            ratio(row["of the given"]),
        ]
        for name, row in each.items()
    ]
    head_whole = [
        *("explanation of one photograph", "gradients", "seconds", "of bare passes", "of captum, as given"),
        "relative error",
    ]
    body_whole = [
        [
            name,
            count(row["gradients"]),
            f"{row['seconds']:.1f}",
            ratio(row["of bare passes"]),
            ratio(row["of captum, as given"]),
            "–" if row["relative error"] is None else f"{row['relative error']:.0%}",
        ]
        for name, row in whole.items()
    ]
    compiled = each.get("compiled, chosen rows")
    said = (
        f"`torch.compile` on top took {compiled['seconds to prepare']:.0f} s, and its passes take "
        f"{ratio(compiled['milliseconds a gradient'] / chosen['milliseconds a gradient'])} times as long as without it."
        if compiled
        else ""
    )
    return f"""## A network with ImageNet weights

EfficientNet-Lite0, 3 × 224 × 224, on {about["cpu"]}, {about["threads"]} thread; times are medians of interleaved
runs. Forward and backward passes of the model as given, and after `prepare`, which
took {chosen["seconds to prepare"]:.0f} s and chose {chosen["rows in a pass"]} rows per pass:

{table(head, body)}

{said}

Explanations by the default solver on the prepared model, against bare passes of the same sizes on it, and against
captum's SmoothGrad (`NoiseTunnel(Saliency)`, 8 rows per pass). Ratios are per gradient, since a solver may end before
its budget of 256. The relative error is `Solution.error.total`; captum's is the sampling error of SmoothGrad with as
many samples. At ρ = 1, as here, so few gradients leave the problem unsolved; the default ρ is found so that it can be
solved ([defaults](#why-the-defaults-are-what-they-are)):

{table(head_whole, body_whole)}

`OMP_NUM_THREADS=1 python benchmarks/bench_imagenet.py{" --compile" if compiled else ""}`.
{source("cpu-imagenet.json")}
"""


def rows_per_pass() -> str:
    found = rows("cpu-rows.json")
    about = load("cpu-rows.json")["machine"]
    head = [
        "network",
        'rows at "auto"',
        "fastest",
        '"auto" / fastest',
        "1,024 / fastest",
        "samples",
        "milliseconds a sample",
        "SmoothGrad / captum's",
        "in as many rows",
    ]
    body = [
        [
            row["model"],
            count(row["auto"]),
            count(row["best"]),
            ratio(row["auto / best"]),
            "–" if row["1024 / best"] is None else ratio(row["1024 / best"]),
            count(row["samples"]),
            f"{row['milliseconds a sample']:.3g}",
            ratio(row["auto / captum"]),
            ratio(row["auto / captum in as many rows"]),
        ]
        for row in found
    ]
    worst = max(row["auto / best"] for row in found)
    return f"""## Rows per pass

`max_batch="auto"` takes rows of 64 MiB in all for each thread, between 4 and 1,024. Against the fastest of 1, 2, 4, …,
1,024 rows (EfficientNet-Lite0: up to 32) it takes at most {percent(worst - 1)} longer. The last two columns are one
SmoothGrad against captum's `NoiseTunnel(Saliency)` with as many samples: as captum is, in one pass of all of them, and
in passes of our rows. One input, {about["cpu"]}, {about["threads"]} thread; medians of the process's own seconds on a
machine that had other work, which move by some percent.

{table(head, body)}

`OMP_NUM_THREADS=1 python benchmarks/bench_rows.py`. {source("cpu-rows.json")}
"""


def precision() -> str:
    found = [row for row in rows("cpu-precision.json") if row["solver"] == "adaptive"]
    body = []
    for net in dict.fromkeys(row["net"] for row in found):
        exact, half = (
            next(row for row in found if row["net"] == net and row["precision"] == name)
            for name in ("float32", "bfloat16")
        )
        cells = [
            cell
            for row in (exact, half)
            for cell in (
                f"{power(row['error, median'])}; {power(row['error, largest'])}",
                f"{row['Jaccard, mean']:.3f}",
            )
        ]
        body.append([f"{net} ({exact['inputs']}), {percent(exact['converged'])} converged", *cells])
    fixed = [
        row["error, median"]
        for row in rows("cpu-precision.json")
        if row["net"] == "digits32_resnet20" and row["precision"] == "float32"
    ]
    return f"""## Precision

‖A − A₆₄‖/‖A₆₄‖ of sparse maps against the float64 model on the same noise (median; largest), ρ = 0.1, by the default
solver, and the Jaccard index of the two supports. Without CUDA, "tf32" is "float32".

{table(["model (inputs)", "float32", "Jaccard", "bfloat16", "Jaccard"], body)}

Where the solver converges, the median error of bfloat16 is below the solver's tolerance of 1 %. Where it does not, and
at kinks of deep ReLU networks, rounding is amplified: on the ResNet the median error of float32 itself is
{between(fixed, lambda value: percent(value, 1))}, depending on the solver. This CPU has no bfloat16 units, so
bfloat16 is not faster here. `OMP_NUM_THREADS=1 python benchmarks/bench_precision.py`. {source("cpu-precision.json")}
"""


def support() -> str:
    found = rows("cpu-support.json")
    body = [
        [
            row["net"],
            f"{row['rho']:g}",
            row["asked"],
            percent(row["as asked"]),
            percent(row["again the same"]),
            percent(row["within one"], 1),
            count(row["gradients median"]),
        ]
        for row in found
    ]
    head = ["net", "ρ", "asked for", "as asked", "same when solved again", "within one", "gradients, median"]
    return f"""## Sparsity as asked

`support=k` finds an η for each input. "Same when solved again": the share of inputs whose support is again k when the
problem with that η is solved with another seed and 8,192 gradients.

{table(head, body)}

`OMP_NUM_THREADS=1 python benchmarks/bench_support.py`. {source("cpu-support.json")}
"""


def batch() -> str:
    through = rows("cpu-batch-throughput.json")
    start = rows("cpu-batch-start-up.json")
    (memory,) = rows("cpu-batch-memory.json")
    ray = rows("cpu-ray.json")
    body = [
        *(
            [
                f"{row['method']}: {row['images']} JPEG files, ResNet-20-like, against the bare explainer",
                f"{ratio(row['ratio'])} of its speed",
            ]
            for row in through
        ),
        *(
            [
                f"start of Python to the first batch, `--prepare {row['--prepare']}`",
                f"{row['seconds to the first batch']:.1f} s",
            ]
            for row in start
        ),
        [
            f"resident memory of both processes, `gradient` of {count(memory['images'])} JPEG files",
            f"{count(memory['MiB at 1,000-2,000'])} MiB at images 1,000 to 2,000, "
            f"{count(memory['MiB in the last 1,000'])} MiB in the last 1,000; in between "
            f"{percent(memory['least'], 1)} to {percent(memory['most'], 1)}",
        ],
        *([f"{row['images']} digits: {row['run']}", f"{count(row['images/s'])} images/s"] for row in ray),
    ]
    return f"""## Whole data sets

Two cores that other jobs were using at the same time: speeds are low, and ratios of interleaved runs say more.

{table(["measurement", "result"], body)}

The Ray runs include the start of the actors, while another job held one of the two cores: two workers gain nothing
there. `bench_batch.py` and `bench_ray.py` in `benchmarks/`.
{source("cpu-batch-throughput.json", "cpu-batch-start-up.json", "cpu-batch-memory.json", "cpu-ray.json")}
"""


def page() -> str:
    about = load("cpu-explainers.json")["machine"]
    intro = f"""<!-- Rendered from benchmarks/results/*.json by tools/render_benchmarks.py: edit the script. -->

# Benchmarks

Measured on {about["cpu"]}, {about["cores"]} shared cores, {about["vectors"]}, {about["threads"]} thread, torch
{about["torch"]}, {about["compiler"]}, unless a section says otherwise. Candidates run in turn (A B A B …), and ratios
are ratios of medians. [benchmarks/README.md](../benchmarks/README.md) lists the commands; `benchmarks/results/` holds
the raw numbers. A commit is the one that was measured.
"""
    parts = [
        intro,
        solver(),
        calibration(),
        errors(),
        defaults(),
        explainers(),
        ops(),
        gpu(gpu_file(), load(gpu_file())),
        prepare(),
        imagenet(),
        rows_per_pass(),
        precision(),
        support(),
        batch(),
    ]
    return "\n".join(wrapped(part) for part in parts)


def chart() -> str:
    """Gradients to 1 %, on a log scale: a dot for the default solver, a square for the published schedule."""
    found = solver_rows()
    left, right, top, step = 330, 760, 52, 22
    low, high = 100.0, 20000.0
    bottom = top + step * len(found)

    def at(value: float) -> float:
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#333") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    ours, theirs = "#0b6fb8", "#c8611a"
    marks = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 {bottom + 44}"',
        'font-family="sans-serif" font-size="12">',
        "<title>Gradients per input until the map is within 1 % of a long reference run</title>",
        f'<rect width="820" height="{bottom + 44}" fill="#fff"/>',
        text(8, 18, "Median gradients per input until the map is within 1 % of a long reference run (fewer is better)"),
        f'<circle cx="16" cy="34" r="5" fill="{ours}"/>',
        text(26, 38, "default solver", colour=ours),
        f'<rect x="132" y="29" width="10" height="10" fill="{theirs}"/>',
        text(148, 38, "published schedule, stopped at the best moment in hindsight", colour=theirs),
    ]
    for value in (100, 300, 1000, 3000, 10000):
        x = at(value)
        marks.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        marks.append(text(x, bottom + 16, count(value), "middle"))
    x = at(PUBLISHED)
    marks.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{theirs}" stroke-dasharray="4 3"/>')
    marks.append(text(x + 5, bottom + 34, f"published schedule as it is: {count(PUBLISHED)}", "end", theirs))
    for i, row in enumerate(found):
        y = top + step * (i + 0.5)
        marks.append(text(left - 12, y + 4, row["problem"], "end"))
        if not resolved(row, 0.01):
            words = f"too noisy: the reference is known to {percent(row['reference'], 1)}"
            marks.append(text(left + 4, y + 4, words, colour="#777"))
            continue
        mine, other = row["auto to 1.0%"], row["published stopped, to 1.0%"]
        end = at(high if other is None else other)
        marks.append(f'<line x1="{at(mine):.1f}" y1="{y}" x2="{end:.1f}" y2="{y}" stroke="#999"/>')
        marks.append(f'<circle cx="{at(mine):.1f}" cy="{y}" r="5" fill="{ours}"/>')
        if other is None:
            marks.append(text(end + 4, y + 4, "never", colour=theirs))
        else:
            marks.append(f'<rect x="{end - 5:.1f}" y="{y - 5}" width="10" height="10" fill="{theirs}"/>')
    return "\n".join([*marks, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing them")
    arguments = parser.parse_args()
    made = {"docs/benchmarks.md": page(), "docs/benchmarks.svg": chart()}
    stale = [
        name for name, text in made.items() if not (ROOT / name).exists() or (ROOT / name).read_text("utf-8") != text
    ]
    if not arguments.check:
        for name, text in made.items():
            (ROOT / name).write_text(text, "utf-8")
        return 0
    for name in stale:
        print(
            f"{name} is not what tools/render_benchmarks.py makes of benchmarks/results: run it, and commit the result"
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
