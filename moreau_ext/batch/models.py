"""Models by name: a factory, an exported program or a Hugging Face folder. Weights are loaded without pickles."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import SettingError, SettingFileNotFoundError, one_line
from ..model.fingerprint import fingerprint as fingerprint
from .exported import load_exported
from .preprocess import Preprocess
from .workdir import import_named

_CALL = re.compile(r"^(?P<module>[\w.]+):(?P<name>[\w.]+)(?P<arguments>\(.*\))?$", re.DOTALL)
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_EXPECTED = {
    "model": "package.module:factory, a .pt2 file or hf:FOLDER",
    "preprocess": "a TOML or JSON file, or package.module:name",
}


def load_model(spec: str, weights: str | Path | None = None) -> tuple[nn.Module, Preprocess | None]:
    """Loads a model on the CPU in eval mode, with the preprocessing that its metadata describes, if any.

    Args:
        spec: "package.module:factory", called without arguments or with literal ones, as in
            'timm:create_model("resnet18", num_classes=10)' (an nn.Module of that name is taken as it is); a file
            "model.pt2" of torch.export; or "hf:FOLDER" with an image classifier saved by Hugging Face transformers.
        weights: a .safetensors file, or a file of torch.save with tensors only; for a factory only.

    Raises:
        ValueError: no model of that name, or weights that do not fit or hold more than tensors.
        FileNotFoundError: no such file or folder.
        ImportError: safetensors or transformers is needed and missing.
    """
    if Path(spec).suffix in _WEIGHTS and (Path(spec).is_file() or ":" not in spec):
        raise SettingError(
            "model",
            f"{spec} holds weights and no model. Name a factory, as package.module:factory, and give the file as "
            "weights",
        )
    if spec.startswith("hf:"):
        model, preprocess = _hugging_face(Path(spec.removeprefix("hf:")))
    elif spec.endswith(".pt2"):
        model, preprocess = _exported(Path(spec)), None
    else:
        model = _factory(spec)
        preprocess = None
    if weights is not None:
        if spec.startswith("hf:") or spec.endswith(".pt2"):
            raise SettingError("weights", f"{spec} holds its own")
        load_weights(model, Path(weights))
    for module in model.modules():
        module.training = False  # the flag alone: an exported program refuses eval()
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if preprocess is None and isinstance(settings, dict) and "input_size" in settings:
        preprocess = Preprocess.of_timm(settings)
    return model, preprocess


def class_names(model: Any) -> list[str] | None:
    """The names of a model's classes by number, from the metadata of Hugging Face or timm; None if it has none.

    Example:
        >>> import torch
        >>> from moreau_ext.batch.models import class_names
        >>> model = torch.nn.Linear(4, 2)
        >>> model.pretrained_cfg = {"label_names": ["cat", "dog"]}
        >>> class_names(model)
        ['cat', 'dog']
    """
    found = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(found, dict) and set(found) == set(range(len(found))):
        named = [str(found[number]) for number in range(len(found))]
        # "LABEL_3" is what Hugging Face calls a class without a name.
        return None if all(name == f"LABEL_{number}" for number, name in enumerate(named)) else named
    settings = getattr(model, "pretrained_cfg", None)
    found = settings.get("label_names") if isinstance(settings, dict) else None
    return [str(name) for name in found] if isinstance(found, (list, tuple)) else None


def load_preprocess(spec: str) -> Preprocess:
    """Loads a preprocessing by name.

    Args:
        spec: a TOML or JSON file, or "package.module:name" of a :class:`Preprocess` or of torchvision's weights, as in
            "torchvision.models:ResNet50_Weights.DEFAULT".

    Raises:
        ValueError: no preprocessing of that name.
        FileNotFoundError: no such file.
    """
    if ":" in spec and not Path(spec).exists():
        named = _named(spec, "preprocess")
        transform = named.transforms() if hasattr(named, "transforms") else named
        if isinstance(transform, Preprocess):
            return transform
        try:
            return Preprocess.of_torchvision(transform)
        except (AttributeError, TypeError, ValueError) as error:
            raise SettingError(
                "preprocess", f"{spec}: expected a Preprocess or weights of torchvision ({error})"
            ) from error
    if not Path(spec).is_file():
        raise SettingFileNotFoundError("preprocess", f"{spec} is not there")
    return Preprocess.read(spec)


def _named(spec: str, setting: str) -> Any:
    """The object "package.module:name", or the result of the call "package.module:name(literals)".

    Args:
        spec: the text.
        setting: the setting that errors name.
    """
    match = _CALL.match(spec)
    if match is None:
        raise SettingError(setting, f"expected {_EXPECTED[setting]}, got {spec!r}")
    try:
        named: Any = import_named(match["module"])
    except ImportError as error:
        hint = "; a module is named without .py" if match["module"].endswith(".py") else ""
        raise SettingError(setting, f"cannot import {match['module']} ({error}){hint}") from error
    except Exception as error:
        raise SettingError(setting, f"{match['module']} fails when it is imported: {one_line(error)}") from error
    for part in match["name"].split("."):
        if not hasattr(named, part):
            raise SettingError(setting, f"{match['module']} has no {match['name']}")
        named = getattr(named, part)
    if match["arguments"] is None:
        return named
    factory: Any = named
    try:
        call = ast.parse(f"f{match['arguments']}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not one call")
        positional = [ast.literal_eval(a) for a in call.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError) as error:
        raise SettingError(setting, f'{spec}: the arguments must be literals, like ("name", 10) ({error})') from error
    return factory(*positional, **keywords)


def _factory(spec: str) -> nn.Module:
    made: Any = _named(spec, "model")
    if not isinstance(made, nn.Module) and callable(made):
        factory: Any = made
        made = factory()
    if not isinstance(made, nn.Module):
        raise SettingError("model", f"{spec}: expected an nn.Module, got {type(made).__name__}")
    return made


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights into a model. A pickle with more than tensors is refused, and nothing in it runs.

    Args:
        model: with the names and shapes of the weights.
        path: a .safetensors file, or a file of torch.save with tensors by name, also under "state_dict" or "model".

    Raises:
        SettingError: no such file, or weights that do not fit or hold more than tensors.
        ImportError: safetensors is needed and missing.
    """
    if not path.is_file():
        raise SettingFileNotFoundError("weights", f"{path} is not there")
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
        raise SettingError("weights", f"{path} {what}, and is not loaded ({one_line(error).split('. ')[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SettingError("weights", f"{path}: expected tensors by name (a state_dict), got {type(state).__name__}")
    wanted = set(model.state_dict())
    for prefix, source in (("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("model.", "Lightning")):
        if state and set(state) != wanted and {name.removeprefix(prefix) for name in state} == wanted:
            raise SettingError(
                "weights",
                f"{path}: all names begin with {prefix!r} ({source}); save the state_dict of the model inside, or take "
                "the prefix from the names",
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SettingError(
            "weights", f"{path}: the weights do not fit the model: {' '.join(str(error).split())[:400]}"
        ) from error


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise SettingFileNotFoundError("model", f"{path} is not there")
    try:
        return load_exported(path)
    except Exception as error:
        raise SettingError(
            "model", f"{path} is no exported program that can be loaded: {one_line(error)[:400]}"
        ) from error


def _hugging_face(folder: Path) -> tuple[nn.Module, Preprocess | None]:
    if not (folder / "config.json").is_file():
        raise SettingFileNotFoundError("model", f"hf:{folder} holds no config.json")
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(
            f"models of Hugging Face need transformers ({error}); install it with: pip install transformers"
        ) from error
    # No pickles, no network, no code from the folder.
    try:
        model: nn.Module = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if "Unrecognized configuration class" in str(error):
            raise SettingError(
                "model",
                f"hf:{folder} is a {kind}, which is no image classifier; explain models of text in Python, from their "
                "embeddings",
            ) from error
        raise SettingError(
            "model", f"hf:{folder} cannot be loaded from its safetensors: {one_line(error)[:300]}"
        ) from error
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return model, None
    auto: Any = importlib.import_module("transformers.models.auto.image_processing_auto")
    # The processor of a kind of model, for files that do not name it.
    kinds = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(json.loads((folder / "config.json").read_text()).get("model_type"))
    kind = next(iter(kinds.values()), None) if isinstance(kinds, dict) else None
    return model, Preprocess.of_hugging_face(json.loads(path.read_text()), kind)
