"""How a model is called: inputs and arguments by position or by name, and a layer's output in the place of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .arguments import Items
from .modules import modules_of
from .passes import PassRunner
from .precision import autocast
from .restore import Change
from .score import Score


@dataclass(frozen=True)
class Called:
    """A model as a function of values in one order: the layer's output, the inputs, further arguments.

    Args:
        model: called with the values, but for the layer's output.
        output_fn: reads the tensor to explain from what the model returns; None for the output itself.
        names: of the inputs that are passed by keyword; () where they are passed by position.
        keywords: of the arguments at the end that are passed by keyword.
        layer: whose output the first value replaces; None where the inputs come first.
    """

    model: Callable[..., Any]
    output_fn: Callable[[Any], Any] | None = None
    names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    layer: nn.Module | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model, for those who look for its modules."""
        return self.model

    def __call__(self, *values: Any) -> Any:
        if self.layer is not None:
            with _Replaced(self.layer, values[0]) as replaced:
                output = replace(self, layer=None)(*values[1:])
            replaced.check()
            return output
        named, rest = values[: len(self.names)], values[len(self.names) :]
        last = len(rest) - len(self.keywords)
        by_name = dict(zip((*self.names, *self.keywords), (*named, *rest[last:]), strict=True))
        output = self.model(*rest[:last], **by_name)
        return output if self.output_fn is None else self.output_fn(output)


class _Hooked(Change):
    """A hook on a layer that acts in this thread's passes alone: others may run the model meanwhile."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._thread = layer, threading.get_ident()
        self._handle: RemovableHandle | None = None
        self.calls = 0

    def do(self) -> None:
        self._handle = self._layer.register_forward_hook(self._hook)

    def undo(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _hook(self, _: nn.Module, __: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        self.calls += 1
        return self.on(output)

    def on(self, output: Any) -> Any:
        """What the layer returns instead; None for its own output."""

    def check(self) -> None:
        """Raises ValueError unless the layer ran once."""
        if self.calls != 1:
            name = type(self._layer).__name__
            raise ValueError(
                f"layer: {name} ran {self.calls} times in a pass of the model, expected once. "
                + (
                    "Likely cause: only parts of it are called"
                    if self.calls == 0
                    else "Name a layer that is not shared"
                )
            )


class _Replaced(_Hooked):
    """A layer that returns another tensor in the place of its own output."""

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__(layer)
        self._value = value

    def on(self, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            # Blocks of transformers return their hidden state with attention weights or a cache.
            made = [self._value, *output[1:]]
            return output._make(made) if hasattr(output, "_make") else type(output)(made)
        if isinstance(output, Mapping):
            whole: Any = copy.copy(output)
            whole[next(iter(output))] = self._value
            return whole
        return self._value


class _Read(_Hooked):
    """A layer whose output is kept."""

    found: Any = None

    def on(self, output: Any) -> None:
        self.found = output


def find_layer(model: Callable[..., Any], layer: str | nn.Module) -> nn.Module:
    """A layer of a model, by its name in ``named_modules()`` or itself.

    Raises:
        ValueError: the model has no such layer.
        TypeError: neither a name nor a module.
    """
    if isinstance(layer, nn.Module):
        if any(module is layer for module in modules_of(model)):
            return layer
        raise ValueError(
            f"layer: {type(layer).__name__} is no part of the model; of a prepared model, or a copy, give the layer's "
            "name"
        )
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name or an nn.Module, got {type(layer).__name__}")
    named: dict[str, nn.Module] = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if not layer or layer not in named:
        some = ", ".join([name for name in named if name][-6:])
        raise ValueError(f"layer: the model has no layer {layer!r}; " + (f"it has {some}" if some else "it has none"))
    return named[layer]


def layer_output(score: Score, passes: PassRunner, rows: int, device: torch.device) -> Tensor:
    """The output of a layer at the inputs, [rows, *features], by passes of the model.

    Args:
        score: whose model is a :class:`Called` with a layer, and whose arguments are the inputs and what follows them.
        passes: of the call.
        rows: number of inputs.
        device: of the inputs.

    Raises:
        TypeError, ValueError: the layer does not run once, or returns no tensor with one row per input.
    """
    return passes(_read, score, (torch.arange(rows, device=device),))[0]


def _read(score: Score, rows: Sequence[Tensor]) -> tuple[Tensor]:
    called: Any = score.model
    # As in the passes that follow: a model may compute something else under torch.no_grad.
    with torch.enable_grad(), score.passing(rows[0].device), autocast(score.precision, rows[0].device):
        with _Read(called.layer) as read:
            replace(called, layer=None, output_fn=None)(*[a.value if type(a) is Items else a for a in score.args])
        read.check()
    found = read.found
    if isinstance(found, (tuple, list, Mapping)) and len(found):
        found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
    kind = type(called.layer).__name__
    if not isinstance(found, Tensor):
        raise TypeError(
            f"layer: expected a tensor of {kind}, or several that begin with one, got {type(found).__name__}"
        )
    if found.dim() == 0 or found.shape[0] != len(rows[0]):
        raise ValueError(
            f"layer: expected an output of {kind} with one row per input, [{len(rows[0])}, ...], got "
            f"{tuple(found.shape)}"
        )
    found = found.detach()
    return (found.float() if score.precision == "bfloat16" and found.dtype == torch.bfloat16 else found,)
