"""Decoders beyond the Gaussian: what p(x|z) is, made from what the decoder puts out for each value of an image.

All take images in [0, 1] of 8-bit levels, x = level/255, and give the logarithm of one of three things:

    MASS      the probability of x's level, P(level): log P <= 0, and the 256 masses sum to 1
    DENSITY   p(x) of a continuous x. One level is 1/255 wide, so P(level) is about p(x)/255, which is true while p
              changes little over one level; log p may be positive
    NEITHER   a training loss of that form, but no likelihood of 8-bit data
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

from fused_elbo import ELBO, gaussian_kl

from .models import ConvVAE

MASS, DENSITY, NEITHER = "mass", "density", "neither"
LEVELS = 256
LOG_SCALE_BOUNDS = (-3.0, 0.0)  # of a density: where a pixel never changes, an unbounded one has no optimum
COMPONENTS = 5  # of the logistic mixture
MIN_LOG_SCALE = -7.0  # of a logistic: a quarter of a level; no bound is needed for its sake, only for exp's


def levels(x: Tensor) -> Tensor:
    return (x * (LEVELS - 1)).round().long()


def bounded(raw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.sigmoid(raw)


class Likelihood(ABC):
    """One p(x|z), every value of the image on its own given z.

    The decoder's outputs come as `out` [B, C, outputs, H, W], x as [B, C, H, W], and so do the results.
    """

    outputs: int  # numbers per value
    gives: str  # MASS, DENSITY or NEITHER

    @abstractmethod
    def log_prob(self, out: Tensor, x: Tensor) -> Tensor: ...

    @abstractmethod
    def mean(self, out: Tensor) -> Tensor:
        """E[x|z]: what is shown of every decoder, and measured; drawing each pixel on its own would add noise to it."""


class Bernoulli(Likelihood):
    """Cross-entropy with grey levels as if they were probabilities: Σ x log p + (1 − x) log(1 − p)."""

    outputs, gives = 1, NEITHER

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        return distributions.Bernoulli(logits=out.squeeze(2), validate_args=False).log_prob(x)

    def mean(self, out: Tensor) -> Tensor:
        return out.squeeze(2).sigmoid()


class StudentT(Likelihood):
    """Location, bounded scale and degrees of freedom ν > 1 of every value, all from the decoder."""

    outputs, gives = 3, DENSITY

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        loc, scale, freedom = out.unbind(2)
        scale = bounded(scale, *LOG_SCALE_BOUNDS).exp()
        return distributions.StudentT(1 + F.softplus(freedom), loc, scale, validate_args=False).log_prob(x)

    def mean(self, out: Tensor) -> Tensor:
        return out[:, :, 0]  # there is one, since ν > 1


class Categorical(Likelihood):
    """A logit for each of the 256 levels, which know nothing of their order."""

    outputs, gives = LEVELS, MASS

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        return -F.cross_entropy(out.transpose(1, 2), levels(x), reduction="none")

    def mean(self, out: Tensor) -> Tensor:
        values = torch.linspace(0, 1, LEVELS, device=out.device, dtype=out.dtype)
        return torch.einsum("bckhw,k->bchw", out.softmax(2), values)


class Bitwise(Likelihood):
    """A logit for each of the level's 8 bits, the lowest first; given z the bits are independent."""

    outputs, gives = 8, MASS

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        bits = (levels(x).unsqueeze(2) >> self._place(out)) & 1
        return distributions.Bernoulli(logits=out, validate_args=False).log_prob(bits.to(out.dtype)).sum(2)

    def mean(self, out: Tensor) -> Tensor:
        return (out.sigmoid() * 2.0 ** self._place(out)).sum(2) / (LEVELS - 1)

    def _place(self, out: Tensor) -> Tensor:
        return torch.arange(8, device=out.device).view(8, 1, 1)


class LogisticMixture(Likelihood):
    """A mixture of logistics, its mass collected by levels, as in PixelCNN++ (arXiv:1701.05517) but each channel alone.

    P(level) = Σ_k π_k [F_k(x + h) − F_k(x − h)] with h half a level; what lies below 0 goes to level 0, above 1 to 255.
    """

    outputs, gives = 3 * COMPONENTS, MASS

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        log_weight, mean, log_scale = self._components(out)
        x, half, inverse = x.unsqueeze(2), 0.5 / (LEVELS - 1), (-log_scale).exp()
        upper, lower = (x + half - mean) * inverse, (x - half - mean) * inverse
        first, last = x < half, x > 1 - half
        # F(a) − F(b) = F(a) F(−b) (1 − e^(b−a)): a product, so that nothing cancels; at the ends one factor is left.
        below = torch.where(last, 0.0, F.logsigmoid(upper))
        above = torch.where(first, 0.0, F.logsigmoid(-lower))
        between = torch.where(first | last, 0.0, torch.log(-torch.expm1(-2 * half * inverse)))
        return torch.logsumexp(log_weight + below + above + between, dim=2)

    def mean(self, out: Tensor) -> Tensor:
        """The mean of the mixture cut off at 0 and 1, ∫ 1 − F over [0, 1]. The levels' mean is within a level."""
        log_weight, mean, log_scale = self._components(out)
        scale = log_scale.exp()
        inside = scale * (F.softplus(mean / scale) - F.softplus((mean - 1) / scale))
        return (log_weight.exp() * inside).sum(2)

    def _components(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, K, H, W] each. Components begin apart, or they would stay alike for long."""
        weight, mean, log_scale = out.chunk(3, dim=2)
        start = torch.linspace(0, 1, COMPONENTS, device=out.device, dtype=out.dtype).view(-1, 1, 1)
        return weight.log_softmax(2), mean + start, (log_scale - 2).clamp_min(MIN_LOG_SCALE)


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "student-t": StudentT(),
    "categorical": Categorical(),
    "bitwise-categorical": Bitwise(),
    "logistic-mixture": LogisticMixture(),
}


class LikelihoodObjective(nn.Module):
    """images [B, C, H, W] in [0, 1] -> ELBO with a decoder of `likelihood`; a trainer's sigma is 0: there is none."""

    def __init__(self, shape: tuple[int, int, int], likelihood: Likelihood, *, latent_dim: int, width: int) -> None:
        super().__init__()
        self.model = ConvVAE(shape, latent_dim, width, outputs=likelihood.outputs)
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> ELBO:
        out = self.model(x)
        distortion = -self.likelihood.log_prob(self._grouped(out.recon), x).sum() / len(x)
        rate = gaussian_kl(out.mu, out.logvar)
        return ELBO(distortion + rate, distortion, rate, x.new_zeros(()))

    def mean(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self._grouped(self.model.decode(z)[0]))

    def _grouped(self, out: Tensor) -> Tensor:
        return out.unflatten(1, (-1, self.likelihood.outputs))


def mass_nats(density_nats: float, dims: int) -> float:
    """−log p(x), of a density on [0, 1], as −log P(levels): P is about p / 255 for each of `dims` values."""
    return density_nats + dims * math.log(LEVELS - 1)
