"""The losses that are timed, and the same in fp64 that each is checked against. All return sums, over tensors that
come in the order of `Case.tensors`.

Half-precision inputs of the eager code are cast to fp32 first, as autocast does: a sum over an image is beyond fp16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from workloads import DATASET_SIZE, OF_POSTERIORS

from fused_elbo import decoupled_elbo, decoupled_elbo_backward, gaussian_kl, log_aggregate_posterior

SOFTCLIP = -6.0  # where the calibrated-decoder code bends log σ
LOG_2PI = math.log(2 * math.pi)
AT_ONCE = 64  # points, where all would be too many to broadcast


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.element_size() == 2 else t for t in tensors]


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """The KL as most VAE code writes it."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def stock(*tensors: Tensor) -> Tensor:
    """Optimal σ as in orybkin/sigma-vae-pytorch: the NLL of every element, with softclip, then the sum."""
    recon, target, mu, logvar = wide(*tensors)
    log_sigma = (target - recon).pow(2).mean().sqrt().log()
    log_sigma = SOFTCLIP + F.softplus(log_sigma - SOFTCLIP)
    nll = 0.5 * torch.pow((target - recon) / log_sigma.exp(), 2) + log_sigma + 0.5 * LOG_2PI
    return nll.sum() + kl(mu, logvar)


def one_liner(*tensors: Tensor) -> Tensor:
    """The best eager code that we know: N/2 log MSE, which is the same loss up to a constant."""
    recon, target, mu, logvar = wide(*tensors)
    return recon.numel() / 2 * torch.log(F.mse_loss(recon, target)) + kl(mu, logvar)


def one_liner_per_image(*tensors: Tensor) -> Tensor:
    recon, target, mu, logvar = wide(*tensors)
    mse = F.mse_loss(recon, target, reduction="none").flatten(1).mean(1)
    return recon[0].numel() / 2 * torch.log(mse).sum() + kl(mu, logvar)


def gaussian_nll(*tensors: Tensor) -> Tensor:
    """PyTorch's own, which takes a variance."""
    recon, target, mu, logvar, log_sigma = wide(*tensors)
    return F.gaussian_nll_loss(recon, target, (2 * log_sigma).exp(), reduction="sum") + kl(mu, logvar)


def latent_diffusion(*tensors: Tensor) -> Tensor:
    """Follows CompVis/latent-diffusion's LPIPSWithDiscriminator: rec / exp(logvar) + logvar, summed, over the batch.

    The squared error is in the place of the absolute one, and the KL has weight 2, which makes it twice our loss.
    """
    recon, target, mu, logvar, log_sigma = wide(*tensors)
    logvar_x = 2 * log_sigma
    nll = (target - recon).pow(2) / torch.exp(logvar_x) + logvar_x
    nll = torch.sum(nll) / nll.shape[0]
    logvar = torch.clamp(logvar, -30.0, 20.0)
    rate = 0.5 * torch.sum(torch.pow(mu, 2) + torch.exp(logvar) - 1.0 - logvar, dim=list(range(1, mu.dim())))
    return nll + 2.0 * torch.sum(rate) / rate.shape[0]


def one_liner_laplace(*tensors: Tensor) -> Tensor:
    recon, target, mu, logvar = wide(*tensors)
    return recon.numel() * torch.log(F.l1_loss(recon, target)) + kl(mu, logvar)


def latent_diffusion_l1(*tensors: Tensor) -> Tensor:
    """As CompVis/latent-diffusion and Stability-AI/generative-models have it, without the perceptual term: |e| /
    exp(logvar) + logvar, summed, over the batch."""
    recon, target, mu, logvar, logvar_x = wide(*tensors)
    nll = torch.abs(target - recon) / torch.exp(logvar_x) + logvar_x
    nll = torch.sum(nll) / nll.shape[0]
    logvar = torch.clamp(logvar, -30.0, 20.0)
    rate = 0.5 * torch.sum(torch.pow(mu, 2) + torch.exp(logvar) - 1.0 - logvar, dim=list(range(1, mu.dim())))
    return nll + torch.sum(rate) / rate.shape[0]


def masked_one_liner(*tensors: Tensor) -> Tensor:
    recon, target, mu, logvar, mask = wide(*tensors)
    selected = mask.sum() * recon.shape[1]
    mse = (mask * (recon - target).square()).sum() / selected
    return selected / 2 * torch.log(mse) + kl(mu, logvar)


def decoders_one_liner(*tensors: Tensor) -> Tensor:
    y, target, mu, logvar = wide(*tensors)
    return one_liner(torch.sigmoid(y), target.float() / 255, mu, logvar)


def eager_levels(*tensors: Tensor) -> Tensor:
    """The KL of two Gaussians for each level, as VDVAE writes it."""
    total = torch.zeros((), device=tensors[0].device)
    for m, l, m_p, l_p in levels_of(tensors):
        total = total + (0.5 * (l_p - l - 1 + ((m - m_p) ** 2 + l.exp()) / l_p.exp())).sum()
    return total


def eager_aggregate(*tensors: Tensor) -> Tensor:
    """Total correlation as code for β-TCVAE has it: the log-densities of all pairs, broadcast, with the stratified
    weights, of which a component's own is 1/N."""
    return _total_correlation(*wide(*tensors))


def eager_aggregate_in_parts(*tensors: Tensor) -> Tensor:
    z, mu, logvar = wide(*tensors)
    parts = enumerate(z.split(AT_ONCE))
    return torch.stack([_total_correlation(rows, mu, logvar, AT_ONCE * i) for i, rows in parts]).sum()


