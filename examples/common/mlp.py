"""A VAE of fully connected layers, for data that are plain vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .models import VAEOutput


class MLPVAE(nn.Module):
    """[B, D] -> reconstruction, posterior. The decoder mirrors the encoder's `hidden` widths; () makes both affine."""

    def __init__(self, dims: int, latent_dim: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = mlp(dims, *hidden, 2 * latent_dim)
        self.decoder = mlp(latent_dim, *reversed(hidden), dims)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        """Mean of p(x|z); the second place is that of ConvVAE's log sigma per pixel."""
        return self.decoder(z), None

    def forward(self, x: Tensor) -> VAEOutput:
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return VAEOutput(self.decoder(z), mu, logvar, None)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.SiLU(), nn.Linear(narrow, wide)]
    return nn.Sequential(*layers[1:])
