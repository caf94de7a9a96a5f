"""rd_curve.py: the readings of one model, and what the curves claim. test_linear.py has the oracle's own tests."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from on_examples import one_thread  # noqa: F401
from rd_sweeps import FAMILIES, Row, curve, sweep

# isort: split
import rd_curve
from common import readings
from common.data import load
from common.objective import make_criterion, make_objective
from common.training import EVAL_SEED, Trainer
from torch.distributions import Normal, kl_divergence

# The readings of one model.


def test_the_squared_error_family_minimises_sse_plus_beta_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    x, recon = torch.rand(5, 20, generator=generator), torch.rand(5, 20, generator=generator).requires_grad_()
    mu, logvar = (torch.randn(5, 3, generator=generator).requires_grad_() for _ in range(2))
    beta = 0.37
    elbo = make_criterion(rd_curve.SIGMA["squared error"], beta, channels=1)(recon, x, mu, logvar)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum() / 5
    expected = (recon - x).square().sum() / 5 + beta * kl
    assert elbo.loss.item() == pytest.approx(expected.item() + 10 * math.log(math.pi), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(v, (recon, mu, logvar)) for v in (elbo.loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", rd_curve.SIGMA)
def test_readings_are_normal_log_likelihoods(family: str, tmp_path: Path) -> None:
    images, beta = load("digits"), 0.2
    torch.manual_seed(0)
    objective = make_objective(images.shape, rd_curve.SIGMA[family], beta, latent_dim=4, width=8)
    trainer = Trainer(
        objective, images, epochs=2, batch_size=1000, lr=0.01, seed=0, device=torch.device("cpu"),
        checkpoint=tmp_path / "x.pt", settings={},
    )  # fmt: skip
    trainer.fit()
    measured = readings.measure(trainer, images.test, draws=2)
    squared_error = family == "squared error"
    rows = {row["reading"]: row for row in readings.readings(measured, 64, beta, squared_error=squared_error)}

    x = torch.cat([images.test] * 2)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(EVAL_SEED)
        out = objective.eval().model(x)
    kl = kl_divergence(Normal(out.mu, (out.logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert measured["rate"] == pytest.approx(kl.item(), rel=1e-5)
    mse = (out.recon - x).square().flatten(1).mean(1)
    sigmas = {"half": math.sqrt(0.5), "beta": math.sqrt(beta / 2), "optimal": mse.mean().sqrt(), "image": mse.sqrt()}
    if not squared_error:
        sigmas["trained"] = objective.criterion.running_var.sqrt()
    assert rows.keys() == sigmas.keys() - (set() if squared_error else {"half", "beta"})
    for reading, row in rows.items():
        sigma = torch.as_tensor(sigmas[reading]).view(-1, 1, 1, 1)
        nll = -Normal(out.recon, sigma).log_prob(x).flatten(1).sum(1).mean()
        assert row["distortion"] == pytest.approx(nll.item(), rel=1e-4, abs=1e-3), reading
        assert row["sigma"] == pytest.approx(sigma.log().mean().exp().item(), rel=1e-4)
        assert row["bound"] == ("no: sigma sees x" if reading == "image" else "yes")
    assert objective.criterion.training is False  # its own again, not that of a reading
    assert objective.criterion is trainer.objective.criterion


# The experiment.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("quick")
    rows = sweep(out, "--quick")
    assert sorted(p.name for p in out.iterdir()) == ["models", "rd_curve.csv", "rd_curve.png"]
    assert (out / "rd_curve.png").stat().st_size > 10_000
    return rows


def test_each_family_has_its_betas_and_readings(quick: list[Row]) -> None:
    for family in FAMILIES:
        expected = (
            {"optimal", "half", "beta", "image"} if family == "squared error" else {"optimal", "trained", "image"}
        )
        assert {row["reading"] for row in quick if row["family"] == family} == expected
        betas = curve(quick, family, "optimal")["beta"]
        np.testing.assert_allclose(np.diff(np.log(betas)), np.log(betas[1] / betas[0]), rtol=0.02)  # 3 digits each
        assert len(betas) == rd_curve.QUICK["points"]
    assert 1.0 in curve(quick, "decoupled", "optimal")["beta"]  # the ELBO is one of them


def test_no_sigma_is_better_than_the_optimal_one(quick: list[Row]) -> None:
    """A theorem, of each model: SSE/(2σ²) + D/2·log σ² is least at σ² = SSE/D. By Jensen's, one σ an image is lower."""
    for row in quick:
        (optimal,) = (
            other["distortion"] for other in quick
            if other["reading"] == "optimal" and all(other[key] == row[key] for key in ("family", "beta", "seed"))
        )  # fmt: skip
        assert row["distortion"] <= optimal + 1e-4 if row["reading"] == "image" else row["distortion"] >= optimal - 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_optimal_reading_is_a_proper_curve(family: str, quick: list[Row]) -> None:
    found = curve(quick, family, "optimal")
    assert (np.diff(found["rate"]) < -1).all()  # nats
    assert (np.diff(found["distortion"]) > 0).all()
    slopes = np.diff(found["distortion"]) / np.diff(found["rate"])
    assert slopes[-1] < 2 * slopes[0] < 0  # a nat of rate buys most where there are few


