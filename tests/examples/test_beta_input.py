"""beta_input.py: what σ does in one model for every β, and the linear VAE that is exact at all of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401
from torch import Tensor

# isort: split
import beta_input
from common import linear, linear_beta
from common.beta_input import SIGMA, BetaInputObjective, sigma_elbo
from common.conditioning import RootGate
from common.linear_beta import ConditionedLinearVAE
from common.models import VAEOutput

EIGENVALUES, LATENTS, RANGE = beta_input.EIGENVALUES, beta_input.LATENTS, beta_input.BETAS
DIMS = len(EIGENVALUES)
UNSEEN = RANGE.grid(5).tolist()


def run(out: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert beta_input.main(["--linear", "--device", "cpu", "--out", str(out), *options]) == code
    return read_csv(out / "beta_input.csv") if code == 0 else []


def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 7), (6, 7), (6, 2), (6, 2))
    recon, x, mu, logvar = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return recon.requires_grad_(), x, mu.requires_grad_(), logvar.requires_grad_()


def parts(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """SSE and rate of each sample."""
    return (recon - x).square().sum(1), 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


BETA = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)


def test_one_sigma_for_mixed_betas_couples_them() -> None:
    """Sample i has the gradient of SSE + β'·rate at β' = 2β_iσ̄², whatever its own error is."""
    recon, x, mu, logvar = batch()
    loss = sigma_elbo("batch", recon, x, mu, logvar, BETA).loss
    found = torch.autograd.grad(loss, (recon, mu, logvar))
    sse, rate = parts(recon, x, mu, logvar)
    shared = float(sse.detach().mean() / 7)
    coupled = ((sse + 2 * BETA * shared * rate) / (2 * shared)).mean()
    for ours, theirs in zip(found, torch.autograd.grad(coupled, (recon, mu, logvar)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_sigma_of_each_beta_does_not() -> None:
    """Sample i's gradient is that of SSE + 2β_iσ(β_i)²·rate, and σ sees no target: a bound."""
    recon, x, mu, logvar = batch()
    log_sigma = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    elbo = sigma_elbo("network", recon, x, mu, logvar, BETA, log_sigma)
    sse, rate = parts(recon, x, mu, logvar)
    var = (2 * log_sigma).exp()
    nll = -torch.distributions.Normal(recon, log_sigma.exp()[:, None]).log_prob(x).sum(1)
    torch.testing.assert_close(elbo.distortion, nll.mean())
    apart = ((sse + 2 * BETA * var.detach() * rate) / (2 * var.detach())).mean()
    found = torch.autograd.grad(elbo.loss, (recon, mu, logvar, log_sigma))
    for ours, theirs in zip(found[:3], torch.autograd.grad(apart, (recon, mu, logvar)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[3], (7 - sse / var).detach() / 6)  # no other sample's error has a part in it


def test_one_beta_a_batch_is_the_decoupled_loss() -> None:
    recon, x, mu, logvar = batch()
    sse, rate = parts(recon, x, mu, logvar)
    elbo = sigma_elbo("one-beta", recon, x, mu, logvar, torch.full_like(BETA, 3.0))
    expected = 7 / 2 * (math.log(2 * math.pi * float(sse.detach().mean()) / 7) + 1) + 3 * float(rate.detach().mean())
    assert float(elbo.loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_sigma_of_each_image_sees_it() -> None:
    recon, x, mu, logvar = batch()
    elbo = sigma_elbo("image", recon, x, mu, logvar, BETA)
    assert elbo.sigma is not None
    torch.testing.assert_close(elbo.sigma, (parts(recon, x, mu, logvar)[0] / 7).sqrt().detach())


class Told(torch.nn.Module):
    """Keeps what it is told."""

    def forward(self, x: Tensor, n: Tensor) -> VAEOutput:
        self.n = n
        return VAEOutput(0 * x, torch.zeros(len(x), 2), torch.zeros(len(x), 2), None)


@pytest.mark.parametrize("sigma", SIGMA)
def test_betas_of_a_batch(sigma: str) -> None:
    torch.manual_seed(0)
    objective, x = BetaInputObjective(Told(), RANGE, sigma=sigma, log_std=0.0), torch.randn(20, 3)
    elbo = objective(x)
    assert all(value.shape == () for value in elbo)
    assert len(objective.draw(x).unique()) == (1 if sigma == "one-beta" else 20)
    objective.eval()
    assert torch.equal(objective.draw(x), objective.draw(x))
    assert len(objective.draw(x).unique()) == 8
    with objective.at(0.7):
        objective(x)
        torch.testing.assert_close(objective.model.n, RANGE.standardise(torch.full((20,), 0.7).log()))


def test_the_level_needs_the_network() -> None:
    with pytest.raises(ValueError, match="got sigma='batch'"):
        BetaInputObjective(Told(), RANGE, sigma="batch", condition="level", log_std=0.0)


def test_log_sigma_is_one_number_a_sample() -> None:
    objective = BetaInputObjective(Told(), RANGE, log_std=-1.5)
    log_sigma = objective.log_sigma(RANGE.draw(9))
    assert log_sigma is not None
    assert torch.equal(log_sigma, torch.full((9,), -1.5))
    objective(torch.randn(9, 3)).loss.backward()
    assert objective.log_sigma_of is not None
    last = list(objective.log_sigma_of.parameters())[-1]
    assert last.grad is not None
    assert last.grad.abs() > 0


@pytest.mark.parametrize("beta", UNSEEN)
def test_level_is_all_that_matters(beta: float) -> None:
    exact = linear.optimum(EIGENVALUES, LATENTS, beta)
    point = linear_beta.at_level(EIGENVALUES, LATENTS, exact.level)
    assert (point.rate, point.sse) == pytest.approx((exact.rate, exact.sse), rel=1e-12)


@pytest.mark.parametrize("betas", [UNSEEN, [0.1], [0.01, 100.0], [5.0, 9.0]])
def test_shared_variance_is_the_error_of_the_mixture(betas: list[float]) -> None:
    shared = linear_beta.shared_variance(EIGENVALUES, LATENTS, betas)
    errors = [linear_beta.at_level(EIGENVALUES, LATENTS, beta * shared).sse for beta in betas]
    assert sum(errors) / len(errors) == pytest.approx(DIMS * shared, rel=1e-9)
    if len(betas) == 1:
        exact = linear.optimum(EIGENVALUES, LATENTS, betas[0])
        assert betas[0] * shared == pytest.approx(exact.level, rel=1e-9)


@torch.no_grad()
def test_gates_in_the_level_are_exact() -> None:
    """With the closed form's weights one model is the optimum of every β. Expectations over x and z are exact here."""
    model = ConditionedLinearVAE(DIMS, LATENTS, 2.0, "gates").double()
    carried, slope = EIGENVALUES[:LATENTS], 0.7
    model.encoder.weight.copy_(torch.eye(LATENTS, DIMS) * model.scale / carried.sqrt()[:, None])
    model.decoder.weight.copy_(torch.eye(DIMS, LATENTS) * carried.sqrt() / model.scale)
    for part in (model.after, model.before, model.logvar):
        part.affine.weight.fill_(1 / slope)
        part.affine.bias.copy_(-carried.log())
    for beta in (*UNSEEN, 4.5, 7.0):
        exact = linear.optimum(EIGENVALUES, LATENTS, beta)
        n = torch.full((LATENTS,), slope * math.log(exact.level), dtype=torch.float64)
        encoder = model.after(model.encoder.weight.T[:LATENTS].contiguous(), n).T / model.scale  # of unit vectors
        decoder = model.scale * model.decoder.weight @ model.before(torch.eye(LATENTS).double(), n)
        logvar = model.logvar(n)[0]
        error = torch.eye(DIMS).double()
        error[:, :LATENTS] -= decoder @ encoder
        sse = (error.square() * EIGENVALUES).sum() + (decoder.square() * logvar.exp()).sum()
        rate = 0.5 * ((encoder.square() * carried).sum() + (logvar.exp() - 1 - logvar).sum())
        assert float(rate) == pytest.approx(exact.rate, abs=1e-9)
        assert float(sse) == pytest.approx(exact.sse, rel=1e-9)


def test_gates_in_log_beta_cannot_be() -> None:
    """The level has the slope 1 + βK/(D − βK) in log β. The best of all affine gates are far off; in ℓ they are exact.

    Coupled, at the levels βσ̄², the same gates would do: there the level is affine in log β.
    """
    betas = torch.logspace(math.log10(RANGE.low), math.log10(RANGE.high), 25, dtype=torch.float64).tolist()
    exact = [linear.optimum(EIGENVALUES, LATENTS, beta) for beta in betas]
    slopes = []
    for (beta, point), (after, further) in itertools.pairwise(zip(betas, exact, strict=True)):
        if point.active == further.active == LATENTS:
            slopes.append(math.log(further.level / point.level) / math.log(after / beta))
            first, second = (1 / (1 - b * LATENTS / DIMS) for b in (beta, after))
            assert first < slopes[-1] < second
    assert slopes[-1] > 3 * slopes[0]
    rates = torch.tensor([point.rate for point in exact], dtype=torch.float64)
    level = linear_beta.best_affine_gates(EIGENVALUES, LATENTS, betas, [math.log(point.level) for point in exact])
    assert level.excess.max() < 1e-8
    log_beta = linear_beta.best_affine_gates(EIGENVALUES, LATENTS, betas, [math.log(beta) for beta in betas])
    assert log_beta.excess.min() > -1e-9
    assert log_beta.excess.mean() > 0.05  # nats
    off = (log_beta.rate / rates - 1).abs()
    assert off.median() > 0.05
    assert off.max() > 0.5


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The exact row as long as the full experiment trains; the other two need less for what they have to show."""
    out = tmp_path_factory.mktemp("beta_input")
    rows = run(out / "long", "--rows", "level", "--repeats", "1")
    rows += run(out / "short", "--rows", "log-beta", "sigma-batch", "--repeats", "1", "--epochs", "100")
    assert (out / "short" / "beta_input.png").stat().st_size > 10_000
    return rows


def off(rows: list[dict[str, Any]], name: str, target: str, key: str = "rate") -> list[float]:
    """How far `key` is from `target`, at each β."""
    return [abs(row[key] / row[target] - 1) for row in rows if row["row"] == name]


def test_trained_gates_in_the_level_are_within_two_percent(quick: list[dict[str, Any]]) -> None:
    found = off(quick, "level", "exact_rate")
    assert len(found) == 5
    assert max(found) < 0.02
    assert max(off(quick, "level", "exact_sse", "sse")) < 0.02


def test_trained_gates_in_log_beta_are_not(quick: list[dict[str, Any]]) -> None:
    found = off(quick, "log-beta", "exact_rate")
    assert max(found) > 0.15
    assert sorted(found)[2] > 0.03


def test_the_network_finds_the_error_of_each_beta(quick: list[dict[str, Any]]) -> None:
    for name in ("level", "log-beta"):
        assert max(off(quick, name, "error_network", "sigma_network")) < 0.02


def test_the_batch_sigma_trains_at_its_own_level(quick: list[dict[str, Any]]) -> None:
    """Its rates are those of βσ̄², which gates in log β can do, and at the largest β more than double the decoupled."""
    assert max(off(quick, "sigma-batch", "coupled_rate")) < 0.02
    own = [row for row in quick if row["row"] == "sigma-batch"]
    assert own[-1]["rate"] > 1.5 * own[-1]["exact_rate"]
    assert own[0]["rate"] < 0.96 * own[0]["exact_rate"]


def test_resumed_run_equals_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rows", "log-beta", "sigma-one-beta", "--epochs", "2", "--repeats", "1"]
    whole = run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 16 + 11)  # of 16 a model: in the second one
        run(tmp_path / "cut", *options, code=130)
    assert "--resume" in capsys.readouterr().err
    torch.manual_seed(12345)
    assert run(tmp_path / "cut", *options, "--resume") == whole
    run(tmp_path / "cut", *options[:-3], "3", "--repeats", "1", "--resume", code=2)
    assert "--epochs (was 2, now 3)" in capsys.readouterr().err


@pytest.mark.release("another seed of the claims")
def test_claims_with_another_seed(tmp_path: Path) -> None:
    rows = run(tmp_path, "--seed", "1", "--repeats", "1", "--rows", "level", "log-beta", "sigma-batch")
    assert max(off(rows, "level", "exact_rate")) < 0.02
    assert max(off(rows, "log-beta", "exact_rate")) > 0.15
    assert max(off(rows, "sigma-batch", "coupled_rate")) < 0.02


def test_gates_of_the_experiment_start_open() -> None:
    model = ConditionedLinearVAE(DIMS, LATENTS, 1.0, "gates")
    for part in (model.after, model.before):
        assert isinstance(part, RootGate)
        assert not part.closed().any()
    assert (model.logvar(torch.tensor([-math.sqrt(3), math.sqrt(3)])) < 0).all()
