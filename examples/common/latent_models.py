"""The three networks of an autoencoder for latent diffusion, small: the autoencoder, the critic and the fixed eye.

Images lie in [-1, 1] here, as latent diffusion has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import ResBlock, norm

SCALE = 4  # of images beside their latents


def wide(t: Tensor) -> Tensor:
    """What autocast has made narrow, in fp32."""
    return t.float() if t.element_size() == 2 else t


class LatentAutoencoder(nn.Module):
    """Images [B, C, H, W] to a posterior of [B, K, H/4, W/4] (rounded up), and back. No output activation.

    The resolution changes in one step, at both ends: everything between costs a sixteenth of what it does at the top.
    """

    def __init__(self, shape: tuple[int, int, int], latent_channels: int = 4, width: int = 64) -> None:
        super().__init__()
        channels, *self.size = shape
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 6, stride=SCALE, padding=1), ResBlock(width),
            norm(width), nn.SiLU(), nn.Conv2d(width, 2 * latent_channels, 3, padding=1),
        )  # fmt: skip
        self.last = nn.Conv2d(width, SCALE**2 * channels, 3, padding=1)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1), ResBlock(width), ResBlock(width),
            norm(width), nn.SiLU(), self.last, nn.PixelShuffle(SCALE),
        )  # fmt: skip

    @property
    def last_layer(self) -> Tensor:
        """The weights that every pixel comes from: where the adaptive weight compares gradients."""
        return self.last.weight

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (-n % SCALE for n in self.size)
        mu, logvar = self.encoder(F.pad(x, (0, width, 0, height))).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)[..., : self.size[0], : self.size[1]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        std = torch.exp(0.5 * wide(logvar).clamp(-30, 20))
        return self.decode(mu + std * torch.randn_like(std)), mu, logvar


class PatchDiscriminator(nn.Module):
    """A logit for each patch of 16 pixels: real or reconstructed. Without running statistics, so that it resumes."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), norm(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return wide(self.body(x))


class FeatureDistance(nn.Module):
    """LPIPS in miniature: the squared distance of normalised features, mean over places, sum over three levels.

    LPIPS has a network that was trained on photographs, and weights that were fitted to what people see. This network
    is random, the same for every run, and frozen: it stands in for the kind of term. Each level halves the resolution.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs = (channels, *widths[:-1])
            self.levels = nn.ModuleList(
                nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in zip(inputs, widths, strict=True)
            )
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for level in self.levels:
            x = F.relu(level(x))
            found.append(F.normalize(wide(x), dim=1, eps=1e-3))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B]"""
        levels = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in levels]).sum(0)
