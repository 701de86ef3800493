"""How models are called: several inputs by name, keyword arguments, outputs of any kind, and layers."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moreau_ext import (
    Gradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    PerInput,
    Pixels,
    ProximalGradient,
    SmoothGrad,
    SparseMoreauGrad,
    prepare,
    zoo,
)
from moreau_ext._errors import MixingError, TrainModeWarning
from moreau_ext.model import calling
from moreau_ext.model.calling import find_layer

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)).eval()
X = torch.randn(5, 6)
SETTINGS: dict[str, Any] = {"rho": 0.5, "noise_level": 0.1, "solver": ProximalGradient(8, 8)}


class Named(nn.Module):
    """Takes everything by name."""

    def forward(self, *, image: Tensor, row: Tensor, weight: Any = 1.0, power: int = 1) -> dict[str, Tensor]:
        score = image.flatten(1).sum(1) ** 2 + (row**3).sum(1)
        return {"hidden": image, "logits": torch.stack([score * torch.as_tensor(weight) ** power, score], 1)}


def by_position(image: Tensor, row: Tensor, weight: Any = 1.0, power: int = 1) -> Tensor:
    return Named()(image=image, row=row, weight=weight, power=power)["logits"]


def test_inputs_and_arguments_by_name_equal_those_by_position() -> None:
    image, row, weight = torch.randn(4, 1, 2, 2), torch.randn(4, 3), torch.rand(4)
    named = SparseMoreauGrad(Named().eval(), eta_ratio=0.2, **SETTINGS)
    placed = SparseMoreauGrad(by_position, eta_ratio=0.2, **SETTINGS)
    maps = named.attribute({"image": image, "row": row}, 0, forward_kwargs={"weight": weight, "power": 2})
    assert list(maps) == ["image", "row"]
    expected = placed.attribute((image, row), 0, (weight, 2))
    assert all(torch.equal(maps[name], e) for name, e in zip(maps, expected, strict=True))
    # An argument for each input follows the inputs in any batch.
    one = named.attribute(
        {"row": row[2:3], "image": image[2:3]},
        0,
        ids=torch.tensor([2]),
        forward_kwargs={"weight": weight[2:3], "power": 2},
    )
    assert list(one) == ["row", "image"]
    torch.testing.assert_close(one["row"], maps["row"][2:3], rtol=0.2, atol=0.2)


def test_a_solution_of_inputs_by_name_is_whole() -> None:
    given = {"image": torch.randn(4, 1, 2, 2), "row": torch.randn(4, 3)}
    explainer = MoreauGrad(Named().eval(), rho=0.01, sigma=0.1)
    held = {"row": torch.tensor([True, False, False])}
    found = explainer.attribute(given, 0, fixed=held, return_solution=True)
    assert {k: v.shape for k, v in found.significant().items()} == {k: v.shape for k, v in given.items()}
    assert not found.attribution["row"][:, 0].any()
    assert found.attribution["row"][:, 1].all()
    some = found[1:3]
    assert some.attribution["row"].shape == (2, 3)
    assert torch.equal(found.concatenate([found[:1], found[1:]]).displacement["image"], found.displacement["image"])
    assert str(found).count("gradients, error") == 4
    slope = explainer.vjp(given, found, found.attribution, num_samples=64, hessian="autograd")
    assert list(slope) == list(given)
    assert explainer.certificate(given, found, num_samples=64, num_hvp_samples=64, lanczos_steps=2).distance.shape == (
        4,
    )


Outputs = namedtuple("Outputs", "hidden scores")


@pytest.mark.parametrize(
    ("made", "read"),
    [
        (lambda y: {"logits": y, "loss": None}, None),
        (lambda y: OrderedDict(out=y), lambda o: o["out"]),
        (lambda y: (y, y * 0), lambda o: o[0]),
        (lambda y: Outputs(y * 0, y), lambda o: o.scores),
    ],
)
def test_outputs_of_any_kind_are_read(made: Any, read: Any) -> None:
    expected = SmoothGrad(NET, num_samples=4).attribute(X, 2)
    assert torch.equal(SmoothGrad(lambda x: made(NET(x)), num_samples=4, output_fn=read).attribute(X, 2), expected)


def test_a_module_that_reads_the_output_is_in_eval_mode_meanwhile() -> None:
    read = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    with pytest.warns(TrainModeWarning):
        maps = Gradient(NET, output_fn=read).attribute(X, 2)
    assert torch.equal(maps, Gradient(NET).attribute(X, 2))
    assert read[0].training
    with pytest.warns(TrainModeWarning) as record:
        Gradient(NET, layer="1", output_fn=read).rows_per_pass(X)
    assert [w.filename for w in record] == [__file__]


def test_a_message_names_what_an_output_holds() -> None:
    with pytest.raises(TypeError, match=r"got dict of boxes, scores; give output_fn"):
        Gradient(lambda x: {"boxes": x, "scores": x}).attribute(X)
    with pytest.raises(TypeError, match=r"got tuple of Tensor, Tensor; give output_fn"):
        Gradient(lambda x: (x, x)).attribute(X)
    with pytest.raises(TypeError, match=r"output_fn: expected a callable, got int"):
        Gradient(NET, output_fn=0)  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize("of", [str, None])
@pytest.mark.parametrize("make", [MoreauGrad, SparseMoreauGrad])
def test_a_layer_is_explained_as_the_input_of_the_rest(make: Any, of: Any) -> None:
    hidden = NET[:2](X).detach()
    layer = "1" if of else NET[1]
    expected = make(NET[2], **SETTINGS).attribute(hidden, 1, return_solution=True)
    explainer = make(NET, layer=layer, **SETTINGS)
    found = explainer.attribute(X, 1, return_solution=True)
    assert torch.equal(found.attribution, expected.attribution)
    assert torch.equal(found.standard_error, expected.standard_error)
    with pytest.raises(ValueError, match="solution: expected displacements shaped as the output of the layer"):
        explainer.certificate(X, make(NET, **SETTINGS).attribute(X, 1, return_solution=True))
    assert not NET[1]._forward_hooks


class Blocks(nn.Module):
    """Token ids to a score for each of three classes; its blocks return tuples, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(9, 4), Block(), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden, _ = self.block(self.embedding(ids) * mask[..., None])
        return self.head(hidden.mean(1))


