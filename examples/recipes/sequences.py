"""Actions and world models: masks of padding, free nats, learned priors, KL balance.

A chunk of actions is (B, T, A); a world model's tensors are (B, T, …), and its time steps are samples: flatten the two.
KL is the rate of a sample, e = recon − x, `std` is σ_z where the network gives it.
"""

from __future__ import annotations

from torch import Tensor

from fused_elbo import ELBO, FreeNats, decoder_nll, decoupled_elbo, gaussian_kl


def act(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, is_pad: Tensor) -> Tensor:
    """tonyzhaozh/act: policy.py

    Loss: mean of |e| where nothing is padded, and 0 where it is, + 10 · ΣKL/B. Padding counts in the denominator.
    Ours: the same number. D = T·A divides by all elements, since `reduction="mean"` would divide by the valid ones.
    """
    d = x[0].numel()
    elbo = decoupled_elbo(
        recon, x, mu, logvar, beta=10.0 * d, likelihood="laplace", sigma=1.0, constant=False, weight=~is_pad[..., None]
    )
    return elbo.loss / d


def lerobot_act(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, is_pad: Tensor) -> ELBO:
    """huggingface/lerobot: src/lerobot/policies/act/modeling_act.py

    Loss: the sum of |e| where nothing is padded, over the number of such elements, + 10 · ΣKL/B.
    Ours: the same number. "mean" divides the rate by the valid elements of a sample, too, so β has their number. Its
    older versions have ACT's loss.
    """
    valid = ~is_pad[..., None]
    beta = 10.0 * valid.sum() * x.shape[-1] / len(x)
    return decoupled_elbo(
        recon, x, mu, logvar, beta=beta, likelihood="laplace", sigma=1.0, constant=False, weight=valid, reduction="mean"
    )


def world_models_experiments(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> ELBO:
    """hardmaru/WorldModelsExperiments: carracing/vae/vae.py

    Loss: Σe²/B + mean max(KL, K/2): free nats of each sample, half a nat for each latent.
    Ours: D·½log π more.
    """
    limit = FreeNats(0.5 * mu[0].numel())
    return decoupled_elbo(recon, x, mu, logvar, limit=limit, sigma=0.5**0.5)


def planet(recon: Tensor, x: Tensor, mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor) -> ELBO:
    """google-research/planet, Kaixhin/PlaNet

    Loss: mean over steps of −log N(x; recon, 1) + max(KL, 3), against a learned prior.
    Ours: the same number. Kaixhin's has Σe²: `sigma=0.5**0.5`. Overshooting is a `gaussian_kl` with `reduction="none"`,
    and its mask.
    """
    recon, x, mu, std, prior_mu, prior_std = (t.flatten(0, 1) for t in (recon, x, mu, std, prior_mu, prior_std))
    prior = prior_mu, 2 * prior_std.log()
    return decoupled_elbo(recon, x, mu, 2 * std.log(), prior=prior, limit=FreeNats(3.0), sigma=1.0)


def dreamer(recon: Tensor, x: Tensor, mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor) -> ELBO:
    """danijar/dreamer: dreamer.py

    Loss: mean over steps of −log N(x; recon, 1), + max(mean KL, 3).
    Ours: the same number. Maximum and mean do not commute: PlaNet's loss is larger.
    """
    recon, x, mu, std, prior_mu, prior_std = (t.flatten(0, 1) for t in (recon, x, mu, std, prior_mu, prior_std))
    prior, limit = (prior_mu, 2 * prior_std.log()), FreeNats(3.0, per="batch")
    return decoupled_elbo(recon, x, mu, 2 * std.log(), prior=prior, limit=limit, sigma=1.0)


def torchrl_dreamer(
    recon: Tensor, x: Tensor, mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor, per: str = "sample"
) -> ELBO:
    """pytorch/rl: torchrl/objectives/dreamer.py, DreamerModelLoss

    Loss: Σe² over steps, + mean max(KL, 3), or with `delayed_clamp` max(mean KL, 3), which is `per="batch"`.
    Ours: D·½log π more.
    """
    recon, x, mu, std, prior_mu, prior_std = (t.flatten(0, 1) for t in (recon, x, mu, std, prior_mu, prior_std))
    prior, limit = (prior_mu, 2 * prior_std.log()), FreeNats(3.0, per=per)
    return decoupled_elbo(recon, x, mu, 2 * std.log(), prior=prior, limit=limit, sigma=0.5**0.5)


def dreamer_v2(recon: Tensor, x: Tensor, mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor) -> Tensor:
    """danijar/dreamerv2: dreamerv2/common/nets.py, with Gaussian latents

    Loss: mean over steps of −log N(x; recon, 1), + 0.8 · max(mean KL(sg q ‖ p), λ) + 0.2 · max(mean KL(q ‖ sg p), λ).
    Ours: the same number; λ = 1 here. KL balance is two calls, and each sees one side detached (sg).
    """
    recon, x, mu, std, prior_mu, prior_std = (t.flatten(0, 1) for t in (recon, x, mu, std, prior_mu, prior_std))
    logvar, prior_logvar = 2 * std.log(), 2 * prior_std.log()
    limit = FreeNats(1.0, per="batch")
    to_prior = gaussian_kl(mu.detach(), logvar.detach(), prior=(prior_mu, prior_logvar), limit=limit)
    to_posterior = gaussian_kl(mu, logvar, prior=(prior_mu.detach(), prior_logvar.detach()), limit=limit)
    return decoder_nll(recon, x, sigma=1.0) + 0.8 * to_prior + 0.2 * to_posterior
