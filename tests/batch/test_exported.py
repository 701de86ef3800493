"""Exported programs: those of torch load, and an archive that would run code is refused before anything of it runs."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Malicious
from torch import nn

from moreau_ext.batch import load_model

Entries = dict[str, bytes]


class Net(nn.Module):
    """With a constant, a branch without gradients, and sizes in its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv-1": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2)})
        self.constant = torch.arange(2.0)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.parts["norm"](self.parts["conv-1"](x)).mean((2, 3))
        with torch.no_grad():
            shift = self.constant * (x.shape[0] // 2)
        return {"logits": y + shift}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "good.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(Net().eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=sizes)
        torch.export.save(program, path, extra_files={"note.txt": "mine"})
    return path


def entries(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, found: Entries) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found.items():
            archive.writestr(name, data)
    return path


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_programs_of_torch_load(good: Path, tmp_path: Path) -> None:
    x = torch.rand(3, 1, 8, 8)
    expected = torch.export.load(good).module()(x)["logits"]
    model, _ = load_model(str(good))
    torch.testing.assert_close(model(x)["logits"], expected, rtol=0, atol=0)
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.rand(65, 1, 8, 8))  # the guards are there
    again = write(tmp_path / "again.pt2", entries(good))
    assert torch.equal(load_model(str(again))[0](x)["logits"], expected)


@pytest.mark.parametrize(
    "net",
    [
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (2, 4)), nn.GELU(), nn.Upsample(scale_factor=1.5)),
    ],
    ids=["attention", "shapes"],
)
def test_other_programs_load(net: nn.Module, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).reshape(x.shape[0] // 2, 2, -1).sum(1)  # makes guards of sizes

    x = torch.rand(4, 6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim.AUTO},)
        torch.export.save(torch.export.export(Odd().eval(), (x,), dynamic_shapes=sizes), tmp_path / "net.pt2")
    torch.testing.assert_close(load_model(str(tmp_path / "net.pt2"))[0](x), Odd().eval()(x))


# --- what runs code ------------------------------------------------------------------------------------------------


def table(name: str, change: Callable[[bytes], bytes]) -> Callable[[Entries, Path], None]:
    def tamper(found: Entries, ran: Path) -> None:
        entry = next(n for n in found if n.endswith(name))
        found[entry] = change(found[entry])
        for weight in [n for n in found if re.search(r"/(weight|tensor)_\d+$", n)]:
            found[weight] = saved(Malicious(ran))

    return tamper


def asks(text: bytes, of: bytes = b'"use_pickle": false') -> Callable[[bytes], bytes]:
    return lambda data: data.replace(of, text)


def program(change: Callable[[Any, str], None]) -> Callable[[Entries, Path], None]:
    """Changes the parsed program; ``change`` gets Python source that touches the file."""

    def tamper(found: Entries, ran: Path) -> None:
        entry = next(n for n in found if n.endswith("models/model.json"))
        value = json.loads(found[entry])
        change(value, f"__import__('pathlib').Path('{ran}').touch()")
        found[entry] = json.dumps(value).encode()

    return tamper


