"""The slices through the objective: their closed form is the loss, and small gammas make them sharp."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import objective_slices
from objective_slices import DIMS, GAMMAS, INTRINSIC, LATENTS, Subspace, energy
from torch import Tensor

from fused_elbo import decoupled_elbo

SEED = 0
FILES = ["gradients.csv", "models", "objective_slices.png", "results.csv", "slices.csv"]


def best_encoder(decoder: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(A, variances) of the diagonal Gaussian N(Ax, variances) nearest to p(z|x) of x = Wz + noise, z ~ N(0, I)."""
    precision = decoder.T @ decoder / gamma + torch.eye(decoder.shape[1], dtype=decoder.dtype)
    return torch.linalg.solve(precision, decoder.T) / gamma, 1 / precision.diagonal()


def negative_elbo(decoder: Tensor, encoder: Tensor, variances: Tensor, covariance: Tensor, gamma: float) -> Tensor:
    """Its expectation over data of that covariance and over z, for any affine encoder."""
    missed = torch.eye(len(decoder), dtype=decoder.dtype) - decoder @ encoder
    squares = (missed @ covariance @ missed.T).trace() + (decoder.square().sum(0) * variances).sum()
    rate = ((encoder @ covariance @ encoder.T).trace() + (variances - 1 - variances.log()).sum()) / 2
    return squares / (2 * gamma) + len(decoder) / 2 * math.log(2 * math.pi * gamma) + rate


@pytest.mark.parametrize("gamma", [1e-3, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.4])
def test_closed_form_is_the_loss(gamma: float, t: float) -> None:
    """`decoupled_elbo` of samples, with the best encoder, has the closed form as its mean."""
    torch.manual_seed(0)
    data = Subspace(SEED)
    decoder = data.decoder + t * data.random_direction(1)
    encoder, variances = best_encoder(decoder, gamma)
    x = data.sample(100_000, noise=0.0, generator=torch.Generator().manual_seed(2))
    mu = x @ encoder.T
    logvar = variances.log().expand_as(mu)
    z = mu + variances.sqrt() * torch.randn_like(mu)
    losses = decoupled_elbo(z @ decoder.T, x, mu, logvar, sigma=math.sqrt(gamma), reduction="none").loss
    error = losses.std().item() / math.sqrt(len(losses))
    assert error < 0.05
    assert losses.mean().item() == pytest.approx(energy(decoder, data.covariance, gamma), abs=4 * error)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_closed_form_is_that_of_the_best_encoder(gamma: float) -> None:
    torch.manual_seed(0)
    data = Subspace(SEED)
    decoder = torch.randn(DIMS, LATENTS, dtype=torch.float64)
    encoder, variances = best_encoder(decoder, gamma)
    best = energy(decoder, data.covariance, gamma)
    assert negative_elbo(decoder, encoder, variances, data.covariance, gamma) == pytest.approx(best, rel=1e-9)
    for _ in range(20):
        other = encoder + 0.05 * torch.randn_like(encoder), variances * (0.1 * torch.randn_like(variances)).exp()
        assert negative_elbo(decoder, *other, data.covariance, gamma) > best


