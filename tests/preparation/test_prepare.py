"""The prepared copy: equal outputs, an untouched original, an honest report. No speed is asserted."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moreau_ext import ProximalGradient, SparseMoreauGrad, zoo
from moreau_ext.model import memory
from moreau_ext.preparation import passes, probe
from moreau_ext.preparation import prepare as module
from moreau_ext.preparation.prepare import prepare
from moreau_ext.preparation.report import Lever, Prepared


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timings decide nothing here that a test looks at."""
    monkeypatch.setattr(probe, "_ROUNDS", 1)
    monkeypatch.setattr(probe, "_PASS_SECONDS", 1e-4)
    monkeypatch.setattr(probe, "_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(probe, "_LONGEST_PASS_SECONDS", 0.03)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms with statistics and weights as after training, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.normal_(std=0.3, generator=generator)
                    part.running_var.uniform_(0.5, 2.0, generator=generator)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5, generator=generator)
                    part.bias.normal_(std=0.2, generator=generator)
    return model.eval()


def by_name(prepared: Prepared) -> dict[str, Lever]:
    return {lever.name: lever for lever in prepared.report}


def norms(model: Any) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def gradient(model: Callable[..., Any], x: Tensor) -> Tensor:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    return found


def assert_equal_maps(model: Callable[..., Any], prepared: Prepared, x: Tensor) -> None:
    """Outputs, and gradients row by row: one row in which a ReLU switches would not be a fault, all would."""
    exact = x.dtype == torch.float64
    with torch.no_grad():
        output, expected = prepared.model(x), model(x)
    scale = float(expected.abs().max())
    torch.testing.assert_close(output, expected, rtol=0, atol=(1e-12 if exact else 1e-5) * scale)
    one, other = gradient(model, x).flatten(1), gradient(prepared.model, x).flatten(1)
    relative = (other - one).norm(dim=1) / one.norm(dim=1)
    assert float(relative.median()) < (1e-11 if exact else 1e-4)


class Attributes(nn.Module):
    """Convolutions and BatchNorms as attributes, as in torchvision: only tracing sees which belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm_two = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6, affine=False)
        self.head, self.norm_head = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_one(self.one(x)).relu()
        x = self.norm_two(self.two(x)).relu() + x
        out: Tensor = self.norm_head(self.head(x.mean((2, 3))))
        return out


class OutputUsedTwice(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        x = self.norm_one(first).relu() + 0.1 * first
        out: Tensor = self.norm_head(self.head(self.norm_two(self.two(x)).relu().mean((2, 3))))
        return out


class Untraceable(nn.Module):
    """Looks at values: fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            x = x / 2
        out: Tensor = self.norm(self.conv(self.body(x))).mean((2, 3))
        return out


class SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.norm(self.conv(x)).relu())).flatten(1)


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).flatten(1) * self.conv.weight.square().sum()


IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


# --- equal results -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resnet_is_folded_and_equal(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = shaken(zoo.resnet20()).to(dtype)
    x = torch.rand(6, 3, 32, 32, dtype=dtype)
    prepared = prepare(model, x[:2], channels_last=True, max_batch=4)
    levers = by_name(prepared)
    assert norms(prepared.model) == 0
    assert levers["fold_batchnorm"].reason == "21 of 21 folded"
    assert all(levers[name].applied for name in ("copy", "fold_batchnorm", "channels_last", "freeze", "max_batch"))
    # The answer holds whatever layout the inputs come in.
    assert_equal_maps(model, prepared, x.contiguous(memory_format=layout))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (zoo.tabular_mlp(), torch.randn(3, 30)),
        (zoo.tiny_vit(depth=1, dim=16), torch.rand(2, 3, 32, 32)),
        (zoo.digits_cnn("gelu"), torch.rand(2, 1, 8, 8)),
        (shaken(Attributes()), IMAGES),
        (shaken(OutputUsedTwice()), IMAGES),
        (shaken(Untraceable()), IMAGES),
        (shaken(SharedConvolution()), IMAGES),
        (shaken(ReadsItsWeight()), IMAGES),
        (shaken(nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten())), torch.rand(2, 2, 9)),
        (shaken(nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Flatten())), torch.rand(2, 2, 4, 4, 4)),
        (shaken(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())), IMAGES),
    ],
    ids=lambda v: type(v).__name__,
)
def test_results_are_equal(model: nn.Module, x: Tensor) -> None:
    assert_equal_maps(model, prepare(model, x, max_batch=8), torch.rand_like(x))


