"""The parts of a KL over a whole data set, and the four terms, against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common import kl_parts, linear, tc_runs
from common.data import Splits
from common.mlp import MLPVAE
from common.objective import VAEObjective, make_criterion

from fused_elbo import decoupled_elbo, kl_decomposition

EIGENVALUES = 80 * 0.5 ** torch.arange(12, dtype=torch.float64)


def test_parts_add_up_to_the_rate_and_are_nothing_where_all_is_collapsed() -> None:
    found = kl_parts.decompose(torch.zeros(600, 5), torch.zeros(600, 5), 256)
    for key in ("rate", "mi", "mi_upper", "tc", "dim_wise", "batch_mi", "batch_tc", "batch_dim_wise"):
        assert found[key] == pytest.approx(0, abs=1e-4), key


def test_parts_of_latents_that_are_copies() -> None:
    """Two latents that are the same, up to noise of variance s²: MI counts that once, and TC what it comes to twice."""
    generator = torch.Generator().manual_seed(0)
    variance, count = 0.2, 4000
    mean = math.sqrt(1 - variance) * torch.randn(count, 1, generator=generator)
    mu, logvar = mean.expand(-1, 2), torch.full((count, 2), math.log(variance))
    found = kl_parts.decompose(mu, logvar, 2000)
    correlation = 1 - variance  # of two N(0, 1): the covariance has the eigenvalues 1 ± correlation
    assert found["rate"] == pytest.approx(-math.log(variance), rel=0.03)
    assert found["dim_wise"] == pytest.approx(0, abs=0.01)
    assert found["mi"] == pytest.approx(0.5 * math.log((1 - correlation**2) / variance**2), abs=4 * found["mi_se"])
    assert found["tc"] == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.06)
    assert found["mi"] + found["tc"] + found["dim_wise"] == pytest.approx(found["rate"])
    assert found["mi_upper"] == pytest.approx(found["mi"], abs=0.02)


def test_saturated_information_shows_as_total_correlation_and_the_bracket_says_so() -> None:
    """Independent latents, 1500 images, MI 28 nats: what is above log 1500 is read as TC, which is 0."""
    generator = torch.Generator().manual_seed(0)
    variance = math.exp(-28.05 / 8)  # 16 latents of −½ log s²
    mu = math.sqrt(1 - variance) * torch.randn(1500, 16, generator=generator)
    found = kl_parts.decompose(mu, torch.full_like(mu, math.log(variance)), 700)
    assert found["mi"] == pytest.approx(math.log(1500), abs=0.05)
    assert found["tc"] == pytest.approx(28.05 - math.log(1500), abs=1)
    assert found["mi_upper"] > 100
    assert found["dim_wise"] < 0.1
    assert found["mi"] < 28.05 < found["mi_upper"]


@pytest.mark.parametrize(("beta", "gap"), [(0.25, 4.830), (0.5, 3.530), (1.0, 2.866), (1.5, 3.399), (2.0, 5.518)])
def test_four_terms_of_linear_vaes_are_exact(beta: float, gap: float) -> None:
    terms = kl_parts.linear_terms(EIGENVALUES, 5, beta)
    entropy = 0.5 * float((2 * math.pi * math.e * EIGENVALUES).log().sum())
    best = linear.optimum(EIGENVALUES, 5, beta)
    assert terms.likelihood - terms.data == pytest.approx(entropy - best.distortion)
    assert terms.information + terms.prior == pytest.approx(best.rate)
    assert sum(terms[1:]) - terms.likelihood == pytest.approx(gap, abs=1e-3)
    # At β = 1 the posterior is exact, and what the decoder makes of z is what the encoder put there.
    difference = terms.likelihood - terms.information
    assert abs(difference) < 1e-9 if beta == 1 else difference < -0.1


def test_importance_terms_bound_the_exact_ones_from_above() -> None:
    """An affine model, whose p(x) is Gaussian, with the exact posterior and with one that is too wide."""
    torch.manual_seed(0)
    model, sigma, x = MLPVAE(6, 2), 0.5, torch.rand(40, 6)
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    evidence = torch.distributions.MultivariateNormal(bias, weight @ weight.T + sigma**2 * torch.eye(6))
    exact = -float(evidence.log_prob(x).mean())
    precision = torch.eye(2) + weight.T @ weight / sigma**2
    mu = torch.linalg.solve(precision, weight.T @ (x - bias).T / sigma**2).T
    # Not a product: the posterior's covariance has its diagonal alone here, as a VAE would.
    logvar = -precision.diagonal().log().expand(40, 2)
    found = kl_parts.importance_terms(model, x, mu, logvar, sigma, 400)
    assert found["data"] == pytest.approx(exact, abs=0.02)
    wide = [kl_parts.importance_terms(model, x, mu, logvar + 3, sigma, samples) for samples in (4, 64, 1024)]
    assert wide[0]["data"] > wide[1]["data"] > wide[2]["data"] > exact - 0.02
    assert wide[2]["data"] == pytest.approx(exact, abs=0.1)


def test_total_correlation_is_weighted_in_training_alone() -> None:
    torch.manual_seed(0)
    x, model = torch.rand(30, 8), MLPVAE(8, 3, (16,))
    objective = tc_runs.TCVAEObjective(model, make_criterion("0.3", 1.0, channels=1), beta=5.0, dataset_size=500)
    plain = VAEObjective(model, make_criterion("0.3", 1.0, channels=1))
    for training in (True, False):
        objective.train(training)
        torch.manual_seed(1)
        found = objective(x)
        torch.manual_seed(1)
        out = plain(x)
        torch.manual_seed(1)
        mu, logvar = model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        elbo = decoupled_elbo(model.decode(z)[0], x, mu, logvar, sigma=0.3)
        tc = kl_decomposition(z, mu, logvar, dataset_size=500).total_correlation
        torch.testing.assert_close(found.loss, elbo.distortion + elbo.rate + (4 * tc if training else 0))
        torch.testing.assert_close((found.distortion, found.rate, found.sigma), out[1:])


def test_families() -> None:
    data = Splits(*(torch.zeros(20, 8) for _ in range(3)))
    made = {family: tc_runs.make_objective(family, 3.0, data, 4) for family in tc_runs.FAMILIES}
    assert {family: type(o).__name__ for family, o in made.items()} == {
        "coupled": "VAEObjective", "decoupled": "VAEObjective", "tc": "TCVAEObjective",
    }  # fmt: skip
    assert made["tc"].dataset_size == 20
