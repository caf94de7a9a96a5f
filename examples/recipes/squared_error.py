"""VAEs of images, vectors and tables: squared error (mostly) and KL, and what decides between sums and means.

x is (B, D) or (B, C, H, W) and has D numbers, a latent has K, e = recon − x. Σe² sums over the batch, KL is the rate of
a sample, and `C` is its capacity. `sigma=0.5**0.5` is Σe², and `sigma=1.0` is ½Σe², as far as gradients go.
"""

from __future__ import annotations

from torch import Tensor

from fused_elbo import ELBO, Capacity, decoupled_elbo
from fused_elbo.sigma import Optimal, softclip


def pytorch_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, w: float = 0.00025) -> ELBO:
    """AntixK/PyTorch-VAE: models/vanilla_vae.py

    Loss: mean e² + w · ΣKL/B, w being `M_N`, often the batch's share of the data set.
    Ours: ½log π more. β = w·D, so a w that was tuned for one image size means another β for the next.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=w * x[0].numel(), sigma=0.5**0.5, reduction="mean")


def pytorch_vae_beta(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, C: float = 3.0) -> ELBO:
    """AntixK/PyTorch-VAE: models/beta_vae.py, with loss_type "B"

    Loss: mean e² + γ·w · |ΣKL/B − C|, with γ = 1000 and w = 0.00025 here.
    Ours: ½log π more. C stays in nats, whatever the reduction is.
    """
    beta = 1000.0 * 0.00025 * x[0].numel()
    return decoupled_elbo(recon, x, mu, logvar, beta=beta, capacity=C, sigma=0.5**0.5, reduction="mean")


def pythae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, beta: float = 4.0) -> ELBO:
    """clementchadebec/benchmark_VAE: src/pythae/models/beta_vae/beta_vae_model.py; β = 1 is its VAE

    Loss: ½Σe²/B + β · ΣKL/B.
    Ours: the same number.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=beta, sigma=1.0, constant=False)


def pythae_disentangled(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, C: float = 3.0) -> ELBO:
    """clementchadebec/benchmark_VAE: src/pythae/models/disentangled_beta_vae/disentangled_beta_vae_model.py

    Loss: ½Σe²/B + β · mean |KL − C|, each sample held against C, and β = 10.
    Ours: the same number.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=10.0, limit=Capacity(C, per="sample"), sigma=1.0, constant=False)


def beta_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, C: float = 3.0) -> ELBO:
    """1Konny/Beta-VAE: solver.py, objective "B" with the Gaussian decoder

    Loss: Σ(sigmoid(y) − x)²/B + γ · |ΣKL/B − C|, with γ = 1000. Objective "H" is `beta=4.0` without `capacity`.
    Ours: D·½log π more. `recon` is y, the decoder's output before the sigmoid.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=1000.0, capacity=C, sigma=0.5**0.5, activation="sigmoid")


def disentanglement_lib(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """google-research/disentanglement_lib: disentanglement_lib/methods/unsupervised/vae.py, with `l2_loss`

    Loss: Σ(sigmoid(y) − x)²/B + β · ΣKL/B, with β = 4. Its `annealed_vae` has a capacity, as `beta_vae` here.
    Ours: D·½log π more. Bernoulli, its default, is another likelihood: see `bernoulli`.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=4.0, sigma=0.5**0.5, activation="sigmoid")


def disvae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """YannDubs/disentangling-vae: disvae/models/losses.py, with rec_dist "gaussian"

    Loss: 255 · Σe²/B + β · ΣKL/B, with β = 4: the squared error of bytes, over 255.
    Ours: D·½log(π/255) more. σ² = 1/510 makes 1/(2σ²) = 255, a noise of 11 grey levels.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=4.0, sigma=510**-0.5)


