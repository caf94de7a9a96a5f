"""KL(q(z_k) ‖ N(0, 1)) by quadrature: against closed forms, and against a grid that is fine everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common.quadrature import channel_density, channel_kl
from torch import Tensor

from fused_elbo import gaussian_kl


def on_a_grid(mu: Tensor, logvar: Tensor) -> float:
    """The same of one channel, by sums over a grid of a quarter of the narrowest component."""
    std = (logvar / 2).exp()
    low, high, step = float((mu - 9 * std).min()), float((mu + 9 * std).max()), float(std.min()) / 4
    z = torch.arange(low, high, step, dtype=torch.float64)
    q = channel_density(z, mu, logvar)
    log_p = -0.5 * (z.square() + math.log(2 * math.pi))
    return float((torch.xlogy(q, q) - q * log_p).sum() * (z[1] - z[0]))


def test_one_component_is_the_closed_form() -> None:
    mu = torch.tensor([[0.3, -2.0, 0.0, 5.0, 0.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0, -3.0, 2.0, -20.0, 0.0]], dtype=torch.float64)
    expected = torch.stack([gaussian_kl(mu[:, k : k + 1], logvar[:, k : k + 1]) for k in range(5)])
    torch.testing.assert_close(channel_kl(mu, logvar), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(channel_kl(mu.repeat(7, 1), logvar.repeat(7, 1)), expected, atol=1e-9, rtol=0)


def test_separated_components_cost_log_n_less() -> None:
    """Of N components that do not touch, q(z) has the mean entropy and log N: KL is the mean KL without log N."""
    mu = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    logvar = torch.linspace(-12, -10, 50, dtype=torch.float64)[:, None]
    assert channel_kl(mu, logvar).item() == pytest.approx(gaussian_kl(mu, logvar).item() - math.log(50), abs=1e-9)


def test_the_priors_own_mixture_has_none() -> None:
    """z = s·ε + √(1 − s²)·u is the prior if u is; with u on N of its quantiles only the farthest tails are missing."""
    found = []
    for count in (200, 2000, 20_000):
        uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        mu = math.sqrt(1 - 0.3**2) * torch.special.ndtri(uniform)[:, None]
        found.append(channel_kl(mu, torch.full_like(mu, 2 * math.log(0.3))).item())
    assert found[0] > 5 * found[1] > 25 * found[2] > 0
    assert found[2] < 1e-5


@pytest.mark.parametrize("level", [0.0, -4.0, -8.0])
def test_components_of_all_widths(level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mu, spread = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    logvar = level + 1.5 * spread
    expected = [on_a_grid(mu[:, k], logvar[:, k]) for k in range(3)]
    assert channel_kl(mu, logvar).tolist() == pytest.approx(expected, abs=1e-7)


def test_a_narrow_component_among_broad_ones_is_not_missed() -> None:
    mu = torch.tensor([[0.0], [0.1], [0.12345]], dtype=torch.float64)
    logvar = torch.tensor([[0.0], [0.0], [-24.0]], dtype=torch.float64)
    # The two kinds hardly overlap: q(z) has the entropies of both, by their masses ⅓ and ⅔, and that of the choice.
    apart = (channel_kl(mu[2:], logvar[2:]) + math.log(1 / 3)) / 3 + (
        channel_kl(mu[:2], logvar[:2]) + math.log(2 / 3)
    ) * 2 / 3
    assert channel_kl(mu, logvar).item() == pytest.approx(apart.item(), abs=3e-4)


def test_density_integrates_to_one_and_takes_the_mean_of_its_components() -> None:
    mu, logvar = torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 1.0])
    z = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    q = channel_density(z, mu, logvar)
    assert (q.sum() * (z[1] - z[0])).item() == pytest.approx(1, abs=1e-9)
    normal = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp())
    torch.testing.assert_close(q, normal.log_prob(z[:, None]).exp().mean(1))
