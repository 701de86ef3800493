"""Models by name: a factory, an exported program, a Hugging Face folder; weights without running what they say."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .preprocess import Preprocess
from .sources.base import reason

_CALL = re.compile(r"^(?P<module>[\w.]+):(?P<name>[\w.]+)(?P<arguments>\(.*\))?$", re.DOTALL)


def load_model(spec: str, weights: str | Path | None = None) -> tuple[nn.Module, Preprocess | None]:
    """A model on the CPU in eval mode, and the preprocessing that it says it was trained with, if it says so.

    Args:
        spec: "package.module:factory", called without arguments or with literal ones, as in
            'timm:create_model("resnet18", num_classes=10)' (an nn.Module of that name is taken as it is); a file
            "model.pt2" of torch.export; or "hf:FOLDER" with an image classifier saved by Hugging Face transformers.
        weights: a .safetensors file, or one of torch.save that holds tensors alone; for the first kind only.

    Raises:
        ValueError: no model there, or weights that do not fit or hold more than tensors.
        ImportError: a package that is needed is missing.
    """
    if spec.startswith("hf:"):
        model, preprocess = _hugging_face(Path(spec.removeprefix("hf:")))
    elif spec.endswith(".pt2"):
        model, preprocess = _exported(Path(spec)), None
    else:
        model = _factory(spec)
        preprocess = None
    if weights is not None:
        if spec.startswith("hf:") or spec.endswith(".pt2"):
            raise ValueError(f"--weights: {spec} holds its own")
        _fill(model, Path(weights))
    for module in model.modules():
        module.training = False  # the flag alone: an exported program refuses eval()
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if preprocess is None and isinstance(settings, dict) and "input_size" in settings:
        preprocess = Preprocess.of_timm(settings)
    return model, preprocess


def load_preprocess(spec: str) -> Preprocess:
    """From a TOML or JSON file, or from torchvision's weights: "torchvision.models:ResNet50_Weights.DEFAULT"."""
    if ":" in spec and not Path(spec).exists():
        held = _named(spec, "--preprocess")
        transform = held.transforms() if hasattr(held, "transforms") else held
        if isinstance(transform, Preprocess):
            return transform
        try:
            return Preprocess.of_torchvision(transform)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"--preprocess {spec}: expected a Preprocess or weights of torchvision, {error}"
            ) from error
    if not Path(spec).is_file():
        raise FileNotFoundError(f"--preprocess {spec}: is not there")
    return Preprocess.read(spec)


def _named(spec: str, option: str) -> Any:
    """What "package.module:name" or "package.module:name(literals)" stands for, uncalled where it has no brackets."""
    match = _CALL.match(spec)
    if match is None:
        raise ValueError(f"{option} {spec}: expected package.module:factory, a .pt2 file or hf:FOLDER")
    try:
        held = importlib.import_module(match["module"])
    except ImportError as error:
        hint = "; a module is named without .py" if match["module"].endswith(".py") else ""
        raise ImportError(f"{option} {spec}: cannot import {match['module']} ({error}){hint}") from error
    for part in match["name"].split("."):
        if not hasattr(held, part):
            raise ValueError(f"{option} {spec}: {match['module']} has no {match['name']}")
        held = getattr(held, part)
    if match["arguments"] is None:
        return held
    factory: Any = held
    try:
        call = ast.parse(f"f{match['arguments']}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not one call")
        positional = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'{option} {spec}: the arguments must be literals, like ("name", 10) ({error})') from error
    return factory(*positional, **named)


def _factory(spec: str) -> nn.Module:
    made: Any = _named(spec, "--model")
    if not isinstance(made, nn.Module) and callable(made):
        factory: Any = made
        made = factory()
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {spec}: expected an nn.Module, got {type(made).__name__}")
    return made


def _fill(model: nn.Module, path: Path) -> None:
    """Loads weights into a model. A pickle that holds more than tensors is refused before anything of it runs."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path}: is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        what = "holds more than tensors, or is damaged" if path.suffix != ".safetensors" else "is damaged"
        raise ValueError(f"--weights {path}: {what}, and is not loaded ({reason(error).split('. ')[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {path}: expected tensors by name (a state_dict), got {type(state).__name__}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"--weights {path}: do not fit the model: {' '.join(str(error).split())[:400]}") from error


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"--model {path}: is not there")
    try:
        _check_archive(path)
        # torch._check's own guards stay in the graph: a batch of another size than it was exported for says so.
        return torch.export.load(path).module()
    except Exception as error:
        raise ValueError(f"--model {path}: is no exported program that can be loaded: {reason(error)[:400]}") from error


def _check_archive(path: Path) -> None:
    """torch.export.load unpickles what an archive asks it to. Refuses archives that ask for more than tensors."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            # Pickled weights, constants and objects are declared in the archive's own tables.
            if entry.endswith(".json") and '"use_pickle":true' in archive.read(entry).decode().replace(" ", ""):
                raise ValueError(f"{entry} asks for a pickle")
            if "custom_obj" in entry or "opaque_obj" in entry:
                raise ValueError(f"{entry} is a pickled object")
            if entry.endswith(".pt"):
                torch.load(io.BytesIO(archive.read(entry)), weights_only=True)


def _hugging_face(folder: Path) -> tuple[nn.Module, Preprocess | None]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model hf:{folder}: holds no config.json")
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(
            f"--model hf: needs transformers ({error}); install it with: pip install transformers"
        ) from error
    # Only safetensors: nothing of a pickle, nothing from the network, no code from the folder.
    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    path = folder / "preprocessor_config.json"
    return model, Preprocess.of_hugging_face(json.loads(path.read_text())) if path.is_file() else None


def fingerprint(model: Any) -> dict[str, str]:
    """What tells a model from another: its class, and a digest of its weights."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        called = getattr(model, "__qualname__", None)
        return {"name": f"{model.__module__}.{called}" if called else name}
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        data = value.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return {"name": name, "weights": digest.hexdigest()}