def disvae_laplace(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """YannDubs/disentangling-vae: disvae/models/losses.py, with rec_dist "laplace"

    Loss: 3 · Σ|e|/B + β · ΣKL/B, with β = 4.
    Ours: D·log(2/3) more.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=4.0, likelihood="laplace", sigma=1 / 3)


def lightning_bolts(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """Lightning-Universe/lightning-bolts: src/pl_bolts/models/autoencoders/basic_vae/basic_vae_module.py

    Loss: mean e² + 0.1 · mean KL of a latent.
    Ours: ½log π more. β has D/K, since "mean" divides the rate by D, and theirs by K.
    """
    beta = 0.1 * x[0].numel() / mu[0].numel()
    return decoupled_elbo(recon, x, mu, logvar, beta=beta, sigma=0.5**0.5, reduction="mean")


def sigma_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, log_sigma: Tensor) -> ELBO:
    """orybkin/sigma-vae-pytorch: model.py, model "sigma_vae"; "gaussian_vae" is `sigma=1.0`

    Loss: Σ[e²/(2σ²) + log σ + ½log 2π] + ΣKL, where log σ is learned, and bent at −6.
    Ours: the same number.
    """
    return decoupled_elbo(recon, x, mu, logvar, log_sigma=softclip(log_sigma, -6.0), reduction="sum")


def optimal_sigma_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """orybkin/sigma-vae-pytorch: model.py, model "optimal_sigma_vae"

    Loss: as sigma_vae, with log σ = ½log MSE of the batch, bent at −6, and its gradient.
    Ours: the same number. Without the bend, which makes σ too large, no option is needed but `reduction`.
    """
    sigma = Optimal(softclip=True)
    return decoupled_elbo(recon, x, mu, logvar, sigma=sigma, min_log_sigma=-6.0, reduction="sum")


def beta_sigma_vae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """overnap/BS-VAE: model.py

    Loss: D/2 · mean[log(2π·MSE) + 1] + β · ΣKL/B, the MSE of each image, and β = 1 here.
    Ours: the same number, but for the 1e-5 that theirs has inside the logarithm in the place of a floor.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=1.0, sigma="optimal-per-image")


def cryodrgn(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, beta: float = 0.125) -> ELBO:
    """ml-struct-bio/cryodrgn: cryodrgn/commands/train_vae.py

    Loss: mean e² + β/D · ΣKL/B.
    Ours: ½log π more. Its optional control, λ(β − KL)², is arithmetic on `elbo.rate`.
    """
    return decoupled_elbo(recon, x, mu, logvar, beta=beta, sigma=0.5**0.5, reduction="mean")


def world_models(recon: Tensor, x: Tensor, mu: Tensor, log_std: Tensor) -> ELBO:
    """ctallec/world-models: trainvae.py

    Loss: Σe² + ΣKL, where the encoder gives log σ_z.
    Ours: B·D·½log π more.
    """
    return decoupled_elbo(recon, x, mu, 2 * log_std, sigma=0.5**0.5, reduction="sum")


def pyod(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, C: float = 3.0) -> Tensor:
    """yzhao062/pyod: pyod/models/vae.py

    Loss: mean e² + β · mean min(KL, C), with β = 1. Its default C = 0 leaves nothing of the rate.
    Ours: ½log π more. An upper limit is no option, since it stops the pull on just the samples that cost too much.
    """
    elbo = decoupled_elbo(recon, x, mu, logvar, sigma=0.5**0.5, reduction="none")
    return elbo.distortion.mean() / x[0].numel() + elbo.rate.clamp(max=C).mean()


def scvi(recon: Tensor, x: Tensor, mu: Tensor, var: Tensor, px_r: Tensor, kl_weight: float = 0.5) -> ELBO:
    """scverse/scvi-tools: src/scvi/module/_vae.py, with gene_likelihood "normal"

    Loss: mean over cells of −log N(x; recon, exp(px_r)) + w · KL, with a σ for each gene, and w warming up to 1.
    Ours: the same number. `[None]` says that px_r is of genes, and not of cells. The encoder gives the variance. ZINB,
    its default, is another likelihood.
    """
    return decoupled_elbo(recon, x, mu, var.log(), beta=kl_weight, log_sigma=px_r[None])


def tvae(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, sigma: Tensor, continuous: Tensor) -> Tensor:
    """sdv-dev/CTGAN: ctgan/synthesizers/tvae.py

    Loss: 2/B · Σ[(tanh(y) − x)²/(2σ²) + log σ] of the continuous columns, + ΣKL/B, + cross-entropy of the others.
    Ours: the same number, without the cross-entropy. `continuous` is a mask of columns, (D,), as σ is (D,), and `recon`
    is y. The mask selects: what the other columns hold is not looked at.
    """
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=0.5, activation="tanh", log_sigma=sigma.log()[None], constant=False,
        weight=continuous,
    )  # fmt: skip
    return 2 * elbo.loss