def test_the_map_is_the_same() -> None:
    model, x = shaken(zoo.resnet20()), torch.rand(1, 3, 32, 32)
    ready = prepare(model, x, max_batch=16, channels_last=True)
    settings = {"seed": 3, "eta_ratio": 0.3, "solver": ProximalGradient(max_steps=3, num_samples=4)}
    one = SparseMoreauGrad(model, **settings).attribute(x, target=2)
    explainer = SparseMoreauGrad(ready, **settings)
    other = explainer.attribute(x, target=2, return_solution=True)
    torch.testing.assert_close(other.attribution, one, rtol=0, atol=1e-3 * float(one.abs().max()))
    # What was measured is used, unless the caller says otherwise; 2-D inputs have no such layout.
    assert explainer.max_batch == ready.max_batch
    assert SparseMoreauGrad(ready, max_batch=3).max_batch == 3
    assert SparseMoreauGrad(model).max_batch == "auto"
    if ready.memory_format == torch.channels_last:
        assert other.displacement.is_contiguous(memory_format=torch.channels_last)
    table = prepare(zoo.tabular_mlp(), torch.rand(3, 30))
    assert SparseMoreauGrad(table, **settings).attribute(torch.rand(3, 30)).shape == (3, 30)
    assert ready.used[0] == "fold_batchnorm"
    assert ready.used[-1] == f"{ready.max_batch} rows per pass"


def test_several_inputs_and_arguments_that_follow_the_rows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, a: Tensor, b: Tensor, scale: Tensor, power: float) -> Tensor:
            return (self.norm(self.layer(a)) + b) ** power * scale[:, None]

    model = shaken(Two())
    inputs = torch.rand(3, 4), torch.rand(3, 3)
    arguments = torch.tensor([1.0, 2.0, 3.0]), 2.0
    prepared = prepare(model, inputs, additional_forward_args=arguments)
    assert by_name(prepared)["fold_batchnorm"].applied
    torch.testing.assert_close(prepared.model(*inputs, *arguments), model(*inputs, *arguments))


# --- the user's own module -----------------------------------------------------------------------------------------


