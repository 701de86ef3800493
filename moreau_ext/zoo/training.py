"""Training, accuracy, and the cache of trained nets."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .data import Dataset, Split, breast_cancer, digits, digits32
from .nets import digits_cnn, resnet20, tabular_mlp, tiny_vit

# A part of the names of cached files. Raise it when a change of this file changes the trained weights.
_RECIPE_VERSION = 1

# Arguments of the last `train` of each model. The cache records these and not the recipe's own numbers, so that weights
# from another training are recognised.
_TRAINED: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode, and restores the flag of every module afterwards, also after an exception."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def train(
    model: nn.Module,
    data: Dataset,
    epochs: int,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
) -> nn.Module:
    """Trains a classifier in place by AdamW on the cross-entropy; the learning rate falls to 0 along a cosine.

    Args:
        model: [B, *features] -> [B, classes] logits.
        data: inputs and classes.
        epochs: passes over the data.
        seed: of the order of the rows, and of dropout where the model has any.
        batch_size: rows per update.
        learning_rate: of the first update.
        weight_decay: per unit of learning rate.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: no rows, or ``epochs`` or ``batch_size`` below 1.

    Notes:
        On the CPU the result has the same bits on the same machine with the same torch and number of threads. The
        global random state is restored.

    Example:
        >>> from moreau_ext import zoo
        >>> data = zoo.breast_cancer("train")
        >>> zoo.accuracy(zoo.train(zoo.tabular_mlp(), data, epochs=3), data) > 0.9
        True
    """
    if epochs < 1 or batch_size < 1 or not len(data.inputs):
        raise ValueError(
            f"train needs rows, epochs and batch_size of at least 1, got {len(data.inputs)}, {epochs} and {batch_size}"
        )
    device = _device(model)
    inputs, targets = data.inputs.to(device), data.targets.to(device)
    order = torch.Generator().manual_seed(seed)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        # Not torch.manual_seed, which would reseed every accelerator too.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        steps = epochs * -(-len(inputs) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(inputs), generator=order).to(device), batch_size):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch's
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
    _TRAINED[model] = {"epochs": epochs, "seed": seed, "learning_rate": learning_rate}
    return model.eval()


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the rows whose class has the largest logit, in [0, 1]. The mode of the model is restored.

    Raises:
        ValueError: no rows.
    """
    if not len(data.inputs):
        raise ValueError("accuracy needs at least one row, got none")
    device, right = _device(model), 0
    with _in_mode(model, False), torch.no_grad():
        for inputs, targets in zip(torch.split(data.inputs, 512), torch.split(data.targets, 512), strict=True):
            right += int((model(inputs.to(device)).argmax(1) == targets.to(device)).sum())
    return right / len(data.inputs)


class _Recipe(NamedTuple):
    """The recipe of a trained net; its numbers are a part of the name of the cached file."""

    make: Callable[[int], nn.Module]
    data: Callable[[Split], Dataset]
    epochs: int
    learning_rate: float = 1e-2


_RECIPES: dict[str, _Recipe] = {
    "digits_cnn": _Recipe(lambda seed: digits_cnn("relu", seed), digits, 25),
    "digits_cnn_gelu": _Recipe(lambda seed: digits_cnn("gelu", seed), digits, 25),
    "digits_cnn_softplus": _Recipe(lambda seed: digits_cnn("softplus", seed), digits, 25),
    "digits_cnn_silu": _Recipe(lambda seed: digits_cnn("silu", seed), digits, 25),
    "digits_vit": _Recipe(
        lambda seed: tiny_vit(image_size=8, patch=2, dim=32, depth=2, channels=1, seed=seed), digits, 30, 3e-3
    ),
    "digits32_resnet20": _Recipe(lambda seed: resnet20(seed=seed), digits32, 4, 3e-3),
    "tabular_mlp": _Recipe(lambda seed: tabular_mlp(seed=seed), breast_cancer, 20, 3e-3),
    "tabular_mlp_gelu": _Recipe(lambda seed: tabular_mlp(activation="gelu", seed=seed), breast_cancer, 20, 3e-3),
}