def test_curves_span_the_same_rates(quick: list[Row]) -> None:
    ends = np.array([curve(quick, family, "optimal")["rate"][[0, -1]] for family in FAMILIES])
    low, high = ends.min(0), ends.max(0)
    assert (high / low < 1.4).all()


def test_squared_error_readings_are_no_proper_curves(quick: list[Row]) -> None:
    half, beta, optimal = (
        curve(quick, "squared error", reading)["distortion"] for reading in ("half", "beta", "optimal")
    )
    # σ² = ½: far above, and blind to what it is that the rate buys.
    assert (half - optimal > 40).all()
    assert np.ptp(half) < 0.1 * np.ptp(optimal)
    # σ² = β/2: more rate, more distortion, at the small β; near the optimal one only where β/2 is near the MSE.
    assert beta[0] > beta[1] + 10
    assert (beta - optimal).max() > 15


def test_sigma_of_training_is_nearly_the_optimal_one(quick: list[Row]) -> None:
    """No hindsight needed: it costs less than a nat that the running average has not seen the test split."""
    for family in ("decoupled", "per image"):
        trained, optimal = (curve(quick, family, reading)["distortion"] for reading in ("trained", "optimal"))
        assert (trained - optimal < 0.75).all()


def test_decoupled_beta_is_a_squared_errors_two_beta_variance(quick: list[Row]) -> None:
    """At its optimal σ² the decoupled loss has the gradient of SSE + 2βσ²·rate over 2σ²: the same rate at that β."""
    squared_error = curve(quick, "squared error", "optimal")
    sigmas = curve(quick, "decoupled", "trained")["sigma"]
    decoupled = curve(quick, "decoupled", "optimal")
    effective = 2 * decoupled["beta"] * sigmas**2
    within = (effective >= squared_error["beta"][0]) & (effective <= squared_error["beta"][-1])
    assert within.sum() >= 3
    rates = np.interp(np.log(effective), np.log(squared_error["beta"]), squared_error["rate"])
    np.testing.assert_allclose(decoupled["rate"][within], rates[within], rtol=0.15)


def test_decoupled_curve_is_not_above_the_squared_errors(quick: list[Row]) -> None:
    """This holds after as many epochs, at one rate, both read at their optimal σ². In the limit the curves are one."""
    squared_error, decoupled = (curve(quick, family, "optimal") for family in ("squared error", "decoupled"))
    within = (decoupled["rate"] >= squared_error["rate"][-1]) & (decoupled["rate"] <= squared_error["rate"][0])
    assert within.sum() >= 3
    other = np.interp(decoupled["rate"], squared_error["rate"][::-1], squared_error["distortion"][::-1])
    assert (decoupled["distortion"] < other + 0.5)[within].all()
    assert (decoupled["distortion"] < other - 2)[within & (decoupled["beta"] <= 1)].all()


@pytest.mark.release("two dozen linear VAEs")
def test_linear_vaes_lie_on_the_closed_form(tmp_path: Path) -> None:
    rows = sweep(tmp_path, "--linear", "--quick")
    assert len(rows) == rd_curve.QUICK_LINEAR["points"]
    for row in rows:
        for key in ("rate", "distortion", "sse"):
            assert row[key] == pytest.approx(row[f"exact_{key}"], rel=0.02), (row["beta"], key)
    assert min(row["exact_active"] for row in rows) < max(row["exact_active"] for row in rows)
    assert (tmp_path / "rd_curve.png").stat().st_size > 10_000
