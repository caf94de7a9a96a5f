"""VAEs that are told β, by layers of common/conditioning.py at places of their networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import FiLM, Modulation, RootGate, RootSigmoid, SigmoidGate
from .mlp import MLPVAE
from .models import ConvVAE, ResBlock, VAEOutput

Layer = Callable[[int], nn.Module]
BLOCKS = "after each residual block"
NORMS = "after each block's second normalisation and each network's last one, and on the posterior's numbers"


class Conditioning(NamedTuple):
    encoder: Layer
    decoder: Layer
    told: str  # of beta_input.CONDITION
    place: str


CONDITIONING = {
    "modulation": Conditioning(Modulation, Modulation, "log-beta", NORMS),
    "modulation-level": Conditioning(Modulation, Modulation, "level", NORMS),
    "film": Conditioning(FiLM, FiLM, "log-beta", BLOCKS),
    "film-level": Conditioning(FiLM, FiLM, "level", BLOCKS),
    "multi-rate": Conditioning(SigmoidGate, RootGate, "log-beta", BLOCKS),
    "root-sigmoid": Conditioning(SigmoidGate, RootSigmoid, "log-beta", BLOCKS),
    "root-sigmoid-level": Conditioning(SigmoidGate, RootSigmoid, "level", BLOCKS),
}


class ConditionedVAE(nn.Module):
    """encode(x, n), decode(z, n): n [B] tells the networks which β."""

    latent_dim: int

    def encode(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def decode(self, z: Tensor, n: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, n: Tensor) -> VAEOutput:
        mu, logvar = self.encode(x, n)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return VAEOutput(self.decode(z, n), mu, logvar, None)


class ConditionedMLPVAE(ConditionedVAE):
    """Modulated after each activation, and on the posterior's numbers."""

    def __init__(self, dims: int, latent_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.vae = MLPVAE(dims, latent_dim, hidden)
        self.encoding = nn.ModuleList(Modulation(width) for width in (*hidden, 2 * latent_dim))
        self.decoding = nn.ModuleList(Modulation(width) for width in reversed(hidden))

    def encode(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.encoding[-1](_activated(self.vae.encoder, self.encoding, x, n), n)
        mu, logvar = parameters.chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, n: Tensor) -> Tensor:
        return _activated(self.vae.decoder, self.decoding, z, n)


def _activated(network: nn.Sequential, layers: nn.ModuleList, h: Tensor, n: Tensor) -> Tensor:
    following = iter(layers)
    for module in network:
        h = module(h)
        if isinstance(module, nn.SiLU):
            h = next(following)(h, n)
    return h


class ConditionedConvVAE(ConditionedVAE):
    def __init__(self, shape: tuple[int, int, int], latent_dim: int, width: int, conditioning: str) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.vae = ConvVAE(shape, latent_dim, width)
        encoder, decoder, _, self.place = CONDITIONING[conditioning]
        self.encoding = nn.ModuleList(encoder(channels) for channels in self._channels(self.vae.encoder))
        self.decoding = nn.ModuleList(decoder(channels) for channels in self._channels(self.vae.decoder))
        self.on_posterior = encoder(2 * latent_dim) if self.place == NORMS else None

    def encode(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.vae.to_posterior(self._through(self.vae.encoder, self.encoding, x, n))
        if self.on_posterior is not None:
            parameters = self.on_posterior(parameters, n)
        mu, logvar = parameters.chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, n: Tensor) -> Tensor:
        out = self._through(self.vae.decoder, self.decoding, z, n)
        return out[..., : self.vae.shape[1], : self.vae.shape[2]]

    def _channels(self, network: nn.Sequential) -> Iterator[int]:
        """Of each layer that tells this network, in the order of `_through`."""
        for module in network:
            if isinstance(module, ResBlock):
                yield module.channels
            elif isinstance(module, nn.GroupNorm) and self.place == NORMS:
                yield module.num_channels

    def _through(self, network: nn.Sequential, layers: nn.ModuleList, h: Tensor, n: Tensor) -> Tensor:
        following = iter(layers)
        for module in network:
            if isinstance(module, ResBlock) and self.place == NORMS:
                layer = next(following)
                h = module(h, lambda normalised, layer=layer: layer(normalised, n))
            elif isinstance(module, ResBlock) or (isinstance(module, nn.GroupNorm) and self.place == NORMS):
                h = next(following)(module(h), n)
            else:
                h = module(h)
        return h
