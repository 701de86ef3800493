"""The state of a model during an explanation: eval mode, buffers, attention kernels, hooks."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._errors import TrainModeWarning
from .modules import modules_of
from .restore import Change

# Numbers of a buffer whose values are compared after every pass.
_WATCHED = 4096


class _Buffers:
    """What the passes of a model may change in some of its modules, as it was before."""

    def __init__(self, modules: list[nn.Module]) -> None:
        # Buffers by name, which a pass may also replace; those of torch.jit's modules are in no dict.
        self._named: list[tuple[dict[str, Any], dict[str, Any]]] = []
        tensors: list[Tensor | None] = []
        custom: set[int] = set()
        weights: list[Tensor] = []
        for module in modules:
            own = module.__dict__.get("_buffers")
            if isinstance(own, dict):
                if own:
                    self._named.append((own, dict(own)))
                    tensors += own.values()
                    if not type(module).__module__.startswith("torch.nn."):
                        custom |= {id(b) for b in own.values()}
            else:
                tensors += module.buffers(recurse=False)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                weights.append(module.weight)  # rescaled in every pass
        kept = [t for t in tensors if t is not None and _keepable(t)]
        self._tensors = [t.detach() for t in kept]
        self._custom = [i for i, t in enumerate(kept) if id(t) in custom and t.layout == torch.strided]
        # Those that are looked at after every pass, where that costs nothing and waits for nothing.
        self._watched = [i for i in self._custom if kept[i].device.type == "cpu" and kept[i].numel() <= _WATCHED]
        self._weights = [t.detach() for t in weights if _keepable(t)]
        with torch.no_grad():
            self._copies = _copied(self._tensors)
            self._weight_copies = _copied(self._weights)
        self._versions = [t._version for t in self._tensors]
        self._weight_versions = [t._version for t in self._weights]

    def restore(self) -> bool:
        """Whether a pass had changed a buffer, in place or by another tensor in its place."""
        changed = False
        for own, before in self._named:
            if len(own) != len(before) or any(own[name] is not b for name, b in before.items()):
                own.clear()
                own.update(before)
                changed = True
        changed = _restored(self._tensors, self._copies, self._versions) or changed
        return self._restore_values(self._watched) or changed

    def restore_all(self) -> None:
        """Buffers, and the weights of embeddings that are rescaled, which is the same in every pass."""
        self.restore()
        self._restore_values(self._custom)
        _restored(self._weights, self._weight_copies, self._weight_versions)

    def _restore_values(self, which: list[int]) -> bool:
        changed = False
        for i in which:
            # A change through .data has no version.
            if not torch.equal(self._tensors[i], self._copies[i]):
                with torch.no_grad():
                    self._tensors[i].copy_(self._copies[i])
                self._versions[i] = self._tensors[i]._version
                changed = True
        return changed


def _keepable(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_inference()


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies; those of small tensors of one kind cost little more than one."""
    kinds = (torch.float32, torch.float64, torch.int64)
    plain = [i for i, t in enumerate(tensors) if t.dtype in kinds and t.layout == torch.strided]
    copies: list[Any] = [None] * len(tensors)
    if plain:
        for i, copied in zip(plain, torch._foreach_mul([tensors[i] for i in plain], 1), strict=True):
            copies[i] = copied
    return [t.clone() if c is None else c for t, c in zip(tensors, copies, strict=True)]


def _restored(tensors: list[Tensor], copies: list[Tensor], versions: list[int]) -> bool:
    changed = False
    for i, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(copies[i])
            versions[i] = tensor._version
            changed = True
    return changed


class _Found:
    """A module as it was before the first of its users came."""

    __slots__ = ("buffers", "module", "training", "users")

    def __init__(self, module: nn.Module, buffers: _Buffers) -> None:
        self.module, self.training, self.buffers = module, module.training, buffers
        self.users: set[Any] = set()


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

    def __init__(self, registry: _Evaluation, model: Callable[..., Any], depth: int | None) -> None:
        # torch.jit.freeze leaves modules without a mode.
        self.modules = [m for m in modules_of(model) if hasattr(m, "training")]
        self._registry, self._depth = registry, depth
        # A function may use a layer that has but one mode, whose flag means nothing.
        self._any = isinstance(model, nn.Module)
        self._buffers: list[_Buffers] = []
        self.moved = False

    def do(self) -> None:
        training = False
        users = self._registry._users
        with self._registry._lock:
            new = [m for m in self.modules if id(m) not in users]
            buffers = _Buffers(new)
            shared = {id(users[id(m)].buffers): users[id(m)].buffers for m in self.modules if id(m) in users}
            self._buffers = [buffers, *shared.values()]
            for module in new:
                training = training or (module.training and (self._any or _has_modes(module)))
                users[id(module)] = _Found(module, buffers)
            for module in self.modules:
                users[id(module)].users.add(self)
                # The flag alone: train() may be overridden to do more, and could not be undone exactly.
                module.training = False
        if training and self._depth is not None:
            warnings.warn(
                "the model is in train mode: it is explained in eval mode and restored afterwards",
                TrainModeWarning,
                stacklevel=3 + self._depth,
            )

    def undo(self) -> None:
        users = self._registry._users
        with self._registry._lock:
            for buffers in self._buffers:
                buffers.restore_all()
            self._buffers = []
            for module in self.modules:
                found = users.get(id(module))
                if found is None:
                    continue
                found.users.discard(self)
                if not found.users:
                    module.training = found.training
                    del users[id(module)]

    def restore_buffers(self) -> None:
        """Undoes what a pass did to buffers, so that every pass begins with those that the model was given with."""
        for buffers in self._buffers:
            if buffers.restore():
                self.moved = True
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    # A replay would restore them from memory that is gone by then.
                    raise RuntimeError("the model changes its buffers")


class _Evaluation:
    """Models in eval mode, by their users, so that threads may share one: the first switches, the last restores.

    ``evaluating(model, depth)`` is the context manager; ``depth``: frames between it and the caller that the warning
    points at, None for no warning. Buffers come back too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[int, _Found] = {}

    def __call__(self, model: Callable[..., Any], depth: int | None = 1) -> Evaluating:
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