def test_the_users_model_is_untouched() -> None:
    model = shaken(zoo.resnet20()).train()
    first = next(model.parameters())
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    calls: list[int] = []
    part = model.get_submodule("3.activation")
    part.register_forward_hook(lambda *_: calls.append(1))
    model.get_submodule("4").eval()
    state = copy.deepcopy(model.state_dict())
    before = {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.stride(), p._version) for name, p in model.named_parameters()}

    prepared = prepare(model, torch.rand(2, 3, 32, 32), max_batch=4)

    after = {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    assert after == before
    assert {n: (id(p), p.requires_grad, p.stride(), p._version) for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert isinstance(prepared.model, nn.Module)
    assert not any(m.training for m in prepared.model.modules())
    assert not any(p.requires_grad for p in prepared.model.parameters())
    assert not {id(p) for p in prepared.model.parameters()} & {id(p) for p in model.parameters()}


def test_the_copy_never_ran() -> None:
    """A forward that counts, or keeps what it computed, starts in the copy where it stands in the original."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.kept = self.norm(self.layer(x))  # not a leaf: cannot be deep-copied
            return self.kept

    model = shaken(Counts())
    prepared = prepare(model, torch.rand(2, 4))
    assert all(by_name(prepared)[name].applied for name in ("fold_batchnorm", "freeze"))
    assert int(model.calls) == int(prepared.model.calls) == 0
    assert prepared.model.kept is None


def test_generators_threads_and_gradient_mode_stay() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x)) * (1 + torch.rand(()))

    model, x = shaken(Draws()), torch.rand(2, 4)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    prepared = prepare(model, x)
    # Every checked pass draws the same, so that drawing is no difference.
    assert by_name(prepared)["fold_batchnorm"].applied
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        model, x = shaken(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))), torch.rand(2, 4)
        prepared = prepare(model, x)
    assert by_name(prepared)["fold_batchnorm"].applied
    assert torch.isfinite(gradient(prepared.model, torch.rand(2, 4))).all()


# --- what is folded ------------------------------------------------------------------------------------------------


def folded(model: nn.Module, x: Tensor) -> tuple[Lever, int]:
    prepared = prepare(model, x, channels_last=False, probe=False)
    return by_name(prepared)["fold_batchnorm"], norms(prepared.model)


def test_attributes_are_folded_by_tracing() -> None:
    lever, left = folded(shaken(Attributes()), IMAGES)
    assert (lever.applied, lever.reason, left) == (True, "3 of 3 folded", 0)


def test_an_output_used_elsewhere_is_not_folded() -> None:
    lever, left = folded(shaken(OutputUsedTwice()), IMAGES)
    assert lever.applied
    assert left == 1
    assert lever.reason == "2 of 3 folded; left alone norm_one: the output of one is used elsewhere"


def test_an_untraceable_model_folds_neighbours() -> None:
    lever, left = folded(shaken(Untraceable()), IMAGES)
    assert (lever.applied, left) == (True, 1)
    assert lever.reason.startswith("1 of 2 folded; left alone norm:")
    assert "cannot be traced" in lever.reason


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.also = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self.conv(x)).flatten(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_linear_is_folded(bias: bool, affine: bool) -> None:
    model, x = shaken(nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4, affine=affine))), torch.rand(3, 5)
    lever, left = folded(model, x)
    assert (lever.applied, left) == (True, 0)
    assert_equal_maps(model, prepare(model, x, max_batch=2), x)


class Recurses(Untraceable):
    """The pair in a Sequential runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            x = x / 2
        return self.body(self.body(x)).flatten(1)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    model[0].register_forward_hook(lambda _m, _i, output: output * 2)
    return model


def same_layer_twice() -> nn.Module:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    return nn.Sequential(conv, norm, nn.ReLU(), conv, nn.BatchNorm2d(3), nn.Flatten())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (SharedConvolution, "not used exactly once"),
        (same_layer_twice, "not used exactly once"),
        (Recurses, "not used exactly once"),
        (TwoNames, "not used exactly once"),
        (ReadsItsWeight, "the model reads its weights"),
        (hooked, "hooks"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Flatten()), "no Conv or Linear"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()),
            "uses the batch's own statistics",
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), "no Conv or Linear"),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(144, 3), nn.BatchNorm1d(3), nn.Flatten()), "a Linear with"),
    ],
)
def test_what_is_left_alone(make: Callable[[], nn.Module], why: str) -> None:
    model = shaken(make())
    before = norms(model)
    lever, left = folded(model, IMAGES)
    assert not lever.applied
    assert why in lever.reason
    assert left == before
    # Nothing was tried, so nothing was measured.
    assert lever.output_difference is lever.time_ratio is None


# --- layers of subclasses ---------------------------------------------------------------------------------------------


class SamePadding(nn.Conv2d):
    """Pads by itself, as timm's and EfficientNet's convolutions do: linear in its weights, so it can be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Clamped(nn.Conv2d):
    """No input of the example comes near the limit."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-8, 8)


class Standardised(nn.Conv2d):
    """Normalises its weights, so that scaling them changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / 2, self.bias)


class FailsFarOut(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().min()) < -5:
            raise ValueError("pixels below -5")
        return super().forward(x)


class DiffersInLargePasses(nn.Conv2d):
    """Right on the few rows that a layer is tried on, wrong on more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) < 3 else Standardised.forward(self, x)  # type: ignore[arg-type]  # borrowed


class TwoTensors(nn.Conv2d):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class CallsWithTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = TwoTensors(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x, x.mean())).flatten(1)


def with_norm(layer: nn.Conv2d) -> nn.Module:
    """Behind it a plain pair, so that something is folded in any case."""
    plain = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    return shaken(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), *plain, nn.Flatten()))


def parametrized() -> nn.Conv2d:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))


def test_a_subclass_that_pads_is_folded() -> None:
    model = with_norm(SamePadding(3, 4, 2, stride=2, bias=False))
    lever, left = folded(model, IMAGES)
    assert (lever.applied, lever.reason, left) == (True, "2 of 2 folded", 0)
    assert_equal_maps(model, prepare(model, IMAGES, max_batch=4), IMAGES)


