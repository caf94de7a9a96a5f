"""phase_diagram.py: entropies that are known, legs that lead to the line, and that no model is below it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import phase_diagram
from common import linear, phase
from common.objective import VAEObjective, make_criterion

from fused_elbo import gaussian_kl

GAPS = {  # R + D − H of the best linear VAE of 5 latents
    "geometric": {0.25: 4.830, 0.5: 3.530, 1.0: 2.866, 1.5: 3.399, 2.0: 5.518},
    "low rank": {0.25: 1.792, 0.5: 0.577, 1.0: 0.0, 2.0: 1.308, 3.0: 5.493},
}
ENTROPIES = {"geometric": 20.446, "low rank": 9.934}


def entropy(eigenvalues: torch.Tensor) -> float:
    return 0.5 * float((2 * math.pi * math.e * eigenvalues).log().sum())


# What is known.


@pytest.mark.parametrize("spectrum", phase.SPECTRA)
def test_gap_of_the_optimum_is_what_its_curve_lacks_to_the_line(spectrum: str) -> None:
    eigenvalues = phase.SPECTRA[spectrum]
    assert entropy(eigenvalues) == pytest.approx(ENTROPIES[spectrum], abs=1e-3)
    for beta, expected in GAPS[spectrum].items():
        assert linear.gap(eigenvalues, 5, beta) == pytest.approx(expected, abs=1e-3)
    for beta in np.geomspace(0.1, linear.switches_off(eigenvalues, 0), 20):  # and where dimensions are switched off
        found = linear.optimum(eigenvalues, 5, float(beta))
        assert linear.gap(eigenvalues, 5, float(beta)) == pytest.approx(
            found.rate + found.distortion - entropy(eigenvalues), abs=1e-9
        )


def test_slope_of_the_curve_is_minus_beta() -> None:
    for beta in (0.4, 1.0, 1.7):
        near, far = (linear.optimum(phase.SPECTRA["geometric"], 5, beta * f) for f in (1 - 1e-5, 1 + 1e-5))
        assert (far.distortion - near.distortion) / (far.rate - near.rate) == pytest.approx(-beta, rel=1e-4)


def test_covariance_is_that_of_the_data() -> None:
    eigenvalues = phase.SPECTRA["geometric"]
    x = linear.gaussian_data(eigenvalues, 40_000).train
    expected = linear.covariance(eigenvalues)
    assert (x.T.cov() - expected).abs().max() < 0.02 * expected.diag().max()
    np.testing.assert_allclose(torch.linalg.eigvalsh(expected).flip(0), eigenvalues, rtol=1e-9)


def random_vae(seed: int, dims: int, latents: int) -> linear.LinearVAE:
    torch.manual_seed(seed)
    vae = linear.LinearVAE(dims, latents, scale=1.3)
    torch.nn.init.normal_(vae.logvar, -1.0)
    return vae


def test_legs_of_any_linear_vae_add_up_to_its_gap() -> None:
    eigenvalues, variance = torch.tensor([4.0, 2.0, 1.0, 0.3], dtype=torch.float64), 0.4
    covariance = linear.covariance(eigenvalues)
    for seed in range(5):
        vae = random_vae(seed, 4, 2)
        with torch.no_grad():
            encoder, decoder = vae.encoder.weight.double() / 1.3, vae.decoder.weight.double() * 1.3
            posterior = vae.logvar.double().exp()
            rate = 0.5 * float((encoder @ covariance @ encoder.T).trace() + (posterior - 1 - posterior.log()).sum())
            error = torch.eye(4) - decoder @ encoder
            sse = float((error @ covariance @ error.T).trace() + (decoder.square() * posterior).sum())
        distortion = sse / (2 * variance) + 2 * math.log(2 * math.pi * variance)
        legs = vae.legs(covariance, variance)
        assert min(legs) > 0.01
        assert sum(legs) == pytest.approx(rate + distortion - entropy(eigenvalues), abs=1e-9)


def test_the_optimum_has_the_decoders_leg_only() -> None:
    eigenvalues, beta = torch.tensor([4.0, 2.0, 0.5, 0.3], dtype=torch.float64), 0.7
    found = linear.optimum(eigenvalues, 2, beta)
    vae = linear.LinearVAE(4, 2, 1.0).double()
    axes = linear._axes(4, torch.Generator().manual_seed(0))[:, :2]
    lengths = (eigenvalues[:2] - found.level).sqrt()
    with torch.no_grad():
        vae.encoder.weight.copy_((axes * lengths / eigenvalues[:2]).T)
        vae.decoder.weight.copy_(axes * lengths)
        vae.logvar.copy_((found.level / eigenvalues[:2]).log())
    prior, decoder = vae.legs(linear.covariance(eigenvalues), found.level / beta)
    assert prior == pytest.approx(0, abs=1e-9)
    assert decoder == pytest.approx(linear.gap(eigenvalues, 2, beta), abs=1e-9)


def test_images_are_distinct_and_their_entropy_is_known() -> None:
    images = phase.distinct_images()
    squares = torch.cdist(images, images).square().fill_diagonal_(math.inf)
    assert images.shape == (phase.IMAGES, 64)
    assert math.exp(-float(squares.min()) / (8 * phase.NOISE**2)) < 1e-4
    torch.manual_seed(0)
    x = phase.noisy(images.repeat(100, 1))
    log_density = phase.images_log_density(x, images)
    error = float(log_density.std()) / math.sqrt(len(x))
    assert -float(log_density.mean()) == pytest.approx(phase.images_entropy(images), abs=3 * error)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(len(images))),
        torch.distributions.Independent(torch.distributions.Normal(images.double(), phase.NOISE), 1),
    )
    torch.testing.assert_close(log_density[:50], mixture.log_prob(x[:50].double()), rtol=1e-9, atol=1e-6)


# What is measured.


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_priors_leg_lies_between_its_bounds(noise: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s = noise / math.sqrt(1 + noise**2)  # of z given x; q(z) is N(shift, I)
    mu, others = (shift + math.sqrt(1 - s**2) * torch.randn(3000, 2, generator=generator) for _ in range(2))
    logvar = torch.full_like(mu, 2 * math.log(s))
    z = mu + s * torch.randn(mu.shape, generator=generator)
    below, above = phase.prior_leg(z, mu, logvar, (others, logvar))
    # With the same z, of which the true log q(z) is known: its mean is off KL(q(z) ‖ p(z)) by as much as theirs are.
    known = float((shift * z - shift**2 / 2).sum(1).mean())
    assert known == pytest.approx(shift**2, abs=0.1)
    assert below - 0.01 < known < above + 0.01
    assert above - below < 0.1


def test_priors_leg_from_above_is_the_rate_without_log_n_where_all_is_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, others = (torch.randn(500, 20, generator=generator) for _ in range(2))
    logvar = torch.full_like(mu, -6.0)
    z = mu + math.exp(-3) * torch.randn(mu.shape, generator=generator)
    below, above = phase.prior_leg(z, mu, logvar, (others, logvar))
    assert above == pytest.approx(float(gaussian_kl(mu, logvar)) - math.log(500), abs=0.5)
    assert below < -100


def test_excess_is_the_legs_sum_and_leaves_the_random_state_alone() -> None:
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.3], dtype=torch.float64)
    covariance, vae = linear.covariance(eigenvalues), random_vae(1, 4, 2)
    objective = VAEObjective(vae, make_criterion("0.6", 1.0, channels=1))
    normal = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    x = normal.sample((20_000,))
    state = torch.get_rng_state()
    found = phase.excess(objective, x.float(), normal.log_prob(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.sigma == pytest.approx(0.6)
    assert found.gap == pytest.approx(sum(vae.legs(covariance, 0.36)), abs=4 * found.gap_error)
    assert found.gap == pytest.approx(found.rate + found.distortion - entropy(eigenvalues), abs=0.1)


# The experiment.


def run(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert phase_diagram.main([*options, "--out", str(out), "--device", "cpu"]) == code
    return read_csv(out / "phase_diagram.csv") if code == 0 else []


def check(rows: list[dict[str, Any]]) -> None:
    """What the section claims of every run."""
    for row in rows:
        assert row["gap"] > -3 * row["gap_error"]  # no model is below the line
        for leg in ("prior", "decoder"):
            assert row[f"{leg}_low"] <= row[f"{leg}_high"]
            assert row[f"{leg}_high"] > -0.01
        if row["part"] in phase.SPECTRA:
            assert row["gap"] == pytest.approx(row["exact_gap"], abs=0.1)
            legs = row["prior_low"] + row["decoder_low"]
            assert legs == pytest.approx(row["gap"], abs=4 * row["gap_error"])
            assert legs == pytest.approx(row["exact_gap"], abs=0.06)
            assert row["prior_low"] < 0.05
    for row in rows:
        if row["model"] == "affine":  # of the noisy images, as of all data, no affine VAE can be nearer than this
            images = phase.distinct_images()
            spectrum = phase.images_spectrum(images)
            best = linear.optimum(spectrum, phase.PIXELS["latent_dim"], row["beta"])
            loss = row["distortion"] + row["beta"] * row["rate"]
            assert loss > best.distortion + row["beta"] * best.rate - 0.2  # H's noise is in D: 0.06, one standard error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phase")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase_diagram, "QUICK_BETAS", (1.0, 2.0))
        patch.setattr(phase_diagram, "QUICK_IMAGE_BETAS", (1.0,))
        patch.setitem(phase.PIXELS, "draws", 32)
        run(out, "--quick", "--linear-epochs", "40", "--image-epochs", "30")
    return out


def test_models_lie_where_they_must(small: Path) -> None:
    rows = read_csv(small / "phase_diagram.csv")
    check(rows)
    (touching,) = (row for row in rows if row["part"] == "low rank" and row["beta"] == 1)
    assert touching["prior_low"] + touching["decoder_low"] < 0.05
    affine, mlp = (next(row for row in rows if row["model"] == model) for model in ("affine", "MLP"))
    assert mlp["gap"] < affine["gap"] - 3
    assert mlp["prior_low"] > 0.5  # the legs that a linear VAE hardly has
    assert sorted(path.name for path in small.iterdir()) == ["models", "phase_diagram.csv", "phase_diagram.png"]
    assert (small / "phase_diagram.png").stat().st_size > 10_000


@pytest.mark.release("all models of --quick")
def test_quick_run(tmp_path: Path) -> None:
    rows = run(tmp_path, "--quick", "--seed", "1")
    assert len(rows) == 12
    check(rows)


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_diagram, "QUICK_BETAS", (1.0,))
    monkeypatch.setattr(phase_diagram, "QUICK_IMAGE_BETAS", (2.0,))
    monkeypatch.setitem(phase.PIXELS, "draws", 4)
    options = ["--quick", "--linear-epochs", "1", "--image-epochs", "2"]
    whole = run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2 * 32 + 40)  # in the second epoch of the first VAE of images
        run(tmp_path / "cut", *options, code=130)
    cut = run(tmp_path / "cut", *options, "--resume")
    assert len(whole) == 4
    assert [{**row, "seconds": 0} for row in cut] == [{**row, "seconds": 0} for row in whole]


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        phase_diagram.main(["--repeats", "0"])
    assert "--repeats: must be at least 1, got 0" in capsys.readouterr().err
