"""Folding of batch normalisation into the layer before it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
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

# A layer of a subclass is tried on its inputs, and far outside of them: there a clamp shows that no example reaches.
_FAR = (1.0, -10.0, 1000.0)

# fx swaps nn.Module.__call__ for the whole process while it traces.
_tracing = threading.Lock()


def fold_pairs(module: nn.Module, rows: Rows, tolerance: float, subclasses: bool = True) -> tuple[bool, str]:
    """Folds what can be folded in place; the modules' own forward stays, with nn.Identity where a BatchNorm was.

    A layer whose class is a subclass of Conv or Linear may do more with its weights than torch's own, so it is folded
    only where the folded layer gives the same numbers.

    Args:
        module: changed in place.
        rows: what the layers are tried on.
        tolerance: of that comparison, relative to the largest number.
        subclasses: False leaves subclasses alone.
    """
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BATCHNORMS)}
    if not norms:
        return False, "no BatchNorm"
    aliases = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    calls, ranks = _calls(module, rows)
    pairs, refusals, traced = _adjacent(module)
    differ = _differing(module, pairs, rows, tolerance) if subclasses else {}
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
        elif _own_class(layer) and (name in differ or not subclasses):
            left[name] = differ.get(name, "a class of its own")
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


def _own_class(layer: nn.Module) -> bool:
    return type(layer) not in _PAIRS


def _norm_of(layer: nn.Module) -> type[nn.Module] | None:
    """The BatchNorm that fits a layer, by the class of torch that its own class is or derives from."""
    return next((norm for kind, norm in _PAIRS.items() if isinstance(layer, kind)), None)


def _differing(module: nn.Module, pairs: dict[str, str], rows: Rows, tolerance: float) -> dict[str, str]:
    """Layers of subclasses that cannot be folded, by the name of their BatchNorm, with the reason.

    Both are compared on the layer's own inputs in one pass, and on −10 and 1,000 times these.
    """
    watched = again(module)
    reasons: dict[str, str] = {}
    seen: dict[str, Tensor] = {}

    def keep(before: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                seen[before] = args[0].detach()

        return hook

    def judge(name: str, before: str) -> Callable[..., None]:
        layer, norm = watched.get_submodule(before), watched.get_submodule(name)

        def hook(*_: Any) -> None:
            given = seen.pop(before, None)
            if given is None:
                reasons[name] = "a class of its own that takes more than one tensor"
                return
            try:
                folded = again(layer)
                _fold_pair(folded, norm)
                for x in [far * given for far in _FAR]:
                    # forward, not the call: the hooks here would be called again.
                    expected, found = norm.forward(layer.forward(x)), folded.forward(x)
                    if not (found - expected).abs().amax() <= tolerance * expected.abs().amax():
                        reasons[name] = "a class of its own, and folding would change its output"
                        break
            except Exception as error:  # the class is the user's and may do anything
                reasons[name] = f"a class of its own that failed: {type(error).__name__}"

        return hook

    for name, before in pairs.items():
        layer = watched.get_submodule(before)
        if not _own_class(layer) or _hooked(layer):
            continue
        weight = layer._parameters.get("weight")
        if parametrize.is_parametrized(layer) or weight is None or "bias" not in layer._parameters:
            reasons[name] = "a class of its own whose weights are no plain parameters"
            continue
        layer.register_forward_hook(keep(before))
        watched.get_submodule(name).register_forward_hook(judge(name, before))
    if any(_own_class(watched.get_submodule(before)) for before in pairs.values()):
        inputs, args = rows.take(2 if rows.batch > 1 else 1)
        with torch.no_grad(), same_random_numbers(rows.device):
            watched(*inputs, *args)
    return reasons


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


class _LayerTracer(fx.Tracer):
    """Layers of subclasses are nodes of the graph too, as torch's own are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _norm_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _adjacent(module: nn.Module) -> tuple[dict[str, str], dict[str, str], bool]:
    """(name of a BatchNorm -> name of the only layer that feeds it and feeds nothing else, why not, whether by fx)."""
    modules = dict(module.named_modules())
    try:
        with _tracing:
            # On a copy: a forward that stores what it computes would leave proxies behind.
            graph = _LayerTracer().trace(again(module))
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
        if _norm_of(modules[before]) is not type(modules[name]):
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
            if _norm_of(layer) is type(norm):
                pairs[prefix + after] = prefix + before
    return pairs
