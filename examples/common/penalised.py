"""Autoencoders whose sparsity comes from a penalty on the code, with a bounded gradient; the VAE's is unbounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_elbo import ELBO, gaussian_nll


def penalty(z: Tensor, width: float | None) -> Tensor:
    """|z|, or z²/(width² + z²), which counts what is not 0 as width → 0. Its slope is at most 0.65/width."""
    if width is None:
        return z.abs()
    return z.square() / (width**2 + z.square())


class PenalisedAutoencoder(nn.Module):
    """[B, D] -> ELBO of one whose rate is Σ_k penalty(z_k), z = Ax + c, and whose σ is 1: ½‖x − x̂‖² + weight·penalty.

    Encoder and decoder are affine. The decoder's columns have length 1, without which a small z and a large decoder
    would make any penalty vanish.
    """

    def __init__(self, dims: int, latent_dim: int, weight: float, width: float | None) -> None:
        super().__init__()
        self.weight, self.width = weight, width
        self.encoder = nn.Linear(dims, latent_dim)
        self.columns = nn.Parameter(torch.randn(dims, latent_dim))
        self.bias = nn.Parameter(torch.zeros(dims))

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        return F.linear(z, F.normalize(self.columns, dim=0), self.bias), None

    def forward(self, x: Tensor) -> ELBO:
        z = self.encoder(x)
        distortion = gaussian_nll(self.decode(z)[0], x, sigma=1.0)
        rate = penalty(z, self.width).sum(1).mean()
        return ELBO(distortion + self.weight * rate, distortion, rate, x.new_ones(()))
