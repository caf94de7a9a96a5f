"""Models of many β as beta_runs.py builds, reads and compares them, and the models themselves: nothing is trained."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import one_thread  # noqa: F401
from torch import Tensor, nn
from torch.distributions import Normal

# isort: split
from common import beta_runs, conditioning, readings
from common.at_beta import AtBeta, at
from common.beta_input import BetaInputObjective, errors, measure
from common.beta_models import CONDITIONING, ConditionedConvVAE, ConditionedMLPVAE
from common.conditioning import BetaRange
from common.data import Images
from common.metrics import frechet_distance
from common.models import VAEOutput
from common.ruler import Ruler, from_prior

RANGE = BetaRange(0.01, 10.0)
SHAPE = (1, 5, 4)
LOG_STD = -1.5  # of `told`


@pytest.fixture
def images() -> Images:
    """Of splits that differ in brightness."""
    return Images(*(scale * torch.rand(count, *SHAPE) for scale, count in ((1.0, 13), (0.5, 4), (0.2, 9))))


def options(**given: Any) -> argparse.Namespace:
    usual = {
        "data": "a folder", "image_size": None, "grey": False, "epochs": 1, "latent_dim": 3, "width": 8, "seed": 4,
        "repeats": 2, "conditioning": "modulation-level", "sigma": "network", "device": torch.device("cpu"),
    }  # fmt: skip
    return argparse.Namespace(**usual | given)


def ruler(images: Images, tmp_path: Path) -> Ruler:
    return Ruler("a folder", images, cache=tmp_path / "none.pt", resume=False, inception=lambda x: x[:, :, 1:3, 1:3])


def build(kind: str, family: str, images: Images, **given: Any) -> Any:
    settings = {"family": family, "seed": 4, "betas": [0.5, 2.0, 8.0] if kind == "beta_input" else [2.0]}
    return getattr(beta_runs, f"build_{kind}")(options(**given), images, Path("none.pt"), settings)


# --------------------------------------------------------------------------------------------------------------- models


def test_sigma_and_condition_of_each_family(images: Images) -> None:
    objective = build("beta_input", "decoupled", images).objective
    assert (objective.sigma, objective.condition, objective.log_std) == ("network", "level", images.log_std)
    assert (objective.betas.low, objective.betas.high) == pytest.approx((0.25, 16))  # half a step beyond both ends
    objective = build("beta_input", "decoupled", images, conditioning="film").objective
    assert (objective.sigma, objective.condition) == ("network", "log-beta")
    objective = build("beta_input", "decoupled", images, sigma="batch").objective
    assert (objective.sigma, objective.condition) == ("batch", "log-beta")
    objective = build("beta_input", "squared error", images).objective
    assert (objective.sigma, objective.condition) == ("half", "log-beta")


def test_losses_of_separate_models(images: Images) -> None:
    """At β = 2: that of the closed form, and SSE + β·rate + D/2·log π."""
    x, mu, logvar = torch.rand(6, *SHAPE), torch.rand(6, 3), torch.rand(6, 3)
    recon = torch.zeros_like(x)
    rate, sse = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean(), x.square().flatten(1).sum(1).mean()
    for family, distortion in (
        ("decoupled", 10 * ((2 * math.pi * sse / 20).log() + 1)), ("squared error", sse + 10 * math.log(math.pi)),
    ):  # fmt: skip
        criterion = build("separate", family, images).objective.criterion
        torch.testing.assert_close(criterion(recon, x, mu, logvar).loss, distortion + 2 * rate)


def test_conditionings_are_what_their_names_say() -> None:
    """Published ones have the published layers: c·sigmoid in the encoder, √relu(1 − exp) in the decoder; FiLM's a."""
    for name, (encoder, decoder, told, _) in CONDITIONING.items():
        assert told == ("level" if name.endswith("-level") else "log-beta")
        assert (encoder is decoder) == name.startswith(("modulation", "film"))
    assert CONDITIONING["multi-rate"][:2] == (conditioning.SigmoidGate, conditioning.RootGate)
    assert CONDITIONING["root-sigmoid"][:2] == (conditioning.SigmoidGate, conditioning.RootSigmoid)
    film = conditioning.FiLM(3)
    assert isinstance(film.scale[0], nn.Linear)
    assert (film.strength, film.scale[0].out_features) == (0.01, 256)


@pytest.mark.parametrize("network", ["convolutions", "layers"])
def test_a_reconstruction_is_of_a_sample_of_the_posterior(network: str) -> None:
    model = ConditionedConvVAE(SHAPE, 3, 8, "film") if network == "convolutions" else ConditionedMLPVAE(20, 3, (9, 7))
    x, n = torch.rand(6, *(SHAPE if network == "convolutions" else (20,))), torch.linspace(-1, 1, 6)
    torch.manual_seed(1)
    out = model(x, n)
    torch.manual_seed(1)
    mu, logvar = model.encode(x, n)
    torch.testing.assert_close(out.recon, model.decode(Normal(mu, (0.5 * logvar).exp()).rsample(), n))
    assert torch.equal(out.mu, mu)
    assert torch.equal(out.logvar, logvar)