def test_a_subclass_of_linear_is_folded_where_it_is_linear() -> None:
    model, x = shaken(nn.Sequential(Halved(5, 4, bias=False), nn.BatchNorm1d(4))), torch.rand(3, 5)
    assert folded(model, x)[0].reason == "1 of 1 folded"
    assert_equal_maps(model, prepare(model, x, max_batch=2), x)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Rectified(3, 4, 3), "folding would change its output"),
        (Clamped(3, 4, 3), "folding would change its output"),
        (Standardised(3, 4, 3), "folding would change its output"),
        (FailsFarOut(3, 4, 3), "failed: ValueError"),
        (parametrized(), "no plain parameters"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_subclass_that_does_more_is_not_folded(layer: nn.Conv2d, why: str) -> None:
    model = with_norm(layer)
    lever, left = folded(model, IMAGES)
    assert (lever.applied, left) == (True, 1)
    assert lever.reason.startswith("1 of 2 folded; left alone 1: a class of its own")
    assert why in lever.reason
    assert_equal_maps(model, prepare(model, IMAGES, max_batch=4), IMAGES)


def test_a_subclass_with_two_inputs_is_not_folded() -> None:
    lever, left = folded(shaken(CallsWithTwo()), IMAGES)
    assert (lever.applied, left) == (False, 1)
    assert "takes more than one tensor" in lever.reason


def test_where_the_whole_differs_plain_layers_are_folded_all_the_same() -> None:
    model = with_norm(DiffersInLargePasses(3, 4, 3))
    lever, left = folded(model, IMAGES)
    assert (lever.applied, left) == (True, 1)
    assert lever.reason == "1 of 2 folded; left alone 1: a class of its own"
    assert_equal_maps(model, prepare(model, IMAGES, max_batch=4), IMAGES)


@pytest.mark.slow
def test_a_net_with_imagenet_weights_is_folded_whole() -> None:
    net, data = zoo.efficientnet_lite0(), zoo.photographs(96)
    prepared = prepare(net, data.inputs[:2], channels_last=False, probe=False)
    lever = by_name(prepared)["fold_batchnorm"]
    assert (lever.reason, norms(prepared.model), norms(net)) == ("49 of 49 folded", 0, 49)
    with torch.no_grad():
        expected = net(data.inputs)
        torch.testing.assert_close(
            prepared.model(data.inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_no_batchnorm() -> None:
    lever, _ = folded(nn.Linear(3, 2), torch.rand(2, 3))
    assert (lever.applied, lever.reason) == (False, "no BatchNorm")


# --- refusal -------------------------------------------------------------------------------------------------------


class CountsItsNorms(nn.Module):
    """Its output depends on what a lever changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (1 + sum(isinstance(m, nn.BatchNorm2d) for m in self.modules()))


class LooksAtLayout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.as_strided(x, (x.shape[0], 50), (x.stride(0), 1))


class Views(LooksAtLayout):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(x.shape[0], -1)


class WantsItsParametersGradient(LooksAtLayout):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1) * (2.0 if self.conv.weight.requires_grad else 3.0)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (CountsItsNorms(), "fold_batchnorm", "outputs differ"),
        (LooksAtLayout(), "channels_last", "outputs differ"),
        (Views(), "channels_last", "failed: RuntimeError: view size"),
        (WantsItsParametersGradient(), "freeze", "outputs differ"),
    ],
    ids=["fold", "strides", "view", "freeze"],
)
def test_a_lever_that_changes_the_outputs_is_left_out(model: nn.Module, name: str, why: str) -> None:
    model = shaken(model)
    prepared = prepare(model, IMAGES, channels_last=True)
    lever = by_name(prepared)[name]
    assert not lever.applied
    assert why in lever.reason
    if "differ" in why:
        assert lever.output_difference is not None
        assert lever.output_difference > 1e-2
    assert torch.equal(prepared.model(IMAGES), model(IMAGES))


class WhenFrozen(nn.Module):
    """Behaves otherwise once its weights are frozen."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 3), what

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.weight.requires_grad:
            return self.layer(x)
        if self.what == "output":
            return self.layer(x) + 1
        # The value of x, with twice its gradient: in all rows, or in those that begin with 1.
        twice = 2 * x - x.detach()
        return self.layer(twice if self.what == "gradient" else torch.where(x[:, :1] == 1, twice, x))


def test_outputs_alone_refuse() -> None:
    lever = by_name(prepare(WhenFrozen("output"), torch.rand(2, 4)))["freeze"]
    assert not lever.applied
    assert lever.reason.startswith("outputs differ")
    assert lever.gradient_difference is not None
    assert lever.gradient_difference < 1e-5


def test_gradients_alone_refuse() -> None:
    lever = by_name(prepare(WhenFrozen("gradient"), torch.rand(2, 4)))["freeze"]
    assert not lever.applied
    assert lever.reason.startswith("gradients differ by 1 of their norm")
    assert lever.gradient_difference == pytest.approx(1.0, rel=1e-4)


def test_a_single_row_is_reported_but_does_not_refuse() -> None:
    """As where one unit switches within rounding."""
    x = torch.rand(9, 4)
    x[2, 0] = 1
    lever = by_name(prepare(WhenFrozen("one row"), x))["freeze"]
    assert lever.applied
    assert lever.gradient_difference == pytest.approx(1.0, rel=1e-4)


def test_the_example_is_untouched() -> None:
    x = torch.rand(2, 30, requires_grad=True)
    before = x.detach().clone()
    prepare(zoo.tabular_mlp(), x, max_batch=2)
    assert torch.equal(x, before)
    assert x.requires_grad
    assert x.grad is None


def test_the_tolerance_is_the_users_too() -> None:
    model, x = shaken(nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30))), torch.rand(4, 30)
    assert by_name(prepare(model, x))["fold_batchnorm"].applied
    lever = by_name(prepare(model, x, tolerance=1e-12))["fold_batchnorm"]
    assert not lever.applied
    assert "allowed are 1e-12" in lever.reason


def test_outputs_that_are_not_finite_differ_only_where_they_differ() -> None:
    compare = passes.compare
    one = torch.tensor([[1.0, float("inf"), float("nan")]]).double(), (torch.zeros(1, 3).double(),)
    assert compare(one, one) == (0.0, 0.0, 0.0)
    other = torch.tensor([[1.0, float("nan"), float("nan")]]).double(), one[1]
    assert compare(one, other)[0] == float("inf")
    assert compare(other, (one[0].nan_to_num(), one[1]))[0] == float("inf")
    assert compare(one, (one[0], (torch.ones(1, 3).double(),)))[2] == float("inf")


# --- the copy ------------------------------------------------------------------------------------------------------


class CannotBeCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def __deepcopy__(self, memo: Any) -> nn.Module:
        raise RuntimeError("there is only one of me\nand a long story")


class CopiesToItself(CannotBeCopied):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        return self


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (shaken(CannotBeCopied()), "cannot be copied, used as it is: RuntimeError: there is only one of me"),
        (shaken(CopiesToItself()), "its copy shares modules, parameters or buffers with it, used as it is"),
        (lambda x: x * 2, "a function is no nn.Module, used as it is"),
    ],
    ids=["raises", "itself", "function"],
)
def test_a_model_that_cannot_be_copied_is_used_as_it_is(model: Any, why: str) -> None:
    prepared = prepare(model, torch.rand(2, 4), max_batch=8)
    levers = by_name(prepared)
    assert prepared.model is model
    assert (levers["copy"].applied, levers["copy"].reason) == (False, why)
    for name in ("fold_batchnorm", "channels_last", "freeze"):
        assert (levers[name].applied, levers[name].reason) == (False, "the model was not copied")
    assert levers["max_batch"].applied
    if isinstance(model, nn.Module):
        assert all(p.requires_grad for p in model.parameters())
        assert norms(model) == 1


