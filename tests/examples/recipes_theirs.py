"""What public VAE trainers minimise, written down from their sources' formulas: one function for each recipe.

A formula has its recipe's name and takes what its recipe takes, whose names say what they are (test_recipes.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of each sample, against N(0, I)."""
    return ((mu**2 + logvar.exp() - 1 - logvar) / 2).flatten(1).sum(1)


def kl_between(mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor) -> Tensor:
    """Of each step, (B, T)."""
    return torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, std), torch.distributions.Normal(prior_mu, prior_std)
    ).sum(-1)


def of_pixels(lpips: Tensor) -> Tensor:
    return lpips[:, None, None, None]


def frames(video: Tensor) -> Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W)"""
    return video.transpose(1, 2).flatten(0, 1)


def nll(error: Tensor, lpips: Tensor, s: Tensor | float, w: float = 1.0) -> Tensor:
    """Summed over an image, and the images' mean."""
    s = torch.as_tensor(s)
    return ((error + w * of_pixels(lpips)) / s.exp() + s).sum() / len(error)


def per_frame(recon: Tensor, x: Tensor, lpips: Tensor, s: Tensor | float, w: float = 1.0) -> Tensor:
    return nll((frames(recon) - frames(x)).abs(), lpips, s, w)


def latent_diffusion(recon, x, mu, logvar, lpips):
    return nll((recon - x).abs(), lpips, 0.0) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def generative_models(recon, x, mu, logvar, lpips, s):
    return nll((recon - x).abs(), lpips, s) + kl(mu, logvar.clamp(-30, 20)).mean()


def diffusers(recon, x, mu, logvar):
    return ((recon - x) ** 2).sum() / len(x) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def open_sora(recon, x, mu, logvar, lpips):
    of_latent_frames = kl(frames(mu), frames(logvar.clamp(-30, 20)))
    return per_frame(recon, x, lpips, 0.0, 0.1) + 1e-6 * of_latent_frames.mean()


def open_sora_plan(recon, x, mu, logvar, lpips):
    return per_frame(recon, x, lpips, 0.0) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def vidtok(recon, x, mu, logvar, lpips, s):
    return per_frame(recon, x, lpips, s) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def cogvideo(recon, x, mu, logvar, lpips_mean):
    return nll((recon - x).abs(), lpips_mean.expand(len(x)), 0.0) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def audioldm(recon, x, mu, logvar):
    return (recon - x).abs().sum() / len(x) + 1000 * kl(mu, logvar.clamp(-30, 20)).mean()


def va_vae(recon, x, mu, logvar, lpips):
    logvar = logvar.clamp(-30, 20)
    return ((recon - x).abs() + of_pixels(lpips)).mean() + 1e-6 * (mu**2 + logvar.exp() - 1 - logvar).mean()


def mosaic(recon, x, mu, logvar, lpips, s):
    latents, pixels = mu[0].numel(), x[0].numel()
    rate = (-0.5 * (1 + logvar - mu**2 - logvar.exp())).mean()
    return (((recon - x).abs() + of_pixels(lpips)) / s.exp() + s + 2).mean() + latents / pixels * rate


def vae_ft_mse(recon, x, mu, logvar, lpips, s):
    return nll((recon - x) ** 2, lpips, s, 0.1) + 1e-6 * kl(mu, logvar.clamp(-30, 20)).mean()


def cosmos(recon, x, mu, logvar, lpips, pixel_weight):
    logvar = logvar.clamp(-30, 20)
    rate = (mu**2 + logvar.exp() - 1 - logvar) / 2
    return (pixel_weight * (recon - x).abs()).mean() + lpips.mean() + 1e-6 * rate.mean()


def monai(recon, x, mu, std, lpips_mean):
    rate = (mu**2 + std**2 - (std**2).log() - 1).flatten(1).sum(1) / 2
    return F.l1_loss(recon, x) + lpips_mean + 1e-6 * rate.sum() / len(x)


def pytorch_vae(recon, x, mu, logvar):
    return F.mse_loss(recon, x) + 0.00025 * kl(mu, logvar).mean()


def pytorch_vae_beta(recon, x, mu, logvar):
    return F.mse_loss(recon, x) + 1000 * 0.00025 * (kl(mu, logvar).mean() - 3).abs()


def pythae(recon, x, mu, logvar):
    return ((recon - x) ** 2).sum() / 2 / len(x) + 4 * kl(mu, logvar).mean()


def pythae_disentangled(recon, x, mu, logvar):
    return ((recon - x) ** 2).sum() / 2 / len(x) + 10 * (kl(mu, logvar) - 3).abs().mean()


def beta_vae(recon, x, mu, logvar):
    return ((recon.sigmoid() - x) ** 2).sum() / len(x) + 1000 * (kl(mu, logvar).mean() - 3).abs()


def disentanglement_lib(recon, x, mu, logvar):
    return ((recon.sigmoid() - x) ** 2).flatten(1).sum(1).mean() + 4 * kl(mu, logvar).mean()


def disvae(recon, x, mu, logvar):
    return F.mse_loss(255 * recon, 255 * x, reduction="sum") / 255 / len(x) + 4 * kl(mu, logvar).mean()


def disvae_laplace(recon, x, mu, logvar):
    return 3 * F.l1_loss(recon, x, reduction="sum") / len(x) + 4 * kl(mu, logvar).mean()


def lightning_bolts(recon, x, mu, logvar):
    return F.mse_loss(recon, x) + 0.1 * ((mu**2 + logvar.exp() - 1 - logvar) / 2).mean()


