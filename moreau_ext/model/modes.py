"""The state of a model during an explanation: eval mode, buffers, attention kernels, hooks."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._errors import TrainModeWarning
from .modules import modules_of
from .restore import Change


class _Kept:
    """A tensor that a pass may change, and its numbers before."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._copy, self._version = tensor, tensor.detach().clone(), tensor._version

    def restore(self) -> bool:
        """Whether it had changed."""
        if self.tensor._version == self._version:
            return False
        with torch.no_grad():
            self.tensor.copy_(self._copy)
        self._version = self.tensor._version
        return True


def _keepable(tensor: Tensor | None) -> bool:
    return tensor is not None and not is_lazy(tensor) and not tensor.is_inference()


@dataclass
class _Found:
    """A module as it was before the first of its users came: its training flag and its buffers."""

    module: nn.Module
    training: bool
    users: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        module = self.module
        # Those of torch.jit's modules are no dict, and cannot be replaced.
        own = vars(module).get("_buffers")
        self._buffers = own if isinstance(own, dict) else None
        self._names = dict(own) if isinstance(own, dict) else {}
        buffers = self._names.values() if self._buffers is not None else module.buffers(recurse=False)
        self._kept = [_Kept(b) for b in buffers if b is not None and _keepable(b)]
        # Embeddings with a maximal norm rescale their weight in every pass.
        shrinks = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        self._weight = _Kept(module.weight) if shrinks and _keepable(module.weight) else None
        # Whether there is anything that a pass could change.
        self.stateful = self._buffers is None or bool(self._names)

    def restore_buffers(self) -> bool:
        """Whether a pass had changed one, in place or by another tensor in its place."""
        changed = False
        for kept in self._kept:
            changed |= kept.restore()
        if self._buffers is not None and (
            len(self._buffers) != len(self._names) or any(self._buffers[k] is not b for k, b in self._names.items())
        ):
            self._buffers.clear()
            self._buffers.update(self._names)
            changed = True
        return changed

    def restore(self) -> None:
        self.module.training = self.training
        self.restore_buffers()
        if self._weight is not None:
            self._weight.restore()


# Layers of torch.nn that compute something else in train mode.
_TWO_MODES = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


def _has_modes(module: nn.Module) -> bool:
    """Whether a module may compute something else in train mode; those within it are asked for themselves."""
    return isinstance(module, _TWO_MODES) or not type(module).__module__.startswith("torch.nn.modules.")


class Evaluating(Change):
    """One use of a model in eval mode; see :class:`_Evaluation`.

    Attributes:
        modules: that were found.
        moved: whether a pass has changed a buffer.
    """

    def __init__(self, registry: _Evaluation, model: Callable[..., Any], depth: int) -> None:
        # torch.jit.freeze leaves modules without a mode.
        self.modules = [m for m in modules_of(model) if hasattr(m, "training")]
        self._registry, self._depth = registry, depth
        # A function may use a layer that has but one mode, whose flag means nothing.
        self._any = isinstance(model, nn.Module)
        self._stateful: list[_Found] = []
        self.moved = False

    def do(self) -> None:
        training = False
        users = self._registry._users
        with self._registry._lock:
            for module in self.modules:
                found = users.get(id(module))
                if found is None:
                    training = training or (module.training and (self._any or _has_modes(module)))
                    found = users[id(module)] = _Found(module, module.training)
                found.users.add(self)
                if found.stateful:
                    self._stateful.append(found)
                # The flag alone: train() may be overridden to do more, and could not be undone exactly.
                module.training = False
        if training:
            warnings.warn(
                "the model is in train mode: it is explained in eval mode and restored afterwards",
                TrainModeWarning,
                stacklevel=3 + self._depth,
            )

    def undo(self) -> None:
        users = self._registry._users
        with self._registry._lock:
            self._stateful = []
            for module in self.modules:
                found = users.get(id(module))
                if found is None:
                    continue
                found.users.discard(self)
                if not found.users:
                    found.restore()
                    del users[id(module)]

    def restore_buffers(self) -> None:
        """Undoes what a pass did to buffers, so that every pass begins with those that the model was given with."""
        for found in self._stateful:
            if found.restore_buffers():
                self.moved = True
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    # A replay would restore them from memory that is gone by then.
                    raise RuntimeError("the model changes its buffers")


class _Evaluation:
    """Models in eval mode, by their users, so that threads may share one: the first switches, the last restores.

    ``evaluating(model, depth)`` is the context manager; ``depth``: frames between it and the caller that the warning
    points at. Buffers come back too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[int, _Found] = {}

    def __call__(self, model: Callable[..., Any], depth: int = 1) -> Evaluating:
        return Evaluating(self, model, depth)


evaluating = _Evaluation()


# Reading and writing torch's flags of its attention kernels, and their values for the plain one.
_CUDA: Any = torch.backends.cuda
_KERNELS = (
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp, False),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp, False),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp, False),
    (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp, True),
)


class _PlainAttentionUse(Change):
    def __init__(self, registry: _PlainAttention) -> None:
        self._registry = registry

    def do(self) -> None:
        registry = self._registry
        with registry._lock:
            first = not registry._users
            registry._users.add(self)
            if first:
                registry._before = [read() for read, _, _ in _KERNELS]
                for _, write, plain in _KERNELS:
                    write(plain)

    def undo(self) -> None:
        registry = self._registry
        with registry._lock:
            registry._users.discard(self)
            if not registry._users and registry._before is not None:
                for (_, write, _), value in zip(_KERNELS, registry._before, strict=True):
                    write(value)
                registry._before = None


class _PlainAttention:
    """torch's plain attention, which alone has second derivatives. The choice is the process's: the first thread that
    needs it makes it, the last restores what was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[_PlainAttentionUse] = set()
        self._before: list[bool] | None = None

    def __call__(self) -> _PlainAttentionUse:
        return _PlainAttentionUse(self)


plain_attention = _PlainAttention()


def without_inference_tensors(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, or a copy of one that was made under torch.inference_mode, whose tensors autograd refuses."""
    if isinstance(model, nn.Module) and any(t.is_inference() for t in chain(model.parameters(), model.buffers())):
        return copy.deepcopy(model)
    return model


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, not counting those inside it, runs more than its forward."""
    return any(getattr(module, name, None) for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether calling any module does."""
    return any(getattr(nn.modules.module, "_global" + name, None) for name in _HOOKS)
