"""The identity of a model: its name and a digest of its weights."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._errors import MoreauWarning
from .modules import modules_of

_WORDS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def fingerprint(model: Any) -> dict[str, str]:
    """The class or name of a model, a digest of its weights, and what the digest leaves out.

    The digest covers the state_dict: tensors of every layout, quantised ones, and extra state of numbers, words, arrays
    and containers. A callable that is no nn.Module is known by its name and the modules that it is found to use.

    Example:
        >>> import torch
        >>> from moreau_ext.model.fingerprint import fingerprint
        >>> sorted(fingerprint(torch.nn.Linear(3, 2)))
        ['name', 'weights']
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    called = None if isinstance(model, nn.Module) else getattr(model, "__qualname__", None)
    made = {"name": f"{model.__module__}.{called}" if called else name}
    found = modules_of(model)
    inner = {id(m) for module in found for m in module.children()}
    states = [model] if isinstance(model, nn.Module) else [m for m in found if id(m) not in inner]
    if not states:
        return made
    digest, left_out = hashlib.blake2b(digest_size=16), list[str]()
    for module in states:
        for key, value in sorted(module.state_dict().items()):
            _update(digest, key, value, left_out)
    made["weights"] = digest.hexdigest()
    if left_out:
        made["left_out"] = ", ".join(left_out)
        warnings.warn(
            f"the fingerprint of the model leaves out {made['left_out']}, which cannot be told from another in a "
            "repeatable way: a job is resumed although it may have changed",
            MoreauWarning,
            stacklevel=2,
        )
    return made


def _update(digest: Any, key: str, value: Any, left_out: list[str]) -> None:
    """Adds a value; what has no bytes that are the same in every process is noted instead."""
    if isinstance(value, Tensor) and is_lazy(value):
        left_out.append(key)
    elif isinstance(value, Tensor):
        try:
            parts = _tensor_parts(value)
        except (RuntimeError, NotImplementedError, TypeError):
            left_out.append(key)
            return
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        for part in parts:
            digest.update(part)
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        array = np.ascontiguousarray(value)
        digest.update(f"{key} {array.shape} {array.dtype.str}\n".encode() + array.tobytes())
    elif isinstance(value, io.BytesIO):
        digest.update(key.encode() + b"\n" + value.getvalue())
    elif isinstance(value, _WORDS):
        digest.update(f"{key} {value!r}\n".encode())
    elif isinstance(value, Mapping):
        digest.update(f"{key} {len(value)} items\n".encode())
        for name, held in sorted(value.items(), key=lambda item: repr(item[0])):
            _update(digest, f"{key}.{name}", held, left_out)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{key} {len(value)} items\n".encode())
        for i, held in enumerate(value):
            _update(digest, f"{key}.{i}", held, left_out)
    else:
        left_out.append(key)


def _tensor_parts(value: Tensor) -> list[Any]:
    """The bytes of a tensor."""
    if value.device.type == "meta":
        raise NotImplementedError
    value = value.detach()
    if value.is_quantized:
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        if not per_channel:
            scales = f"{value.q_scale()!r} {value.q_zero_point()}"
            return [*_tensor_parts(value.int_repr()), scales.encode()]
        scale, zero = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        return [part for t in (value.int_repr(), scale, zero) for part in _tensor_parts(t)]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return [part for t in (value.indices(), value.values()) for part in _tensor_parts(t)]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [p for t in (value.crow_indices(), value.col_indices(), value.values()) for p in _tensor_parts(t)]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [p for t in (value.ccol_indices(), value.row_indices(), value.values()) for p in _tensor_parts(t)]
    data = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return [data.view(torch.uint8).numpy().data] if data.numel() else []
