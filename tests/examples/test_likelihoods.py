"""The likelihoods beyond the Gaussian: against brute force over all levels, and scipy's distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common.likelihoods import (
    COMPONENTS,
    DENSITY,
    LEVELS,
    LIKELIHOODS,
    LOG_SCALE_BOUNDS,
    MASS,
    MIN_LOG_SCALE,
    NEITHER,
    Likelihood,
    LikelihoodObjective,
    mass_nats,
)
from torch import Tensor, distributions

MASSES = [name for name, likelihood in LIKELIHOODS.items() if likelihood.gives == MASS]
X = torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1)


def outputs(likelihood: Likelihood, spread: float = 2.0, count: int = 5) -> Tensor:
    """[count, 2, outputs, 1, 1]: two channels of one pixel."""
    generator = torch.Generator().manual_seed(0)
    return spread * torch.randn(count, 2, likelihood.outputs, 1, 1, dtype=torch.float64, generator=generator)


def over_levels(likelihood: Likelihood, out: Tensor) -> Tensor:
    """log_prob of each level under each of `out`'s values: [*, 256]."""
    wide = out.expand(*out.shape[:4], LEVELS)
    return likelihood.log_prob(wide, X.expand(*out.shape[:2], 1, LEVELS)).squeeze(2)


