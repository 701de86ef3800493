"""Folding of batch normalisation into the layer before it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..model.memory import same_random_numbers
from ..model.modes import has_hooks
from .passes import Rows, again

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# fx swaps nn.Module.__call__ for the whole process while it traces.
_tracing = threading.Lock()


def fold_pairs(module: nn.Module, rows: Rows) -> tuple[bool, str]:
    """Folds what can be folded in place; the modules' own forward stays, with nn.Identity where a BatchNorm was."""
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BATCHNORMS)}
    if not norms:
        return False, "no BatchNorm"
    aliases = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    calls, ranks = _calls(module, rows)
    pairs, refusals, traced = _adjacent(module)
    left: dict[str, str] = {}
    folded = 0
    for name, norm in norms.items():
        before = pairs.get(name)
        layer = None if before is None else module.get_submodule(before)
        if before is None or layer is None:
            left[name] = refusals.get(name, "no Conv or Linear of its kind straight before it")
        elif any(_hooked(m) for m in (layer, norm)):
            left[name] = "hooks, or a forward of its own"
        elif norm.running_mean is None or norm.running_var is None or not norm.track_running_stats:
            left[name] = "uses the batch's own statistics"
        elif any(aliases[id(m)] != 1 for m in (layer, norm)) or (calls[before], calls[name]) != (1, 1):
            left[name] = "not used exactly once"
        elif isinstance(layer, nn.Linear) and ranks[name] != 2:
            # BatchNorm's channels are axis 1, Linear's the last.
            left[name] = "a Linear with more than one axis of features"
        else:
            _fold_pair(layer, norm)
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Identity().train(False))
            folded += 1
    reason = f"{folded} of {len(norms)} folded"
    if left:
        some = [f"{name}: {why}" for name, why in left.items()]
        reason += "; left alone " + ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
    if not traced:
        reason += "; cannot be traced, looked at neighbours in Sequential only"
    return folded > 0, reason


def _fold_pair(layer: Any, norm: Any) -> None:
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift
    )


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module may do more than its class says."""
    return "forward" in vars(module) or has_hooks(module)


def _calls(module: nn.Module, rows: Rows) -> tuple[Counter[str], dict[str, int]]:
    """How often each submodule runs in one pass, and the rank of its input: seen on a copy of its own."""
    watched = again(module)
    calls: Counter[str] = Counter()
    ranks: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            ranks[name] = args[0].dim() if args and isinstance(args[0], Tensor) else -1

        return count

    for name, part in watched.named_modules():
        part.register_forward_pre_hook(watch(name))
    inputs, args = rows.take(1)
    with same_random_numbers(rows.device):
        rows.run(watched, inputs, args)
    return calls, ranks


def _adjacent(module: nn.Module) -> tuple[dict[str, str], dict[str, str], bool]:
    """(name of a BatchNorm -> name of the only layer that feeds it and feeds nothing else, why not, whether by fx)."""
    modules = dict(module.named_modules())
    try:
        with _tracing:
            # On a copy: a forward that stores what it computes would leave proxies behind.
            graph = fx.Tracer().trace(again(module))
    except Exception:  # fx raises whatever the model's own code raises on a proxy
        return _in_sequentials(modules), {}, False
    # A weight that the forward itself reads must stay as it is.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    uses = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _BATCHNORMS):
            continue
        name, source = str(node.target), node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        before = str(source.target)
        if _PAIRS.get(type(modules[before])) is not type(modules[name]):
            continue
        if len(source.users) > 1:
            refusals[name] = f"the output of {before} is used elsewhere"
        elif uses[before] != 1 or uses[name] != 1:
            refusals[name] = "not used exactly once"
        elif read & {before, name}:
            refusals[name] = "the model reads its weights"
        else:
            pairs[name] = before
    return pairs, refusals, True


def _in_sequentials(modules: dict[str, nn.Module]) -> dict[str, str]:
    pairs = {}
    for name, module in modules.items():
        if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
            continue
        prefix = f"{name}." if name else ""
        for (before, layer), (after, norm) in pairwise(module.named_children()):
            if _PAIRS.get(type(layer)) is type(norm):
                pairs[prefix + after] = prefix + before
    return pairs