def test_a_model_used_as_it_is_comes_back_in_its_mode() -> None:
    model = CannotBeCopied()
    with pytest.warns(UserWarning, match="train mode"):
        prepare(model, torch.rand(2, 4))
    assert model.layer[1].training
    assert int(model.layer[1].num_batches_tracked) == 0


def test_a_scripted_model() -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"):
        model = torch.jit.trace(shaken(Attributes()), IMAGES)
    prepared = prepare(model, IMAGES, max_batch=4)
    torch.testing.assert_close(prepared.model(IMAGES), model(IMAGES))
    assert not by_name(prepared)["fold_batchnorm"].applied


# --- the chunk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [True, False])
def test_the_chunk_fits_the_budget(probe: bool) -> None:
    model, x = zoo.digits_cnn(), torch.rand(2, 1, 8, 8)
    needed = prepare(model, x, channels_last=False).row_bytes
    assert needed is not None
    # At the least: the input, its gradient and what the ReLUs keep.
    assert needed > 4 * (2 * 64 + 16 * 64 + 32 * 16)
    for rows in (1, 3, 10):
        prepared = prepare(model, x, memory_budget=rows * needed, probe=probe, channels_last=False)
        assert 1 <= prepared.max_batch <= rows
        assert all(size <= rows for size, _ in prepared.row_seconds)
    prepared = prepare(model, x, memory_budget=1, probe=probe, channels_last=False)
    assert prepared.max_batch == 1
    assert "more than the budget of 1" in by_name(prepared)["max_batch"].reason


