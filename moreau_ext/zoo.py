"""Small nets and data that the demo, the tests, the benchmarks and the evaluation share.

The data are real tables that scikit-learn ships, so nothing is downloaded. Every net is a function of its arguments:
weights come from a generator of their own, and the global random state is neither read nor moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "NAMES",
    "Dataset",
    "accuracy",
    "breast_cancer",
    "cache_folder",
    "digits",
    "digits32",
    "digits_cnn",
    "resnet20",
    "tabular_mlp",
    "tiny_vit",
    "train",
    "trained",
]

Activation = Literal["relu", "gelu", "softplus", "silu"]
Split = Literal["all", "train", "test"]

# A part of the cached files' names: raise it when a change to this file changes the trained weights.
_RECIPE_VERSION = 1
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    # log(1 + exp(5v))/5: at the default sharpness of 1 the net is nearly linear and 1-2 % of the digits worse.
    "softplus": lambda: nn.Softplus(beta=5),
    "silu": nn.SiLU,
}


# --- data ----------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """Inputs with their classes.

    Args:
        inputs: float32 [N, *features].
        targets: int64 [N], the class of each.
        names: what the classes are called, by number.
    """

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]


def _rows(count: int, split: Split) -> Tensor:
    """Row numbers of a split: the first 80 % of a permutation that depends on ``count`` alone, the rest, or all."""
    if split == "all":
        return torch.arange(count)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test', got {split!r}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    border = count * 4 // 5
    return (order[:border] if split == "train" else order[border:]).sort().values


def _needs_sklearn(error: ImportError) -> ImportError:
    return ImportError(f'these data come with scikit-learn ({error}); install it with: pip install "moreau_ext[demo]"')


def digits(split: Split = "all") -> Dataset:
    """Handwritten digits of 8 x 8 pixels: scikit-learn's 1,797, the test part of UCI's optdigits.

    Args:
        split: "all" in the order of the source, so that a row number names an image; "train" (1,437) or "test" (360),
            a fixed permutation cut at 80 %.

    Returns:
        inputs float32 [N, 1, 8, 8] in [0, 1] (ink counts 0..16 over 16), targets int64 [N], names "0".."9".

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another ``split``.

    Example:
        >>> from moreau_ext import zoo
        >>> tuple(zoo.digits("test").inputs.shape)
        (360, 1, 8, 8)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _needs_sklearn(error) from error
    raw = load_digits()
    rows = _rows(len(raw.target), split)
    images = torch.from_numpy(raw.images).to(torch.float32).div_(16).unsqueeze(1)
    return Dataset(images[rows], torch.from_numpy(raw.target).long()[rows], tuple(str(n) for n in raw.target_names))


def digits32(split: Split = "all") -> Dataset:
    """The digits as colour images of the usual small size: enlarged to 32 x 32 (bilinear) and repeated for 3 channels.

    Args, returns and errors as for :func:`digits`, but inputs float32 [N, 3, 32, 32].

    Example:
        >>> from moreau_ext import zoo
        >>> tuple(zoo.digits32("test").inputs.shape)
        (360, 3, 32, 32)
    """
    small = digits(split)
    large = nn.functional.interpolate(small.inputs, size=(32, 32), mode="bilinear", align_corners=False)
    return small._replace(inputs=large.repeat(1, 3, 1, 1))


