"""What the mathematics says must hold, whatever the code: checked on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MODES, Call, allowed
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fused_elbo import decoupled_elbo, gaussian_kl, gaussian_nll
from fused_elbo.sigma import Optimal, softclip

pytestmark = pytest.mark.usefixtures("backend")
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def data(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    target = torch.randn(batch, 3, 8, 8, dtype=dtype)
    scale = torch.linspace(0.2, 1.0, batch, dtype=dtype).reshape(-1, 1, 1, 1)
    return (target + scale * torch.randn_like(target)).requires_grad_(), target


def gradient(value: Tensor, recon: Tensor, weight: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(value, recon, weight)[0]


def nll_at(recon: Tensor, target: Tensor, sigma: Tensor, reduction: str = "none") -> Tensor:
    return gaussian_nll(recon, target, log_sigma=sigma.detach().log(), reduction=reduction)


def test_envelope_equal_weights() -> None:
    """At its optimum σ does not move the loss, so a detached σ gives the same gradient."""
    recon, target = data()
    for mode in ("optimal", "optimal-per-image"):
        through = gradient(gaussian_nll(recon, target, sigma=mode), recon)
        rmse = (recon - target).square().mean((1, 2, 3) if mode == "optimal-per-image" else (0, 1, 2, 3)).sqrt()
        torch.testing.assert_close(through, gradient(nll_at(recon, target, rmse, "batchmean"), recon))


def test_no_envelope_for_unequal_weights() -> None:
    """With a weight per sample the batch's σ is no optimum of the weighted loss, and what flows through it counts."""
    recon, target = data()
    weight = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    through = gradient(gaussian_nll(recon, target, reduction="none"), recon, weight)
    sigma = (recon - target).square().mean().sqrt()
    detached = gradient(nll_at(recon, target, sigma), recon, weight)
    assert (through - detached).norm() > 0.01 * through.norm()
    log_mse = (recon - target).square().mean().log()
    nll = ((recon - target).square() * (-log_mse).exp() / 2 + log_mse / 2 + HALF_LOG_2PI).sum((1, 2, 3))
    torch.testing.assert_close(through, gradient(nll, recon, weight))


def test_no_envelope_with_softclip() -> None:
    recon, target = data()
    sigma = Optimal(softclip=True)
    through = gradient(gaussian_nll(recon, target, sigma=sigma, min_log_sigma=-1.0), recon)
    bound = softclip((recon - target).square().mean().log() / 2, -1.0)
    detached = gradient(nll_at(recon, target, bound.exp(), "batchmean"), recon)
    assert (through - detached).norm() > 0.01 * through.norm()


