"""Sources: every kind, stable ids, and the corrupt-input suite."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moreau_ext.batch import Preprocess, open_source, path_id
from moreau_ext.batch.sources.base import Source
from moreau_ext.batch.sources.datasets import Stream

GRAY = Preprocess(mode="L")


def png(mode: str = "RGB", size: tuple[int, int] = (8, 8), **how: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(file, how.pop("format", "PNG"), **how)
    return file.getvalue()


def jpeg(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    return png(mode, size, format="JPEG")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def malformed() -> dict[str, bytes]:
    """Files that no decoder should take, by what is wrong with them."""
    big = png(size=(64, 64))
    photo = jpeg(size=(64, 64))
    found = {
        "empty": b"",
        "one_byte": b"\x89",
        "zeros": bytes(1000),
        "text": b"this is no image\n",
        "html": b"<!doctype html><title>404</title>",
        "signature_only": big[:8],
        "png_no_data": big[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""),
        "png_zero_width": bomb(0, 8),
        "png_bad_depth": big[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 3, 2, 0, 0, 0)) + big[33:],
        "png_bad_checksum": flipped(big, 30),
        "png_bad_zlib": flipped(big, 45),
        "bomb": bomb(20_000, 20_000),
        "bomb_warned_of": bomb(10_000, 10_000),
        "bomb_absurd": bomb(2**31 - 1, 2**31 - 1),
        "jpeg_headless": photo[2:],
        "jpeg_start_only": photo[:2],
        "gif_header": b"GIF89a",
        "gif_cut": png("P", (64, 64), format="GIF")[:60],
        "bmp_cut": png(format="BMP")[:60],
        "bmp_header": b"BM" + bytes(12),
        "tiff_header": b"II*\0" + bytes(4),
        "tiff_cut": png(format="TIFF")[:100],
        "tiff_loop": b"II*\0" + struct.pack("<IH", 8, 65535),
        "webp_cut": png(size=(64, 64), format="WEBP")[:40],
        "webp_header": b"RIFF\x10\0\0\0WEBPVP8 ",
        "ppm_short": b"P6 8 8 255\n" + bytes(10),
        "ppm_words": b"P6 eight eight 255\n",
        "float_tiff": png("F", format="TIFF"),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + bytes(40),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "other_size": png(size=(9, 8)),
    }
    for share in (0.3, 0.6, 0.9):
        found[f"png_cut_{share}"] = big[: int(share * len(big))]
        found[f"jpeg_cut_{share}"] = photo[: int(share * len(photo))]
    return found


def test_corrupt_inputs_are_all_reported_and_none_is_fatal(tmp_path: Path) -> None:
    bad = malformed()
    assert len(bad) >= 30
    (tmp_path / "0000.png").write_bytes(png())
    for name, data in bad.items():
        (tmp_path / f"bad_{name}.png").write_bytes(data)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zzzz.png").write_bytes(jpeg())  # a wrong suffix is no matter
    source = open_source(tmp_path)
    loaded = source.load(0, len(source))
    assert len(loaded) == len(bad) + 3
    assert [loaded.names[i] for i in loaded.good] == ["0000.png", "zzzz.png"]
    assert {loaded.names[i] for i in loaded.errors} == {f"bad_{name}.png" for name in bad} | {"link.png"}
    assert all(reason and "\n" not in reason for reason in loaded.errors.values())


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    loaded = open_source(tmp_path / "pipe.png").load(0, 1)
    assert loaded.errors == {0: "is no file"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(mode))
    x = open_source(tmp_path).load(0, 1).inputs
    assert x is not None
    assert x.shape == (1, 3, 8, 8)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpeg_modes(mode: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(mode))
    assert open_source(tmp_path).load(0, 1).inputs.shape == (1, 3, 8, 8)


def test_sixteen_bits_are_exact(tmp_path: Path) -> None:
    pixels = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    x = open_source(tmp_path, preprocess=GRAY).load(0, 1).inputs
    torch.testing.assert_close(x[0, 0], torch.from_numpy(pixels.astype(np.float32)) / 65535)


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (100, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    x = open_source(tmp_path, preprocess=GRAY).load(0, 1).inputs
    torch.testing.assert_close(x, torch.full((1, 1, 8, 8), 100 / 255))


def folder(root: Path) -> Path:
    for name in ("b/2.png", "a/1.png", "a/3.jpg", ".hidden/4.png", "a/.5.png", "a/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png() if name.endswith("png") else jpeg())
    return root


def test_folder_ids_and_classes(tmp_path: Path) -> None:
    loaded = open_source(folder(tmp_path), target="class").load(0, 3)
    assert loaded.names == ["a/1.png", "a/3.jpg", "b/2.png"]
    assert loaded.ids == [path_id(name) for name in loaded.names]
    assert loaded.targets == [0, 0, 1]
    # Golden: results written by any version are found again by their ids.
    assert path_id("a/1.png") == 2453813604590468563


def test_globs_and_single_files(tmp_path: Path) -> None:
    folder(tmp_path)
    assert open_source(str(tmp_path / "a" / "*.png")).load(0, 1).names == ["1.png"]
    assert open_source(str(tmp_path / "**" / "*.png")).load(0, 2).names == ["a/1.png", "b/2.png"]
    assert open_source([tmp_path / "b" / "2.png", tmp_path / "a"]).load(0, 3).names == ["1.png", "2.png", "3.jpg"]


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"both called 1.png, which makes their ids equal"):
        open_source([tmp_path / "x", tmp_path / "y"])


def test_equal_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moreau_ext.batch.sources.files.path_id", lambda _: 7)
    with pytest.raises(ValueError, match="have the same id"):
        open_source(folder(tmp_path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none", "is not there"),
        (lambda p: p, "no image files"),
        (lambda p: [p / "x.npy", p / "y.png"], "expected one kind"),
        (lambda p: [p / "x.npy", p / "y.npy"], "expected one .npy"),
        (lambda p: np.zeros((0, 3)), "has no rows"),
        (lambda p: [], "empty"),
    ],
)
def test_nothing_there(make, words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_source(make(tmp_path))


def check(source: Source | Stream, expected: torch.Tensor, targets: list[int | None]) -> None:
    loaded = [b for _, b in source.batches(2)] if isinstance(source, Stream) else [source.load(0, 3), source.load(3, 5)]
    torch.testing.assert_close(torch.cat([part.inputs for part in loaded]), expected)
    assert [t for part in loaded for t in part.targets] == targets
    assert [i for part in loaded for i in part.ids] == list(range(len(expected)))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.x[row], row + 10


class Walk(torch.utils.data.IterableDataset):
    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __iter__(self):
        return iter([{"x": x, "label": y} for x, y in self.pairs])


def test_arrays_datasets_and_streams(tmp_path: Path) -> None:
    x = torch.randn(5, 2, 3)
    none, labels = [None] * 5, list(range(10, 15))
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "x.npz", x=x.numpy(), y=np.array(labels))
    check(open_source(x), x, none)
    check(open_source(tmp_path / "x.npy"), x, none)
    check(open_source(tmp_path / "x.npz", target="y"), x, labels)
    check(open_source(Pairs(x), target="label"), x, labels)
    check(open_source(Walk(Pairs(x)), column="x", target="label"), x, labels)
    check(open_source(torch.utils.data.DataLoader(Pairs(x), batch_size=3), target="label"), x, labels)
    check(open_source(torch.utils.data.DataLoader(Walk(Pairs(x)), batch_size=3), column="x", target="label"), x, labels)
    check(open_source(list(x)), x, none)
    pixels = torch.randint(0, 256, (5, 2, 3), dtype=torch.uint8)
    check(open_source(pixels), pixels / 255, none)


def test_a_shuffling_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffles"):
        open_source(torch.utils.data.DataLoader(Pairs(torch.zeros(3, 2)), shuffle=True))


def test_parquet_columns(tmp_path: Path) -> None:
    x = torch.randn(5, 2, 3)
    labels = list(range(10, 15))
    images = [png("L") for _ in range(5)]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(i)))) for i in images])[:, None] / 255
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x.numpy())
    columns = {
        "tensor": (tensors, x),
        "lists": (pa.array(x.tolist(), pa.list_(pa.list_(pa.float32()))), x),
        "binary": (pa.array(images), pixels),
        "hugging": (pa.array([{"bytes": i, "path": "p"} for i in images]), pixels),
    }
    for name, (column, expected) in columns.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({name: column, "label": labels}), path, row_group_size=2)
        check(open_source(path, preprocess=GRAY, target="label"), expected, labels)
    both = pa.table({"a": tensors, "b": tensors})
    pq.write_table(both, tmp_path / "both.parquet")
    with pytest.raises(ValueError, match="found a, b of a, b; name it"):
        open_source(tmp_path / "both.parquet")
    check(open_source(tmp_path / "both.parquet", column="b"), x, [None] * 5)


def test_parquet_rows_that_hold_nothing(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(), None, b"junk", png()]), "label": pa.array([1, 2, 3, None])})
    (tmp_path / "parts").mkdir()
    pq.write_table(table, tmp_path / "parts" / "1.parquet")
    pq.write_table(table, tmp_path / "parts" / "2.parquet")
    source = open_source(tmp_path / "parts", target="label")
    loaded = source.load(0, len(source))
    assert loaded.good == [0, 4]
    assert loaded.names[4] == "2.parquet:0"
    assert "image is empty" in loaded.errors[1]
    assert "UnidentifiedImageError" in loaded.errors[2]
    assert "has no target" in loaded.errors[3]


@pytest.mark.parametrize("target", ["nothing", "x"])
def test_a_wrong_target_column(target: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2), np.float32), y=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="target"):
        open_source(tmp_path / "x.npz", column="x", target=target)


def test_pickled_and_damaged_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    for name in ("x.npy", "y.npz", "z.parquet"):
        with pytest.raises(ValueError, match=name):
            open_source(tmp_path / name)


def test_nan_is_an_error_of_its_row() -> None:
    x = torch.zeros(3, 2)
    x[1, 0] = torch.nan
    loaded = open_source(x).load(0, 3)
    assert loaded.errors == {1: "holds NaN or infinity"}
    assert loaded.inputs.shape == (2, 2)


def test_a_changed_source_describes_itself_otherwise(tmp_path: Path) -> None:
    before = open_source(folder(tmp_path)).describe()
    assert open_source(tmp_path).describe() == before
    (tmp_path / "a" / "1.png").write_bytes(png(size=(16, 16)))
    assert open_source(tmp_path).describe() != before
