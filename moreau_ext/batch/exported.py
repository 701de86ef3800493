"""``.pt2`` archives of ``torch.export``: checked against what is known, and loaded from a copy of what was checked.

torch's own loader runs code that an archive asks for in more than one way: pickled weights and constants, shared
objects, expressions that sympy evaluates, guards that are compiled, types that are imported, names that become Python
source, and operators that are any attribute of torch. So each entry and each text is checked against what
``torch.export.save`` writes for tensors and operators of ATen. The loader then gets a new archive of the checked
entries, so that it cannot read others, whatever the order, the encoding or the duplicates of the file.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Entries by their path below the root folder. Others are refused: pickled objects (custom_obj_0), shared objects
# (data/aotinductor), programs of other names, and the layout of torch 2.7 and older, which holds pickles.
_COPIED = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_PAYLOADS = re.compile(r"data/(weights|constants)/model_(weights|constants)_config\.json")
_PROGRAM = "models/model.json"
_TENSORS = re.compile(r"data/(sample_inputs|weights|constants)/model\.pt")
_EXTRA = "extra/"

# Names become attributes, arguments or parts of Python source: no quotes, brackets, or line breaks.
_NAME = re.compile(r"[\w.\-+ :/]*")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|")
_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}

_NAMESPACES = {"aten", "prims", "quantized_decomposed", "torchvision"}
# They read or write files.
_OPERATORS_REFUSED = {"from_file", "save"}
_HIGHER_ORDER = {
    "associative_scan",
    "auto_functionalized",
    "auto_functionalized_v2",
    "cond",
    "flex_attention",
    "invoke_subgraph",
    "map_impl",
    "scan",
    "while_loop",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}
_ARITHMETIC = {
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "inv", "invert", "le", "lshift", "lt", "mod", "mul",
    "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor",
}  # fmt: skip
_SYMBOLIC = re.compile(r"torch\._?sym_\w+")

# Functions and flags of sympy's and torch's expressions of sizes.
_FUNCTIONS = {
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float", "FloatPow", "FloatTrueDiv",
    "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv", "Integer",
    "IsNonOverlappingAndDenseIndicator", "LShift", "Le", "LessThan", "Lt", "Max", "Min", "Mod", "ModularIndexing",
    "Mul", "Ne", "Not", "Or", "Piecewise", "ExprCondPair", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational",
    "RoundDecimal", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat",
    "TruncToInt", "Unequality", "Where", "ceiling", "floor", "sqrt",
}  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,6}\d+|int_oo|oo|inf|true|false")
_METHODS = {"size", "stride", "storage_offset", "dim", "numel", "is_integer", "isnan", "isinf"}
_ATTRIBUTES = {"shape", "dtype", "device", "layout", "inf", "nan", "requires_grad"}
_NODES = (
    ast.Expression, ast.Load, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.LShift, ast.RShift, ast.Compare, ast.Eq, ast.NotEq,
    ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot, ast.Tuple, ast.List, ast.IfExp,
)  # fmt: skip


def load_exported(path: Path) -> nn.Module:
    """The module of a program of ``torch.export``.

    Raises:
        ValueError, zipfile.BadZipFile, ...: the archive is damaged or holds anything but tensors and known operators.
            Nothing of it has run.
    """
    checked = _checked_copy(path)
    logger = logging.getLogger("torch.export")  # it prints tracebacks of errors that are raised as well
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # The guards stay in the graph, so a batch size that was not exported raises an error.
        module: nn.Module = torch.export.load(checked).module()
    finally:
        logger.setLevel(level)
    return module


def _checked_copy(path: Path) -> io.BytesIO:
    """A new archive of the checked entries. Tables are written anew from their parsed contents."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as checked:
        names = archive.namelist()
        roots = {name.split("/", 1)[0] for name in names}
        if "version" in names:
            raise ValueError("has the layout of torch 2.7 and older, which holds pickles; export the model again")
        if len(set(names)) < len(names) or len(roots) != 1:
            raise ValueError("names an entry twice, or has entries outside its folder")
        for name in names:
            inner = name.split("/", 1)[-1]
            if inner.startswith(_EXTRA) or name.endswith("/"):
                continue  # torch reads them as text; nobody asks for them
            data = archive.read(name)
            if inner == _PROGRAM:
                data = json.dumps(_check_program(json.loads(data))).encode()
            elif _PAYLOADS.fullmatch(inner):
                data = json.dumps(_check_payloads(json.loads(data))).encode()
            elif _TENSORS.fullmatch(inner):
                # As torch.export.load does at first; if this fails, it would unpickle everything.
                torch.load(io.BytesIO(data), weights_only=True)
            elif not _COPIED.fullmatch(inner):
                raise ValueError(f"{name} is no part of an exported program of tensors")
            checked.writestr(f"model/{inner}", data)
    copy.seek(0)
    return copy


def _check_payloads(table: Any) -> Any:
    """A table of weights or constants: raw tensors only."""
    for name, about in table["config"].items():
        if about.get("use_pickle") is not False:
            raise ValueError(f"{name[:80]!r} asks for a pickle")
        if not re.fullmatch(r"weight_\d+|tensor_\d+", about["path_name"]):
            raise ValueError(f"{about['path_name'][:80]!r} is no entry of a tensor")
    _check_names(table)
    return table


