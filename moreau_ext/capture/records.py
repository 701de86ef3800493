"""Records: dataclasses of tensors that a captured step works on."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.passes import PassRunner


class Parts:
    """The tensors of a record, each once, and a signature: records of equal signatures differ in nothing but the
    contents of their tensors.

    A record is a dataclass of tensors, numbers, containers and further records. Anything else in it is opaque.
    """

    def __init__(self, record: Any) -> None:
        self.tensors: list[Tensor] = []
        self.opaque: list[Any] = []
        self._places: dict[int, int] = {}
        self.signature = self._visit(record)

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(t.numel() for t in self.tensors)

    def versions(self) -> list[int]:
        """The versions of the tensors; a tensor that is written in place has another one afterwards."""
        return [t._version for t in self.tensors]

    def _visit(self, value: Any) -> Hashable:
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
            place = self._places.setdefault(id(value), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(value)
            return (place, tuple(value.shape), value.stride(), value.dtype, value.device)
        if value is None or isinstance(value, (bool, int, float, str)):
            return (type(value), value)
        if type(value) in (tuple, list):
            return (type(value), *(self._visit(v) for v in value))
        if type(value) is dict:
            return (dict, *((key, self._visit(v)) for key, v in value.items()))
        if isinstance(value, PassRunner):
            return (PassRunner, value.max_rows, value.exact)
        if _is_record(value):
            return (type(value), *(self._visit(getattr(value, f.name)) for f in fields(value)))
        self.opaque.append(value)  # held, so that nothing else gets its address
        return (type(value), id(value))

    def copied(self, value: Any, tensors: list[Tensor]) -> Any:
        """The record, or a part of it, with other tensors in the places of its own."""
        if id(value) in self._places:
            return tensors[self._places[id(value)]]
        if type(value) in (tuple, list):
            return type(value)(self.copied(v, tensors) for v in value)
        if type(value) is dict:
            return {key: self.copied(v, tensors) for key, v in value.items()}
        if _is_record(value):
            made = copy.copy(value)
            for f in fields(value):
                object.__setattr__(made, f.name, self.copied(getattr(value, f.name), tensors))
            return made
        return value


def _is_record(value: Any) -> bool:
    # Callable ones are models and the like, which no one here may take apart.
    return is_dataclass(value) and not isinstance(value, type) and not callable(value)


def copy_all(to: list[Tensor], values: list[Tensor]) -> None:
    """One launch per dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(to, values, strict=True):
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(value)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)
