"""The metrics that compare maps, and those that question the model, against independent formulas and other packages."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from helpers import drawn
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from moreau_ext import Gradient, zoo
from moreau_ext.evaluation import (
    area,
    blurred,
    cosine,
    faithfulness,
    max_sensitivity,
    metrics,
    normalised_distance,
    perturbation_curve,
    randomised,
    ssim,
    support_fraction,
    support_jaccard,
    target_probability,
    topk_intersection,
    topk_mask,
)

SIZES = [1, 2, 33, 111, 1023]


# --- pairs of maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 7, 0.4, 1.0])
def test_topk_intersection_counts_shared_features(n: int, k: float) -> None:
    a, b = drawn(3, n), drawn(3, n, seed=1)
    a[:, n // 2 + 1 :] = 0
    expected = []
    for x, y in zip(a.abs().numpy(), b.abs().numpy(), strict=True):
        nonzero = int((x > 0).sum())
        count = min(k, nonzero) if isinstance(k, int) else math.ceil(k * nonzero - 1e-9)
        top, other = set(np.argsort(-x, kind="stable")[:count]), set(np.argsort(-y, kind="stable")[:count])
        expected.append(len(top & other) / count)
    torch.testing.assert_close(topk_intersection(a, b, k), torch.tensor(expected, dtype=torch.float64))


def test_topk_of_zeros_and_ties() -> None:
    zero, one = torch.zeros(1, 4), torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    assert topk_intersection(zero, zero).item() == 1
    assert topk_intersection(zero, one).item() == 0
    assert topk_intersection(one, zero).item() == 0
    assert topk_mask(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]
    assert topk_mask(one, 3).sum() == 1
    # 0.4 of 5 is 2, whatever rounding makes of the product.
    assert topk_mask(torch.ones(1, 5), 0.4).sum() == 2


@pytest.mark.parametrize("k", [0, -1, 1.5, 0.0, True])
def test_topk_refuses_other_k(k: object) -> None:
    with pytest.raises(ValueError, match="k: expected a positive integer, or a fraction"):
        topk_intersection(torch.ones(1, 3), torch.ones(1, 3), k)


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (2, 3, 32, 32), (2, 11, 9)])
def test_ssim_is_scikit_images(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape), drawn(*shape, seed=1)
    for i, got in enumerate(ssim(a, b).tolist()):
        x, y = (t[i].abs().double() for t in (a, b))
        x, y = ((t.sum(0) if t.dim() == 3 else t).numpy() for t in (x, y))
        assert got == pytest.approx(structural_similarity(x / x.max(), y / y.max(), data_range=1.0), abs=1e-6)


def test_ssim_of_the_same_of_nothing_and_of_small_pictures() -> None:
    a = drawn(2, 1, 5, 5)
    torch.testing.assert_close(ssim(a, -3 * a), torch.ones(2, dtype=torch.float64))
    assert ssim(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)).item() == 1
    assert ssim(torch.full((1, 4, 4), math.nan), a[:1, 0, :4, :4]).isnan().all()
    with pytest.raises(ValueError, match="expected pictures"):
        ssim(torch.ones(3, 9), torch.ones(3, 9))


@pytest.mark.parametrize("n", SIZES)
def test_distance_and_cosine_are_of_unit_vectors(n: int) -> None:
    a, b = drawn(4, n).double(), drawn(4, n, seed=1).double()
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (a, b))
    torch.testing.assert_close(normalised_distance(a, b), (x - y).norm(dim=1))
    torch.testing.assert_close(cosine(a, b), nn.functional.cosine_similarity(a, b))
    # One says the other: ‖x − y‖² = 2 − 2 cos.
    torch.testing.assert_close(normalised_distance(a, b).square(), 2 - 2 * cosine(a, b), atol=1e-9, rtol=0)
    for scale in (1e300, 1e-300):
        torch.testing.assert_close(cosine(scale * a, b), cosine(a, b))


def test_empty_maps_have_no_direction() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert normalised_distance(zero, zero).item() == 0
    assert normalised_distance(zero, one).item() == 1
    assert cosine(zero, one).item() == 0
    assert support_fraction(torch.tensor([[0.0, -1.0, 0.0, 1e-30]])).item() == 0.5


@pytest.mark.parametrize("function", [topk_intersection, normalised_distance, cosine, ssim])
def test_pairs_must_match(function) -> None:
    with pytest.raises(ValueError, match="expected the shape of a"):
        function(torch.ones(2, 3, 3), torch.ones(2, 3, 4))


# --- the model in question -----------------------------------------------------------------------------------------


def test_curves_of_a_linear_model_are_those_of_its_sums() -> None:
    weight = torch.tensor([3.0, -2.0, 1.0, 0.5])

    def model(x: Tensor) -> Tensor:
        score = x @ weight
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    x, target = torch.ones(1, 4), torch.tensor([0])
    # By |map|: 3, then -2, then 1, then 0.5.
    left = torch.tensor([[2.5, -0.5, 1.5, 0.5, 0.0]], dtype=torch.float64).sigmoid()
    entered = torch.tensor([[0.0, 3.0, 1.0, 2.0, 2.5]], dtype=torch.float64).sigmoid()
    maps = weight.expand(1, -1)
    deletion = perturbation_curve(model, x, maps, target, "deletion", steps=4)
    insertion = perturbation_curve(model, x, maps, target, "insertion", steps=4)
    torch.testing.assert_close(deletion, left)
    torch.testing.assert_close(insertion, entered)
    assert area(deletion).item() == pytest.approx(np.trapezoid(left[0].numpy(), dx=0.25))
    other = perturbation_curve(model, x, maps, target, "deletion", steps=4, baseline=1.0)
    torch.testing.assert_close(other, left[:, :1].expand(-1, 5))


def test_channels_of_a_pixel_go_together_and_ties_are_drawn_by_id() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.flatten(1)[:, :2]

    x, maps = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    maps[:, 1, 0, 1] = -1
    settings = {"steps": 4, "ids": torch.tensor([7, 7])}
    perturbation_curve(model, x, maps, torch.tensor([0, 0]), "deletion", **settings)
    assert (seen[1] == 0).sum() == 6
    assert (seen[1][:, :, 0, 1] == 0).all()
    assert all(torch.equal(rows[0], rows[1]) for rows in seen)


def test_maps_that_know_beat_chance_on_a_trained_net() -> None:
    model, data = zoo.trained("digits_cnn"), zoo.digits("test")
    x = data.inputs[:100]
    target = model(x).argmax(1)
    gradient = Gradient(model).attribute(x, target) * x
    chance = drawn(*x.shape)
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        informed, blind = (area(perturbation_curve(model, x, m, target, kind)).mean() for m in (gradient, chance))
        assert sign * (informed - blind) > 0.1
    assert target_probability(model, x, target).min() > 0.1


def test_the_jaccard_index_of_supports() -> None:
    one = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4, [1.0] * 4])
    other = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0] * 4, [2.0] * 4, [0.0, 1.0, 1.0, 1.0]])
    found = support_jaccard(one, other)
    torch.testing.assert_close(
        found, torch.tensor([1 / 3, 1.0, float("nan"), 0.75], dtype=torch.float64), equal_nan=True
    )


def test_a_blurred_baseline_has_no_detail() -> None:
    x = zoo.photographs(64).inputs
    found = blurred(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=0.1)
    # What is left of the differences between neighbours.
    assert float(found.diff(dim=3).abs().mean() / x.diff(dim=3).abs().mean()) < 0.25
    with pytest.raises(ValueError, match="share"):
        blurred(x, 0.5)
    with pytest.raises(ValueError, match="images"):
        blurred(x[0])


def test_max_sensitivity_is_captums_with_the_same_nudges() -> None:
    model = zoo.trained("digits_cnn_silu")
    x = zoo.digits("test").inputs[:5].double()
    model = model.double()
    target = model(x).argmax(1)
    seen: list[Tensor] = []

    def explain(moved: Tensor) -> Tensor:
        seen.append(moved)
        return Gradient(model).attribute(moved, target)

    got = max_sensitivity(explain, x, Gradient(model).attribute(x, target), radius=0.1, draws=4)
    nudged = torch.stack(seen, dim=1)
    moves = nudged - x.unsqueeze(1)
    assert moves.abs().max() <= 0.1
    # Uniform over the cube.
    assert stats.kstest((moves.flatten() / 0.1).numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    theirs = sensitivity_max(
        lambda inputs, **more: Gradient(model).attribute(inputs, more["target"].flatten()),
        x,
        perturb_func=lambda inputs: nudged.flatten(0, 1),
        n_perturb_samples=4,
        target=target[:, None],
    )
    torch.testing.assert_close(got, theirs.double(), atol=1e-6, rtol=1e-6)


def test_max_sensitivity_of_an_empty_map_is_not_a_number() -> None:
    x = torch.ones(2, 3)
    assert max_sensitivity(lambda x: x, x, torch.zeros(2, 3)).isnan().all()
    with pytest.raises(ValueError, match="radius"):
        max_sensitivity(lambda x: x, x, x, radius=-1)


def test_randomised_layers_are_shuffled_from_the_output_down() -> None:
    model = zoo.trained("digits_cnn")
    before = [p.clone() for p in model.parameters()]
    for layers in (1, 2, None):
        other = randomised(model, layers)
        pairs = list(zip(model.parameters(), other.parameters(), strict=True))
        same = [torch.equal(p, q) for p, q in pairs]
        assert same == [i < 6 - 2 * (3 if layers is None else layers) for i in range(6)]
        for p, q in pairs:
            assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)
        assert zoo.accuracy(other, zoo.digits("test")) < 0.5
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert torch.equal(next(randomised(model, seed=3).parameters()), next(randomised(model, seed=3).parameters()))
    with pytest.raises(ValueError, match="no parameters"):
        randomised(nn.ReLU())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "removal"}, "kind: expected 'deletion' or 'insertion'"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"maps": torch.ones(2, 4)}, "maps: expected the shape of the inputs"),
    ],
)
def test_curves_refuse(arguments: dict, words: str) -> None:
    settings = {"maps": torch.ones(2, 3), "kind": "deletion", **arguments}
    maps, kind = settings.pop("maps"), settings.pop("kind")
    with pytest.raises(ValueError, match=words):
        perturbation_curve(nn.Linear(3, 2), torch.ones(2, 3), maps, torch.zeros(2, dtype=torch.int64), kind, **settings)


def test_examples() -> None:
    for module in (metrics, faithfulness):
        assert doctest.testmod(module).failed == 0