def _check_program(program: Any) -> Any:
    """A program: known operators, and texts that are names. Metadata of nodes but for the traces is left out."""
    for node in _dictionaries(program):
        if isinstance(node.get("metadata"), dict):
            traces = node["metadata"].get("stack_trace")
            node["metadata"] = {"stack_trace": traces} if isinstance(traces, str) else {}
        for key in ("target", "as_operator"):
            if key in node:
                _check_operator(node[key])
        if "expr_str" in node:
            _check_expression(node["expr_str"], _FUNCTIONS)
        for key in ("in_spec", "out_spec"):
            if isinstance(node.get(key), str):
                _check_structure(node[key])
        if node.get("as_custom_obj") or node.get("custom_obj_values"):
            raise ValueError("holds a custom object")
        for key in ("name", "as_name"):
            if not _IDENTIFIER.fullmatch(node.get(key) or ""):
                raise ValueError(f"{node[key]!r:.80} is no name")
    for guard in program.get("guards_code") or []:
        _check_expression(guard, _FUNCTIONS | {"L", "math", "len", "max", "min", "abs"}, guard=True)
    _check_names(program)
    return program


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in a value of JSON."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield item
            todo += item.values()
        elif isinstance(item, list):
            todo += item


# Checked by other rules, or constant arguments of operators, which are written as literals.
_OTHER = {
    "target",
    "as_operator",
    "expr_str",
    "in_spec",
    "out_spec",
    "guards_code",
    "stack_trace",
    "as_string",
    "as_strings",
}


def _check_names(value: Any) -> None:
    """Texts that become attributes or source are names; keys too."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            for key, below in item.items():
                todo.append(key)
                if key not in _OTHER:
                    todo.append(below)
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, str) and not _NAME.fullmatch(item):
            raise ValueError(f"{item[:80]!r} is no name")


def _check_operator(target: Any) -> None:
    parts = target.split(".") if isinstance(target, str) else [""]
    if _SYMBOLIC.fullmatch(".".join(parts)) and "__" not in parts[1]:
        return
    if parts[0] == "_operator" and len(parts) == 2 and parts[1] in _ARITHMETIC:
        return
    if parts[0] == "math" and len(parts) == 2 and callable(getattr(math, parts[1], None)) and parts[1][0] != "_":
        return
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4 and parts[3] in _HIGHER_ORDER:
        return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in _NAMESPACES:
        _, _, namespace, name, overload = parts
        safe = all(part.isidentifier() and not part.startswith("__") for part in (name, overload))
        if safe and name not in _OPERATORS_REFUSED:
            found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
            if isinstance(found, torch._ops.OpOverload):
                return
    raise ValueError(f"{target!r:.80} is no operator that is allowed here")


def _check_structure(text: str) -> None:
    """The structure of inputs or outputs: tuples, lists and dictionaries. Other types may be imported by name."""
    todo = [json.loads(text)[1]]
    while todo:
        node = todo.pop()
        context = node["context"]
        keys = json.loads(context) if isinstance(context, str) else context
        plain = keys is None or (isinstance(keys, list) and all(isinstance(k, (str, int)) for k in keys))
        if node["type"] not in _TYPES or not plain:
            raise ValueError(f"its inputs or outputs hold {node['type']!r:.80}, which is no tuple, list or dictionary")
        todo += node["children_spec"]


def _check_expression(text: Any, functions: set[str], guard: bool = False) -> None:
    """An expression of sizes, which torch evaluates: arithmetic, comparisons, symbols and known functions.

    Args:
        text: of the expression.
        functions: that may be called.
        guard: allow ``L['x'].size()[0]`` and the like.
    """

    def refuse() -> ValueError:
        return ValueError(f"{text!r:.120} is no expression of sizes")

    # No comments, continued lines or double quotes: torch writes the text into a line of source.
    if not isinstance(text, str) or len(text) > 10_000 or set(text) & set('#\n\r\\";'):
        raise refuse()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise refuse() from error
    names = set()  # texts that are names of symbols or inputs
    for node in ast.walk(tree):
        known = isinstance(node, _NODES)
        if isinstance(node, ast.Constant):
            known = isinstance(node.value, (int, float)) or node in names
        elif isinstance(node, ast.Name):
            known = node.id in functions or bool(_SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.keyword):
            known = node.arg in (
                "positive",
                "integer",
                "nonnegative",
                "real",
                "finite",
                "zero",
                "evaluate",
                "precision",
            )
        elif isinstance(node, ast.Call):
            called = node.func
            known = (isinstance(called, ast.Name) and called.id in functions) or (
                guard and isinstance(called, ast.Attribute) and called.attr in _METHODS
            )
            if isinstance(called, ast.Name) and called.id in ("Symbol", "Float") and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and re.fullmatch(r"[A-Za-z_]\w*|[\d.e+-]+", str(first.value)):
                    names.add(first)
        elif guard and isinstance(node, ast.Subscript):
            known = True
            if isinstance(node.slice, ast.Constant) and _NAME.fullmatch(str(node.slice.value)):
                names.add(node.slice)
        elif guard and isinstance(node, ast.Attribute):
            known = node.attr in _METHODS | _ATTRIBUTES
        if not known:
            raise refuse()
