"""Public signatures say what they take and return."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

import moreau_ext

ADAPTERS = ("captum", "grad_cam", "inseq", "quantus", "zennit")
# Where nothing narrower is true: by the name of the argument or "return", and why.
ALLOWED = {
    # Whatever the model returns; with object, a function of a dict would be refused.
    ("Explainer", "output_fn"): "Callable[[Any], Tensor] | None",
    # Values of JSON and TOML, and rows and records whose columns are of several types.
    ("Config.prepared_explainer", "choices"): "dict[str, Any] | None",
    ("Config.prepared_explainer", "return"): "tuple[Explainer, dict[str, Any] | None]",
    ("Config.record", "return"): "dict[str, Any]",
    ("Plan.identity", "return"): "dict[str, Any]",
    ("Preprocess.of", "settings"): "Mapping[str, Any]",
    ("Preprocess.of_hugging_face", "settings"): "Mapping[str, Any]",
    ("Preprocess.of_timm", "settings"): "Mapping[str, Any]",
    ("Preprocess.record", "return"): "dict[str, Any]",
    ("Source.describe", "return"): "dict[str, Any]",
    ("Stream.describe", "return"): "dict[str, Any]",
    ("claims", "return"): "list[dict[str, Any]]",
    ("explain_dataset", "return"): "Iterator[dict[str, Any]]",
    ("manifest", "return"): "dict[str, Any]",
    ("summarise", "return"): "list[dict[str, Any]]",
}


CALLED = ("__init__", "__call__", "__getitem__")


def public() -> Iterator[Any]:
    """Classes and functions that the package and its documented modules offer."""
    yield from (getattr(moreau_ext, name) for name in moreau_ext._WHERE)
    for module in [getattr(moreau_ext, name) for name in moreau_ext._MODULES]:
        yield from (getattr(module, name) for name in module.__all__)
    for module in [import_module(f"moreau_ext.integrations.{name}") for name in ADAPTERS]:
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        yield from (value for name, value in own.items() if name[0] != "_")


def signatures() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """By module: the name and the annotations of every function, overload, method and property, and of fields."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    seen = set()

    def add(function: Any) -> None:
        if inspect.isfunction(function) and function not in seen:
            seen.add(function)
            inner = inspect.unwrap(function)
            for one in typing.get_overloads(inner) or [inner]:
                found.setdefault(one.__module__, []).append((one.__qualname__, one.__annotations__))

    for offered in public():
        add(offered)
        for cls in offered.__mro__ if inspect.isclass(offered) else ():
            if cls.__module__.split(".")[0] == "moreau_ext" and cls not in seen:
                seen.add(cls)
                members = {k: v for k, v in vars(cls).items() if k[0] != "_" or k in CALLED}
                if "__dataclass_fields__" in vars(cls):
                    members.pop("__init__", None)  # the fields
                fields = {k: v for k, v in vars(cls).get("__annotations__", {}).items() if k[0] != "_"}
                found.setdefault(cls.__module__, []).append((cls.__qualname__, fields))
                for member in members.values():
                    add(member.fget if isinstance(member, property) else getattr(member, "__func__", member))
    return found


# Shapes and dtypes of numpy's arrays.
ARRAY = re.compile(r"\bnp\.(ndarray\[(tuple\[Any, \.\.\.\]|Any), (Any|np\.dtype\[[\w.]*\])\]|integer\[Any\])")


def spelled(annotation: str, names: dict[str, Any], depth: int = 3) -> str:
    """An annotation with the aliases in it that hold Any written out. Arrays and numpy's ArrayLike do not count."""

    def alias(match: re.Match[str]) -> str:
        value = names.get(match[0])
        if value is None or value is Any or depth == 0 or inspect.isclass(value) or inspect.ismodule(value):
            return match[0]
        written = str(value).replace("typing.", "").replace("numpy.", "np.")
        held = re.search(r"\bAny\b", written) and "_NestedSequence" not in written
        return f"({spelled(written, names, depth - 1)})" if held else match[0]

    return re.sub(r"\b[A-Z]\w+\b", alias, ARRAY.sub("Array", annotation))


@pytest.mark.parametrize("module", sorted(signatures()))
def test_no_public_signature_has_any_where_a_type_is_known(module: str) -> None:
    names = vars(sys.modules[module])
    for where, hints in signatures()[module]:
        for argument, hint in hints.items():
            written = getattr(hint, "__forward_arg__", hint)
            if re.search(r"\bAny\b", spelled(written, names)):
                assert ALLOWED.get((where, argument)) == written, f"{where}: {argument}: {written}"


def test_what_is_allowed_is_there() -> None:
    found = {(where, argument) for listed in signatures().values() for where, hints in listed for argument in hints}
    assert {*ALLOWED} <= found


def test_an_alias_does_not_hide_any() -> None:
    hidden = {"Alias": list[Any], "Array": 3, "Plain": list[int]}
    assert "Any" in spelled("Alias | None", hidden)
    assert "Any" not in spelled("Plain | np.ndarray[Any, np.dtype[np.float32]]", hidden)