class Block(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(x), None


@pytest.mark.parametrize("rows", [1, 3, "auto"])
def test_layers_of_models_whose_inputs_are_integers(rows: Any) -> None:
    model, ids, mask = Blocks().eval(), torch.randint(0, 9, (5, 7)), (torch.rand(5, 7) > 0.3).float()
    for layer, given in (
        ("embedding", model.embedding(ids)),
        ("block", torch.tanh(model.embedding(ids) * mask[..., None])),
    ):
        explainer = GroupSparseMoreauGrad(
            model, layer=layer, groups=Pixels(channel_axis=-1), eta_ratio=0.3, max_batch=rows, **SETTINGS
        )
        maps = explainer.attribute(ids, 2, PerInput(mask))

        def rest(h: Tensor, m: Tensor, layer: str = layer) -> Tensor:
            return model.head((torch.tanh(h * m[..., None]) if layer == "embedding" else h).mean(1))

        expected = replaced(explainer, rest).attribute(given.detach(), 2, PerInput(mask))
        torch.testing.assert_close(maps, expected)


def replaced(explainer: GroupSparseMoreauGrad, model: Any) -> GroupSparseMoreauGrad:
    return GroupSparseMoreauGrad(
        model, groups=explainer.groups, eta_ratio=0.3, max_batch=explainer.max_batch, **SETTINGS
    )


def test_layers_of_a_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    small = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(small).eval()
    ids, mask = torch.randint(0, 50, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    embedded = model.get_input_embeddings()(ids).detach()
    own: dict[str, Any] = {"groups": Pixels(channel_axis=-1), "eta_ratio": 0.3, **SETTINGS}
    expected = GroupSparseMoreauGrad(model, **own).attribute(
        {
            "inputs_embeds": embedded,
        },
        1,
        forward_kwargs={"attention_mask": mask},
    )
    explainer = GroupSparseMoreauGrad(model, layer="bert.embeddings.word_embeddings", **own)
    maps = explainer.attribute({"input_ids": ids, "attention_mask": mask}, 1)
    torch.testing.assert_close(maps, expected["inputs_embeds"])
    # Its blocks return tensors or tuples, by version, and the encoder an object.
    for layer in ("bert.encoder.layer.0", "bert.encoder"):
        maps = GroupSparseMoreauGrad(model, layer=layer, **own).attribute({"input_ids": ids, "attention_mask": mask}, 1)
        assert maps.shape == embedded.shape
        assert maps.any()


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: the model has no layer '7'; it has 0, 1, 2"):
        MoreauGrad(NET, layer="7")
    with pytest.raises(ValueError, match=r"layer: Linear is no part of the model"):
        MoreauGrad(NET, layer=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"layer: expected a name or an nn.Module, got int"):
        MoreauGrad(NET, layer=3)  # type: ignore[arg-type]  # refused
    shared = nn.Sequential(NET[0], NET[1], nn.Linear(8, 6), NET[1])
    with pytest.raises(ValueError, match=r"layer: SiLU ran 2 times in a pass of the model, expected once"):
        MoreauGrad(shared.eval(), layer=NET[1]).attribute(X)
    with pytest.raises(ValueError, match=r"inputs: expected at least one"):
        MoreauGrad(NET, layer="1").attribute(X[:0])
    with pytest.raises(TypeError, match=r"layer: its output: expected floating point, got torch.int64"):
        Gradient(nn.Sequential(nn.Linear(6, 6), Whole()).eval(), layer="1").attribute(X)
    with pytest.raises(ValueError, match=r"layer: its output: input 0 holds NaN or infinity"):
        MoreauGrad(NET, layer="1").attribute(X * torch.nan)
    assert not any(module._forward_hooks for module in shared.modules())


def test_a_layer_of_a_prepared_model_and_of_a_convolution() -> None:
    maps = SmoothGrad(NET, layer="1", num_samples=8).attribute(X, 1)
    ready = prepare(NET, X, channels_last=False, probe=False)
    torch.testing.assert_close(SmoothGrad(ready, layer="1", num_samples=8).attribute(X, 1), maps)
    with pytest.raises(ValueError, match="of a prepared model, or a copy, give the layer's name"):
        SmoothGrad(ready, layer=NET[1])
    model, x = zoo.trained("digits_cnn"), zoo.digits("test").inputs[:3]
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][-1]
    assert SmoothGrad(model, layer=last, num_samples=8).attribute(x).dim() == 4


def test_threads_that_explain_two_layers_do_not_meet() -> None:
    """A pass of one thread runs while another's hook is on the same layer."""
    explainers = [SmoothGrad(NET, layer=name, num_samples=16, max_batch=2) for name in ("0", "1")]
    alone = [e.attribute(X, 1) for e in explainers]
    found: list[Any] = [None] * 8

    def work(i: int) -> None:
        found[i] = explainers[i % 2].attribute(X, 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(maps, alone[i % 2]) for i, maps in enumerate(found))


class Edits(nn.Module):
    """Changes its input, and the output of its layer, in place."""

    def __init__(self, scale: float = 2.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.scale, self.checkpointed = scale, checkpointed
        self.body, self.shortcut, self.act, self.head = NET[0], nn.Sequential(), nn.ReLU(inplace=True), NET[2]

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(self.scale)

        def part(x: Tensor) -> Tensor:
            return self.act(self.shortcut(self.body(x)))

        return self.head(checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x))


@pytest.mark.parametrize("layer", ["body", "shortcut"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_model_may_change_its_inputs_and_the_layers_output_in_place(layer: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = X.clone()
    maps = MoreauGrad(Edits().eval(), layer=layer, **SETTINGS).attribute(x, 1)
    assert torch.equal(x, X)
    rest = nn.Sequential(nn.ReLU(), NET[2]).eval()
    assert torch.equal(maps, MoreauGrad(rest, **SETTINGS).attribute(NET[0](2 * X).detach(), 1))


def test_passes_up_to_a_layer_are_small_whatever_the_arguments() -> None:
    """Whether an argument follows the inputs is found by passes of one and of two rows."""
    seen: list[int] = []

    def model(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        seen.append(len(x))
        return NET[2](NET[1](NET[0](x @ table) * scale[:, None]) * scale[:, None])

    x, scale, table = torch.randn(6, 6), torch.rand(6), torch.randn(6, 6)
    explainer = SmoothGrad(model, layer=NET[1], num_samples=8, max_batch=4)
    maps = explainer.attribute(x, 1, (scale, table))
    assert max(seen) == 4
    hidden = NET[1](NET[0](x @ table) * scale[:, None])
    rest = SmoothGrad(lambda h, s: NET[2](h * s[:, None]), num_samples=8, max_batch=4)
    torch.testing.assert_close(maps, rest.attribute(hidden.detach(), 1, PerInput(scale)))


def test_a_model_that_mixes_its_inputs_before_the_layer() -> None:
    def model(x: Tensor) -> Tensor:
        return NET(x - x.mean(0))

    with pytest.raises(MixingError):
        Gradient(model, layer=NET[1]).attribute(X, 1)
    assert Gradient(model, layer=NET[1], max_batch=1).attribute(X, 1).shape == (5, 8)


def test_a_name_is_that_of_the_layer_which_has_it_now() -> None:
    model = nn.Sequential(NET[0], nn.Tanh(), NET[2]).eval()
    explainer = SmoothGrad(model, layer="1", num_samples=4)
    explainer.attribute(X, 1)
    model[1] = nn.SiLU().eval()
    assert torch.equal(explainer.attribute(X, 1), SmoothGrad(NET, layer="1", num_samples=4).attribute(X, 1))


def test_layers_that_a_hook_does_not_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: Linear is in a part of the model that torch.utils.checkpoint runs"):
        Gradient(Edits(checkpointed=True).eval(), layer="body").attribute(X, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        block = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1).eval()
        block.requires_grad_(False)
        padding = torch.tensor([[False, False], [False, True]])
        with pytest.raises(
            ValueError, match=r"layer: TransformerEncoderLayer returns a nested tensor, in the fast path"
        ):
            Gradient(
                lambda x: block(x, src_key_padding_mask=padding[: len(x)]).flatten(1), layer=block.layers[0]
            ).attribute(X[:4].view(2, 2, 6), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(NET, X)
    with pytest.raises(ValueError, match=r"layer: '1' is torch.jit's, which calls no hooks"):
        Gradient(traced, layer="1")


def test_every_name_of_a_layer_is_found() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"tokens": NET[0]}), "first": NET[0]})
    assert find_layer(model, "encoder.tokens") is find_layer(model, "first") is NET[0]


def test_an_interrupt_at_any_line_leaves_no_hook() -> None:
    explainer = Gradient(NET, layer="1", max_batch=8)
    files = (calling.__file__, nn.modules.module.__file__)

    def lines(stop: int) -> int:
        """Explains until the line of that number; how many there were."""
        count = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename not in files or frame.f_code.co_name in ("__getattr__", "_call_impl"):
                return None
            if event == "line":
                count += 1
                if count == stop:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            explainer.attribute(X, 1)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return count

    total = lines(0)
    assert total > 100
    for stop in range(1, total + 1):
        lines(stop)
        assert not NET[1]._forward_hooks, stop


def test_dicts_are_matched_by_name_and_not_by_place() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return (a**2).sum(1) + 3 * (b**2).sum(1)

    a, b = X, X.flip(1)
    explainer = MoreauGrad(model, rho=0.01, sigma=0.0, solver=ProximalGradient(2, 50, step_size=1e-3))
    found = explainer.attribute({"a": a, "b": b}, return_solution=True)
    known: dict[str, Any] = {"num_samples": 64, "hessian": "autograd"}
    expected = explainer.vjp({"a": a, "b": b}, found, {"a": a, "b": b}, **known)
    slopes = explainer.vjp({"b": b, "a": a}, found, {"a": a, "b": b}, **known)
    assert list(slopes) == ["b", "a"]
    assert all(torch.allclose(slopes[name], expected[name]) for name in "ab")
    proof = explainer.certificate({"b": b, "a": a}, found, num_samples=64, num_hvp_samples=64, lanczos_steps=2)
    assert proof.residual.max() < 1e-3
    with pytest.raises(ValueError, match=r"vectors: expected the names of the inputs, \['a', 'b'\], got \['c', 'd'\]"):
        explainer.vjp({"a": a, "b": b}, found, {"c": a, "d": b})
    with pytest.raises(ValueError, match="forward_kwargs: 'a' is the name of an input too"):
        explainer.attribute({"a": a, "b": b}, forward_kwargs={"a": 1})
    with pytest.raises(TypeError, match=r"inputs: expected a dict by the names of arguments, got the keys \[0\]"):
        explainer.attribute({0: a})