def test_the_measured_memory_is_that_of_the_tensors() -> None:
    """y = exp(exp(x)) keeps both results; x is made before the pass, its gradient in it."""

    class Exponents(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp().exp()

    size = 4 * 100_000
    measured = prepare(Exponents(), torch.rand(2, 100_000)).row_bytes
    assert measured is not None
    assert 4 * size <= measured <= 6 * size


@pytest.mark.parametrize("limit", [1, 6, None])
def test_the_chunk_keeps_the_limit(limit: int | None) -> None:
    prepared = prepare(zoo.tabular_mlp(), torch.rand(2, 30), max_batch=limit, memory_budget=2_000_000)
    sizes = [size for size, _ in prepared.row_seconds]
    assert prepared.max_batch in sizes
    assert sizes == [2**i for i in range(len(sizes))]
    assert limit is None or max(sizes) <= limit
    assert all(seconds > 0 for _, seconds in prepared.row_seconds)


def test_a_model_that_does_not_run_under_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no dispatch modes here")

    monkeypatch.setattr(memory.BytesAlive, "__torch_dispatch__", refuse)
    prepared = prepare(zoo.tabular_mlp(), torch.rand(2, 30))
    assert prepared.row_bytes is None
    assert prepared.max_batch <= 32
    assert "memory could not be measured" in by_name(prepared)["max_batch"].reason


def test_running_out_of_memory_ends_the_probe() -> None:
    def small(x: Tensor) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return x * 2

    assert prepare(small, torch.rand(2, 4)).max_batch <= 4


# --- switches and report -------------------------------------------------------------------------------------------


def test_every_lever_can_be_switched_off() -> None:
    model = shaken(Attributes())
    prepared = prepare(model, IMAGES, fold_batchnorm=False, channels_last=False, freeze=False, probe=False, max_batch=7)
    assert [(lever.name, lever.applied) for lever in prepared.report] == [
        ("copy", True),
        ("fold_batchnorm", False),
        ("channels_last", False),
        ("freeze", False),
        ("compile", False),
        ("max_batch", True),
    ]
    assert all(lever.reason == "switched off" for lever in prepared.report[1:5])
    assert torch.equal(prepared.model(IMAGES), model(IMAGES))
    assert norms(prepared.model) == 3
    assert (prepared.max_batch, prepared.row_seconds) == (7, ())
    assert prepared.memory_format == torch.preserve_format


@pytest.mark.parametrize(("ratio", "applied"), [(0.5, True), (0.98, False), (2.0, False)])
def test_the_layout_is_decided_by_measurement(monkeypatch: pytest.MonkeyPatch, ratio: float, applied: bool) -> None:
    monkeypatch.setattr(module, "alternating", lambda one, other: (1.0, ratio))
    prepared = prepare(zoo.digits_cnn(), torch.rand(2, 1, 8, 8), max_batch=2)
    lever = by_name(prepared)["channels_last"]
    assert (lever.applied, lever.time_ratio) == (applied, ratio)
    assert prepared.model[3].weight.is_contiguous(memory_format=torch.channels_last) is applied
    # Weights alone already did it: inputs are taken as they come.
    assert prepared.memory_format == torch.preserve_format


def test_inputs_are_converted_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([0.9, 0.5])
    monkeypatch.setattr(module, "alternating", lambda one, other: (1.0, next(ratios)))
    prepared = prepare(zoo.digits_cnn(), torch.rand(2, 1, 8, 8), freeze=False, max_batch=2)
    lever = by_name(prepared)["channels_last"]
    assert (lever.applied, lever.time_ratio, lever.reason) == (True, 0.5, "weights and inputs converted")
    assert prepared.memory_format == torch.channels_last


def test_the_report_holds_what_the_levers_did() -> None:
    model, x = shaken(zoo.resnet20()), torch.rand(8, 3, 32, 32)
    prepared = prepare(model, x, channels_last=False, freeze=False, max_batch=2)
    lever = by_name(prepared)["fold_batchnorm"]
    with torch.no_grad():
        expected = model(x)
        difference = (prepared.model(x) - expected).abs().max() / expected.abs().max()
    assert lever.output_difference is not None
    # In chunks of another size the kernels round otherwise; the size of the difference is the same.
    assert 0.1 * lever.output_difference <= float(difference) <= 10 * lever.output_difference
    assert lever.gradient_difference is not None
    assert lever.time_ratio is not None
    assert lever.memory_ratio is not None
    # Without the BatchNorms their inputs are not kept.
    assert lever.memory_ratio < 0.8
    assert str(lever).startswith("fold_batchnorm: yes, 21 of 21 folded (output ")
    assert str(prepared).splitlines() == [str(each) for each in prepared.report]


def test_freezing_frees_what_only_weight_gradients_need() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Hardtanh(), nn.Linear(512, 512))
    lever = by_name(prepare(model, torch.rand(2, 512)))["freeze"]
    assert lever.applied
    assert lever.memory_ratio is not None
    assert lever.memory_ratio <= 1
    assert by_name(prepare(model.requires_grad_(False), torch.rand(2, 512)))["freeze"].reason == (
        "no parameter requires a gradient"
    )


