"""The rate alone, beside a likelihood that is not ours, and of hierarchies.

KL is the rate of a sample, K its number of latents. Lists have a tensor for each level of a hierarchy.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fused_elbo import gaussian_kl


def bernoulli(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """pytorch/examples, keras-team/keras-io: their VAE of MNIST

    Loss: ΣBCE + ΣKL.
    Ours: the same number. A Bernoulli likelihood is for bits; for grey values `sigma="optimal"` is a density.
    """
    return F.binary_cross_entropy(recon, x, reduction="sum") + gaussian_kl(mu, logvar, reduction="sum")


def stable_audio(mu: Tensor, std: Tensor) -> Tensor:
    """Stability-AI/stable-audio-tools: stable_audio_tools/models/bottleneck.py

    Loss: 1e-4 · mean over clips and frames of Σ(μ² + σ_z² − log σ_z² − 1) over channels, without the ½, + STFT losses.
    Ours: the same number, of the rate. Latents are (B, C, T).
    """
    return 1e-4 * 2 * gaussian_kl(mu, 2 * std.log()) / mu.shape[-1]


def pyg_vgae(mu: Tensor, log_std: Tensor) -> Tensor:
    """pyg-team/pytorch_geometric: torch_geometric/nn/models/autoencoder.py, VGAE

    Loss: 1/N · mean KL of a node, with log σ_z ≤ 10, + cross-entropy of edges.
    Ours: the same number, of the rate. `logvar_range` takes two numbers; −1000 is no bound, since exp(−1000) is 0.
    """
    return gaussian_kl(mu, 2 * log_std, logvar_range=(-1000, 20)) / len(mu)


def vdvae(
    mu: list[Tensor], log_std: list[Tensor], prior_mu: list[Tensor], prior_log_std: list[Tensor], d: int = 48
) -> Tensor:
    """openai/vdvae: vae.py

    Loss: 1/D · Σ over levels of ΣKL(q ‖ p)/B, + the mixture's likelihood.
    Ours: the same number, of the rate, by one call for all levels.
    """
    prior = [(m, 2 * l) for m, l in zip(prior_mu, prior_log_std, strict=True)]
    return gaussian_kl(mu, [2 * l for l in log_std], prior=prior) / d


def nvae(
    mu: list[Tensor],
    std: list[Tensor],
    prior_mu: list[Tensor],
    prior_std: list[Tensor],
    alpha: Tensor,
    beta: float = 0.5,
) -> Tensor:
    """NVlabs/NVAE: utils.py, kl_balancer

    Loss: β · Σ over groups of c · ΣKL(q ‖ p)/B, c being sg(ΣKL/B + 0.01)/α over its mean, + the likelihood; β warms up.
    Ours: the same number, of the rate. α has a number for each group. At β = 1 every c is 1.
    """
    prior = [(m, 2 * s.log()) for m, s in zip(prior_mu, prior_std, strict=True)]
    rates = gaussian_kl(mu, [2 * s.log() for s in std], prior=prior, per_level=True)
    coefficients = (rates.detach() + 0.01) / alpha
    return beta * (coefficients / coefficients.mean() * rates).sum()


def ladder_vae(
    mu: list[Tensor], logvar: list[Tensor], prior_mu: list[Tensor], prior_logvar: list[Tensor], free_nats: float = 0.5
) -> Tensor:
    """addtt/ladder-vae-pytorch

    Loss: β · Σ over levels of mean max(KL(q ‖ p), λ), with β = 1 here, + the likelihood.
    Ours: the same number, of the rate.
    """
    prior = list(zip(prior_mu, prior_logvar, strict=True))
    rates = gaussian_kl(mu, logvar, prior=prior, per_level=True, reduction="none")  # (B, L)
    return rates.clamp(min=free_nats).mean(0).sum()