def breast_cancer(split: Split = "all") -> Dataset:
    """Measurements of 569 breast masses (UCI's Wisconsin diagnostic table), 30 features each.

    Args:
        split: "all" in the order of the source; "train" (455) or "test" (114), a fixed permutation cut at 80 %.

    Returns:
        inputs float32 [N, 30], each feature minus its mean over its standard deviation, both of the train rows;
        targets int64 [N], 0 malignant and 1 benign.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another ``split``.

    Example:
        >>> from moreau_ext import zoo
        >>> zoo.breast_cancer().inputs.shape, zoo.breast_cancer().names
        (torch.Size([569, 30]), ('malignant', 'benign'))
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise _needs_sklearn(error) from error
    raw = load_breast_cancer()
    rows = _rows(len(raw.target), split)
    table = torch.from_numpy(raw.data)
    seen = table[_rows(len(raw.target), "train")]
    table = ((table - seen.mean(0)) / seen.std(0)).to(torch.float32)
    return Dataset(table[rows], torch.from_numpy(raw.target).long()[rows], tuple(str(n) for n in raw.target_names))


# --- nets ----------------------------------------------------------------------------------------------------------


def _activation(name: str) -> nn.Module:
    """Never in place: a net that overwrites its activations cannot be hooked or reused by other tools."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class _Tokens(nn.Module):
    """An image cut into square patches, each mapped to ``dim`` numbers, plus a learned position: [B, patches, dim]."""

    def __init__(self, image_size: int, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return tokens


class _Attention(nn.Module):
    """Self-attention of all tokens with all."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class _TransformerBlock(nn.Module):
    """Attention, then a two-layer perceptron per token, each on a normalised copy and added back."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(dim), _Attention(dim, heads))
        self.think = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        out: Tensor = x + self.think(x)
        return out


class _MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; a 1 x 1 convolution carries the shortcut where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return out


def _build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A float32 net on the CPU in eval mode, its weights drawn from ``seed`` alone.

    The modules are made without storage, so that their own initialisation draws nothing from the global generator.
    """
    with torch.inference_mode(False), torch.device("meta"):
        model = make().to(torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.Linear):
                # Variance 1/(3·inputs), torch's own choice: larger weights cost the transformer 4 % of the digits.
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, _Tokens):
                module.position.normal_(std=0.2, generator=generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()
    return model.eval()


def digits_cnn(activation: Activation = "relu", seed: int = 0) -> nn.Module:
    """A convolutional net for the digits, untrained: [B, 1, 8, 8] -> [B, 10] logits.

    Two 3 x 3 convolutions (16 and 32 channels) with average pooling between them, and a linear layer; 9,930 weights.
    Averages rather than maxima are pooled, so that with a smooth activation the whole net is smooth.

    Args:
        activation: "relu" gives a piecewise linear net; "gelu", "softplus" (of sharpness 5) and "silu" smooth ones.
        seed: of the weights.

    Raises:
        ValueError: another ``activation``.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.digits_cnn("silu")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _build(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            _activation(activation),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            _activation(activation),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        ),
        seed,
    )