class Told(ConditionedMLPVAE):
    """Keeps what it is told. The posterior is the prior; the reconstruction is far off where much is told, and z."""

    def __init__(self) -> None:
        super().__init__(20, 2, (4,))

    def forward(self, x: Tensor, n: Tensor) -> VAEOutput:
        self.n = n
        shift = (0.3 + 0.02 * n)[:, None] * torch.ones(20) + 0.1 * torch.randn(len(x), 1)
        return VAEOutput(x + shift.reshape(x.shape), torch.full((len(x), 2), 0.1), torch.zeros(len(x), 2), None)


def told(condition: str = "level") -> BetaInputObjective:
    return BetaInputObjective(Told(), RANGE, condition=condition, log_std=LOG_STD)


def test_a_model_at_one_beta() -> None:
    """It is told the level of the σ that it is given, or its network's."""
    objective = told()
    for sigma, expected in ((0.4, 0.4), (None, math.exp(LOG_STD))):
        level = math.log(2.5) + 2 * (math.log(expected) - LOG_STD)
        model = at(objective, 2.5, sigma)
        assert isinstance(model, AtBeta)
        torch.testing.assert_close(model.n, RANGE.standardise(torch.tensor([level])))
    model, x, z = at(told("log-beta"), 2.5, 0.4), torch.rand(3, 20), torch.randn(3, 2)
    n = RANGE.standardise(torch.full((3,), 2.5).log())
    torch.testing.assert_close(model.encode(x), model.model.encode(x, n))
    torch.testing.assert_close(model.decode(z), (model.model.decode(z, n), None))


# ------------------------------------------------------------------------------------------------------- the objective


def test_a_fixed_beta_is_fixed_for_a_while() -> None:
    objective, x = told(), torch.rand(9, 20)
    with objective.at(0.7):
        with objective.at(0.2):
            assert objective.draw(x).tolist() == pytest.approx([0.2] * 9)
        assert objective.draw(x).tolist() == pytest.approx([0.7] * 9)
    assert len(objective.draw(x).unique()) == 9


def test_what_an_objective_tells_and_reports() -> None:
    """The level, from the network's σ; and the geometric mean of all σ."""
    objective, beta = told(), torch.linspace(0.1, 5, 9)
    assert objective.log_sigma_of is not None
    with torch.no_grad():
        objective.log_sigma_of.net[-1].weight.normal_()
    objective.draw = lambda x: beta  # type: ignore[method-assign]
    elbo, log_sigma = objective(torch.rand(9, 20)), objective.log_sigma(beta)
    assert log_sigma is not None
    torch.testing.assert_close(elbo.sigma, log_sigma.mean().exp())
    torch.testing.assert_close(objective.model.n, RANGE.standardise(beta.log() + 2 * (log_sigma - LOG_STD)).detach())


@pytest.mark.parametrize(("draws", "batch_size"), [(1, 10), (3, 10), (1, 4), (4000, 4)])
def test_errors_are_means_over_all_samples_and_draws(draws: int, batch_size: int) -> None:
    """Batches of unequal size among them."""
    objective, x = told("log-beta"), torch.rand(10, 20)
    rate, sse = errors(objective, x, 2.0, None, draws, batch_size)
    assert (rate, sse) == errors(objective, x, 2.0, None, draws, batch_size)  # the same noise
    assert rate == pytest.approx(2 * 0.005, rel=1e-3)
    shift = 0.3 + 0.02 * float(RANGE.standardise(torch.tensor(2.0).log()))
    assert sse == pytest.approx(20 * (shift**2 + 0.01), rel=0.03 if draws == 4000 else 1)


