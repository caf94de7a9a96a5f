"""Maximum mean discrepancy: how far two samples are from being of one distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import DataError, Splits

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CHUNK = 256  # rows of the kernel matrix that are held at once: small enough for the cache


def mmd(x: Tensor, y: Tensor, scale: float | None = None) -> float:
    """Unbiased estimate of MMD² between the distributions of x [N, K] and y [M, K]; 0 on average if they are one.

        MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y)        k(a, b) = Σ_s C_s / (C_s + ‖a − b‖²),  C_s = 2·scale·s

    The inverse multi-quadratic kernel summed over SCALES, as Dai, Wenliang, Wipf (NeurIPS 2021) and the Wasserstein
    autoencoder (Tolstikhin et al., ICLR 2018) use it. `scale` is the total variance of a sample, which for N(0, I) is
    its dimension K, the default. The estimate leaves out k(x_i, x_i), and so may be slightly negative.
    """
    if x.dim() != 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x, y: expected [N, K] and [M, K], got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"x, y: expected two samples or more in each, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    scale = x.shape[1] if scale is None else scale
    within = sum((_kernel_sum(a, a, scale) - len(SCALES) * len(a)) / (len(a) * (len(a) - 1)) for a in (x, y))
    return within - 2 * _kernel_sum(x, y, scale) / (len(x) * len(y))


def check_enough(data: Splits, name: str) -> None:
    """Before any work: the validation and the test split, a tenth of the data each, have an MMD."""
    if min(len(data.val), len(data.test)) < 2:
        raise DataError(f"{name}: too few images for an MMD of a tenth of them, at least 20 are needed")


def _kernel_sum(x: Tensor, y: Tensor, scale: float) -> float:
    """Σ_ij k(x_i, y_j), the diagonal included, where k is len(SCALES) if x and y are the same."""
    total = 0.0
    for rows in x.split(CHUNK):
        squares = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        total += sum(float((c / (c + squares)).sum()) for c in (2 * scale * s for s in SCALES))
    return total
