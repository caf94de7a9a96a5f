"""What the examples read: arrays, folders of images, MNIST; and a model for images of any size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from on_examples import one_thread, train  # noqa: F401

# isort: split
from common import data
from common.models import ConvVAE
from PIL import Image

BAD_ARRAYS = {
    "two-dimensional": np.zeros((20, 8), np.uint8),
    "five channels": np.zeros((20, 5, 8, 8), np.uint8),
    "no images": np.zeros((0, 8, 8), np.uint8),
    "too few": np.zeros((3, 8, 8), np.uint8),
    "integers": np.zeros((20, 8, 8), np.int64),
    "range": np.full((20, 8, 8), 2.0),
    "nan": np.full((20, 8, 8), np.nan),
    "objects": np.array([{}] * 20, object),
}


@pytest.mark.parametrize("name", [*BAD_ARRAYS, "missing", "empty folder", "not an npz", "suffix", "bad picture"])
def test_bad_data_is_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    if name in BAD_ARRAYS:
        np.savez(path, images=BAD_ARRAYS[name], allow_pickle=True)
    elif name == "not an npz":
        path.write_bytes(b"not a zip")
    elif name == "suffix":
        path = tmp_path / "x.txt"
        path.touch()
    elif name in ("empty folder", "bad picture"):
        path = tmp_path / "folder"
        path.mkdir()
        if name == "bad picture":
            (path / "a.png").write_bytes(b"not a picture")

    train(tmp_path / "out", "--data", str(path), code=2)
    error = capsys.readouterr().err
    assert error.startswith("train_vae.py: error: ")
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grey", [False, True])
def test_folder_of_images(grey: bool, tmp_path: Path) -> None:
    sizes = [(40, 30), (16, 64), (9, 9)]
    (tmp_path / "nested").mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "nested" / f"{i}.png")
    Image.new("RGBA", (20, 20), (0, 0, 255, 255)).save(tmp_path / "z.PNG")
    (tmp_path / "notes.txt").write_text("not a picture")

    images = data.load_tensor(str(tmp_path), image_size=12, grey=grey)
    assert images.shape == (4, 1 if grey else 3, 12, 12)
    assert images.dtype == torch.uint8
    if not grey:
        assert images[0, :, 5, 5].tolist() == [255, 0, 0]
        assert images[-1, :, 5, 5].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 9, 7), (1, 9, 7)), ((20, 9, 7, 3), (3, 9, 7)), ((20, 3, 9, 7), (3, 9, 7)), ((20, 9, 7, 1), (1, 9, 7))],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz(shape: tuple[int, ...], expected: tuple[int, ...], dtype: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(shape)
    array = (values * 255).astype(np.uint8) if dtype is np.uint8 else values.astype(dtype)
    np.savez(tmp_path / "x.npz", labels=np.zeros(20), images=array)

    images = data.load(str(tmp_path / "x.npz"))
    assert images.shape == expected
    assert [len(s) for s in (images.train, images.val, images.test)] == [16, 2, 2]
    assert images.is_8bit == (dtype is np.uint8)
    unit = data.to_unit(torch.cat([images.train, images.val, images.test]))
    assert unit.dtype == torch.float32
    scale = 255 if dtype is np.uint8 else 1
    np.testing.assert_allclose(np.sort(unit.numpy(), None), np.sort(array.astype(np.float32) / scale, None), rtol=1e-6)


def test_8bit_colour_images_of_odd_size_train(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 11, 17, 3), np.uint8)
    np.savez(tmp_path / "x.npz", array)
    metrics = train(
        tmp_path / "out", "--data", str(tmp_path / "x.npz"), "--epochs", "1", "--sigma", "learned-per-channel"
    )
    assert metrics["dims"] == 3 * 11 * 17
    assert metrics["bits_per_dim_8bit"] == pytest.approx(metrics["bits_per_dim"] + math.log2(255))


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 64, 64), (1, 8, 8), (3, 33, 50), (1, 1, 1)])
def test_model_takes_any_size(size: tuple[int, int, int]) -> None:
    x = torch.rand(2, *size)
    out = ConvVAE(size, latent_dim=3, width=4, per_pixel_sigma=True, log_sigma_bounds=(-2.0, 0.5))(x)
    assert out.recon.shape == x.shape
    assert out.mu.shape == out.logvar.shape == (2, 3)
    assert out.log_sigma is not None
    assert out.log_sigma.shape == x.shape
    assert out.log_sigma.min() >= -2.0
    assert out.log_sigma.max() <= 0.5


def test_mnist_is_in_range() -> None:
    images = data.load("mnist")
    assert images.shape == (1, 28, 28)
    assert images.is_8bit
    assert [len(s) for s in (images.train, images.val, images.test)] == [4000, 500, 500]
    assert data.to_unit(images.train[:100]).max() == 1
