"""The state of a model during an explanation: eval mode, attention kernels, hooks."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._errors import TrainModeWarning


class _Evaluation:
    """Counts who needs a module in eval mode, so that threads may share it: the first switches, the last restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()

    @contextmanager
    def __call__(self, model: Callable[..., Any], depth: int = 1) -> Iterator[None]:
        """``depth``: frames between this one and the caller that the warning points at."""
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        modules = [m for m in modules if hasattr(m, "training")]  # those of torch.jit.freeze have no modes
        training = False
        with self._lock:
            for module in modules:
                users, flag = self._users.get(module, (0, module.training))
                training = training or (users == 0 and flag)
                self._users[module] = (users + 1, flag)
                # The flag alone: train() may be overridden to do more, and could not be undone exactly.
                module.training = False
        try:
            if training:
                warnings.warn(
                    "the model is in train mode: it is explained in eval mode and restored afterwards",
                    TrainModeWarning,
                    stacklevel=3 + depth,
                )
            yield
        finally:
            with self._lock:
                for module in modules:
                    users, flag = self._users[module]
                    if users == 1:
                        module.training = flag
                        del self._users[module]
                    else:
                        self._users[module] = (users - 1, flag)


evaluating = _Evaluation()


class _PlainAttention:
    """torch's plain attention, which alone has second derivatives. The choice is the process's: the first thread that
    needs it makes it, the last restores what was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._chosen = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._chosen.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._chosen.close()


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