def test_the_optimum_is_sparse_and_on_the_subspace() -> None:
    data = Subspace(SEED)
    lengths = data.decoder.norm(dim=0)
    torch.testing.assert_close(lengths[:INTRINSIC], data.deviations)
    assert lengths[INTRINSIC:].eq(0).all()
    assert torch.linalg.matrix_rank(data.covariance) == INTRINSIC
    x = data.sample(20_000, noise=0.25, generator=torch.Generator().manual_seed(0))
    expected = data.covariance + 0.25 * torch.eye(DIMS, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(x.T), expected, atol=0.06, rtol=0)

    small = 1e-6
    best = energy(data.decoder, data.covariance, small)
    for i in range(20):
        direction = data.random_direction(i)
        assert torch.linalg.matrix_rank(torch.cat([data.decoder, direction], 1)) == INTRINSIC
        assert direction.norm() == pytest.approx(data.decoder.norm())
        assert all(
            energy(data.decoder + t * direction, data.covariance, small) > best for t in (-0.5, -0.01, 0.01, 0.5)
        )
    assert energy(data.decoder + data.exchange(), data.covariance, small) == pytest.approx(best)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_gammas_are_sharp_and_large_ones_smooth(seed: int) -> None:
    rows, curves = objective_slices.slice_curves(Subspace(seed), seed)
    assert [row["gamma"] for row in rows] == list(GAMMAS)
    widths, displacements = ([row[key] for row in rows] for key in ("width", "displacement"))
    assert all(narrow < 0.9 * wide for narrow, wide in itertools.pairwise(widths))
    assert displacements[0] == displacements[1] == 0  # on a grid of 0.005
    assert displacements[1] < displacements[2] < 0.2 * displacements[3]
    # Between two optima there is a barrier where gamma is small, and at gamma = 1 the half-way is better than either.
    barriers = [row["barrier"] for row in rows]
    assert barriers == sorted(barriers, reverse=True)
    assert barriers[0] > 0.7
    assert barriers[-1] < -0.1
    assert rows[0]["exchange_argmin"] == pytest.approx(0, abs=0.006)
    assert rows[-1]["exchange_argmin"] == pytest.approx(0.5, abs=0.006)
    assert all(curve.min() == 0 and curve.max() == 1 for family in curves.values() for curve in family)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slices")
    assert objective_slices.main(["--quick", "--out", str(out), "--device", "cpu"]) == 0
    return out


def points(out: Path, kind: str, seed: int) -> list[dict[str, Any]]:
    return [p for p in read_csv(out / "gradients.csv") if (p["kind"], p["seed"]) == (kind, seed)]


def test_what_a_quick_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES
    assert [row["gamma"] for row in read_csv(quick / "slices.csv")] == list(GAMMAS)
    assert len(read_csv(quick / "results.csv")) == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_gamma_starts_with_the_large_gradients_that_a_learned_one_ends_with(quick: Path, seed: int) -> None:
    learned, fixed = points(quick, "learned", seed), points(quick, "fixed", seed)
    assert [p["epoch"] for p in learned] == [p["epoch"] for p in fixed] == list(range(21))
    assert learned[0]["gamma"] == 1
    assert all(p["gamma"] == pytest.approx(fixed[0]["gamma"], rel=1e-5) for p in fixed)
    # From the same weights, the gradient is as 1/gamma: hundreds of times larger.
    assert fixed[0]["gradient"] / learned[0]["gradient"] == pytest.approx(1 / fixed[0]["gamma"], rel=1e-3)
    assert fixed[0]["gradient"] > 100 * learned[0]["gradient"]
    assert learned[-1]["gradient"] > 5 * learned[0]["gradient"]
    assert fixed[-1]["gradient"] < 0.2 * fixed[0]["gradient"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_gamma_ends_at_a_worse_elbo(quick: Path, seed: int) -> None:
    learned, fixed = (
        next(row for row in read_csv(quick / "results.csv") if (row["kind"], row["seed"]) == (kind, seed))
        for kind in ("learned", "fixed")
    )
    assert fixed["final_gamma"] == pytest.approx(learned["final_gamma"], rel=1e-5)
    assert fixed["loss"] > learned["loss"] + 5  # nats, at one and the same gamma
    assert INTRINSIC <= learned["active"] < LATENTS


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--epochs", "2", "--repeats", "1", "--device", "cpu"]
    assert objective_slices.main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 100)  # of 2 models with 80 each: in the second one
        assert objective_slices.main([*options, "--out", str(tmp_path / "cut")]) == 130
    torch.manual_seed(1)
    assert objective_slices.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    for name in ("gradients.csv", "slices.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("option", ["--epochs", "--repeats"])
def test_bad_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        objective_slices.main([option, "0"])
    assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err