def gaussian(recon, x, log_sigma):
    return (((recon - x) / log_sigma.exp()) ** 2 / 2 + log_sigma + LOG_2PI / 2).sum()


def sigma_vae(recon, x, mu, logvar, log_sigma):
    return gaussian(recon, x, -6 + F.softplus(log_sigma + 6)) + kl(mu, logvar).sum()


def optimal_sigma_vae(recon, x, mu, logvar):
    return sigma_vae(recon, x, mu, logvar, ((recon - x) ** 2).mean().sqrt().log())


def beta_sigma_vae(recon, x, mu, logvar):
    of_images = ((recon - x) ** 2).flatten(1).mean(1)
    return x[0].numel() / 2 * ((2 * math.pi * of_images).log() + 1).mean() + kl(mu, logvar).mean()


def cryodrgn(recon, x, mu, logvar):
    return F.mse_loss(recon, x) + 0.125 * kl(mu, logvar).mean() / x[0].numel()


def world_models(recon, x, mu, log_std):
    return ((recon - x) ** 2).sum() - 0.5 * (1 + 2 * log_std - mu**2 - (2 * log_std).exp()).sum()


def pyod(recon, x, mu, logvar):
    return F.mse_loss(recon, x) + kl(mu, logvar).clamp(0, 3).mean()


def scvi(recon, x, mu, var, px_r):
    of_cells = -torch.distributions.Normal(recon, px_r.exp()).log_prob(x).sum(-1)
    return (of_cells + 0.5 * kl(mu, var.log())).mean()


def tvae(recon, x, mu, logvar, sigma, continuous):
    columns = [
        ((x[:, j] - recon[:, j].tanh()) ** 2 / 2 / sigma[j] ** 2).sum() + len(x) * sigma[j].log()
        for j in range(x.shape[1])
        if continuous[j]
    ]
    return 2 * torch.stack(columns).sum() / len(x) + kl(mu, logvar).sum() / len(x)


def act(recon, x, mu, logvar, is_pad):
    return ((recon - x).abs() * ~is_pad[..., None]).mean() + 10 * kl(mu, logvar).mean()


def lerobot_act(recon, x, mu, logvar, is_pad):
    return (recon - x).abs()[~is_pad].mean() + 10 * kl(mu, logvar).mean()


def world_models_experiments(recon, x, mu, logvar):
    return ((recon - x) ** 2).sum() / len(x) + kl(mu, logvar).clamp(min=0.5 * mu.shape[1]).mean()


def unit_gaussian(recon, x):
    """Of each step, (B, T)."""
    return ((recon - x) ** 2 / 2 + LOG_2PI / 2).sum(-1)


def planet(recon, x, mu, std, prior_mu, prior_std):
    return (unit_gaussian(recon, x) + kl_between(mu, std, prior_mu, prior_std).clamp(min=3)).mean()


def dreamer(recon, x, mu, std, prior_mu, prior_std):
    return unit_gaussian(recon, x).mean() + kl_between(mu, std, prior_mu, prior_std).mean().clamp(min=3)


def torchrl_dreamer(recon, x, mu, std, prior_mu, prior_std):
    return ((recon - x) ** 2).sum(-1).mean() + kl_between(mu, std, prior_mu, prior_std).clamp(min=3).mean()


def dreamer_v2(recon, x, mu, std, prior_mu, prior_std):
    to_prior = kl_between(mu.detach(), std.detach(), prior_mu, prior_std).mean().clamp(min=1)
    to_posterior = kl_between(mu, std, prior_mu.detach(), prior_std.detach()).mean().clamp(min=1)
    return unit_gaussian(recon, x).mean() + 0.8 * to_prior + 0.2 * to_posterior


def bernoulli(recon, x, mu, logvar):
    return F.binary_cross_entropy(recon, x, reduction="sum") + kl(mu, logvar).sum()


def stable_audio(mu, std):
    return 1e-4 * (mu**2 + std**2 - (std**2).log() - 1).sum(1).mean()


def pyg_vgae(mu, log_std):
    log_std = log_std.clamp(max=10)
    return (1 / len(mu)) * -0.5 * (1 + 2 * log_std - mu**2 - log_std.exp() ** 2).sum(1).mean()


def vdvae(mu, log_std, prior_mu, prior_log_std):
    total = 0.0
    for m, l, p, q in zip(mu, log_std, prior_mu, prior_log_std, strict=True):
        total = total + (-0.5 + q - l + 0.5 * (l.exp() ** 2 + (m - p) ** 2) / q.exp() ** 2).flatten(1).sum(1)
    return (total / 48).mean()


def nvae(mu, std, prior_mu, prior_std, alpha):
    levels = zip(mu, std, prior_mu, prior_std, strict=True)
    rates = torch.stack([kl_between(*(t.flatten(1) for t in level)) for level in levels], 1)
    weights = rates.mean(0, keepdim=True) + 0.01
    weights = weights / alpha * weights.sum()
    return (0.5 * (rates * (weights / weights.mean()).detach()).sum(1)).mean()


def ladder_vae(mu, logvar, prior_mu, prior_logvar):
    total = 0.0
    for m, l, p, q in zip(mu, logvar, prior_mu, prior_logvar, strict=True):
        level = kl_between(m.flatten(1), (l / 2).exp().flatten(1), p.flatten(1), (q / 2).exp().flatten(1))
        total = total + level.clamp(min=0.5).mean()
    return total
