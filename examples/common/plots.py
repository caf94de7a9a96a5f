"""The examples' pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; works without a display

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor


def tile(images: Tensor, columns: int) -> np.ndarray:
    """[N, C, H, W] -> one [H', W', 3] picture, row by row, on white; values outside [0, 1] are clipped."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    count, _, height, width = images.shape
    rows, gap = -(-count // columns), max(1, height // 14)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    return canvas


def plot_images(path: Path, originals: Tensor, recons: Tensor, samples: Tensor, *, columns: int, title: str) -> None:
    """Pairs of rows, originals over their reconstructions; below them samples from the prior."""
    pairs = zip(originals.cpu().split(columns), recons.cpu().split(columns), strict=True)
    panels = [
        ("test images (upper rows) and their reconstructions (lower rows)", tile(torch.cat(sum(pairs, ())), columns)),
        ("samples: decoder mean at z ~ N(0, I)", tile(samples, columns)),
    ]
    heights = [panel.shape[0] / panel.shape[1] for _, panel in panels]
    width = 9.0
    figure, axes = plt.subplots(
        2, 1, figsize=(width, width * sum(heights) + 1.1), height_ratios=heights, layout="constrained"
    )
    for axis, (label, panel) in zip(axes, panels, strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(label, fontsize=10, loc="left")
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_history(path: Path, history: list[dict[str, Any]], *, title: str) -> None:
    """Distortion, rate and sigma over the epochs, training and validation."""
    epochs = [entry["epoch"] for entry in history]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, key, unit in zip(axes, ("distortion", "rate", "sigma"), ("nats", "nats", "std"), strict=True):
        for split, style in (("train", "-"), ("val", "--")):
            axis.plot(epochs, [entry[split][key] for entry in history], style, marker=".", label=split)
        axis.set(title=f"{key} ({unit})", xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
