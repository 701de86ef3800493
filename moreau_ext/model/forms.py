"""Inputs in a form that the model does not take: another dtype, or no batch axis."""

from __future__ import annotations

import torch

from .._errors import MixingError, OutputTypeError, one_line
from ..ops.layout import Tensors
from .memory import out_of_memory
from .modules import modules_of
from .score import Score

# What may be missing: the batch axis, that of a gray image's channel, or both.
_AXES = {"x[None]": (None,), "x[None, None]": (None, None), "x[:, None]": (slice(None), None)}


def named_cure(score: Score, inputs: Tensors, error: Exception) -> Exception | None:
    """An error that names the form in which a model takes inputs that it failed on; None if no other form helps.

    The forms are tried by passes: only a cure that works is named.

    Args:
        score: bound to the inputs.
        inputs: checked.
        error: raised with them.
    """
    if isinstance(error, (MixingError, OutputTypeError, torch.AcceleratorError)) or out_of_memory(error):
        return None

    def takes(rows: Tensors) -> bool:
        try:
            score.output(rows)
        except Exception:  # a model may fail in any way
            return False
        return True

    dtypes = {p.dtype for m in modules_of(score.model) for p in m.parameters() if p.is_floating_point()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else inputs[0].dtype
    cast = tuple([x.to(dtype) for x in inputs])
    other_dtype = any(x.dtype != dtype for x in inputs)
    if takes(inputs):
        return None  # the target or a setting is wrong
    name, shape = str(dtype), tuple(inputs[0].shape)
    said = f"The model says: {one_line(error)}"
    if other_dtype and takes(cast):
        return TypeError(f"inputs: are {inputs[0].dtype} and the model is {name}; give x.to({name}). {said}")
    to = f".to({name})" if other_dtype else ""
    for text, index in _AXES.items():
        try:
            more = tuple([x[index] for x in cast])
        except IndexError:  # a tuple's row beside an image
            continue
        if takes(more):
            return ValueError(
                f"inputs: the model fails on shape {shape} and takes {tuple(more[0].shape)}; give {text}{to}, since "
                f"inputs have a batch axis, and images one of channels too. {said}"
            )
    return None
