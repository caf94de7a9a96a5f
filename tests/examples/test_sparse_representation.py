"""The VAE's code is sparse: which latents stay, what they cost, and that the others can go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import sparse_representation
from common import latents
from common.manifolds import curved, parabola
from common.mlp import MLPVAE
from common.penalised import PenalisedAutoencoder, penalty
from common.sparse_runs import SUBSPACE

FILES = ["models", "outliers.csv", "pruning.csv", "results.csv", "sparse_representation.png"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse")
    assert sparse_representation.main(["--quick", "--out", str(out), "--device", "cpu"]) == 0
    return out


def rows(out: Path, part: str) -> list[dict[str, Any]]:
    return [row for row in read_csv(out / "results.csv") if row["part"] == part]


def test_what_a_quick_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES


def test_fewer_latents_stay_active_under_a_larger_beta_and_a_larger_sigma(quick: Path) -> None:
    images = rows(quick, "images")
    by_beta = [row["active"] for row in images if row["sigma_mode"] == "optimal"]
    by_sigma = [row["active"] for row in images if row["sigma_mode"] != "optimal"]
    for active in (by_beta, by_sigma):
        assert active == sorted(active, reverse=True)
        assert active[0] >= 14  # of 16
        assert active[-1] == 0
    assert by_beta[-3] > by_beta[-2] + 4


def test_twice_the_rate_rises_by_r_for_each_nat_of_minus_log_gamma(quick: Path) -> None:
    points = rows(quick, "rate")
    assert [row["active"] for row in points] == [3] * len(points)  # of 10, as many as the data has dimensions
    assert sparse_representation.slope(points)[0] == pytest.approx(3, rel=0.1)
    assert all(row["noise"] <= row["gamma"] < 1.5 * row["noise"] for row in points)


def test_pruning_what_is_not_active_changes_little(quick: Path) -> None:
    curve = read_csv(quick / "pruning.csv")
    images = [row for row in rows(quick, "images") if row["sigma_mode"] == "optimal"]
    active = min((row["active"] for row in images), key=lambda active: abs(active - 8))
    whole, without, all_gone = curve[0], curve[-1 - int(active)], curve[-1]
    assert 0 < active < 16
    assert without["mse"] < 1.2 * whole["mse"]
    assert without["mmd"] < 1.3 * whole["mmd"]
    assert all_gone["mse"] > 1.8 * whole["mse"]
    assert all_gone["mmd"] > 4 * whole["mmd"]
    # The first of the active ones costs more than all the others together.
    assert curve[-int(active)]["mse"] - without["mse"] > without["mse"] - whole["mse"]


def test_no_bounded_penalty_is_both_accurate_and_sparse(quick: Path) -> None:
    """The VAE is: as many latents as the data has dimensions, and next to no error."""
    (vae,) = (row for row in rows(quick, "penalty") if row["kind"] == "vae")
    assert vae["used"] == SUBSPACE
    assert vae["error"] < 1e-4
    bounded = [row for row in rows(quick, "penalty") if row["kind"] == "penalty"]
    assert {row["width"] for row in bounded} == set(sparse_representation.WIDTHS)
    assert all(row["used"] > SUBSPACE or row["error"] > 10 * vae["error"] for row in bounded)
    for width in sparse_representation.WIDTHS:  # the sweep reaches both ends: accurate, and far from it
        errors = [row["error"] for row in bounded if row["width"] == width]
        assert min(errors) < 1e-4
        assert max(errors) > 1e-2


def test_one_latent_for_a_curve_and_outliers_far_from_it(quick: Path) -> None:
    (found,) = rows(quick, "parabola")
    assert found["active"] == 1
    auroc = {row["method"]: row["auroc"] for row in read_csv(quick / "outliers.csv")}
    assert auroc["vae"] > 0.93
    assert auroc["pca"] < 0.8


def test_slope_is_that_of_the_line_of_the_sparsest() -> None:
    points = [{"gamma": math.exp(-x), "rate": (4 * x + 1) / 2, "active": 4} for x in (1.0, 2.0, 5.0)]
    spare = {"gamma": math.exp(-6), "rate": 20.0, "active": 5}
    assert sparse_representation.slope(points) == pytest.approx((4, 1))
    assert sparse_representation.slope([*points, spare])[0] > 4.5
    assert sparse_representation.sparsest([spare, *points]) == points


def test_outlier_scores_are_squared_distances_from_the_reconstruction() -> None:
    torch.manual_seed(0)
    data = parabola(200, noise=0.01, seed=0)
    outliers = sparse_representation.Outliers(MLPVAE(2, 2, (4,)), data.train, data.test, seed=0)
    points = torch.randn(5, 2)
    scores = outliers.scores(points)
    centred = data.train - data.train.mean(0)
    axis = torch.linalg.svd(centred).Vh[:1]
    left = (points - data.train.mean(0)) @ (torch.eye(2) - axis.T @ axis)
    assert scores["pca"] == pytest.approx(left.square().sum(1).numpy(), rel=1e-3)
    with torch.no_grad():
        recon = outliers.model.decode(outliers.model.encode(points)[0])[0]
    assert scores["vae"] == pytest.approx((recon - points).square().sum(1).numpy(), rel=1e-4)
    low, high = torch.tensor(sparse_representation.SPAN).T
    assert ((outliers.outliers >= low) & (outliers.outliers <= high)).all()


def test_curved_manifold_has_its_dimensions() -> None:
    flat = curved(3000, intrinsic=3, dims=8, noise=0.0, curvature=0.0, seed=1)
    assert torch.linalg.matrix_rank(flat.train, rtol=1e-4) == 3
    torch.testing.assert_close(
        torch.linalg.svdvals(flat.train).square() / 3000, torch.tensor([1.0] * 3 + [0] * 5), atol=0.1, rtol=0
    )
    bent = curved(3000, intrinsic=3, dims=8, noise=0.0, curvature=0.2, seed=1)
    assert torch.linalg.matrix_rank(bent.train, rtol=1e-4) == 6
    noisy = curved(3000, intrinsic=3, dims=8, noise=0.25, curvature=0.2, seed=1)
    # u and its squares lie on a frame of 6 axes; the two others hold noise alone.
    assert torch.linalg.svdvals(noisy.train)[-2:].square().div(3000).tolist() == pytest.approx([0.25, 0.25], rel=0.1)
    assert [len(part) for part in (noisy.train, noisy.val, noisy.test)] == [3000, 500, 500]


def test_parabola() -> None:
    x, y = parabola(3000, noise=0.0, seed=0).train.T
    torch.testing.assert_close(y, x.square() - 0.75)
    assert x.min() >= -1.5
    assert x.max() <= 1.5
    thick = parabola(3000, noise=0.04, seed=0).train
    assert (thick - torch.stack([x, y], 1)).std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(("width", "bound"), [(None, 1.0), (1.0, 0.65), (0.1, 6.5)])
def test_penalties_have_bounded_slopes(width: float | None, bound: float) -> None:
    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64).requires_grad_()
    value = penalty(z, width)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert slope.abs().max().item() == pytest.approx(bound, rel=2e-3)
    assert value.min().item() == pytest.approx(0, abs=1e-12)
    assert value[0] == value[-1] > 0.9


@pytest.mark.parametrize("width", [None, 0.5])
def test_penalised_autoencoder_is_its_formula(width: float | None) -> None:
    torch.manual_seed(0)
    model, x = PenalisedAutoencoder(6, 4, 0.3, width), torch.randn(9, 6)
    elbo = model(x)
    z = x @ model.encoder.weight.T + model.encoder.bias
    unit = model.columns / model.columns.square().sum(0).sqrt()
    squares = (x - z @ unit.T - model.bias).square().sum()
    sparsity = z.abs().sum() if width is None else (z**2 / (0.25 + z**2)).sum()
    expected = squares / 2 / 9 + 3 * math.log(2 * math.pi) + 0.3 * sparsity / 9
    assert elbo.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert elbo.rate.item() == pytest.approx(sparsity.item() / 9, rel=1e-5)


def test_used_and_pruned_latents() -> None:
    torch.manual_seed(0)
    model, z = MLPVAE(6, 3), torch.randn(200, 3)
    with torch.no_grad():
        model.decoder[0].weight[:, 1] *= 1e-3
    variance = latents.decode(model, z).var(0).sum().item()
    assert latents.used(model, z, variance).tolist() == [True, False, True]
    kept = latents.pruned(z, torch.tensor([0, 2]))
    assert kept[:, [0, 2]].eq(0).all()
    assert torch.equal(kept[:, 1], z[:, 1])
    assert z.ne(0).all()


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {"BETAS": (1.0,), "SIGMAS": ("0.3",), "NOISES": (0.03, 0.003), "WEIGHTS": (0.1,)}.items():
        monkeypatch.setattr(sparse_representation, f"QUICK_{name}", values)
    options = ["--quick", "--length", "0.01", "--device", "cpu"]
    assert sparse_representation.main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 60)  # after the images' models, in the first one on the curved manifold
        assert sparse_representation.main([*options, "--out", str(tmp_path / "cut")]) == 130
    assert sparse_representation.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = ([{**r, "seconds": 0} for r in read_csv(tmp_path / run / "results.csv")] for run in ("whole", "cut"))
    assert len(whole) == 9
    assert whole == cut
    for name in ("pruning.csv", "outliers.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "0"], "--length: must be greater than 0, got 0"),
        (["--latent-dim", "0"], "--latent-dim: must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sparse_representation.main(options)
    assert message in capsys.readouterr().err
