"""The weights and settings of a model, watched for changes that a captured graph would not see."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn


class Weights:
    """What a model is made of: its modules, their numbers, and where their tensors lie."""

    def __init__(self, model: Any) -> None:
        self._tensors, self._rest = _made_of(model)
        self._aliases = [t.detach() for t in self._tensors]  # these keep the memory from others

    def unmoved(self, model: Any) -> bool:
        """Whether a graph that was captured with them still does what the model does; values of tensors may differ."""
        now, rest = _made_of(model)
        return (
            rest == self._rest
            and len(now) == len(self._tensors)
            and all(
                t is known and t.layout == torch.strided and t.is_set_to(alias)
                for t, known, alias in zip(now, self._tensors, self._aliases, strict=True)
            )
        )

    def on(self, device: torch.device) -> bool:
        """Whether all of them are dense and there: what lies elsewhere is a number to a graph."""
        return all(t.device == device and t.layout == torch.strided for t in self._tensors)


def _made_of(model: Any) -> tuple[list[Tensor], list[Any]]:
    if not isinstance(model, nn.Module):
        return [], []
    tensors, rest, seen = [*model.parameters(), *model.buffers()], list[Any](), set[int]()
    for module in model.modules():
        rest.append((id(module), type(module).forward))
        for name, value in vars(module).items():
            if name not in _OF_ALL_MODULES:
                rest.append((name, _settings_of(value, tensors, seen, _DEPTH)))
    return tensors, rest


# What torch keeps in every module: parameters, modules, hooks, which are looked at by other ways.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))

# How deep and how far settings are followed: a configuration, not a vocabulary.
_DEPTH, _MOST_ITEMS = 6, 256


def _settings_of(value: Any, tensors: list[Tensor], seen: set[int], depth: int) -> Any:
    """The numbers and names in a value, copied, so that a later change shows; its tensors are added to ``tensors``.
    What was ``seen`` is not followed again."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors)
    items: Any = ()
    if depth and id(value) not in seen and not callable(value) and not isinstance(value, nn.Module):
        seen.add(id(value))
        if isinstance(value, (tuple, list)):
            items = enumerate(value)
        else:
            items = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).items()
        items = islice(items, _MOST_ITEMS)
    # Containers of equal contents are equal.
    same = type(value) if isinstance(value, (tuple, list, dict)) else id(value)
    return (same, [(key, _settings_of(v, tensors, seen, depth - 1)) for key, v in items])
