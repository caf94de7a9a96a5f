"""The linear VAE's closed form: against all active sets, against an optimiser, and its data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common import linear
from scipy.optimize import minimize

SPECTRA = {  # with BETAS no λ is βσ² exactly, but for the flat one at β = 1
    "geometric": 5 * 0.6 ** torch.arange(6, dtype=torch.float64),
    "two equal": torch.tensor([4.0, 4.0, 1.0, 1.0, 0.5], dtype=torch.float64),
    "flat": torch.ones(5, dtype=torch.float64),
    "one direction": torch.tensor([10.0, 0.13, 0.1, 0.07], dtype=torch.float64),
    "singular": torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64),
}
BETAS = (0.05, 0.3, 0.9, 1.0, 1.7, 2.5, 4.0, 7.0)


def candidates(eigenvalues: list[float], latents: int, beta: float) -> dict[tuple[int, ...], float]:
    """D/2·log(2πσ²) + D/2 + β·rate at every self-consistent set of active dimensions, which need not be the first."""
    dims, found = len(eigenvalues), {}
    for count in range(latents + 1):
        for active in itertools.combinations(range(dims), count):
            if dims - beta * count <= 0:
                continue
            var = sum(value for i, value in enumerate(eigenvalues) if i not in active) / (dims - beta * count)
            if var > 0 and all(eigenvalues[i] > beta * var for i in active):
                rate = sum(0.5 * math.log(eigenvalues[i] / (beta * var)) for i in active)
                found[active] = dims / 2 * (math.log(2 * math.pi * var) + 1) + beta * rate
    return found


@pytest.mark.parametrize("name", SPECTRA)
def test_optimum_is_the_best_of_all_active_sets(name: str) -> None:
    eigenvalues = SPECTRA[name]
    dims = len(eigenvalues)
    for latents, beta in itertools.product(range(4 if name != "singular" else 3), BETAS):  # with 3 it has σ = 0
        found = linear.optimum(eigenvalues, latents, beta)
        every = candidates(eigenvalues.tolist(), latents, beta)
        assert found.distortion + beta * found.rate == pytest.approx(min(every.values()), abs=1e-10)
        assert found.sse == pytest.approx(dims * found.level / beta)  # σ² = SSE/D

        # One set of the largest λ is self-consistent to both sides: no λ > βσ² is left out either.
        consistent = []
        for count in (count for count in range(latents + 1) if tuple(range(count)) in every):
            var = float(eigenvalues[count:].sum()) / (dims - beta * count)
            if count == latents or float(eigenvalues[count]) <= beta * var * (1 + 1e-12):
                consistent.append(count)
        assert consistent == [found.active]
        assert dims - beta * found.active > 0


def expected_loss(parameters: torch.Tensor, eigenvalues: torch.Tensor, latents: int, beta: float) -> torch.Tensor:
    """A linear VAE's loss, with closed-form expectations over x and z, for any orientation, not only along the axes."""
    dims = len(eigenvalues)
    encoder, decoder, logvar, logvar_x = parameters.split([latents * dims, dims * latents, latents, 1])
    encoder, decoder = encoder.view(latents, dims), decoder.view(dims, latents)
    error = torch.eye(dims, dtype=torch.float64) - decoder @ encoder
    sse = (error * eigenvalues @ error.T).trace() + (decoder.square() * logvar.exp()).sum()
    rate = 0.5 * ((encoder.square() @ eigenvalues).sum() + (logvar.exp() - 1 - logvar).sum())
    nll = sse / (2 * logvar_x.exp()) + dims / 2 * (math.log(2 * math.pi) + logvar_x)
    return (nll + beta * rate).squeeze()


def closed_form(eigenvalues: torch.Tensor, latents: int, beta: float) -> torch.Tensor:
    """The parameters that the module's docstring gives: μ_i = w_i/λ_i x_i."""
    found, dims = linear.optimum(eigenvalues, latents, beta), len(eigenvalues)
    w = (eigenvalues[:latents] - found.level).clamp_min(0).sqrt()
    encoder, decoder = torch.zeros(latents, dims).double(), torch.zeros(dims, latents).double()
    encoder[range(latents), range(latents)] = w / eigenvalues[:latents]
    decoder[range(latents), range(latents)] = w
    logvar = torch.minimum(found.level / eigenvalues[:latents], torch.tensor(1.0)).log()
    logvar_x = torch.tensor([found.sse / dims], dtype=torch.float64).log()
    return torch.cat([encoder.flatten(), decoder.flatten(), logvar, logvar_x])


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 1.6])
def test_optimum_minimises_the_exact_loss(beta: float) -> None:
    eigenvalues, latents = SPECTRA["geometric"], 3
    found = linear.optimum(eigenvalues, latents, beta)
    there = closed_form(eigenvalues, latents, beta).requires_grad_()
    loss = expected_loss(there, eigenvalues, latents, beta)
    assert loss.item() == pytest.approx(found.distortion + beta * found.rate, abs=1e-10)
    (gradient,) = torch.autograd.grad(loss, there)
    assert gradient.abs().max() < 1e-9

    def value_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(parameters).requires_grad_()
        value = expected_loss(point, eigenvalues, latents, beta)
        return value.item(), torch.autograd.grad(value, point)[0].numpy()

    starts = np.random.default_rng(0).normal(0, 0.5, (4, len(there)))
    ends = [minimize(value_and_gradient, start, jac=True, options={"maxiter": 5000, "gtol": 1e-8}) for start in starts]
    assert min(end.fun for end in ends) == pytest.approx(loss.item(), abs=1e-6)
    assert all(end.fun > loss.item() - 1e-9 for end in ends)


def test_dimensions_switch_off_where_it_says() -> None:
    eigenvalues, latents = SPECTRA["geometric"], 3
    for i in range(latents):
        beta = linear.switches_off(eigenvalues, i)
        assert linear.optimum(eigenvalues, latents, beta).level == pytest.approx(float(eigenvalues[i]))
        assert linear.optimum(eigenvalues, latents, 0.999 * beta).active == i + 1
        assert linear.optimum(eigenvalues, latents, 1.001 * beta).active == i


def test_optimum_leaves_a_dimension_to_sigma() -> None:
    with pytest.raises(ValueError, match="got 6 latents for 6"):
        linear.optimum(SPECTRA["geometric"], 6, 1.0)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_spectrum_is_the_covariances(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(linear.spectrum(x).numpy(), expected, atol=1e-12)


def test_gaussian_data_have_the_spectrum_that_was_asked_for() -> None:
    asked = SPECTRA["geometric"]
    data = linear.gaussian_data(asked, 20000)
    assert data.train.mean(0).abs().max() < 1e-5
    np.testing.assert_allclose(linear.spectrum(data.train).numpy(), asked.numpy(), rtol=0.05)