def nodes(value: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = value["graph_module"]["graph"]["nodes"]
    return found


def set_size(value: Any, text: str) -> None:
    value["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text


def call(value: Any, target: str, *texts: str) -> None:
    node = nodes(value)[1]
    node["target"] = target
    node["inputs"] = [{"name": "", "arg": {"as_string": text}, "kind": 1} for text in texts]


def structure(kind: str, context: str) -> Callable[[Any, str], None]:
    def change(value: Any, _: str) -> None:
        leaf = {"type": None, "context": None, "children_spec": []}
        spec = [1, {"type": kind, "context": context, "children_spec": [leaf]}]
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(spec)

    return change


def entry(name: str, make: Callable[[Path], bytes]) -> Callable[[Entries, Path], None]:
    return lambda found, ran: found.update({f"good/{name}": make(ran)})


def old_layout(found: Entries, ran: Path) -> None:
    pickled = b"".join(pickle.dumps(v, 0) for v in (torch.serialization.MAGIC_NUMBER, 1001, {}, Malicious(ran)))
    model = next(data for name, data in found.items() if name.endswith("model.json"))
    found.clear()
    found |= {
        "version": b"8.20",
        "serialized_exported_program.json": model,
        "serialized_state_dict.json": pickled,
        "serialized_constants.json": b"",
        "serialized_example_inputs.pt": saved(({},)),
    }


EVIL: dict[str, Callable[[Entries, Path], None]] = {
    "pickled weights": table("model_weights_config.json", asks(b'"use_pickle": true')),
    "escaped": table("model_weights_config.json", asks(b'"use\\u005fpickle": true')),
    "escaped twice over": table("model_weights_config.json", asks(b'"\\u0075se_pickl\\u0065": true')),
    "tab": table("model_weights_config.json", asks(b'"use_pickle"\t:\ttrue')),
    "number": table("model_weights_config.json", asks(b'"use_pickle": 1')),
    "text": table("model_weights_config.json", asks(b'"use_pickle": "no"')),
    "last of two": table("model_weights_config.json", asks(b'"use_pickle": false, "use_pickle": true')),
    "utf-16": table(
        "model_weights_config.json",
        lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true').decode().encode("utf-16"),
    ),
    "pickled constants": table("model_constants_config.json", asks(b'"use_pickle": true')),
    "opaque object": table("model_constants_config.json", asks(b'"opaque_obj_0"', b'"tensor_0"')),
    "custom object": entry("data/constants/custom_obj_0", lambda ran: saved(Malicious(ran))),
    "path out of the folder": table("model_weights_config.json", asks(b'"../sample_inputs/model.pt"', b'"weight_0"')),
    "example inputs": entry("data/sample_inputs/model.pt", lambda ran: saved(Malicious(ran))),
    "weights of torch 2.8": entry("data/weights/model.pt", lambda ran: saved({"w": Malicious(ran)})),
    "plain pickle": entry("data/sample_inputs/model.pt", lambda ran: pickle.dumps(Malicious(ran), 2)),
    "shared object": entry("data/aotinductor/model/x.so", lambda _: b"\x7fELF"),
    "second program": entry("models/other.json", lambda _: b"{}"),
    "unknown entry": entry("data/hooks/start.py", lambda _: b"print()"),
    "old layout": old_layout,
    "outside its folder": lambda found, _: found.update({"version": b"8.20"}),
    "system as operator": program(lambda v, run: call(v, "torch.serialization.os.system", f"touch {run}")),
    "operator.call": program(lambda v, run: call(v, "_operator.call", run)),
    "methodcaller": program(lambda v, run: call(v, "_operator.methodcaller", run)),
    "load_library": program(lambda v, _: call(v, "torch.ops.load_library", "x.so")),
    "attributes of operators": program(lambda v, run: call(v, "torch.ops.aten.__class__.__init__.x", run)),
    "module of math": program(lambda v, run: call(v, "math.__loader__.load_module", "os")),
    "file operator": program(lambda v, _: call(v, "torch.ops.aten.from_file.default", "/etc/passwd")),
    "extension operator": program(lambda v, _: call(v, "#evil:x")),
    "operator as argument": program(
        lambda v, _: nodes(v)[1]["inputs"].append({"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1})
    ),
    "size": program(set_size),
    "size in a call": program(lambda v, run: set_size(v, f"Max(Integer(2), {run})")),
    "size by attributes": program(lambda v, _: set_size(v, "Symbol.__init__.__globals__")),
    "name of a symbol": program(lambda v, run: set_size(v, f'Symbol("{run}")')),
    "lambda": program(lambda v, _: set_size(v, "(lambda: 1)()")),
    "guard": program(lambda v, run: v.update(guards_code=[run])),
    "guard behind a comment": program(lambda v, run: v.update(guards_code=[f"True) #\n  {run} #"])),
    "guard by a subscript": program(lambda v, _: v.update(guards_code=["L['x'].__class__ == 1"])),
    "imported type": program(
        structure(
            "collections.defaultdict",
            '{"default_factory_module": "this", "default_factory_name": "x", "dict_context": []}',
        )
    ),
    "imported enumeration": program(
        structure("builtins.dict", '[{"__enum__": true, "fqn": "this:X", "name": "A"}]')
    ),
    "name of a node": program(lambda v, run: nodes(v)[1].update(name=f"a, {run}")),
    "name of an argument": program(lambda v, run: nodes(v)[1]["inputs"][0].update(name=run)),
    "name of an input": program(
        lambda v, run: v["graph_module"]["graph"]["inputs"][-1]["as_tensor"].update(name=f"x={run}")
    ),
    "name of a weight": program(
        lambda v, run: v["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name=run)
    ),
    "key": program(lambda v, run: v["graph_module"]["graph"]["tensor_values"].update({run: None})),
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_would_run_code_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    found = entries(good)
    EVIL[name](found, ran)
    assert found != entries(good)
    path = write(tmp_path / "evil.pt2", found)
    with pytest.raises(ValueError, match="is no exported program that can be loaded") as raised:
        load_model(str(path))
    assert not ran.exists()
    # Refused here, not by an accident of torch's.
    assert type(raised.value.__cause__) in (ValueError, pickle.UnpicklingError)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_named_twice_is_refused(good: Path, tmp_path: Path) -> None:
    """One reader takes the first, another the last."""
    with zipfile.ZipFile(tmp_path / "twice.pt2", "w") as archive:
        for name, data in entries(good).items():
            archive.writestr(name, data)
        archive.writestr("good/data/sample_inputs/model.pt", saved(({},)))
    with pytest.raises(ValueError, match="names an entry twice"):
        load_model(str(tmp_path / "twice.pt2"))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x04."])
def test_damaged_archives_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(data)
    with pytest.raises(ValueError, match="no exported program that can be loaded"):
        load_model(str(tmp_path / "x.pt2"))
