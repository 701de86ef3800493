"""The modules of a model that need not be an nn.Module: a function, a bound method, a partial or an object."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

# What torch keeps in every module. Registered modules and hooks are reached by other ways.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))

# Values that lead nowhere.
_ATOMS = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter, torch.dtype, torch.device)
    + (torch.Size, torch.Generator, types.ModuleType, type)
)

# Objects of these packages hold no model of the user's, but may hold a great deal else.
_FOREIGN = frozenset(("torch", "numpy", "builtins", "logging", "threading", "_thread", "re", "moreau_ext", "PIL"))

# How deep references are followed, and how many items of a container are: layers, not vocabularies.
_DEPTH, _ITEMS = 8, 512

_CONTAINERS = (tuple, list, set, frozenset, deque)


def modules_of(model: Callable[..., Any]) -> list[nn.Module]:
    """Every module that a model is found to use, each once.

    Those of an nn.Module are its registered ones and those that its attributes hold, alone or in containers. Those of
    another callable are found in its closure, its ``__self__``, the arguments of a partial, ``__wrapped__``, the
    attributes of an object, and the global names that a function uses.

    Example:
        >>> import torch
        >>> from moreau_ext.model.modules import modules_of
        >>> net = torch.nn.Linear(3, 2)
        >>> modules_of(net.forward)
        [Linear(in_features=3, out_features=2, bias=True)]
    """
    found: dict[int, nn.Module] = {}
    _visit(model, found, {}, _DEPTH)
    return list(found.values())


def _visit(value: Any, found: dict[int, nn.Module], seen: dict[int, Any], depth: int) -> None:
    if type(value) in _ATOMS or id(value) in seen or id(value) in found or depth == 0:
        return
    if isinstance(value, nn.Module):
        for module in value.modules():
            if id(module) in found:
                continue
            found[id(module)] = module
            if _standard(type(module)):
                continue
            for name, held in vars(module).items():
                if type(held) not in _ATOMS and name not in _OF_ALL_MODULES:
                    _visit(held, found, seen, depth - 1)
        return
    seen[id(value)] = value  # held, so that nothing else gets its address
    for held in _references(value):
        _visit(held, found, seen, depth - 1)


def _standard(kind: type) -> bool:
    """A layer of torch.nn holds no modules but registered ones."""
    return kind.__module__.startswith("torch.nn.modules.")


def _references(value: Any) -> Iterable[Any]:
    """The objects that a value leads to."""
    if isinstance(value, Mapping):
        return islice(_safe(value.values), _ITEMS)
    if isinstance(value, _CONTAINERS):
        return islice(iter(value), _ITEMS)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values(), *vars(value).values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.BuiltinMethodType):
        return (value.__self__,)
    if isinstance(value, weakref.ref):
        return (value(),)
    kind = type(value)
    wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
    if wrapped is not None:  # functools.lru_cache and the like
        return (wrapped, *vars(value).values()) if hasattr(value, "__dict__") else (wrapped,)
    if _package_of(kind) in _FOREIGN:
        return ()
    slots = [name for base in kind.__mro__ for name in _names(vars(base).get("__slots__", ()))]
    held = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    call = getattr(kind, "__call__", None)  # noqa: B004  the function is wanted
    return (*held, call) if isinstance(call, types.FunctionType) else held


def _of_function(function: types.FunctionType) -> list[Any]:
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += vars(function).values()  # __wrapped__ too
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not yet filled
            continue
    if _package_of(function) not in _FOREIGN:
        names = _globals_in(function.__code__)
        held += [function.__globals__[name] for name in names if name in function.__globals__]
    return held


def _package_of(value: Any) -> str:
    # Generated code may have no module, or none that is a name.
    return str(getattr(value, "__module__", None)).partition(".")[0]


def _globals_in(code: types.CodeType) -> set[str]:
    """Names that the code, or functions within it, look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _globals_in(constant)
    return names


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _safe(values: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    try:
        return iter(values())
    except Exception:  # a mapping of someone else's
        return ()
