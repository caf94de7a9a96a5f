"""Autoencoders for latent diffusion: absolute error, perceptual term, a small weight on the rate, a discriminator.

x is an image (B, C, H, W) or a clip (B, C, T, H, W) and has D numbers, e = recon − x, and `lpips` is the perceptual
distance p of each image or frame, flat. `mu` and `logvar` are the halves of the encoder's output, before any clamp. Σ
counts everything in the batch, and KL is the rate of a sample. `adversarial` is the discriminator's term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_elbo import ELBO, decoupled_elbo


def adversarial(distortion: Tensor, g_loss: Tensor, last_layer: Tensor, weight: float = 0.5) -> Tensor:
    """The generator's term, in the balance of the gradients that reach the decoder's last layer.

    Pass `elbo.distortion`, divided by T where the loss is. Then one `backward` of the sum of both serves all.
    """
    size, g_size = (torch.autograd.grad(t, last_layer, retain_graph=True)[0].norm() for t in (distortion, g_loss))
    return weight * (size / (g_size + 1e-4)).clamp(0.0, 1e4) * g_loss


def latent_diffusion(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor) -> ELBO:
    """CompVis/latent-diffusion: ldm/modules/losses/contperceptual.py

    Loss: 1/B · Σ[(|e| + w·p)/eˢ + s] + 1e-6 · ΣKL/B, with w = 1 and s = 0, a parameter that no optimiser gets.
    Ours: the same number. Every pixel has w·p, so a sample has D·w·p. Without `sigma`, s is at its optimum.
    """
    return decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6, likelihood="laplace", sigma=1.0, constant=False,
        extra_error=x[0].numel() * 1.0 * lpips, logvar_range=(-30, 20),
    )  # fmt: skip


def generative_models(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor, s: Tensor) -> ELBO:
    """Stability-AI/generative-models: sgm/modules/autoencoding/losses/discriminator_loss.py

    Loss: 1/B · Σ[(|e| + w·p)/eˢ + s] + ΣKL/B, with s learned: a Laplace likelihood of scale b = eˢ, and β = 1.
    Ours: the same number. A clip's frames are samples there; flatten them into the batch of all tensors, as it does.
    """
    return decoupled_elbo(
        recon, x, mu, logvar, beta=1.0, likelihood="laplace", log_sigma=s, constant=False,
        extra_error=x[0].numel() * 1.0 * lpips, logvar_range=(-30, 20),
    )  # fmt: skip


def diffusers(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """huggingface/diffusers: examples/research_projects/autoencoderkl/train_autoencoderkl.py

    Loss: 1/B · Σ[e² + w·p] + 1e-6 · ΣKL/B, where p has no gradient, so that it does not train anything.
    Ours: D·½log π more, and p is left out. `posterior.mean` and `posterior.logvar` of AutoencoderKL are mu and logvar.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=1e-6, sigma=0.5**0.5, logvar_range=(-30, 20))


def open_sora(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor) -> Tensor:
    """hpcaitech/Open-Sora: opensora/models/vae/losses.py

    Loss: 1/(B·T) · Σ[(|e| + w·p)/eˢ + s] + 1e-6 · ΣKL/(B·t), for T frames and t latent ones; w = 0.1 and s = 0.
    Ours: the same number. Theirs adds up in bf16; here bf16 tensors are added up in fp32.
    """
    frames, d = x.shape[2], x[0, :, 0].numel()
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6 * frames / mu.shape[2], likelihood="laplace", sigma=1.0, constant=False,
        extra_error=d * 0.1 * lpips.reshape(-1, frames).sum(1), logvar_range=(-30, 20),
    )  # fmt: skip
    return elbo.loss / frames


def open_sora_plan(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor) -> Tensor:
    """PKU-YuanGroup/Open-Sora-Plan, PKU-YuanGroup/WF-VAE, VideoVerses/VideoVAEPlus: their perceptual loss

    Loss: 1/(B·T) · Σ[(|e| + w·p)/eˢ + s] + 1e-6 · ΣKL/B: a frame's error beside a clip's rate; w = 1 and s = 0.
    Ours: the same number. Wavelet terms and WF-VAE's distillation of latents are added to it.
    """
    frames, d = x.shape[2], x[0, :, 0].numel()
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6 * frames, likelihood="laplace", sigma=1.0, constant=False,
        extra_error=d * 1.0 * lpips.reshape(-1, frames).sum(1), logvar_range=(-30, 20),
    )  # fmt: skip
    return elbo.loss / frames


def vidtok(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor, s: Tensor) -> Tensor:
    """microsoft/VidTok: vidtok/modules/losses.py

    Loss: 1/(B·T) · Σ[(|e| + w·p)/eˢ + s] + 1e-6 · ΣKL/B, with s learned and w = 1, in bf16 autocast.
    Ours: the same number.
    """
    frames, d = x.shape[2], x[0, :, 0].numel()
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6 * frames, likelihood="laplace", log_sigma=s, constant=False,
        extra_error=d * 1.0 * lpips.reshape(-1, frames).sum(1), logvar_range=(-30, 20),
    )  # fmt: skip
    return elbo.loss / frames