def logistics(out: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and scales of the mixture, written once more."""
    weight, mean, log_scale = (
        out.squeeze((3, 4)).numpy().reshape(*out.shape[:2], 3, COMPONENTS).swapaxes(0, 2).swapaxes(1, 2)
    )
    weight = np.exp(weight) / np.exp(weight).sum(-1, keepdims=True)
    return weight, mean + np.arange(COMPONENTS) / (COMPONENTS - 1), np.exp(np.maximum(log_scale - 2, MIN_LOG_SCALE))


def test_what_each_gives() -> None:
    assert {name: likelihood.gives for name, likelihood in LIKELIHOODS.items()} == {
        "bernoulli": NEITHER, "student-t": DENSITY, "categorical": MASS, "bitwise-categorical": MASS,
        "logistic-mixture": MASS,
    }  # fmt: skip


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_masses_of_the_256_levels_sum_to_one(name: str, spread: float) -> None:
    likelihood = LIKELIHOODS[name]
    log_mass = over_levels(likelihood, outputs(likelihood, spread))
    assert log_mass.shape == (5, 2, LEVELS)
    assert log_mass.max() <= 1e-12
    torch.testing.assert_close(log_mass.exp().sum(-1), torch.ones(5, 2, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_mean_is_that_of_the_masses(name: str, spread: float) -> None:
    likelihood = LIKELIHOODS[name]
    out = outputs(likelihood, spread)
    expected = (over_levels(likelihood, out).exp() * X).sum(-1)
    tolerance = 0.5 / (LEVELS - 1) if name == "logistic-mixture" else 1e-12  # its mean is of the uncollected mixture
    torch.testing.assert_close(likelihood.mean(out).squeeze((2, 3)), expected, rtol=0, atol=tolerance)


def test_categorical_is_the_softmax_at_the_level() -> None:
    likelihood = LIKELIHOODS["categorical"]
    out = outputs(likelihood)
    expected = distributions.Categorical(logits=out.squeeze((3, 4))).probs.log()
    torch.testing.assert_close(over_levels(likelihood, out), expected)


def test_bitwise_by_hand() -> None:
    likelihood = LIKELIHOODS["bitwise-categorical"]
    out = outputs(likelihood)
    one = out.sigmoid().squeeze((3, 4)).numpy()  # [5, 2, 8]
    for level in (0, 1, 2, 77, 128, 255):
        bits = [int(bit) for bit in f"{level:08b}"[::-1]]
        expected = sum(np.log(one[..., i] if bit else 1 - one[..., i]) for i, bit in enumerate(bits))
        np.testing.assert_allclose(over_levels(likelihood, out)[..., level].numpy(), expected, rtol=1e-10)


def test_logistic_mixture_is_differences_of_the_distribution_function() -> None:
    likelihood = LIKELIHOODS["logistic-mixture"]
    out = outputs(likelihood, 1.0)
    weight, mean, scale = (array[..., None] for array in logistics(out))
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    mass = np.diff(scipy.stats.logistic.cdf((edges - mean) / scale), axis=-1)
    np.testing.assert_allclose(over_levels(likelihood, out).exp().numpy(), (weight * mass).sum(2), rtol=1e-9)


def test_logistic_mixture_is_exact_and_differentiable_far_out_in_its_tails() -> None:
    """Where F(a) − F(b) is 0 in fp32: all components at 30 with the smallest scale, x at 0.2."""
    likelihood = LIKELIHOODS["logistic-mixture"]
    out = torch.zeros(1, 1, likelihood.outputs, 1, 1)
    out[:, :, COMPONENTS : 2 * COMPONENTS] = 30 - torch.linspace(0, 1, COMPONENTS).view(-1, 1, 1)
    out[:, :, 2 * COMPONENTS :] = -1.0
    out.requires_grad_()
    level, scale = 51, math.exp(-3.0)
    found = likelihood.log_prob(out, torch.full((1, 1, 1, 1), level / 255))
    # F is e^((x − μ)/s) there.
    high, low = ((level + sign * 0.5) / 255 - 30 for sign in (1, -1))
    expected = high / scale + math.log(-math.expm1((low - high) / scale))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    assert out.grad is not None
    assert out.grad.isfinite().all()
    assert out.grad[:, :, COMPONENTS : 2 * COMPONENTS].sum().item() == pytest.approx(-1 / scale, rel=1e-4)


def test_student_t_is_scipys() -> None:
    likelihood = LIKELIHOODS["student-t"]
    out = outputs(likelihood)
    loc, scale, freedom = (array[..., None] for array in np.moveaxis(out.squeeze((3, 4)).numpy(), 2, 0))
    low, high = LOG_SCALE_BOUNDS
    scale = np.exp(low + (high - low) / (1 + np.exp(-scale)))
    expected = scipy.stats.t(1 + np.log1p(np.exp(freedom)), loc, scale)
    np.testing.assert_allclose(over_levels(likelihood, out).numpy(), expected.logpdf(X.numpy()), rtol=1e-9)
    np.testing.assert_allclose(likelihood.mean(out).squeeze((2, 3)).numpy(), expected.mean().squeeze(-1), rtol=1e-9)


def test_bernoulli_is_the_cross_entropy_and_no_likelihood_of_grey_levels() -> None:
    likelihood = LIKELIHOODS["bernoulli"]
    out = outputs(likelihood)
    p = out.sigmoid().squeeze((3, 4))
    found = over_levels(likelihood, out)
    torch.testing.assert_close(found, X * p.log() + (1 - X) * (1 - p).log())
    torch.testing.assert_close(likelihood.mean(out).squeeze((2, 3)), p.squeeze(2))
    black_or_white = found[..., [0, -1]].exp().sum(-1)
    torch.testing.assert_close(black_or_white, torch.ones_like(black_or_white))
    assert (found.exp().sum(-1) > 10).all()  # as masses of the levels they sum to far more than 1
    assert ((found.exp().mean(-1) - 1).abs() > 0.05).all()  # and as a density they do not integrate to 1


@pytest.mark.parametrize("log_sigma", [LOG_SCALE_BOUNDS[0], -1.0, 0.0])
def test_a_density_becomes_a_mass_by_the_width_of_a_level(log_sigma: float) -> None:
    """At the smallest sigma that a decoder may choose, too; the masses sum to no more than 1."""
    normal = distributions.Normal(torch.tensor(0.3, dtype=torch.float64), math.exp(log_sigma))
    exact = normal.cdf(X + 0.5 / 255) - normal.cdf(X - 0.5 / 255)
    likely = exact > 1e-3 * exact.max()
    converted = torch.tensor([mass_nats(-nats, dims=1) for nats in normal.log_prob(X).tolist()]).double()
    torch.testing.assert_close(converted[likely], -exact[likely].log(), rtol=0, atol=0.02)
    assert (-converted).exp().sum() <= 1 + 1e-4
    assert mass_nats(-100.0, dims=7) == pytest.approx(-100 + 7 * math.log(255))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_objective_is_the_negative_elbo(name: str) -> None:
    """One posterior sample per image, the rate by torch.distributions, gradients into every weight that matters."""
    torch.manual_seed(0)
    objective = LikelihoodObjective((3, 9, 6), LIKELIHOODS[name], latent_dim=4, width=4)
    x = torch.randint(0, LEVELS, (5, 3, 9, 6)) / (LEVELS - 1)
    torch.manual_seed(1)
    elbo = objective(x)
    torch.manual_seed(1)
    out = objective.model(x)
    by_value = out.recon.unflatten(1, (3, -1))
    assert by_value.shape == (5, 3, LIKELIHOODS[name].outputs, 9, 6)
    posterior = distributions.Normal(out.mu, (0.5 * out.logvar).exp())
    rate = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0)).sum(1).mean()
    distortion = -LIKELIHOODS[name].log_prob(by_value, x).sum((1, 2, 3)).mean()
    torch.testing.assert_close(elbo.rate, rate)
    torch.testing.assert_close(elbo.distortion, distortion)
    torch.testing.assert_close(elbo.loss, distortion + rate)
    elbo.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert objective.model.to_posterior.weight.grad.abs().sum() > 0
    assert objective.mean(torch.zeros(2, 4)).shape == (2, 3, 9, 6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_each_learns_one_image(name: str) -> None:
    """With nothing else to explain, the mean of p(x|z) comes close to the image."""
    torch.manual_seed(0)
    objective = LikelihoodObjective((1, 8, 8), LIKELIHOODS[name], latent_dim=2, width=8)
    x = (torch.randint(0, LEVELS, (1, 1, 8, 8)) / (LEVELS - 1)).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        objective(x).loss.backward()
        optimizer.step()
    blind = (x - x.mean()).square().mean().sqrt()
    error = (objective.mean(objective.model.encode(x[:1])[0]) - x[:1]).square().mean().sqrt()
    assert error < 0.25 * blind
