"""Explainers behind captum's interface, on the models that captum tests itself with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import drawn
from torch import Tensor, nn

from moreau_ext import (
    GroupSparseMoreauGrad,
    Labels,
    MoreauGrad,
    ProximalGradient,
    SmoothGrad,
    SparseMoreauGrad,
)
from moreau_ext.integrations.captum import CaptumAttribution

pytest.importorskip("captum", reason="adapters for captum")

from captum.attr import NoiseTunnel, Saliency
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from captum.testing.attr.helpers.test_config import config as configurations
from captum.testing.helpers import basic_models as nets

# One step of size rho without noise: the map is the gradient.
ONE_STEP = ProximalGradient(num_samples=1, max_steps=1, step_size=1.0, average_last=1, tol=0.0)
EXPLAINERS = {"moreau": MoreauGrad, "sparse": SparseMoreauGrad, "group": GroupSparseMoreauGrad}


def gradient_of(model: Callable[..., Any]) -> CaptumAttribution:
    return CaptumAttribution(MoreauGrad(model, rho=1.0, sigma=0.0, solver=ONE_STEP, unused_inputs="zero"))


def rows(*shape: int) -> Tensor:
    return drawn(*shape).mul(3).round() / 2 + 0.3


def add(scale: float) -> dict[str, Any]:
    return {"additional_forward_args": (torch.tensor([[0.0, 40.0, 4.0]]).expand(3, 3) * scale, True)}


torch.manual_seed(0)  # some models draw their weights
# Models of captum's own tests with inputs, arguments and, where it can be worked out by hand, the gradient.
CASES: dict[str, tuple[nn.Module, Any, dict[str, Any], Any]] = {
    "one number": (nets.BasicModel(), torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0, 7.0]), {}, [0, 0, 0, 1, 1, 0]),
    "two tensors": (nets.BasicModel2(), (torch.tensor([3.0]), torch.tensor([1.0])), {}, ([1], [-1])),
    "flat": (nets.BasicModel3(), (torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])), {}, ([1, 0], [-1, 0])),
    "one argument": (
        nets.BasicModel4_MultiArgs(), (torch.tensor([[1.5, 2.0, 3.3]]), torch.tensor([[3.0, 3.5, 3.2]])),
        {"additional_forward_args": torch.tensor([[5.0, 2.0, 2.0]])}, None,
    ),
    "list argument": (
        nets.BasicModel5_MultiArgs(), (torch.tensor([[1.5, 2.0, 34.3], [3.4, 1.2, 2.0]]), torch.full((2, 3), 0.5)),
        {"additional_forward_args": ([2, 3], 1)}, None,
    ),
    "sum of tensors": (nets.BasicModel6_MultiTensor(), (rows(4, 3), rows(4, 3)), {}, None),
    "tensor argument": (
        nets.MixedKwargsAndArgsModule(), rows(3, 2), {"target": 1, "additional_forward_args": torch.ones(3, 2)},
        [[0, 1]] * 3,
    ),
    "linear": (nets.BasicLinearModel(), (rows(4, 3), rows(4, 4)), {}, None),
    "list of targets": (nets.BasicLinearModel2(4, 3), rows(3, 4), {"target": [0, 2, 1]}, None),
    "tensor of targets": (
        nets.BasicLinearModel_Multilayer(4, 5, 3), rows(3, 4), {"target": torch.tensor([0, 2, 1])}, None,
    ),
    "one-element target": (nets.BasicModel_MultiLayer(), rows(3, 3), {"target": torch.tensor([0])}, None),
    "scalar target": (nets.BasicModel_MultiLayer(inplace=True), rows(3, 3), {"target": torch.tensor(1)}, None),
    "tuple target": (nets.BasicModel_MultiLayer(), rows(3, 3), {"target": (1, 0, 1), **add(1)}, None),
    "tuples": (
        nets.BasicModel_MultiLayer(), rows(3, 3), {"target": [(0, 1, 1), (1, 0, 0), (1, 1, 1)], **add(0.1)}, None,
    ),
    "four tensors": (nets.BasicModel_MultiLayer_TrueMultiInput(), (rows(3, 3),) * 4, {"target": 1}, None),
    "integer argument": (
        nets.BasicModel_MultiLayer_MultiInput(), (rows(3, 3),) * 3, {"target": 0, "additional_forward_args": (4,)},
        None,
    ),
    "relu": (nets.ReLULinearModel(inplace=True), (rows(3, 3), rows(3, 3)), {"additional_forward_args": 2}, None),
    "tanh": (nets.TanhDeepLiftModel(), (torch.tensor([0.3, 2.0]), torch.tensor([1.5, 1.0])), {}, None),
    "two relus": (nets.ReLUDeepLiftModel(), (torch.tensor([3.0]), torch.tensor([2.0])), {}, ([2], [2])),
    "max pool": (nets.LinearMaxPoolLinearModel(), rows(3, 4), {}, None),
    "pool and relu": (nets.BasicModel_MaxPool_ReLU(), rows(3, 2, 6), {"target": 1}, None),
    "reused": (nets.BasicModelWithReusedModules(), rows(4, 3), {"target": 0}, None),
    "reused linear": (nets.BasicModelWithReusedLinear(), rows(4, 3), {"target": 2}, None),
    "dropout": (nets.SimpleLRPModel(inplace=False).eval(), rows(3, 3), {"target": 0}, None),
    "convolution": (
        nets.BasicModel_ConvNet_One_Conv(), 20 * torch.arange(32.0).view(2, 1, 4, 4), {"target": torch.tensor([1, 2])},
        None,
    ),
    "dilation": (nets.BasicModel_ConvNetWithPaddingDilation(), rows(2, 1, 5, 5), {"target": 0}, None),
    "network": (nets.BasicModel_ConvNet(), rows(3, 1, 10, 10), {"target": 1}, None),
    "network 1d": (nets.BasicModel_ConvNet_MaxPool1d(), rows(3, 1, 10), {"target": 1}, None),
    "network 3d": (nets.BasicModel_ConvNet_MaxPool3d(), rows(2, 1, 10, 10, 10), {"target": 1}, None),
}  # fmt: skip


# The configurations of captum's generated tests that Saliency serves, also those written for other methods; the rest
# explain hidden layers and have no target.
SERVED = [c for c in configurations if "target" in c["attribute_args"] or isinstance(c["model"], nets.ReLULinearModel)]
CASES |= {
    f"captum's {c['name']}": (
        c["model"], c["attribute_args"]["inputs"],
        {k: v for k, v in c["attribute_args"].items() if k in ("target", "additional_forward_args")}, None,
    )
    for c in SERVED
}  # fmt: skip


def in_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def of_row(value: Any, i: int, batch: int) -> Any:
    """The part of a target or a tensor that belongs to one input."""
    follows = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[i : i + 1] if follows and len(value) == batch else value


@pytest.mark.filterwarnings("ignore::moreau_ext._errors.EmptyMapWarning")
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_captums_own_models(name: str) -> None:
    """By one step of size rho without noise, as Saliency gives them: together and one by one."""
    model, inputs, arguments, known = CASES[name]
    inputs = tuple([x.detach() for x in inputs]) if isinstance(inputs, tuple) else inputs.detach()
    saliency = Saliency(model.eval())
    leaves = tuple([x.clone().requires_grad_() for x in in_tuple(inputs)])
    expected = saliency.attribute(leaves if isinstance(inputs, tuple) else leaves[0], abs=False, **arguments)
    if known is not None:
        assert [g.tolist() for g in in_tuple(expected)] == list(in_tuple(known))
    method = gradient_of(model)
    torch.testing.assert_close(method.attribute(inputs, **arguments), expected)
    batch = len(in_tuple(inputs)[0])
    for i in range(batch):
        x = tuple([x[i : i + 1] for x in in_tuple(inputs)])
        extra = tuple(
            [
                v if isinstance(v, list) else of_row(v, i, batch)
                for v in in_tuple(arguments.get("additional_forward_args", ()))
            ]
        )
        one = method.attribute(x, of_row(arguments.get("target"), i, batch), extra)
        torch.testing.assert_close(one, tuple([g[i : i + 1] for g in in_tuple(expected)]))


def scaled(x: Tensor, settings: dict[str, Tensor]) -> Tensor:
    return (x * settings["scale"]).sum(1)


def test_a_dict_is_one_argument() -> None:
    found = gradient_of(scaled).attribute(rows(3, 2), additional_forward_args={"scale": torch.tensor([[1.0, 2.0]])})
    assert found.tolist() == [[1, 2]] * 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()


@pytest.fixture(params=EXPLAINERS)
def method(request: pytest.FixtureRequest) -> CaptumAttribution:
    solver = ProximalGradient(num_samples=8, max_steps=10, tol=0.0)
    return CaptumAttribution(EXPLAINERS[request.param](net(), rho=0.1, noise_level=0.1, solver=solver))


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(method: CaptumAttribution, kind: str) -> None:
    x = drawn(2, 3, 6, 6)
    tunnel = NoiseTunnel(method)
    assert not tunnel.has_convergence_delta()
    assert not tunnel.multiplies_by_inputs
    maps = tunnel.attribute(x, kind, nt_samples=3, nt_samples_batch_size=2, stdevs=0.1, target=torch.tensor([0, 2]))
    assert maps.shape == x.shape
    assert bool(torch.isfinite(maps).all())


def test_sensitivity_without_a_nudge_is_zero(method: CaptumAttribution) -> None:
    """captum repeats each input; with a noise of their own, the copies would differ."""
    x, target = drawn(2, 3, 6, 6), torch.tensor([0, 2])

    def sensitivity(radius: float, **settings: Any) -> Tensor:
        torch.manual_seed(0)
        return sensitivity_max(
            method.attribute, x, perturb_radius=radius, n_perturb_samples=4, target=target, **settings
        )

    # Passes of other numbers of rows round otherwise.
    assert float(sensitivity(0.0).max()) < 1e-6
    assert float(sensitivity(0.0, ids=None).min()) > 1e-3
    assert float(sensitivity(0.05).min()) > 1e-3


def test_infidelity_and_captums_figure(method: CaptumAttribution) -> None:
    x = drawn(2, 3, 6, 6)
    maps = method.attribute(x, 1)

    def nudge(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.01 * torch.ones_like(inputs)
        return noise, inputs - noise

    assert float(infidelity(method.forward_func, nudge, x, maps, target=1).max()) < 0.1
    image = np.moveaxis(maps[0].numpy(), 0, 2)
    figure, _ = viz.visualize_image_attr(image, sign="all", use_pyplot=False)
    assert len(figure.axes) == 1


def test_a_feature_mask_is_the_groups() -> None:
    x, solver = drawn(2, 3, 6, 6), ProximalGradient(num_samples=8, max_steps=10, tol=0.0)
    explainer = GroupSparseMoreauGrad(net(), rho=0.1, eta_ratio=0.5, solver=solver)
    mask = torch.arange(36).view(6, 6) // 12
    expected = replace(explainer, groups=Labels(mask)).attribute(x, 1, ids=0)
    for given in (mask, mask.view(1, 1, 6, 6), mask.expand(2, 3, 6, 6)):
        assert torch.equal(CaptumAttribution(explainer).attribute(x, 1, feature_mask=given), expected)
    tunnel = NoiseTunnel(CaptumAttribution(explainer))
    found = tunnel.attribute(x, nt_samples=2, stdevs=0.1, target=1, feature_mask=mask.view(1, 1, 6, 6))
    assert found.shape == x.shape


def test_fixed_features_are_those_of_the_explainer() -> None:
    x, solver = drawn(2, 3, 6, 6), ProximalGradient(num_samples=8, max_steps=10, tol=0.0)
    explainer, background = SparseMoreauGrad(net(), rho=0.1, solver=solver), torch.arange(36).view(6, 6) < 12
    expected = explainer.attribute(x, 1, ids=0, fixed=background)
    assert torch.equal(CaptumAttribution(explainer).attribute(x, 1, fixed=background), expected)
    tunnel = NoiseTunnel(CaptumAttribution(explainer))
    assert not tunnel.attribute(x, nt_samples=2, stdevs=0.1, target=1, fixed=background)[..., background].any()


def test_errors_name_the_cure() -> None:
    explainer = GroupSparseMoreauGrad(nets.BasicLinearModel().eval())
    x = (rows(2, 3), rows(2, 4))
    with pytest.raises(
        TypeError, match=r"explainer: expected an explainer such as MoreauGrad\(model\), got Sequential"
    ):
        CaptumAttribution(net())  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(NotImplementedError, match=r"Solution.relative_residual"):
        CaptumAttribution(explainer).compute_convergence_delta(x, 0, 1)
    with pytest.raises(NotImplementedError, match=r"attribute_future: .* use attribute"):
        CaptumAttribution(explainer).attribute_future(x)
    with pytest.raises(TypeError, match="SmoothGrad has no groups; use GroupSparseMoreauGrad"):
        CaptumAttribution(SmoothGrad(net())).attribute(drawn(1, 3, 6, 6), 0, feature_mask=torch.ones(6, 6).long())
    with pytest.raises(ValueError, match="expected one per input tensor, 2, got 1"):
        CaptumAttribution(explainer).attribute(x, feature_mask=torch.arange(3))
    with pytest.raises(ValueError, match="give every tensor numbers of its own"):
        CaptumAttribution(explainer).attribute(x, feature_mask=(torch.arange(3), torch.arange(4)))
