"""Models by name, and weights that would run something."""

from __future__ import annotations

import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import Malicious
from safetensors.torch import save_file
from torch import nn

from moreau_ext import zoo
from moreau_ext.batch import Preprocess, load_model, load_preprocess
from moreau_ext.batch.models import fingerprint

DIGITS = "moreau_ext.zoo:digits_cnn"


def test_factories() -> None:
    model, preprocess = load_model("moreau_ext.zoo:resnet20(num_classes=7)")
    assert model.training is False
    assert preprocess is None
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_the_model_says_how_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    made = nn.Flatten()\n"
        "    made.pretrained_cfg = {'input_size': (1, 8, 8), 'mean': (0.5,), 'std': (0.5,)}\n"
        "    return made\n"
        "class Weights:\n"
        "    @staticmethod\n"
        "    def transforms():\n"
        "        import types\n"
        "        return types.SimpleNamespace(resize_size=[9], crop_size=[8], interpolation='bilinear',\n"
        "                                     mean=[0.5], std=[0.5])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("my_nets:net")[1] == Preprocess(
        mode="L", resize=9, interpolation="bicubic", crop=(8, 8), mean=(0.5,), std=(0.5,)
    )  # timm's defaults
    assert load_preprocess("my_nets:Weights") == Preprocess(resize=9, crop=8, mean=(0.5,), std=(0.5,))
    sys.modules.pop("my_nets")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet50", "expected package.module:factory"),
        ("no_such_package:net", "cannot import no_such_package"),
        ("mynet.py:net", r"cannot import mynet.py .*; a module is named without .py"),
        ("moreau_ext.zoo:nothing", "has no nothing"),
        ("moreau_ext.zoo:digits_cnn(print(1))", "must be literals"),
        ("moreau_ext.zoo:NAMES", "expected an nn.Module"),
        ("gone.pt2", "is not there"),
        ("hf:gone", "holds no config.json"),
    ],
)
def test_no_model_there(spec: str, words: str) -> None:
    with pytest.raises((ValueError, ImportError, FileNotFoundError), match=words):
        load_model(spec)


def test_weights(tmp_path: Path) -> None:
    other = zoo.digits_cnn(seed=5)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": other.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "checkpoint.pt", "w.safetensors"):
        model, _ = load_model(DIGITS, tmp_path / name)
        assert fingerprint(model) == fingerprint(other) != fingerprint(zoo.digits_cnn())


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for name in ("zip.pt", "old.pt"):
        torch.save({"w": Malicious(ran)}, tmp_path / name, _use_new_zipfile_serialization=name == "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(ran)))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Malicious(ran)))
    for name in ("zip.pt", "old.pt", "plain.pt", "named.safetensors"):
        with pytest.raises(ValueError, match=f"weights: .*{name}.*is not loaded"):
            load_model(DIGITS, tmp_path / name)
    assert not ran.exists()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="do not fit the model"):
        load_model(DIGITS, tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_model(DIGITS, tmp_path / "gone.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    return path


def test_an_exported_program(exported: Path) -> None:
    from moreau_ext import Gradient

    model, _ = load_model(str(exported))
    assert Gradient(model).attribute(torch.rand(3, 1, 8, 8)).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="holds its own"):
        load_model(str(exported), "weights.pt")


def test_an_exported_program_with_a_pickle_is_refused(exported: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.namelist():
            data = good.read(entry)
            if entry.endswith(".pt"):
                torch.save(Malicious(ran), tmp_path / "x")
                data = (tmp_path / "x").read_bytes()
            bad.writestr(entry, data)
    with pytest.raises(ValueError, match="no exported program that can be loaded"):
        load_model(str(path))
    assert not ran.exists()


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="no extra brings it", exc_type=ImportError)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true, "size": 8, "do_normalize": false}')
    model, preprocess = load_model(f"hf:{tmp_path}")
    # ViT's processor makes a square of a size that is one number.
    assert preprocess == Preprocess(resize=(8, 8))
    assert model(torch.rand(2, 3, 8, 8)).logits.shape == (2, 2)
