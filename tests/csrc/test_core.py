"""The compiled core's interface: keywords only, as the stub declares them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from moreau_ext import _core

STUB = ast.parse((Path(__file__).parents[2] / "moreau_ext/_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef) and node.name != "make_stream"}
STRUCTS = {name: node.body[0] for name, node in CLASSES.items() if isinstance(node.body[0], ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted(FUNCTIONS | STRUCTS))
def test_keywords_are_those_of_the_stub(name: str) -> None:
    declared = (FUNCTIONS | STRUCTS)[name]
    parameters = inspect.signature(getattr(_core, name)).parameters.values()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
    assert [parameter.name for parameter in parameters] == [argument.arg for argument in declared.args.kwonlyargs]


def test_members_of_enumerations_are_those_of_the_stub() -> None:
    for name, node in CLASSES.items():
        if name not in STRUCTS:
            declared = [line.target.id for line in node.body]
            assert list(getattr(_core, name).__members__) == declared


def test_every_name_is_in_the_stub() -> None:
    attributes = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)} - {"_Address"}
    public = {name for name in dir(_core) if not name.startswith("_")} - {"make_stream"}
    assert public == set(CLASSES) | set(FUNCTIONS) | attributes


def test_keywords_in_any_order() -> None:
    first = _core.Extents(batch=2, channels=3, positions=5000)
    other = _core.Extents(positions=5000, batch=2, channels=3)
    assert _core.prox_step_partials(extents=first, cuda=False) == _core.prox_step_partials(cuda=False, extents=other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1, "channels": 1}, "Extents: expected 3 keywords"),
        ({"batch": 1, "channels": 1, "positions": 1, "more": 1}, "Extents: expected 3 keywords"),
        ({"batch": 1, "channels": 1, "position": 1}, "Extents: missing keyword positions"),
        ({"batch": 1, "channels": 1, "positions": 1.5}, "Extents: wrong type or range of positions"),
        ({"batch": 1, "channels": 1, "positions": 1 << 63}, "Extents: wrong type or range of positions"),
        ({"batch": None, "channels": 1, "positions": 1}, "Extents: wrong type or range of batch"),
    ],
)
def test_wrong_keywords_are_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _core.Extents(**arguments)


def test_positional_arguments_and_other_structs_are_errors() -> None:
    with pytest.raises(TypeError, match="Extents: expected 3 keywords"):
        _core.Extents(1, 1, 1)
    with pytest.raises(TypeError, match="wrong type or range of extents"):
        _core.prox_step_partials(extents=1, cuda=False)
    with pytest.raises(TypeError, match="wrong type or range of features"):
        _core.momentum_step_partials(features=_core.Extents(batch=1, channels=1, positions=1), cuda=False)
