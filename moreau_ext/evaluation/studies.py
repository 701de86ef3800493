"""Studies of open questions on small data.

Every finding is generated from a paired difference on the same inputs and its 95 % bootstrap interval. It reads
"undecided" if the interval contains 0, and it also reports when MoreauGrad is worse.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import zoo
from .._files import write
from ..explainers.moreau import MoreauGrad
from ..plots import bars
from ..solvers.fixed import ProximalGradient
from ..solvers.solution import Solution
from .attacks import Attack
from .derivatives import find_hessian
from .faithfulness import area, drawn, perturbation_curve, target_probability
from .methods import DEFAULT, Settings, methods
from .metrics import cosine, gini, support_fraction, topk_intersection
from .statistics import Interval, bootstrap

__all__ = ["STUDIES", "InputConvex", "Study", "consistency", "perturbation", "regularised", "tabular"]

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Args:
        name: for the command line.
        question: of the study.
        how: data, models and settings, in a sentence or two.
        rows: (group, method, metric) -> one value per input.
        findings: sentences with numbers.
    """

    name: str
    question: str
    how: str
    rows: dict[tuple[str, str, str], Values]
    findings: tuple[str, ...]

    def interval(self, group: str, method: str, metric: str) -> Interval:
        return bootstrap(self.rows[group, method, metric])

    def text(self) -> str:
        """The results as a page in Markdown."""
        metrics = list(dict.fromkeys(metric for _, _, metric in self.rows))
        lines = [f"# {self.question}", "", self.how, "", f"| group | method | {' | '.join(metrics)} |"]
        lines.append("|" + "---|" * (2 + len(metrics)))
        for group, method in dict.fromkeys((g, m) for g, m, _ in self.rows):
            cells = [str(self.interval(group, method, x)) if (group, method, x) in self.rows else "-" for x in metrics]
            lines.append(f"| {group} | {method} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"- {finding}" for finding in self.findings), ""])

    def save(self, folder: Path) -> None:
        """Writes ``NAME.md``, ``NAME.csv`` (means and intervals) and ``NAME.png``."""
        panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(["group", "method", "metric", "mean", "low", "high", "count"])
        for group, method, metric in self.rows:
            found = self.interval(group, method, metric)
            table.writerow([group, method, metric, found.mean, found.low, found.high, found.count])
            if found.count:
                panels.setdefault(metric, {}).setdefault(group, {})[method] = (found.mean, found.low, found.high)
        write(folder / f"{self.name}.csv", lambda file: file.write(buffer.getvalue().encode()))
        write(folder / f"{self.name}.md", lambda file: file.write(self.text().encode()))
        write(folder / f"{self.name}.png", lambda file: bars(panels).savefig(file, format="png", dpi=110))


def _said(what: str, first: Values, second: Values, *, more: str = "higher", less: str = "lower") -> str:
    """A finding: "what: difference [interval], verdict"."""
    found = bootstrap(first - second)
    verdict = "undecided" if found.low <= 0 <= found.high else more if found.mean > 0 else less
    return f"{what}: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {verdict}"


def _explain(name: str, model: Any, x: Tensor, target: Tensor, settings: Settings) -> Solution:
    explainer = methods(settings)[name].build(model, x)
    found: Solution = explainer.attribute(x, target, return_solution=True)
    return found


# Methods whose maps can be compared between nets: superpixels depend only on the image, random maps on nothing.
_COMPARED = tuple(name for name in DEFAULT if name not in ("group_superpixels", "random"))


def consistency(limit: int = 100, seeds: int = 4) -> Study:
    """Agreement of maps between nets of different seeds and architectures.

    Args:
        limit: number of test digits, of those that all nets classify correctly.
        seeds: number of nets in the first group.
    """
    settings = Settings()
    groups = {
        "seeds": [("digits_cnn", seed) for seed in range(seeds)],
        "architectures": [(name, 0) for name in ("digits_cnn", "digits_cnn_gelu", "digits_cnn_silu", "digits_vit")],
    }
    data = zoo.digits("test")
    nets = {spec: zoo.trained(*spec) for specs in groups.values() for spec in specs}
    right = torch.ones(len(data.inputs), dtype=torch.bool)
    with torch.no_grad():
        for net in nets.values():
            right &= net(data.inputs).argmax(1) == data.targets
    x, target = data.inputs[right][:limit], data.targets[right][:limit]
    known = methods(settings)
    rows: dict[tuple[str, str, str], Values] = {}
    for name in _COMPARED:
        maps = {spec: _explain(name, net, x, target, settings).attribution for spec, net in nets.items()}
        for group, specs in groups.items():
            pairs = list(itertools.combinations(specs, 2))
            label = known[name].label
            for metric, measure in (
                ("cosine", cosine),
                ("top-8 intersection", lambda a, b: topk_intersection(a, b, 8)),
            ):
                each = torch.stack([measure(maps[a], maps[b]) for a, b in pairs]).mean(0)
                rows[group, label, metric] = each.numpy()
    findings = []
    for group in groups:
        for ours in ("moreau", "sparse", "group"):
            for rival in ("smoothgrad", "st_smoothgrad", "integrated_gradients"):
                a, b = known[ours].label, known[rival].label
                findings.append(
                    _said(f"cosine across {group}, {a} minus {b}", rows[group, a, "cosine"], rows[group, b, "cosine"])
                )
    return Study(
        "consistency",
        "Are maps the same for differently seeded nets, and for other architectures?",
        f"{len(x)} test digits that all nets get right; {seeds} seeds of digits_cnn, and digits_cnn with ReLU, GELU "
        "and SiLU and digits_vit; every pair of nets, the mean over pairs per digit. 480 gradients per map.",
        rows,
        tuple(findings),
    )


class InputConvex(nn.Module):
    """Logits that are convex functions of the input: z' = softplus(W₊z + Ux + b), with W₊ ≥ 0.

    Source: Amos, Xu, Kolter 2017, "Input Convex Neural Networks", ICML, arXiv 1609.07152.

    Args:
        features, width, classes: of the layers; three of them.
        seed: of the weights.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation.studies import InputConvex
        >>> net, a, b = InputConvex(4, 8, 3), torch.randn(5, 4), torch.randn(5, 4)
        >>> bool((net((a + b) / 2) <= (net(a) + net(b)) / 2 + 1e-6).all())
        True
    """

    def __init__(self, features: int, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn_weights(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        sizes = [width, width, classes]
        self.direct = nn.ParameterList([drawn_weights(n, features, scale=features**-0.5) for n in sizes])
        # softplus(raw) is the weight; -3 makes it 0.05, so that the sums over the width start at the inputs' scale.
        self.raw = nn.ParameterList([nn.Parameter(drawn_weights(n, width, scale=0.3).data - 3) for n in sizes[1:]])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in sizes])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        z = nn.functional.softplus(flat @ self.direct[0].T + self.bias[0], beta=5)
        for layer, raw in enumerate(self.raw, 1):
            z = z @ nn.functional.softplus(raw).T + flat @ self.direct[layer].T + self.bias[layer]
            if layer < len(self.raw):
                z = nn.functional.softplus(z, beta=5)
        return z


def regularised(limit: int = 60) -> Study:
    """Maps of regularised and input-convex nets: their robustness, and the convexity of their problems.

    Args:
        limit: number of test digits.
    """
    train, data = zoo.digits("train"), zoo.digits("test")
    x = data.inputs[:limit]
    nets: dict[str, nn.Module] = {}
    for decay in (0.0, 0.1, 1.0):
        net = zoo.digits_cnn("softplus", 0)
        nets[f"weight decay {decay:g}"] = zoo.train(net, train, 25, 0, learning_rate=1e-2, weight_decay=decay)
    nets["input-convex"] = zoo.train(InputConvex(64, 64, 10), train, 25, 0, learning_rate=1e-2)
    known = methods(Settings())
    rows: dict[tuple[str, str, str], Values] = {}
    findings = []
    for group, net in nets.items():
        with torch.no_grad():
            target = net(x).argmax(1)
        accuracy = zoo.accuracy(net, data)
        hessian = find_hessian(net, x)
        for name in ("gradient", "smoothgrad", "moreau", "sparse"):
            settings = Settings()
            explainer = known[name].build(net, x)
            clean = explainer.attribute(x, target, return_solution=True)
            attack = Attack("adaptive", 0.3, hessian=hessian, num_samples=32 if hessian == "autograd" else 256)
            found = attack.run(explainer, net, x, target, clean=clean)
            other = _explain(name, net, found.inputs, target, settings).attribution
            label = known[name].label
            rows[group, label, "Gini"] = gini(clean.attribution).numpy()
            rows[group, label, "top-k, adaptive 0.3"] = topk_intersection(clean.attribution, other).numpy()
        # Weak convexity of the score, and whether the problem at rho 1 has a unique solution.
        far = MoreauGrad(net, rho=1.0, solver=ProximalGradient(8, 100, 0.05), max_batch=1024)
        some = x[:16]
        solved = far.attribute(some, target[:16], return_solution=True)
        proof = far.certificate(
            some, solved, target[:16], num_samples=256, num_hvp_samples=64, hessian=hessian, lanczos_steps=12
        )
        lam = float(proof.weak_convexity.median())
        share = float(proof.premise.double().mean())
        findings.append(
            f"{group}: accuracy {accuracy:.1%}; at rho 1 the median weak convexity λ is {lam:.3g}, and ρλ < 1 is shown "
            f"for {share:.0%} of 16 digits"
        )
    first = "weight decay 0"
    for name in ("gradient", "smoothgrad", "moreau", "sparse"):
        label, metric = known[name].label, "top-k, adaptive 0.3"
        before = rows[first, label, metric]
        findings += [
            _said(f"{label}, {metric}, {group} minus {first}", rows[group, label, metric], before)
            for group in list(nets)[1:]
        ]
    for group in nets:
        metric = "top-k, adaptive 0.3"
        a, b = known["moreau"].label, known["smoothgrad"].label
        findings.append(_said(f"{group}: {metric}, {a} minus {b}", rows[group, a, metric], rows[group, b, metric]))
    return Study(
        "regularised",
        "Do regularised or input-convex nets have sparser, more robust or more solvable maps?",
        f"{limit} test digits; digits_cnn with softplus trained with weight decay 0, 0.1 and 1, and an input-convex "
        "net (softplus, 64 wide). The adaptive attack has 10 steps and L2 magnitude 0.3.",
        rows,
        tuple(findings),
    )


def occlusion(model: Any, x: Tensor, target: Tensor, where: Tensor, baseline: float = 0.0) -> tuple[Tensor, Tensor]:
    """The drop of the target's probability when a single pixel is set to the baseline, for the pixels of a mask.

    Args:
        model: [B, 1, H, W] -> [B, classes].
        x: [B, 1, H, W].
        target: int64 [B].
        where: bool, shaped as x: the pixels to test; the others get 0.
        baseline: value of an occluded pixel.

    Returns:
        (maps shaped as x, forward passes per input).

    Source: Zeiler and Fergus 2014, arXiv 1311.2901, with patches of one pixel.
    """
    row, place = where.flatten(1).nonzero(as_tuple=True)
    before = target_probability(model, x, target)
    moved = x[row].flatten(1)
    moved[torch.arange(len(row)), place] = baseline
    after = target_probability(model, moved.view(-1, *x.shape[1:]), target[row])
    maps = torch.zeros(x.shape[0], x[0].numel(), dtype=torch.float64)
    maps[row, place] = before[row] - after
    return maps.view(x.shape), where.flatten(1).sum(1).double() + 1


def perturbation(limit: int = 200) -> Study:
    """Occlusion restricted to the support of a sparse map.

    Args:
        limit: number of test digits.
    """
    settings = Settings()
    model = zoo.trained("digits_cnn")
    x = zoo.digits("test").inputs[:limit]
    with torch.no_grad():
        target = model(x).argmax(1)
    known = methods(settings)
    sparse, group, rival = (
        _explain(name, model, x, target, settings).attribution for name in ("sparse", "group", "st_smoothgrad")
    )
    # Random pixels, as many as the support of the sparse map.
    order = drawn(0x5EED_0CC1, torch.arange(limit)[: len(x)], x)[:, 0].flatten(1).argsort(1).argsort(1).view(x.shape)
    count = (sparse != 0).flatten(1).sum(1).view(-1, 1, 1, 1)
    tried = {
        "occlusion, all pixels": torch.ones_like(x, dtype=torch.bool),
        "occlusion, support of Sparse MoreauGrad": sparse != 0,
        "occlusion, support of Group-Sparse MoreauGrad": group != 0,
        "occlusion, support of soft-thresholded SmoothGrad": rival != 0,
        "occlusion, as many random pixels": order < count,
    }
    maps = {"Sparse MoreauGrad alone": (sparse.double(), torch.full((len(x),), torch.nan, dtype=torch.float64))}
    maps |= {name: occlusion(model, x, target, where) for name, where in tried.items()}
    ids = torch.arange(len(x))
    rows: dict[tuple[str, str, str], Values] = {}
    for name, (found, passes) in maps.items():
        for kind in ("deletion", "insertion"):
            curve = perturbation_curve(model, x, found.to(x), target, kind, ids=ids)
            rows["digits", name, f"{kind} area"] = area(curve).numpy()
        rows["digits", name, "forward passes"] = passes.numpy()
    findings = []
    mine = "occlusion, support of Sparse MoreauGrad"
    for metric, more, less in (("deletion area", "worse", "better"), ("insertion area", "better", "worse")):
        for other in maps:
            if other != mine:
                a, b = rows["digits", mine, metric], rows["digits", other, metric]
                findings.append(_said(f"{metric}, {mine} minus {other}", a, b, more=more, less=less))
    kept = bootstrap(rows["digits", mine, "forward passes"])
    findings.append(f"{mine} takes {kept.mean:.1f} forward passes per digit instead of 65, after 480 gradients")
    return Study(
        "perturbation",
        "Does a sparse map tell a perturbation method where to look?",
        f"{len(x)} test digits, digits_cnn; occlusion of single pixels by 0, restricted to the support of a sparse "
        f"map. {known['sparse'].how}.",
        rows,
        tuple(findings),
    )


def tabular(limit: int = 114) -> Study:
    """The L1 envelope on a table, the breast-cancer data.

    Args:
        limit: number of test rows.
    """
    settings = Settings(rho=0.3)
    model = zoo.trained("tabular_mlp")
    data = zoo.breast_cancer("test")
    x = data.inputs[:limit]
    with torch.no_grad():
        target = model(x).argmax(1)
    known = methods(settings)
    ids = torch.arange(len(x))
    hessian = find_hessian(model, x)
    rows: dict[tuple[str, str, str], Values] = {}
    for name in ("gradient", "smoothgrad", "st_smoothgrad", "sparsified_smoothgrad", "integrated_gradients",
                 "moreau", "sparse"):  # fmt: skip
        explainer = known[name].build(model, x)
        clean = explainer.attribute(x, target, ids=ids, return_solution=True)
        found = Attack("adaptive", 1.0, hessian=hessian, k=5).run(explainer, model, x, target, clean=clean, ids=ids)
        other = explainer.attribute(found.inputs, target, ids=ids)
        label = known[name].label
        rows["breast cancer", label, "Gini"] = gini(clean.attribution).numpy()
        rows["breast cancer", label, "non-zero share"] = support_fraction(clean.attribution).numpy()
        for kind in ("deletion", "insertion"):
            curve = perturbation_curve(
                model,
                x,
                clean.attribution,
                target,
                kind,
                steps=15,
                ids=ids,
            )
            rows["breast cancer", label, f"{kind} area"] = area(curve).numpy()
        rows["breast cancer", label, "top-5, adaptive 1"] = topk_intersection(clean.attribution, other, 5).numpy()
    findings = []
    mine = known["sparse"].label
    senses = {
        "Gini": ("better", "worse"),
        "deletion area": ("worse", "better"),
        "insertion area": ("better", "worse"),
        "top-5, adaptive 1": ("better", "worse"),
    }
    for metric, (more, less) in senses.items():
        for rival in ("smoothgrad", "st_smoothgrad", "integrated_gradients", "moreau"):
            other_label = known[rival].label
            a, b = (rows["breast cancer", label, metric] for label in (mine, other_label))
            findings.append(_said(f"{metric}, {mine} minus {other_label}", a, b, more=more, less=less))
    return Study(
        "tabular",
        "Is the L1 envelope of use beyond images?",
        f"{len(x)} test rows of the breast-cancer table, 30 standardised features, tabular_mlp, rho 0.3; a removed "
        "feature gets its mean. The adaptive attack has 10 steps and L2 magnitude 1, a feature's standard deviation.",
        rows,
        tuple(findings),
    )


STUDIES: dict[str, Callable[..., Study]] = {
    "consistency": consistency,
    "regularised": regularised,
    "perturbation": perturbation,
    "tabular": tabular,
}