def test_compiled() -> None:
    model, x = shaken(Attributes()), IMAGES
    prepared = prepare(model, x, channels_last=False, compile={"backend": "eager"}, max_batch=2)
    lever = by_name(prepared)["compile"]
    assert lever.applied, lever
    assert_equal_maps(model, prepared, x)
    assert type(model) is Attributes


def test_a_sequential_is_compiled_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    lever = by_name(prepare(zoo.tabular_mlp(), torch.rand(2, 30), compile={"backend": backend}, max_batch=1))["compile"]
    assert lever.applied, lever
    assert graphs


def test_a_compiler_that_fails_is_reported() -> None:
    prepared = prepare(nn.Linear(3, 2), torch.rand(2, 3), compile={"backend": "there is none of that name"})
    lever = by_name(prepared)["compile"]
    assert not lever.applied
    assert lever.reason.startswith("failed: ")
    assert prepared.model(torch.rand(2, 3)).shape == (2, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    model, x = shaken(zoo.resnet20()).cuda(), torch.rand(4, 3, 32, 32, device="cuda")
    state = torch.cuda.get_rng_state()
    prepared = prepare(model, x, channels_last=True, max_batch=8)
    assert norms(prepared.model) == 0
    assert by_name(prepared)["channels_last"].applied
    assert prepared.row_bytes is not None
    assert torch.equal(torch.cuda.get_rng_state(), state)
    # TF32, cuDNN's default, rounds otherwise from one layout to the other.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(prepared.model(x), model(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="example: is on cpu, but the model is on cuda"):
        prepare(model, x.cpu())


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a callable, got int"),
        ({"example": [1.0]}, TypeError, "example: expected a tensor or a tuple of tensors, got list"),
        ({"example": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "example: expected floating point"),
        ({"example": torch.ones(0, 3)}, ValueError, "example: expected at least one input"),
        ({"example": (torch.ones(2, 3), torch.ones(1, 3))}, ValueError, r"example\[1\]: expected 2 inputs"),
        ({"channels_last": "yes"}, ValueError, "channels_last: expected True, False or 'auto', got 'yes'"),
        ({"freeze": 1}, TypeError, "freeze: expected True or False, got 1"),
        ({"compile": "yes"}, TypeError, "compile: expected True, False or arguments of torch.compile"),
        ({"max_batch": 0}, ValueError, "max_batch: expected a positive integer or None, got 0"),
        ({"memory_budget": -5}, ValueError, "memory_budget: expected a positive integer or None, got -5"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a positive finite number or None, got 0.0"),
    ],
)
def test_errors_name_the_argument(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": nn.Linear(3, 2), "example": torch.ones(2, 3)} | settings
    model, example = arguments.pop("model"), arguments.pop("example")
    with pytest.raises(error, match=message):
        prepare(model, example, **arguments)


def test_a_model_that_fails_on_the_example_says_so_itself() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        prepare(nn.Linear(3, 2), torch.ones(2, 4))


def test_documented_examples_run() -> None:
    assert doctest.testmod(module).failed == 0