def test_the_level_of_a_reading_agrees_with_its_error() -> None:
    """And the random numbers of training go on as if nothing had been read."""
    objective, x, before = told(), torch.rand(10, 20), torch.get_rng_state()
    (row,) = measure(objective, x, [2.0], draws=2, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    sigma = math.sqrt(row["sse"] / 20)
    assert row["sigma_error"] == pytest.approx(sigma)
    level = torch.tensor([math.log(2.0) + 2 * (math.log(sigma) - LOG_STD)])
    assert objective.model.n[0].item() == pytest.approx(RANGE.standardise(level).item(), abs=1e-3)
    assert row["sigma_network"] == pytest.approx(math.exp(LOG_STD))
    at_network = errors(objective, x, 2.0, torch.tensor([LOG_STD]), 2, 4)
    assert (row["rate_network"], row["error_network"]) == pytest.approx((at_network[0], math.sqrt(at_network[1] / 20)))
    assert row["error_network"] != pytest.approx(sigma, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ readings


def test_a_reading_has_sigma_of_the_training_images_and_the_rest_of_the_test_images(
    images: Images, tmp_path: Path
) -> None:
    distance = ruler(images, tmp_path)
    trainer = build("separate", "squared error", images)
    (point,) = beta_runs.read_separate(trainer, images, 2.0, distance)["points"]
    train, test = readings.measure(trainer, images.train, draws=1), readings.measure(trainer, images.test, draws=4)
    assert (point["rate"], point["sse"]) == (test["rate"], test["sse"])
    assert point["sigma"] == pytest.approx(math.sqrt(train["sse"] / 20))
    assert point["frechet"] == distance(from_prior(trainer.objective.model, 13))

    trainer = build("beta_input", "decoupled", images)
    (point,) = beta_runs.read_beta_input(trainer, images, [2.0], distance)["points"]
    (train,) = measure(trainer.objective, images.train, [2.0], draws=1, batch_size=256)
    assert point["sigma"] == train["sigma_error"]
    log_sigma = torch.tensor([math.log(point["sigma"])])
    assert (point["rate"], point["sse"]) == errors(trainer.objective, images.test, 2.0, log_sigma, 4, 256)
    assert point["frechet"] == distance(from_prior(at(trainer.objective, 2.0, point["sigma"]), 13))


def test_settings_name_all_that_decides_a_models_numbers(images: Images, tmp_path: Path) -> None:
    betas = {"decoupled": [0.5, 2.0], "squared error": [1.0, 3.0]}
    runs = list(beta_runs.sweep(options(), images, betas, ruler(images, tmp_path)))
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 3  # seeds, families, one VAE and one a β
    for run in runs:
        assert run.settings["seed"] in (4, 5)
        for name in ("data", "image_size", "grey", "epochs", "latent_dim", "width"):
            assert run.settings[name] == getattr(options(), name)
        own = betas[run.settings["family"]]
        if run.settings["kind"] == "beta-input":
            assert (run.settings["betas"], run.settings["sigma"]) == (own, "network")
            assert run.settings["conditioning"] == "modulation-level"
        else:
            assert run.settings["betas"][0] in own


def test_excess_is_in_the_loss_of_each_model() -> None:
    """Decoupled: in nats at its own σ. Squared error: SSE + β'·rate over 2σ² of the separate model, in nats too."""

    def model(kind: str, family: str, **point: float) -> dict[str, Any]:
        return {"kind": kind, "family": family, "seed": 0, "points": [{"beta": 3.0, "frechet": None, **point}]}

    def nll(sse: float, sigma: float) -> float:
        error = torch.full((10,), math.sqrt(sse / 10), dtype=torch.float64)
        return -float(Normal(torch.tensor(0.0).double(), sigma).log_prob(error).sum())

    one, other = {"rate": 4.0, "sse": 5.0, "sigma": 0.6}, {"rate": 3.0, "sse": 5.5, "sigma": 0.8}
    both = (("beta-input", one), ("separate", other))
    models = [model(kind, family, **point) for family in beta_runs.FAMILIES for kind, point in both]
    rows = beta_runs.rows_of(models, 10)
    decoupled, coupled = ([r for r in rows if r["family"] == family] for family in beta_runs.FAMILIES)
    losses = nll(5.0, 0.6) + 3 * 4, nll(5.5, 0.8) + 3 * 3
    assert [r["loss"] for r in decoupled] == pytest.approx(losses)
    assert [r["excess"] for r in decoupled] == pytest.approx([losses[0] - losses[1], 0])
    losses = nll(5.0, 0.8) + 3 * 4 / 1.28, nll(5.5, 0.8) + 3 * 3 / 1.28
    assert [r["loss"] for r in coupled] == pytest.approx(losses)
    assert [r["excess"] for r in coupled] == pytest.approx([(5.0 + 3 * 4 - 5.5 - 3 * 3) / 1.28, 0])
    assert [r["distortion"] for r in rows] == pytest.approx([nll(5.0, 0.6), nll(5.5, 0.8)] * 2)
    assert all(r["separate_rate"] == 3 for r in rows)


def test_spreads_are_of_means_over_the_seeds() -> None:
    points = [(0.5, 0, 1.0), (0.5, 1, 3.0), (2.0, 0, 4.0), (2.0, 1, 6.0)]
    rows = [{"kind": "separate", "family": "decoupled", "beta": b, "seed": s, "frechet": f} for b, s, f in points]
    rows.append({"kind": "separate", "family": "squared error", "beta": 1.0, "seed": 0, "frechet": None})
    assert beta_runs.spreads(rows) == {("separate", "decoupled"): pytest.approx(5 / 2)}


def test_the_ruler_measures_so_many_images_against_the_test_images(images: Images, tmp_path: Path) -> None:
    found = ruler(images, tmp_path)
    assert (found.count, found.label) == (13, "FID")
    drawn = torch.rand(20, *SHAPE)
    few, test = (t[:, :, 1:3, 1:3].flatten(1) for t in (drawn[:13], images.test))
    assert found(drawn) == pytest.approx(frechet_distance(few, test))
    without = Ruler("a folder", images, cache=tmp_path / "none.pt", resume=False)
    assert without(drawn) is None
    assert without.note == "no features, so no distance"


def test_samples_of_the_prior_are_images_of_the_same_latents() -> None:
    model = at(told(), 2.0)
    with torch.no_grad():
        model.model.vae.decoder[-1].bias.uniform_(-2, 3)
    drawn = from_prior(model, 50)
    assert (drawn.min(), drawn.max()) == (0, 1)
    torch.manual_seed(7)
    assert torch.equal(drawn, from_prior(model, 50))
