"""A small residual convolutional VAE for images of any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

COARSEST = 7  # halve the resolution until no side is longer than this
MAX_WIDENING = 4  # channels double with each halving, up to this many times --width


class VAEOutput(NamedTuple):
    recon: Tensor  # [B, C * outputs, H, W]
    mu: Tensor  # [B, K]
    logvar: Tensor  # [B, K]
    log_sigma: Tensor | None  # [B, C, H, W] with per_pixel_sigma, else None


def _halve(n: int) -> int:
    return -(-n // 2)  # rounded up, as a strided convolution with "same" padding does


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """Pre-activation residual block. GroupNorm: the same function in training and evaluation, whatever the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(last.weight)  # each block starts as the identity
        self.body = nn.Sequential(norm(channels), nn.SiLU(), first, norm(channels), nn.SiLU(), last)

    def forward(self, x: Tensor, modulate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`modulate` stands after the second normalisation: it can tell the block what the image does not say."""
        if modulate is None:
            return x + self.body(x)
        return x + self.body[4:](modulate(self.body[:4](x)))


class ConvVAE(nn.Module):
    """Encoder q(z|x) and decoder of a Gaussian VAE; the decoder's mean has no output activation.

    Args:
        shape: (channels, height, width) of the images.
        latent_dim: K, the size of z.
        width: channels at half resolution; coarser levels have up to four times as many.
        outputs: numbers that the decoder puts out for each value of the image: one, a mean, for a Gaussian.
        per_pixel_sigma: the decoder also outputs log sigma of every pixel.
        log_sigma_bounds: range of that log sigma. Both ends matter: unbounded below, a pixel that is constant in the
            training data is worth infinitely many nats; unbounded above, bright strokes are explained as noise.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int = 16,
        width: int = 32,
        *,
        outputs: int = 1,
        per_pixel_sigma: bool = False,
        log_sigma_bounds: tuple[float, float] = (-3.0, 0.0),
    ) -> None:
        super().__init__()
        channels = shape[0]
        self.shape, self.latent_dim, self.per_pixel_sigma = shape, latent_dim, per_pixel_sigma
        self.log_sigma_bounds = log_sigma_bounds

        widths, (rows, cols) = [width], (_halve(n) for n in shape[1:])
        while max(rows, cols) > COARSEST:
            widths.append(min(2 * widths[-1], MAX_WIDENING * width))
            rows, cols = _halve(rows), _halve(cols)
        coarse = (widths[-1], rows, cols)
        features = widths[-1] * rows * cols

        # The finest level is entered and left in one strided / sub-pixel step: full resolution costs most, gives least.
        encoder: list[nn.Module] = [nn.Conv2d(channels, width, 5, stride=2, padding=2), ResBlock(width)]
        for fine, wide in itertools.pairwise(widths):
            encoder += [nn.Conv2d(fine, wide, 3, stride=2, padding=1), ResBlock(wide)]
        self.encoder = nn.Sequential(*encoder, norm(widths[-1]), nn.SiLU(), nn.Flatten())
        self.to_posterior = nn.Linear(features, 2 * latent_dim)

        decoder: list[nn.Module] = [nn.Linear(latent_dim, features), nn.Unflatten(1, coarse), ResBlock(widths[-1])]
        for wide, fine in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, fine, 3, padding=1), ResBlock(fine)]
        out_channels = channels * outputs * (2 if per_pixel_sigma else 1)
        self.decoder = nn.Sequential(
            *decoder, norm(width), nn.SiLU(), nn.Conv2d(width, 4 * out_channels, 3, padding=1), nn.PixelShuffle(2)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.to_posterior(self.encoder(x)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (or other `outputs`) of p(x|z), and its log sigma per pixel where the model has one."""
        out = self.decoder(z)[..., : self.shape[1], : self.shape[2]]  # odd sizes were rounded up on the way down
        if not self.per_pixel_sigma:
            return out, None
        recon, raw = out.chunk(2, dim=1)
        low, high = self.log_sigma_bounds
        return recon, low + (high - low) * torch.sigmoid(raw)

    def forward(self, x: Tensor) -> VAEOutput:
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        recon, log_sigma = self.decode(z)
        return VAEOutput(recon, mu, logvar, log_sigma)
