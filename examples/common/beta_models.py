"""The convolutional VAE that is told β: a layer of common/conditioning.py after each of its residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .conditioning import FiLM, RootGate, RootSigmoid, SigmoidGate
from .models import ConvVAE, ResBlock, VAEOutput

Layer = Callable[[int], nn.Module]
CONDITIONING: dict[str, tuple[Layer, Layer, str]] = {  # in the encoder, in the decoder, what they are told
    "film": (FiLM, FiLM, "log-beta"),
    "film-level": (FiLM, FiLM, "level"),
    "multi-rate": (SigmoidGate, RootGate, "log-beta"),
    "root-sigmoid": (SigmoidGate, RootSigmoid, "log-beta"),
    "root-sigmoid-level": (SigmoidGate, RootSigmoid, "level"),
}


class ConditionedConvVAE(nn.Module):
    def __init__(self, shape: tuple[int, int, int], latent_dim: int, width: int, conditioning: str) -> None:
        super().__init__()
        self.vae = ConvVAE(shape, latent_dim, width)
        encoder, decoder, _ = CONDITIONING[conditioning]
        self.after = nn.ModuleList(encoder(channels) for channels in _channels(self.vae.encoder))
        self.before = nn.ModuleList(decoder(channels) for channels in _channels(self.vae.decoder))

    def encode(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.vae.to_posterior(_through(self.vae.encoder, self.after, x, n)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, n: Tensor) -> Tensor:
        out = _through(self.vae.decoder, self.before, z, n)
        return out[..., : self.vae.shape[1], : self.vae.shape[2]]

    def forward(self, x: Tensor, n: Tensor) -> VAEOutput:
        mu, logvar = self.encode(x, n)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return VAEOutput(self.decode(z, n), mu, logvar, None)


def _channels(network: nn.Sequential) -> list[int]:
    return [block.channels for block in network if isinstance(block, ResBlock)]


def _through(network: nn.Sequential, layers: Iterable[nn.Module], h: Tensor, n: Tensor) -> Tensor:
    following = iter(layers)
    for module in network:
        h = module(h)
        if isinstance(module, ResBlock):
            h = next(following)(h, n)
    return h
