"""Changes of state that are undone: also by an interrupt between any two steps of the interpreter."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Device types whose autocast a call may switch.
_AUTOCAST = ("cpu", "cuda")


class _Noted(threading.local):
    """The changes that this thread has begun and not yet undone."""

    def __init__(self) -> None:
        self.changes: list[Change] = []


_noted = _Noted()


class Change(ABC):
    """A reversible change of the state of a model, a thread or the process, as a context manager.

    An interrupt may come before the first line of ``__exit__`` runs, so a change is noted before it is made, and
    :func:`leaves_as_found` undoes those that are still noted at the end of a call.
    """

    def __enter__(self) -> Any:
        _noted.changes.append(self)
        try:
            self.do()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self.undo()
        if self in _noted.changes:
            _noted.changes.remove(self)

    @abstractmethod
    def do(self) -> None:
        """Makes the change."""

    @abstractmethod
    def undo(self) -> None:
        """Undoes as much of it as was made; doing so twice changes nothing."""


class Turns:
    """Whose turn it is with a state of the process: uses of one thread nest, and so do those of several threads that
    want the same.

    A lock that is held from ``do`` to ``undo`` could be left locked by an interrupt between its being taken and that
    being noted; here the list of users says who has the turn.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[tuple[Change, int, Any]] = []

    def take(self, change: Change, wanted: Any = None, first: Callable[[], None] = lambda: None) -> None:
        """Waits for the turn.

        Args:
            change: that wants it.
            wanted: what other threads must want too to share it; None for a turn that is not shared.
            first: called where nobody else has it.

        Raises:
            ValueError: this thread has it for something else.
        """
        me = threading.get_ident()
        while True:
            with self._lock:
                same = wanted is not None and all(w == wanted for _, _, w in self._users)
                if not same and wanted is not None and any(thread == me for _, thread, _ in self._users):
                    raise ValueError(f"wanted for {wanted!r} within a use for something else")
                if same or all(thread == me for _, thread, _ in self._users):
                    self._users.append((change, me, wanted))
                    if len(self._users) == 1:
                        first()
                    return
            time.sleep(1e-3)

    def leave(self, change: Change, last: Callable[[], None] = lambda: None) -> None:
        """Gives the turn back, if ``change`` has it; ``last`` is called before where nobody else does."""
        with self._lock:
            rest = [user for user in self._users if user[0] is not change]
            if len(rest) < len(self._users) and not rest:
                last()
            self._users = rest


def leaves_as_found(call: Callable[P, R]) -> Callable[P, R]:
    """A function that undoes every :class:`Change` it began, and restores the thread's grad mode and autocast.

    Nothing here is left to an ``__exit__``: an interrupt anywhere in the call, the end of it included, leads to one of
    the two attempts below.
    """

    @wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        start, thread = len(_noted.changes), _thread_state()
        try:
            return call(*args, **kwargs)
        finally:
            try:
                _undo(start, thread)
            except BaseException:
                _undo(start, thread)
                raise

    return run


def _thread_state() -> tuple[Any, ...]:
    casts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST]
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), *casts


def _undo(start: int, thread: tuple[Any, ...]) -> None:
    for change in _noted.changes[start:][::-1]:
        change.undo()
    del _noted.changes[start:]
    grad, cache, *casts = thread
    if torch.is_grad_enabled() != grad:
        torch._C._set_grad_enabled(grad)
    if _thread_state() != thread:
        torch.set_autocast_cache_enabled(cache)
        for kind, (enabled, dtype) in zip(_AUTOCAST, casts, strict=True):
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
