"""Results as Parquet, CSV, JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._files import write
from .methods import Method, methods
from .plan import Results
from .statistics import claim_name, claims, summarise


def _claims_table(records: list[dict[str, Any]], known: dict[str, Method]) -> str:
    """The claims in Markdown: one row per method and test, one column per rival."""
    rivals = list(dict.fromkeys(claim["rival"] for claim in records))
    rows: dict[str, list[str]] = {}
    for claim in records:
        cell = "{mean:+.3f} [{low:+.3f}, {high:+.3f}] ".format(**claim) if claim["count"] else "– "
        verdict = claim["verdict"]
        cell += verdict if verdict == "undecided" else f"**{verdict}**"
        rows.setdefault(claim_name(claim, known), []).append(cell)
    head = ["method minus rival", *(known[rival].label for rival in rivals)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(results: Results, folder: Path) -> list[str]:
    """Writes the tables of an evaluation.

    ``results.parquet`` and ``results.csv`` have the same rows; ``summary.json`` has means and intervals. ``claims.csv``
    and ``claims.md`` have the same claims, if the plan has a variant of MoreauGrad and a rival.

    Returns:
        The names of the files.

    Raises:
        ImportError: pyarrow is missing.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    columns = {
        name: pyarrow.array(column.tolist() if column.dtype == object else column, from_pandas=True)
        for name, column in results.table.items()
    }
    table = pyarrow.table(columns)
    write(folder / "results.parquet", lambda file: pyarrow.parquet.write_table(table, file))
    write(folder / "results.csv", lambda file: pyarrow.csv.write_csv(table, file))
    known = methods(results.plan.settings)
    summary = {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "methods": {m: {"label": known[m].label, "how": known[m].how} for m in results.plan.methods},
        "inputs": len(results.data.inputs),
        "accuracy": float((results.rows(results.plan.methods[0])["target"] == results.data.targets.numpy()).mean()),
        "hessian": results.hessian,
        "numbers": summarise(results),
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write(folder / "summary.json", lambda file: file.write(text.encode()))
    names = ["results.parquet", "results.csv", "summary.json"]
    records = claims(results)
    if not records:
        return names
    claimed = pyarrow.Table.from_pylist(records)
    write(folder / "claims.csv", lambda file: pyarrow.csv.write_csv(claimed, file))
    lines = _claims_table(records, known)
    write(folder / "claims.md", lambda file: file.write(lines.encode()))
    return [*names, "claims.csv", "claims.md"]