def _total_correlation(z: Tensor, mu: Tensor, logvar: Tensor, first: int = 0) -> Tensor:
    """Of rows of z that begin at `first`, with all of mu and logvar."""
    log_density = -0.5 * ((z[:, None] - mu) ** 2 / logvar.exp() + logvar + LOG_2PI)
    batch, components = z.shape[0], mu.shape[0]
    others = math.log((DATASET_SIZE - 1) / (DATASET_SIZE * (components - 1)))
    weights = torch.full((batch, components), others, dtype=z.dtype, device=z.device)
    weights.diagonal(first).fill_(-math.log(DATASET_SIZE))
    joint = torch.logsumexp(log_density.sum(2) + weights, 1)
    return (joint - torch.logsumexp(log_density + weights[:, :, None], 1).sum(1)).sum()


def keops_aggregate(*tensors: Tensor) -> Tensor:
    """The same by pykeops, which streams too: one reduction for the joint density, and one for all dimensions, which
    are then a dimension of batches."""
    z, mu, logvar = wide(*tensors)
    columns = (t.t()[:, :, None].contiguous() for t in (z, mu, logvar))
    return _keops_log_sums(z, mu, logvar).sum() - _keops_log_sums(*columns).sum()


def _keops_log_sums(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor  # pyright: ignore[reportMissingImports]

    components = mu.shape[-2]
    own = -math.log(DATASET_SIZE)
    others = math.log((DATASET_SIZE - 1) / (DATASET_SIZE * (components - 1)))
    i = torch.arange(z.shape[-2], dtype=z.dtype, device=z.device)[:, None, None]
    j = torch.arange(components, dtype=z.dtype, device=z.device)[None, :, None]
    log_weight = own + (others - own) * (LazyTensor(i) - LazyTensor(j)).square().sign()
    scaled = (LazyTensor(z[..., :, None, :]) - LazyTensor(mu[..., None, :, :])).square()
    scaled = scaled * LazyTensor(torch.exp(-logvar)[..., None, :, :])
    log_density = -0.5 * (scaled + LazyTensor((logvar + LOG_2PI)[..., None, :, :]))
    return (log_density.sum(-1) + log_weight).logsumexp(dim=z.dim() - 1)


def levels_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [tensors[i : i + 4] for i in range(0, len(tensors), 4)]


# ----------------------------------------------------------------------------------------------------------- fused_elbo


def options(sigma: str, tensors: tuple[Tensor, ...]) -> dict[str, object]:
    if sigma in ("learned", "pixel"):
        return {"log_sigma": tensors[4]}
    if sigma == "laplace-learned":
        return {"likelihood": "laplace", "log_sigma": tensors[4], "logvar_range": (-30, 20)}
    return {
        "image": {"sigma": "optimal-per-image"},
        "laplace": {"likelihood": "laplace"},
        "mask": {"weight": tensors[-1]},
        "decoder": {"activation": "sigmoid"},
    }.get(sigma, {})


def fused(sigma: str, *tensors: Tensor) -> Tensor:
    if sigma == "levels":
        mu, logvar, *prior = zip(*levels_of(tensors), strict=True)
        return gaussian_kl(mu, logvar, prior=list(zip(*prior, strict=True)), reduction="sum")
    if sigma in OF_POSTERIORS:
        joint, marginals = log_aggregate_posterior(*tensors, dataset_size=DATASET_SIZE)
        return joint.sum() - marginals.sum()
    return decoupled_elbo(*tensors[:4], **options(sigma, tensors), reduction="sum").loss  # type: ignore[arg-type]


def single_pass(sigma: str, *tensors: Tensor) -> Tensor:
    """Leaves the gradients in .grad."""
    return decoupled_elbo_backward(*tensors[:4], **options(sigma, tensors), reduction="sum").loss  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- fp64


def exact(sigma: str, softclip: bool, *tensors: Tensor) -> Tensor:
    """−log p(x|z) + KL, summed, as the formulas are written; for fp64 tensors, and without a thought for speed."""
    if sigma == "levels":
        gaussians = [(m, l, m_p, l_p) for m, l, m_p, l_p in levels_of(tensors)]
        return torch.stack(
            [0.5 * ((m - m_p) ** 2 / l_p.exp() + (l - l_p).exp() - 1 - (l - l_p)).sum() for m, l, m_p, l_p in gaussians]
        ).sum()
    if sigma in OF_POSTERIORS:  # in parts, whose tensors are made again for their gradients
        z, mu, logvar = tensors
        parts = enumerate(z.split(AT_ONCE))
        return torch.stack(
            [checkpoint(_total_correlation, rows, mu, logvar, AT_ONCE * i, use_reentrant=False) for i, rows in parts]
        ).sum()
    recon, target, mu, logvar = tensors[:4]
    rate = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    if sigma.startswith("laplace"):
        absolute = (recon - target).abs()
        log_scale = absolute.mean().log() if sigma == "laplace" else tensors[4]
        return (absolute / log_scale.exp() + log_scale + math.log(2)).sum() + rate
    if sigma == "mask":
        squared = ((recon - target) ** 2)[tensors[4].bool().expand(recon.shape)]
        return squared.numel() / 2 * (squared.mean().log() + 1 + LOG_2PI) + rate
    if sigma == "decoder":
        recon, target, sigma = torch.sigmoid(recon), target.double() / 255, "batch"
    squared = (recon - target) ** 2
    if sigma == "batch":
        log_sigma = 0.5 * squared.mean().log()
    elif sigma == "image":
        log_sigma = 0.5 * squared.mean(dim=tuple(range(1, recon.dim())), keepdim=True).log()
    else:
        log_sigma = tensors[4]
    if softclip:
        log_sigma = SOFTCLIP + F.softplus(log_sigma - SOFTCLIP)
    distortion = squared / (2 * (2 * log_sigma).exp()) + log_sigma + 0.5 * LOG_2PI
    return distortion.sum() + rate
