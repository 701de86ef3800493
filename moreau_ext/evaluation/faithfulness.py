"""Faithfulness of maps to their model: deletion and insertion, randomised parameters, sensitivity to the input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.noise import Noise, noise_keys
from ..plots import gaussian_blur

__all__ = ["area", "blurred", "max_sensitivity", "perturbation_curve", "randomised", "target_probability"]

# Mixed with the caller's seed, so that the draws are independent of the noise of explainers.
_TIES, _NUDGES = 0x5EED_71E5, 0x5EED_9D6E
_MAX_ROWS = 4096


def target_probability(model: Callable[..., Tensor], inputs: Tensor, target: Tensor) -> Tensor:
    """softmax(logits)[target] of every input, float64 [B].

    Args:
        model: [B, *features] -> [B, classes], in eval mode.
        inputs: [B, *features].
        target: int64 [B].
    """
    parts = []
    with torch.no_grad():
        for rows, classes in zip(torch.split(inputs, _MAX_ROWS), torch.split(target, _MAX_ROWS), strict=True):
            probability = model(rows).double().softmax(1)
            parts.append(probability.gather(1, classes[:, None].to(probability.device))[:, 0])
    return torch.cat(parts) if parts else inputs.new_zeros(0, dtype=torch.float64)


def blurred(inputs: Tensor, share: float = 0.1) -> Tensor:
    """Images blurred by a Gaussian: a baseline without detail that keeps colours and brightness.

    Args:
        inputs: images [B, channels, H, W].
        share: standard deviation of the Gaussian, as a share of the shorter edge.

    Returns:
        Shaped as ``inputs``. Beyond the border an image is continued by reflection.

    Raises:
        ValueError: inputs that are no images, or a share outside (0, 0.3].

    Source: the blurred canvas of insertion in Petsiuk, Das, Saenko 2018, "RISE", BMVC, arXiv 1806.07421.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import blurred
        >>> x = torch.rand(1, 3, 32, 32)
        >>> bool(blurred(x).std() < 0.5 * x.std())
        True
    """
    if inputs.dim() != 4:
        raise ValueError(f"inputs: expected images [B, channels, H, W], got shape {tuple(inputs.shape)}")
    if not 0 < share <= 0.3:
        raise ValueError(f"share: expected a number in (0, 0.3], got {share!r}")
    return gaussian_blur(inputs, share * min(inputs.shape[-2:]))


def drawn(seed: int, ids: Tensor, like: Tensor, count: int = 1, antithetic: bool = False) -> Tensor:
    """Standard normals [B, count, *features] of the noise bank; those of an input depend only on its id and the seed.

    Args:
        seed: mixed with the ids.
        ids: int64 [B].
        like: [B, *features], for shape, device and dtype (float32 or float64).
        count: draws per input.
        antithetic: draw 2k + 1 is minus draw 2k.
    """
    zeros = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    step = torch.zeros(1, dtype=torch.int64, device=like.device)
    noise = Noise(noise_keys(seed, ids.to(like.device)), step, 1.0, count, antithetic)
    return ops.perturb(zeros, None, noise).reshape(like.shape[0], count, *like.shape[1:])


def perturbation_curve(
    model: Callable[..., Tensor],
    inputs: Tensor,
    maps: Tensor,
    target: Tensor,
    kind: Literal["deletion", "insertion"],
    *,
    baseline: float | Tensor = 0.0,
    steps: int = 16,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The target's probability as features leave the input, or enter the baseline, those with the largest |map| first.

    After step s of S, the ⌈s·n/S⌉ features with the largest |map| (a pixel's channels are summed, and move together)
    have the value of the baseline (deletion), or alone have that of the input (insertion). Deletion of relevant
    features makes the curve fall early; insertion makes it rise early. Both evaluate inputs outside the training
    distribution, and both depend on the baseline.

    Args:
        model: [B, *features] -> [B, classes], in eval mode.
        inputs: [B, *features]; with four axes, axis 1 holds the channels of a position.
        maps: shaped as ``inputs``.
        target: int64 [B].
        kind: "deletion" or "insertion".
        baseline: value of a removed feature: a number, or a tensor that broadcasts to the inputs.
        steps: S.
        ids: int64 [B]; features of equal |map|, such as the zeros of a sparse map, have a random order per id.
        seed: of that order.

    Returns:
        float64 [B, S + 1]: the probability after 0, 1, ..., S steps.

    Raises:
        ValueError: shapes that do not match, another ``kind``, or no steps.

    Source: Petsiuk, Das, Saenko 2018, "RISE", BMVC, arXiv 1806.07421, section 4.3.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import perturbation_curve
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> x, a = torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, -0.5]])
        >>> perturbation_curve(model, x, a, torch.tensor([0]), "deletion", steps=2).round(decimals=2).tolist()
        [[0.98, 0.5, 0.5]]
    """
    if maps.shape != inputs.shape or inputs.dim() < 2:
        raise ValueError(f"maps: expected the shape of the inputs, {tuple(inputs.shape)}, got {tuple(maps.shape)}")
    if kind not in ("deletion", "insertion"):
        raise ValueError(f"kind: expected 'deletion' or 'insertion', got {kind!r}")
    if steps < 1:
        raise ValueError(f"steps: expected a positive integer, got {steps!r}")
    batch = inputs.shape[0]
    size = maps.detach().double().abs()
    size = (size.sum(1, keepdim=True) if size.dim() == 4 else size).reshape(batch, -1)
    positions = size.shape[1]
    names = torch.arange(batch) if ids is None else ids
    ties = drawn(seed ^ _TIES, names, size)[:, 0]
    # By ties first, then by size: the second sort is stable.
    order = ties.argsort(dim=1)
    order = order.gather(1, size.gather(1, order).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(positions, device=order.device).expand_as(order))
    view = (batch, 1, *inputs.shape[2:]) if inputs.dim() == 4 else inputs.shape
    ranks = rank.reshape(view)
    empty = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
    curve = []
    for s in range(steps + 1):
        first = ranks < -(-s * positions // steps)
        rows = torch.where(first, empty, inputs) if kind == "deletion" else torch.where(first, inputs, empty)
        curve.append(target_probability(model, rows, target))
    return torch.stack(curve, dim=1)


def area(curve: Tensor) -> Tensor:
    """The area under curves over [0, 1] by the trapezoid rule: [B, S + 1] -> [B].

    A smaller area is better for deletion, a larger one for insertion.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import area
        >>> area(torch.tensor([[1.0, 0.5, 0.0]])).tolist()
        [0.5]
    """
    return torch.trapezoid(curve, dx=1.0, dim=1) / (curve.shape[1] - 1)


def max_sensitivity(
    explain: Callable[[Tensor], Tensor],
    inputs: Tensor,
    maps: Tensor,
    *,
    radius: float = 0.02,
    draws: int = 10,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The largest relative change of a map over random u, max_u ‖A(x + u) − A(x)‖₂ / ‖A(x)‖₂ with ‖u‖_∞ ≤ radius.

    Args:
        explain: inputs -> maps, of the target that ``maps`` explains.
        inputs: [B, *features].
        maps: A(x).
        radius: of the cube in which u is uniform, in the inputs' unit.
        draws: number of u.
        ids: int64 [B]; the perturbations of an input depend only on its id and the seed.
        seed: of the perturbations.

    Returns:
        float64 [B]; NaN where A(x) is zero everywhere.

    Raises:
        ValueError: a negative radius, no draws.

    Source: Yeh et al. 2019, "On the (In)fidelity and Sensitivity of Explanations", NeurIPS, arXiv 1901.09392; relative,
    with the cube and the defaults of captum's ``sensitivity_max``.

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import max_sensitivity
        >>> x = torch.ones(1, 1)
        >>> float(max_sensitivity(lambda x: 3 * x, x, 3 * x, radius=0.5)) <= 0.5
        True
    """
    if radius < 0 or draws < 1:
        raise ValueError(f"radius, draws: expected radius >= 0 and draws >= 1, got {radius!r} and {draws!r}")
    batch = inputs.shape[0]
    names = torch.arange(batch) if ids is None else ids
    # The distribution function of a normal is uniform.
    nudges = radius * torch.erf(drawn(seed ^ _NUDGES, names, inputs, draws) / 2**0.5)
    clean = maps.reshape(batch, -1).double()
    worst = clean.new_zeros(batch)
    for u in nudges.unbind(1):
        moved = explain(inputs + u).reshape(batch, -1).double()
        worst = torch.maximum(worst, (moved - clean).norm(dim=1))
    size = clean.norm(dim=1)
    return torch.where(size > 0, worst / size, torch.nan)


def randomised(model: nn.Module, layers: int | None = None, seed: int = 0) -> nn.Module:
    """A copy of a model with shuffled parameters in its last layers.

    A map that hardly changes does not depend on the learnt parameters. Shuffling keeps the distribution of every
    tensor, so the logits, and with them ρ and η, roughly keep their scale.

    Args:
        model: the last modules in the order of ``modules()`` are those of the output.
        layers: number of modules with parameters, from the output down; None for all.
        seed: of the shuffles.

    Returns:
        The copy, in the mode of the model.

    Raises:
        ValueError: a model without parameters.

    Source: Adebayo et al. 2018, "Sanity Checks for Saliency Maps", NeurIPS, arXiv 1810.03292 (cascading randomisation).

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation import randomised
        >>> model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9))
        >>> other = randomised(model, layers=1)
        >>> torch.equal(model[0].weight, other[0].weight), torch.equal(model[1].weight, other[1].weight)
        (True, False)
    """
    other = copy.deepcopy(model)
    holders = [m for m in other.modules() if any(True for _ in m.parameters(recurse=False))]
    if not holders:
        raise ValueError("model: has no parameters to shuffle")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in reversed(holders if layers is None else holders[-layers:]):
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.reshape(-1)[order].reshape(parameter.shape))
    return other