def resnet20(num_classes: int = 10, seed: int = 0) -> nn.Module:
    """ResNet-20 for 3 x 32 x 32 images, untrained: [B, 3, 32, 32] -> [B, num_classes] logits.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2, with 1 x 1 convolutions as shortcuts where the shape changes.

    Args:
        num_classes: width of the output.
        seed: of the weights.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.resnet20()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for after in (16, 32, 64):
            for block in range(3):
                layers.append(_ResidualBlock(before, after, 2 if block == 0 and after != before else 1))
                before = after
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    return _build(make, seed)


def tabular_mlp(features: int = 30, classes: int = 2, activation: Activation = "relu", seed: int = 0) -> nn.Module:
    """A perceptron for table rows, untrained: [B, features] -> [B, classes] logits, two hidden layers of 32.

    Args:
        features: numbers per row.
        classes: width of the output.
        activation: as for :func:`digits_cnn`.
        seed: of the weights.

    Raises:
        ValueError: another ``activation``.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.tabular_mlp(features=5, classes=3)(torch.zeros(2, 5)).shape
        torch.Size([2, 3])
    """
    return _build(
        lambda: nn.Sequential(
            nn.Linear(features, 32),
            _activation(activation),
            nn.Linear(32, 32),
            _activation(activation),
            nn.Linear(32, classes),
        ),
        seed,
    )


def tiny_vit(
    image_size: int = 32,
    patch: int = 4,
    dim: int = 64,
    depth: int = 3,
    heads: int = 4,
    channels: int = 3,
    num_classes: int = 10,
    seed: int = 0,
) -> nn.Module:
    """A vision transformer, untrained: [B, channels, image_size, image_size] -> [B, num_classes] logits.

    Patches are embedded and given a learned position; blocks of attention and perceptron (GELU, twice as wide) follow,
    normalised before each; the mean over the tokens feeds a linear layer. Smooth throughout.

    Args:
        image_size: edge of the image in pixels.
        patch: edge of a patch in pixels; must divide ``image_size``.
        dim: width of a token; ``heads`` must divide it.
        depth: number of blocks.
        heads: attention heads per block.
        channels: of the image.
        num_classes: width of the output.
        seed: of the weights.

    Raises:
        ValueError: ``patch`` does not divide ``image_size``, or ``heads`` does not divide ``dim``.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929, pooled by the mean instead of a class token.

    Example:
        >>> import torch
        >>> from moreau_ext import zoo
        >>> zoo.tiny_vit(image_size=8, patch=2, channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if image_size % patch:
        raise ValueError(f"patch must divide image_size, got patches of {patch} in images of {image_size}")
    if dim % heads:
        raise ValueError(f"heads must divide dim, got {heads} heads for a width of {dim}")
    return _build(
        lambda: nn.Sequential(
            _Tokens(image_size, patch, channels, dim),
            *(_TransformerBlock(dim, heads) for _ in range(depth)),
            nn.LayerNorm(dim),
            _MeanOverTokens(),
            nn.Linear(dim, num_classes),
        ),
        seed,
    )


# --- training ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module's own flag comes back, also after an exception."""
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
    """Fits a classifier in place by AdamW on the cross-entropy, the learning rate falling to 0 along a cosine.

    Args:
        model: [B, *features] -> [B, classes] logits.
        data: what to fit.
        epochs: passes over the data.
        seed: of the order of the rows, and of dropout where the model has any.
        batch_size: rows per update.
        learning_rate: of the first update.
        weight_decay: per unit of learning rate.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: no rows, or fewer than one epoch or row per batch.

    Notes:
        On the CPU the result is the same bits for the same machine, torch and number of threads. The global random
        state is restored afterwards.

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
    return model.eval()


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the rows whose class has the largest logit, in [0, 1]. The model is left in the mode it was in.

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
    """How one of the trained nets comes about; its printed numbers are part of the cached file's name."""

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
"""What :func:`trained` can give."""


def cache_folder() -> Path:
    """Where trained weights are kept: ``$XDG_CACHE_HOME/moreau_ext``, or ``~/.cache/moreau_ext`` where that is unset.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path there is invalid by the XDG specification and to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "moreau_ext"


def _cache_file(name: str, seed: int) -> Path:
    recipe = _RECIPES[name]
    recipe_text = repr((_RECIPE_VERSION, name, recipe.epochs, recipe.learning_rate, seed, torch.__version__))
    return cache_folder() / f"{name}-{hashlib.sha256(recipe_text.encode()).hexdigest()[:16]}.pt"


def _load(model: nn.Module, path: Path) -> bool:
    """Whether the file held weights that fit; a damaged one means training again."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception:  # the unpickler raises nearly anything on a damaged file
        return False
    return all(bool(p.isfinite().all()) for p in model.parameters())


def _save(model: nn.Module, path: Path) -> None:
    """Whole or not at all: another process may read, or write the same, at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(model.state_dict(), file)
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
            version. A missing or damaged file means training again; where none can be written, one warning says so.

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
        if _load(model, path):
            return model
        model = recipe.make(seed)
    train(model, recipe.data("train"), recipe.epochs, seed, learning_rate=recipe.learning_rate)
    if path is not None:
        try:
            _save(model, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            warnings.warn(f"{name} is trained anew each time: cannot write {path} ({error})", stacklevel=2)
    return model