def cogvideo(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips_mean: Tensor, beta: float = 1e-6) -> ELBO:
    """zai-org/CogVideo: sat/sgm/modules/autoencoding/losses/discriminator_loss.py

    Loss: 1/B · Σ[(|e| + w·p)/eˢ + s] + β · ΣKL/B, where p is one number, the mean over one frame of each clip; w = 1.
    Ours: the same number. No configuration of its VAE is published, so β and s = 0 are guesses.
    """
    return decoupled_elbo(
        recon, x, mu, logvar, beta=beta, likelihood="laplace", sigma=1.0, constant=False,
        extra_error=x[0].numel() * 1.0 * lpips_mean, logvar_range=(-30, 20),
    )  # fmt: skip


def audioldm(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """haoheliu/AudioLDM-training-finetuning: audioldm_train/losses/contperceptual.py

    Loss: 1/B · Σ|e| + 1000 · ΣKL/B, of mel spectrograms.
    Ours: the same number. Its perceptual term, where one is configured, is as latent diffusion's.
    """
    return decoupled_elbo(
        recon, x, mu, logvar, beta=1000.0, likelihood="laplace", sigma=1.0, constant=False, logvar_range=(-30, 20)
    )


def va_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor) -> ELBO:
    """hustvl/LightningDiT: vavae/ldm/modules/losses/contperceptual.py, with `pp_style`

    Loss: mean(|e| + w·p) + 1e-6 · mean(μ² + σ_z² − 1 − log σ_z²), over pixels and over latents, without the ½; w = 1.
    Ours: the same number: "mean" divides the rate by D, so β has D/K and 2. The alignment of features is added to it.
    Without `pp_style`, it is latent diffusion's.
    """
    d, k = x[0].numel(), mu[0].numel()
    return decoupled_elbo(
        recon, x, mu, logvar, beta=2 * 1e-6 * d / k, likelihood="laplace", sigma=1.0, constant=False, reduction="mean",
        extra_error=d * 1.0 * lpips, logvar_range=(-30, 20),
    )  # fmt: skip


def mosaic(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor, s: Tensor) -> ELBO:
    """mosaicml/diffusion: diffusion/models/autoencoder.py

    Loss: mean[(|e| + w·p)/eˢ + s + 2] + β·(K/D) · mean KL of a latent, with s learned; w = 1 and β = 1 here.
    Ours: 2 less. Its K/D is just what "mean" does to the rate.
    """
    return decoupled_elbo(
        recon, x, mu, logvar, beta=1.0, likelihood="laplace", log_sigma=s, constant=False, reduction="mean",
        extra_error=x[0].numel() * 1.0 * lpips,
    )  # fmt: skip


def vae_ft_mse(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor, s: Tensor) -> Tensor:
    """lavinal712/AutoencoderKL: its vae-ft-mse configuration, with s learned

    Loss: 1/B · Σ[(e² + 0.1·p)/eˢ + s] + 1e-6 · ΣKL/B.
    Ours: the same number. Here s is log σ², and twice the Gaussian's loss has no ½. With s = 0, `sigma=0.5**0.5` and
    `beta=1e-6` say it without the 2, and D·½log π more.
    """
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6 / 2, log_sigma=s / 2, constant=False,
        extra_error=x[0].numel() * 0.1 * lpips, logvar_range=(-30, 20),
    )  # fmt: skip
    return 2 * elbo.loss


def cosmos(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, lpips: Tensor, pixel_weight: Tensor) -> Tensor:
    """nvidia-cosmos/cosmos-predict1: cosmos_predict1/tokenizer/training/losses/continuous.py

    Loss: mean(m·|e|) + w·mean p + 1e-6 · mean KL of a latent, with weights m of pixels; w = 1.
    Ours: the same number. Its mean divides by all elements, `reduction="mean"` by Σm, so here D divides.
    """
    d, k = x[0].numel(), mu[0].numel()
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=1e-6 * d / k, likelihood="laplace", sigma=1.0, constant=False, weight=pixel_weight,
        extra_error=d * 1.0 * lpips, logvar_range=(-30, 20),
    )  # fmt: skip
    return elbo.loss / d


def monai(recon: Tensor, x: Tensor, mu: Tensor, std: Tensor, lpips_mean: Tensor) -> ELBO:
    """Project-MONAI/GenerativeModels, Project-MONAI/tutorials: their autoencoderkl training

    Loss: mean|e| + w·p + 1e-6 · ΣKL/B, with p the batch's mean and w = 1; the encoder gives σ_z.
    Ours: the same number: "mean" divides the rate by D, so β has D. MAISI has 1e-10 inside the logarithm of σ_z². In
    fp16, σ_z² would underflow; log σ_z does not, and the kernels compute in fp32.
    """
    d = x[0].numel()
    return decoupled_elbo(
        recon, x, mu, 2 * std.log(), beta=1e-6 * d, likelihood="laplace", sigma=1.0, constant=False, reduction="mean",
        extra_error=d * 1.0 * lpips_mean,
    )  # fmt: skip