NAMES: tuple[str, ...] = tuple(_RECIPES)
"""The nets of :func:`trained`."""


def cache_folder() -> Path:
    """The folder of trained weights: ``$XDG_CACHE_HOME/moreau_ext``, or ``~/.cache/moreau_ext`` if that is unset.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path is invalid and must be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "moreau_ext"


def _settings(name: str, seed: int) -> dict[str, str | float]:
    """The settings that determine the weights. The cached file holds them, and its name is their hash."""
    recipe = _RECIPES[name]
    made = {"epochs": recipe.epochs, "seed": seed, "learning_rate": recipe.learning_rate}
    return {"version": _RECIPE_VERSION, "torch": str(torch.__version__), "name": name, **made}


def _cache_file(name: str, seed: int) -> Path:
    digest = hashlib.sha256(repr(_settings(name, seed)).encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{digest}.pt"


def _load(model: nn.Module, path: Path, name: str, seed: int) -> bool:
    """Whether the file held this net: its settings, weights that fit, and the accuracy that it had when it was trained.

    Most changes to the code of a net alter the accuracy of weights that were trained before.
    """
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(kept["weights"])
        right = kept["settings"] == _settings(name, seed) and all(bool(p.isfinite().all()) for p in model.parameters())
        expected = kept["accuracy"]
    except Exception:  # the unpickler raises nearly anything on a damaged file
        return False
    try:
        test = _RECIPES[name].data("test")
    except ImportError:  # without scikit-learn there is no data to check with
        return right
    return right and accuracy(model, test) == expected


def _save(model: nn.Module, path: Path, name: str, seed: int) -> None:
    """Whole or not at all: another process may read, or write the same, at any moment."""
    content = {
        "settings": {**_settings(name, seed), **_TRAINED[model]},
        "accuracy": accuracy(model, _RECIPES[name].data("test")),
        "weights": model.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def trained(name: str, seed: int = 0, cache: bool = True) -> nn.Module:
    """One of the zoo's nets, trained on the train split of its data; a few seconds the first time, then from a file.

    Args:
        name: one of :data:`NAMES`: "digits_cnn" (ReLU), "digits_cnn_gelu", "digits_cnn_softplus", "digits_cnn_silu",
            "digits_vit" (smooth), "digits32_resnet20" (ReLU; a minute of training), "tabular_mlp" (ReLU),
            "tabular_mlp_gelu".
        seed: of the weights and of the order of training.
        cache: read and write a file in :func:`cache_folder`. Its name depends on the recipe, the seed and torch's
            version, and it also holds the accuracy on the test split. If the file is missing or damaged, or if its
            recipe or accuracy differs, the net is trained again. If none can be written, one warning says so.

    Returns:
        The model on the CPU, in eval mode. On test rows it is right for :func:`accuracy` of the cases: 98-99 % for the
        convolutional nets and the ResNet-20, 96-97 % for the transformer and the perceptrons (seed 0).

    Raises:
        ImportError: scikit-learn, whose data it is trained on, is missing and no file is cached.
        ValueError: another ``name``.

    Example:
        >>> from moreau_ext import zoo
        >>> zoo.accuracy(zoo.trained("tabular_mlp"), zoo.breast_cancer("test")) > 0.9
        True
    """
    if name not in _RECIPES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    recipe = _RECIPES[name]
    path: Path | None = None
    if cache:
        try:
            path = _cache_file(name, seed)
        except RuntimeError as error:
            warnings.warn(f"{name} is trained anew each time: no cache folder ({error})", stacklevel=2)
    model = recipe.make(seed)
    if path is not None and path.is_file():
        if _load(model, path, name, seed):
            return model
        model = recipe.make(seed)
    train(model, recipe.data("train"), recipe.epochs, seed, learning_rate=recipe.learning_rate)
    if path is not None:
        try:
            _save(model, path, name, seed)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            warnings.warn(f"{name} is trained anew each time: cannot write {path} ({error})", stacklevel=2)
    return model