@pytest.mark.parametrize(("log_sigma", "biased"), [(-3.0, -2.95), (-4.0, -3.87), (-5.0, -4.69), (-6.0, -5.31)])
def test_softclips_published_bias(log_sigma: float, biased: float) -> None:
    """orybkin/sigma-vae-pytorch: λ ← −6 + softplus(λ + 6)."""
    x, latents = torch.zeros(1, 100), torch.zeros(1, 2)
    elbo = decoupled_elbo(
        x + math.exp(log_sigma), x, latents, latents, sigma=Optimal(softclip=True), min_log_sigma=-6.0
    )
    assert elbo.sigma is not None
    assert abs(elbo.sigma.log().item() - biased) < 5e-3


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_squared_error_plus_beta_kl_fixes_sigma(beta: float) -> None:
    """Σe² + β KL is the ELBO at σ² = β/2: the gradients of β·(its negative ELBO) and of the squared error agree."""
    recon, target = data()
    mu, logvar = (torch.randn(4, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    inputs = (recon, mu, logvar)
    elbo = decoupled_elbo(recon, target, mu, logvar, sigma=math.sqrt(beta / 2), reduction="sum").loss
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum()
    squared = (recon - target).square().sum() + beta * kl
    for a, b in zip(torch.autograd.grad(beta * elbo, inputs), torch.autograd.grad(squared, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_decoupled_beta_acts_as_two_beta_mse() -> None:
    """With the optimal σ*², the loss has the gradient of (SSE + 2βσ*² KL) / (2σ*²)."""
    recon, target = data()
    mu = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    beta, logvar = 3.0, torch.zeros(4, 5, dtype=torch.float64)
    loss = decoupled_elbo(recon, target, mu, logvar, beta=beta, reduction="sum").loss
    mse = (recon - target).square().mean().item()
    coupled = ((recon - target).square().sum() + 2 * beta * mse * 0.5 * mu.square().sum()) / (2 * mse)
    for a, b in zip(torch.autograd.grad(loss, (recon, mu)), torch.autograd.grad(coupled, (recon, mu)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_optimal_sigma_minimises() -> None:
    recon, target = data()
    best = gaussian_nll(recon, target)
    optimum = (recon - target).square().mean().sqrt().item()
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert best < gaussian_nll(recon, target, sigma=factor * optimum)
    torch.testing.assert_close(best, gaussian_nll(recon, target, sigma=optimum))
    assert gaussian_nll(recon, target, sigma="optimal-per-image") < best


@pytest.mark.parametrize(
    "sigma", ["optimal", "optimal-per-image", Optimal(softclip=True), Optimal(True, True)], ids=str
)
def test_zero_error_is_finite(sigma: Any) -> None:
    recon, target = data()
    recon = target.clone().requires_grad_()
    nll = gaussian_nll(recon, target, sigma=sigma)
    torch.testing.assert_close(nll, torch.tensor(192 * (-7.0 + HALF_LOG_2PI), dtype=torch.float64))
    assert (gradient(nll, recon) == 0).all()


def test_the_floor_is_unbiased_above_and_its_gradient_continuous() -> None:
    target = torch.zeros(2, 50, dtype=torch.float64)
    at = math.exp(-2.0)

    def step(scale: float) -> tuple[Tensor, Tensor]:
        recon = torch.full_like(target, scale).requires_grad_()
        nll = gaussian_nll(recon, target, min_log_sigma=-2.0)
        return nll, gradient(nll, recon)

    (below, g_below), (above, g_above) = step(at * (1 - 1e-9)), step(at * (1 + 1e-9))
    torch.testing.assert_close(below, above)
    torch.testing.assert_close(g_below, g_above)
    free = torch.full_like(target, 2 * at)
    torch.testing.assert_close(
        gaussian_nll(free, target, min_log_sigma=-2.0), gaussian_nll(free, target, min_log_sigma=-20.0)
    )


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_samples_equal_the_reductions(mode: str) -> None:
    call = Call(mode, "sum", dtype=torch.float64)
    outputs = {}
    for call.reduction in ("none", "sum", "batchmean", "mean"):
        if allowed(mode, call.reduction):
            outputs[call.reduction] = torch.stack([v.sum() for v in call(decoupled_elbo)[:3]])
    torch.testing.assert_close(outputs["batchmean"] * 4, outputs["sum"])
    weight = call.kw.get("weight", torch.ones(()))
    torch.testing.assert_close(outputs["mean"] * weight.double().expand(4, 3, 8, 8).sum(), outputs["sum"])
    if "none" in outputs:
        torch.testing.assert_close(outputs["none"], outputs["sum"])


LIMITED = {"free_bits", "capacity", "limit"}


@pytest.mark.parametrize("mode", [m for m, kw in MODES.items() if not LIMITED & kw(4, (3, 8, 8), (5,)).keys()])
def test_loss_is_distortion_plus_beta_rate(mode: str) -> None:
    """This holds for each sample, and for a batch unless β differs in it. ("sum" and "mean" only scale: see above.)"""
    for reduction in ("none", "batchmean"):
        call = Call(mode, reduction)
        beta = call.kw.get("beta", 1.0)
        if reduction == "none" or not (isinstance(beta, Tensor) and beta.dim()):
            elbo = call(decoupled_elbo)
            torch.testing.assert_close(elbo.loss, elbo.distortion + beta * elbo.rate)


def test_rate_is_plain_whatever_the_loss_does_with_it() -> None:
    plain = Call("optimal")(decoupled_elbo).rate
    for mode in ("beta", "beta-sample", "free-bits", "capacity"):
        torch.testing.assert_close(Call(mode)(decoupled_elbo).rate, plain)


def test_agrees_with_torch_distributions() -> None:
    recon, target = data()
    mu, logvar, prior_mu, prior_logvar = (torch.randn(4, 5, dtype=torch.float64) for _ in range(4))
    q, p = Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())
    torch.testing.assert_close(gaussian_kl(mu, logvar, reduction="none"), kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(
        gaussian_kl(mu, logvar, prior=(prior_mu, prior_logvar), reduction="none"), kl_divergence(q, p).sum(1)
    )
    torch.testing.assert_close(
        gaussian_kl(mu, logvar, free_bits=0.5), kl_divergence(q, Normal(0.0, 1.0)).clamp(min=0.5).sum() / 4
    )
    torch.testing.assert_close(gaussian_kl(mu, logvar, reduction="mean"), kl_divergence(q, Normal(0.0, 1.0)).mean())
    nll = gaussian_nll(recon, target, sigma=0.7, reduction="none")
    torch.testing.assert_close(nll, -Normal(recon, 0.7).log_prob(target).sum((1, 2, 3)))


def test_agrees_with_torchs_gaussian_nll_loss() -> None:
    """It takes a variance, and leaves ½ log 2π out unless full=True."""
    recon, target = data()
    log_sigma = (torch.randn_like(target) * 0.3).requires_grad_()
    ours = gaussian_nll(recon, target, log_sigma=log_sigma, reduction="mean")
    theirs = F.gaussian_nll_loss(recon, target, (2 * log_sigma).exp(), full=True)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(v, (recon, log_sigma)) for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_targets_gradient_is_the_negative() -> None:
    call = Call("optimal")
    g_recon, g_target, *_ = call.gradients(call(decoupled_elbo))
    assert torch.equal(g_target, -g_recon)


def test_shapes_of_log_sigma_that_mean_the_same() -> None:
    """(B, 1, 1, 1) is one per image, (1, 1, 1, 1) is one."""
    recon, target = data()
    per_image = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=torch.float64)
    a = gaussian_nll(recon, target, log_sigma=per_image)
    torch.testing.assert_close(a, gaussian_nll(recon, target, log_sigma=per_image.reshape(4, 1, 1, 1)))
    one = torch.tensor(-0.5, dtype=torch.float64)
    for shape in ((1,), (1, 1), (1, 1, 1, 1)):
        torch.testing.assert_close(
            gaussian_nll(recon, target, log_sigma=one.reshape(shape)), gaussian_nll(recon, target, log_sigma=one)
        )
    pixels = (per_image.reshape(4, 1, 1, 1) + torch.zeros_like(target)).requires_grad_()
    torch.testing.assert_close(a, gaussian_nll(recon, target, log_sigma=pixels))


def test_what_sigma_is_reported() -> None:
    latents = torch.zeros(4, 2)
    recon, target = (t.detach().float() for t in data())

    def sigma(**kw: Any) -> Tensor | None:
        return decoupled_elbo(recon, target, latents, latents, **kw).sigma

    torch.testing.assert_close(sigma(), (recon - target).square().mean().sqrt())
    torch.testing.assert_close(sigma(sigma="optimal-per-image"), (recon - target).square().mean((1, 2, 3)).sqrt())
    torch.testing.assert_close(sigma(sigma=0.25), torch.tensor(0.25))
    torch.testing.assert_close(sigma(log_sigma=torch.zeros(4)), torch.ones(4))
    torch.testing.assert_close(sigma(log_sigma=torch.zeros(1)), torch.ones(()))
    assert sigma(log_sigma=torch.zeros(3, 1, 1)) is None
