"""``report.html``: a self-contained report that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write
from ..plots import bands
from .methods import OURS, Method, methods
from .metrics import gini, normalised_distance, ssim, support_fraction, topk_intersection
from .plan import METRICS, Results
from .statistics import bootstrap, claim_name, claims

__all__ = ["figure", "write_report"]

_NORMS = {"l2": "L2", "linf": "L∞"}
_CURVES = ("distance", "topk", "topk_fixed", "ssim")
_MAPS = ("gini", "support", "seed_jaccard", "seed_cosine", "deletion", "insertion", "max_sensitivity",
         "randomised_top", "randomised_all", "gradients", "relative_residual")  # fmt: skip
_ROBUST = ("distance", "topk", "topk_fixed", "ssim", "distance_l2", "kept")
# Metrics by which the gallery can be sorted, with their labels.
_SORTED = {
    "topk": "top-k intersection under the attack",
    "ssim": "SSIM under the attack",
    "distance": "normalised distance under the attack",
    "gini": "Gini of the map",
    "support": "non-zero share of the map",
}


def figure(results: Results, *, dark: bool = False) -> Any:
    """Curves of robustness over magnitude with 95 % bands, one row per metric and one column per attack."""
    plan = results.plan
    known = methods(plan.settings)
    shown = [m for m in plan.methods if known[m].attacked]
    panels: dict[str, dict[str, dict[str, list[tuple[float, float, float, float]]]]] = {}
    for metric in _CURVES:
        panels[METRICS[metric][0]] = {attack: {} for attack in plan.attacks}
        for attack in plan.attacks:
            for method in shown:
                points = []
                for magnitude in sorted(plan.magnitudes):
                    found = bootstrap(results.rows(method, attack, magnitude)[metric])
                    if found.count:
                        points.append((magnitude, found.mean, found.low, found.high))
                panels[METRICS[metric][0]][attack][method] = points
    labels = {m: known[m].label for m in shown}
    return bands(panels, labels, f"{_NORMS[plan.norm]} magnitude", strong=OURS, dark=dark)


def png_of(figure: Any, background: str = "none") -> bytes:
    """A figure as PNG, on a background colour or transparent."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=background)
    return buffer.getvalue()


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _picture_of_input(x: Tensor) -> str:
    """An input as PNG, scaled to its own range; three channels in colour, others summed to gray."""
    from PIL import Image

    x = x.double()
    image = x if x.dim() == 3 and x.shape[0] == 3 else x.reshape(-1, *x.shape[-2:]).sum(0, keepdim=True)
    low, high = float(image.min()), float(image.max())
    level = ((image - low) / (high - low if high > low else 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(level.movedim(0, -1).squeeze(-1).contiguous().numpy())
    return _png(picture)


def _picture_of_map(a: Tensor, colours: Any) -> str:
    """A map as PNG: blue is negative, white zero, red positive; channels summed; scaled to its own maximum."""
    from PIL import Image

    image = a.double().reshape(-1, *a.shape[-2:]).sum(0)
    largest = float(image.abs().max())
    scaled = (image / (largest or 1) + 1) / 2
    return _png(Image.fromarray(colours(scaled.numpy(), bytes=True)[..., :3]))


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return _uri(buffer.getvalue())


def _img(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{html.escape(alt)}">'


def _number(value: float, metric: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if metric == "gradients" else f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]], caption: str, sortable: bool = True) -> str:
    """A table in HTML. Cells are text, or HTML that begins with '<'."""

    def cell(text: str, tag: str) -> str:
        body = text if text.startswith("<") else html.escape(text)
        return f"<{tag}>{body}</{tag}>"

    if sortable:
        top = "".join(
            f'<th scope="col" aria-sort="none"><button type="button">{html.escape(h)}</button></th>' for h in head
        )
    else:
        top = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(cell(c, "td") for c in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="wide"><table class="{"numbers" if sortable else "plain"}"><caption>{html.escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _interval(values: Any, metric: str) -> str:
    found = bootstrap(values)
    if not found.count:
        return '<span data-value="">–</span>'
    return (
        f'<span data-value="{found.mean!r}">{_number(found.mean, metric)} '
        f"<small>[{_number(found.low, metric)}, {_number(found.high, metric)}]</small></span>"
    )


def _heading(metric: str) -> str:
    name, sense = METRICS[metric]
    return f"{name} {'↑' if sense > 0 else '↓' if sense < 0 else ''}".strip()


def _tables(results: Results, known: dict[str, Method]) -> str:
    plan = results.plan
    present = [m for m in _MAPS if any(bootstrap(results.rows(k)[m]).count for k in plan.methods)]
    rows = [[known[m].label, *(_interval(results.rows(m)[metric], metric) for metric in present)] for m in plan.methods]
    parts = [
        _table(["method", *map(_heading, present)], rows, "The maps themselves: mean and 95 % interval over inputs")
    ]
    for attack in plan.attacks:
        for magnitude in plan.magnitudes:
            rows = [
                [known[m].label, *(_interval(results.rows(m, attack, magnitude)[x], x) for x in _ROBUST)]
                for m in plan.methods
                if known[m].attacked
            ]
            what = f"Attack “{attack}”, {_NORMS[plan.norm]} magnitude {magnitude:g}"
            caption = f"{what}: the attacked map against the clean one"
            parts.append(_table(["method", *map(_heading, _ROBUST)], rows, caption))
    return "\n".join(parts)


def _comparisons(results: Results, known: dict[str, Method], magnitude: float) -> str:
    rivals: dict[str, None] = {}
    rows: dict[tuple[Any, ...], list[str]] = {}
    for claim in claims(results):
        if claim["magnitude"] not in (0.0, magnitude):
            continue
        rivals[claim["rival"]] = None
        where = (claim["method"], claim["metric"], claim["attack"])
        text = f"{claim['mean']:+.3f}" if claim["count"] else "–"
        rows.setdefault(where, [claim_name(claim, known)]).append(
            f'<span class="{claim["verdict"]}">{text} <small>{claim["verdict"]}</small></span>'
        )
    if not rows:
        return ""
    return _table(
        ["method minus rival", *(known[r].label for r in rivals)],
        list(rows.values()),
        "Paired differences on the same inputs; a verdict only where the 95 % interval excludes 0. All magnitudes are "
        "in claims.md",
        sortable=False,
    )


def _gallery(
    results: Results, known: dict[str, Method], attack: str, magnitude: float, count: int
) -> tuple[str, dict[str, Any]]:
    from matplotlib import colormaps

    colours = colormaps["RdBu_r"].resampled(257)
    plan, names = results.plan, results.data.names
    shown = [m for m in plan.methods if known[m].attacked]
    count = min(count, len(results.data.inputs))
    inputs = results.data.inputs[:count]
    clean = {m: results.maps(m, count)[0] for m in shown}
    attacked = {m: results.maps(m, count, attack, magnitude) for m in shown}
    target = results.rows(shown[0])["target"]
    values: dict[str, Any] = {}
    for m in shown:
        a, b = clean[m], attacked[m][0]
        values[m] = {
            "topk": topk_intersection(a, b, plan.k).tolist(),
            "ssim": ssim(a, b).tolist() if min(a.shape[-2:]) >= 3 else [0.0] * count,
            "distance": normalised_distance(a, b).tolist(),
            "gini": gini(a).tolist(),
            "support": support_fraction(a).tolist(),
        }
    head = ['<th scope="col" aria-sort="ascending" data-key="id"><button type="button">input</button></th>']
    head += [
        f'<th scope="col" aria-sort="none" data-key="{m}"><button type="button">{html.escape(known[m].label)}'
        "</button></th>"
        for m in shown
    ]
    rows = []
    for i in range(count):
        said, true = int(target[i]), int(results.data.targets[i])
        label = f"{names[said]}" + ("" if said == true else f" (is {names[true]})")
        cells = [
            f'<th scope="row">{_img(_picture_of_input(inputs[i]), f"input {i}, predicted {label}")}'
            f"<span>{html.escape(label)}</span></th>"
        ]
        for m in shown:
            other, moved = attacked[m]
            what = known[m].label
            cells.append(
                f'<td data-method="{m}">'
                + _img(_picture_of_map(clean[m][i], colours), f"{what}: map of input {i}")
                + _img(_picture_of_input(moved[i]), f"{what}: input {i} as attacked")
                + _img(_picture_of_map(other[i], colours), f"{what}: map of the attacked input {i}")
                + "<output></output></td>"
            )
        rows.append(f'<tr data-id="{i}">{"".join(cells)}</tr>')
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in _SORTED.items())
    text = f"""
<p>In each column from top to bottom: the map, the input as the attack “{html.escape(attack)}” of magnitude
{magnitude:g} left it, and the map of that. Red raises the score of the predicted class, blue lowers it; white is zero.
Every map has a scale of its own. Press a method's name to sort the inputs by its number, again to turn the order.</p>
<p><label>Sort by <select id="metric">{options}</select></label> <span id="said" role="status"></span></p>
<table id="gallery"><caption class="hidden">Gallery of maps, sortable by method</caption>
<thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(rows)}</tbody></table>"""
    return text, values


def write_report(
    results: Results, path: str | Path, *, gallery: int = 24, attack: str | None = None, magnitude: float | None = None
) -> None:
    """Writes the report: tables with intervals, curves, and a gallery that can be sorted.

    Args:
        results: of :func:`moreau_ext.evaluation.run`.
        path: of the HTML file.
        gallery: number of inputs in the gallery, which images only have.
        attack: of the gallery; the last of the plan by default.
        magnitude: of the gallery; the middle one by default.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        OSError: it cannot be written.
    """
    plan = results.plan
    known = methods(plan.settings)
    attack = plan.attacks[-1] if attack is None and plan.attacks else attack
    middle = sorted(plan.magnitudes)[(len(plan.magnitudes) - 1) // 2] if plan.magnitudes else 0.0
    magnitude = middle if magnitude is None else magnitude
    images = results.data.inputs.dim() in (3, 4)
    shown, values = "", dict[str, Any]()
    if images and gallery and attack is not None and any(known[m].attacked for m in plan.methods):
        shown, values = _gallery(results, known, attack, magnitude, gallery)
    light, dark = "", ""
    if plan.attacks and plan.magnitudes:
        light, dark = (_uri(png_of(figure(results, dark=d))) for d in (False, True))
    accuracy = float((results.rows(plan.methods[0])["target"] == results.data.targets.numpy()).mean())
    how = _table(
        ["method", "settings"], [[known[m].label, known[m].how] for m in plan.methods], "The methods", sortable=False
    )
    manifest = html.escape(json.dumps(json.loads((results.folder / "manifest.json").read_text()), indent=1))
    second = (
        "second derivatives, as the model is smooth" if results.hessian == "autograd" else
        "Stein's identity, as the model has kinks and its second derivatives say nothing"
    )  # fmt: skip
    curves = (
        f'<h2 id="robustness">Robustness</h2><p>Lines are means, bands 95 % bootstrap intervals over inputs. Distance: '
        "less is more robust; the others: more is.</p>"
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)"><img class="curves" src="{light}" '
        "alt=\"Robustness metrics against the attack's magnitude, one column per attack; the tables below hold the "
        'numbers"></picture>'
        if light
        else ""
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>Saliency maps compared</title><style>{_STYLE}</style></head><body><main>
<h1>Saliency maps compared</h1>
<p>{len(results.data.inputs)} inputs of shape {" × ".join(map(str, results.data.inputs.shape[1:]))}; the model is right
for {accuracy:.1%} of them, and the maps explain what it predicts. Attacks keep the prediction and take derivatives from
{second}.</p>
{"<h2 id='maps'>Maps</h2>" + shown if shown else ""}
{curves}
<h2 id="numbers">Numbers</h2>
<p>↑ more is better, ↓ less is. Press a column's head to sort.</p>
{_tables(results, known)}
<h2 id="compared">Compared in pairs</h2>
{_comparisons(results, known, middle)}
<h2 id="how">How</h2>
{how}
<details><summary>Manifest</summary><pre>{manifest}</pre></details>
</main><script type="application/json" id="values">{json.dumps(values)}</script><script>{_SCRIPT}</script></body></html>
"""
    write(Path(path), lambda file: file.write(page.encode()))


_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1b1f, #e7e7ea); --page: light-dark(#ffffff, #16171a);
  --soft: light-dark(#66666e, #a3a4ad); --line: light-dark(#d9d9de, #3a3b42); --fill: light-dark(#f4f4f7, #202127);
  --good: light-dark(#14692f, #6fd08c); --bad: light-dark(#a11d21, #ff9a94); --focus: light-dark(#0b57d0, #8ab4f8); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1600px; margin: 0 auto; padding: 12px 16px 48px; }
h1 { font-size: 24px; margin: 8px 0; } h2 { font-size: 19px; margin: 28px 0 8px; } p { max-width: 75em; margin: 6px 0; }
small { color: var(--soft); font-size: 11.5px; white-space: nowrap; }
table { border-collapse: collapse; } caption { text-align: left; font-weight: 600; padding: 12px 0 4px; }
.numbers, .plain { font-size: 13px; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td, .plain th, .plain td { padding: 3px 8px; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; font-weight: 400; }
thead th { vertical-align: bottom !important; font-weight: 600 !important; background: var(--fill); }
td span { white-space: nowrap; } .numbers small { display: block; }
.wide { overflow-x: auto; }
.better { color: var(--good); } .worse { color: var(--bad); } .undecided { color: var(--soft); }
button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 2px; cursor: pointer;
  text-align: left; } button:hover { text-decoration: underline; }
button:focus-visible, select:focus-visible, summary:focus-visible { outline: 2px solid var(--focus); }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
select { font: inherit; color: inherit; background: var(--fill); border: 1px solid var(--line); padding: 2px 6px; }
#gallery { table-layout: fixed; width: 100%; font-size: 12px; }
#gallery th, #gallery td { padding: 5px 4px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; text-align: left; }
#gallery thead th { position: sticky; top: 0; z-index: 1; font-size: 11.5px; line-height: 1.25; overflow-wrap: normal;
  hyphens: auto; }
#gallery img { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; margin-bottom: 3px;
  border: 1px solid var(--line); object-fit: contain; }
#gallery output { font-variant-numeric: tabular-nums; color: var(--soft); }
.curves { max-width: 100%; } pre { white-space: pre-wrap; font-size: 12px; background: var(--fill); padding: 8px; }
.hidden { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
"""

_SCRIPT = """
'use strict';
const order = (heads, head) => {
  const down = head.getAttribute('aria-sort') !== 'descending';
  heads.forEach(h => h.setAttribute('aria-sort', 'none'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  return down ? -1 : 1;
};
const arrange = (body, key, sign) => {
  const rows = [...body.rows].map(row => [key(row), row]);
  const empty = v => v === '' || (typeof v === 'number' && isNaN(v));
  rows.sort(([a], [b]) => empty(a) || empty(b) ? empty(a) - empty(b) :
    sign * (typeof a === 'string' ? a.localeCompare(b) : a - b));
  rows.forEach(([, row]) => body.append(row));
};
for (const table of document.querySelectorAll('table.numbers')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.firstChild.addEventListener('click', () => arrange(table.tBodies[0], row => {
    const value = row.cells[i].querySelector('[data-value]');
    return value ? parseFloat(value.dataset.value) : row.cells[i].textContent;
  }, order(heads, head))));
}
const gallery = document.getElementById('gallery');
if (gallery) {
  const values = JSON.parse(document.getElementById('values').textContent);
  const metric = document.getElementById('metric'), said = document.getElementById('said');
  const heads = [...gallery.tHead.rows[0].cells], body = gallery.tBodies[0];
  let current = heads[0], sign = 1;
  const sort = () => {
    const method = current.dataset.key;
    arrange(body, row => method === 'id' ? +row.dataset.id : values[method][metric.value][+row.dataset.id], sign);
    const how = sign > 0 ? 'smallest first' : 'largest first';
    said.textContent = method === 'id' ? 'In the order of the data, ' + how :
      current.textContent + ', ' + metric.selectedOptions[0].textContent + ', ' + how;
  };
  const show = () => {
    for (const cell of body.querySelectorAll('td'))
      cell.querySelector('output').textContent =
        values[cell.dataset.method][metric.value][+cell.parentNode.dataset.id].toFixed(3);
  };
  heads.forEach(head => head.firstChild.addEventListener('click', () => {
    sign = order(heads, head); current = head; sort();
  }));
  metric.addEventListener('change', () => { show(); if (current.dataset.key !== 'id') sort(); });
  show();
}
"""
