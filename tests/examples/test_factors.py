"""Pictures of known factors, and how well a code keeps these apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common import factor_metrics, shapes

SIZES = list(shapes.FACTORS.values())


def scores(codes: np.ndarray) -> dict[str, float]:
    return factor_metrics.scores(codes, shapes.factors().numpy(), SIZES, train=800, test=400, votes=1000)


def one_latent_each() -> np.ndarray:
    """[6144, 5], each factor in a latent of its own, of mean 0 and variance 1."""
    factors = shapes.factors().numpy().astype(float)
    return (factors - factors.mean(0)) / factors.std(0)


def noise(columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((shapes.COUNT, columns))


def test_every_picture_of_the_population_differs_from_all_others() -> None:
    """So that a picture has log 6144 nats, and what a code knows of it is bounded by that."""
    pictures = shapes.shapes()
    assert pictures.shape == (6144, 1, 32, 32)
    assert pictures.dtype == torch.uint8
    assert len(pictures.flatten(1).unique(dim=0)) == shapes.COUNT == 6144
    assert math.log(shapes.COUNT) == pytest.approx(8.7232, abs=1e-4)
    assert len(shapes.population().train.flatten(1).unique(dim=0)) == 6144  # halved
    assert pictures[:, :, [0, -1]].max() == pictures[:, :, :, [0, -1]].max() == 0  # nothing is cut off
    x = pictures.flatten(1).float() / 255
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:400]
    distances = torch.cdist(x[some], x).square()
    distances[torch.arange(len(some)), some] = math.inf
    assert distances.min().item() == pytest.approx(1.56, abs=0.03)


def test_pictures_are_in_the_order_of_their_factors() -> None:
    pictures, factors = shapes.shapes().float(), shapes.factors()
    mass = pictures.sum((1, 2, 3))
    rows, columns = pictures.sum((1, 3)), pictures.sum((1, 2))
    axis = torch.arange(shapes.SIZE) + 0.5
    for moment, factor in ((columns @ axis / mass, 3), (rows @ axis / mass, 4)):
        means = torch.stack([moment[factors[:, factor] == value].mean() for value in range(8)])
        torch.testing.assert_close(means.diff(), torch.full((7,), 0.4 / 7 * shapes.SIZE), rtol=0.01, atol=0)
    areas = torch.stack([mass[factors[:, 1] == value].mean() for value in range(4)]) / 255 / shapes.SIZE**2
    assert (areas.sqrt() / areas[0].sqrt()).tolist() == pytest.approx([1, 4 / 3, 5 / 3, 2], rel=0.01)
    # An eighth of half a turn further each time: the direction of the longest axis of a large rectangle.
    large = pictures[(factors == torch.tensor([0, 3, 0, 4, 4])).logical_or(torch.arange(5) == 2).all(1)][:, 0]
    covariance = []
    for picture in large:
        weight = picture / picture.sum()
        y, x = (weight.sum(1) * axis).sum(), (weight.sum(0) * axis).sum()
        dx, dy = axis - x, (axis - y)[:, None]
        covariance.append([(weight * dx * dx).sum(), (weight * dx * dy).sum(), (weight * dy * dy).sum()])
    xx, xy, yy = torch.tensor(covariance).T
    angle = (0.5 * torch.atan2(2 * xy, xx - yy)).remainder(math.pi)
    expected = torch.arange(8) * math.pi / 8
    assert torch.sin(angle - expected).abs().max() < 0.03  # angles modulo half a turn


def test_a_perfect_code_scores_one() -> None:
    found = scores(np.concatenate([one_latent_each(), np.zeros((shapes.COUNT, 3))], axis=1))
    for name in ("mig", "disentanglement", "completeness", "informativeness", "factor_vae", "sap_correlation"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    # A line, one class against the rest, finds a middle value of a latent no better than by chance: 0.35 is perfect.
    assert 0.3 < found["sap"] < 0.4


def test_sap_of_two_valued_factors_is_a_half_at_best() -> None:
    """All right on one latent, and half of it by chance on the second."""
    values = np.random.default_rng(0).integers(2, size=(2000, 4))
    found = factor_metrics.sap(2.0 * values[:1000] - 1, values[:1000], 2.0 * values[1000:] - 1, values[1000:])
    assert found == pytest.approx(0.5, abs=0.05)


def test_noise_scores_about_nothing() -> None:
    found = scores(noise(8))
    for name in ("mig", "disentanglement", "completeness", "sap", "sap_correlation"):
        assert 0 <= found[name] < 0.03, name
    chance = np.mean([1 / size for size in SIZES])
    assert found["informativeness"] == pytest.approx(chance, abs=0.05)
    assert found["factor_vae"] == pytest.approx(1 / len(SIZES), abs=0.06)


def test_a_rotated_code_knows_as_much_and_keeps_it_apart_less() -> None:
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    found = scores(one_latent_each() @ turn)
    assert found["mig"] < 0.2
    assert found["disentanglement"] < 0.5
    assert found["completeness"] < 0.6
    assert found["sap"] < 0.15
    assert found["sap_correlation"] < 0.5


def test_disentangled_and_complete_are_two_things() -> None:
    """Two latents that hold the same factor are disentangled and not complete; one latent of two factors the other
    way round."""
    each, factors = one_latent_each(), shapes.factors().numpy()
    learn, check = np.random.default_rng(0).permutation(len(each))[:1000].reshape(2, 500)

    def dci(codes: np.ndarray) -> dict[str, float]:
        return factor_metrics.dci(codes[learn], factors[learn], codes[check], factors[check])

    copies = np.concatenate([each, each], axis=1) + 1e-3 * noise(10)  # which of two copies trees take is open
    found = dci(copies)
    assert found["disentanglement"] > 0.95
    assert factor_metrics.mig(copies, factors) < 0.1
    merged = np.stack([each[:, 0] + 10 * each[:, 1], *each.T[2:]], axis=1)
    found = dci(merged)
    assert found["completeness"] > 0.95
    assert found["disentanglement"] < found["completeness"] - 0.1


def test_a_latent_counts_whatever_its_scale_is() -> None:
    """From a standard deviation of 0.05 on. Variances are compared with the latent's own over all pictures."""
    codes = (one_latent_each() + 0.03 * noise(5)) * np.array([0.06, 0.1, 1.0, 10.0, 100.0])
    rng = np.random.default_rng(0)
    assert factor_metrics.factor_vae(codes, SIZES, votes=500, rng=rng) == 1
    assert factor_metrics.sap_correlation(codes, shapes.factors().numpy()) == pytest.approx(1, abs=0.01)


def test_information_is_in_units_of_the_factors_entropy() -> None:
    """Of a factor with values that are not alike often; a latent has 20 bins."""
    rng = np.random.default_rng(0)
    factor = np.minimum(rng.integers(10, size=(4000, 1)), 2)
    codes = np.concatenate([factor, rng.standard_normal((4000, 1))], axis=1)
    assert factor_metrics.mig(codes, factor) == pytest.approx(1, abs=0.02)
    fine = np.arange(4000)[:, None] % 40
    found = factor_metrics.mig(np.concatenate([fine, np.zeros_like(fine)], axis=1).astype(float), fine)
    assert found == pytest.approx(math.log(20) / math.log(40), abs=1e-9)


def test_sap_is_of_test_points_and_squared_correlations() -> None:
    rng = np.random.default_rng(0)
    values, other = rng.integers(2, size=(2, 2000, 2))
    codes = 2.0 * values - 1
    assert abs(factor_metrics.sap(codes, values, codes, other)) < 0.05  # nothing is right but by chance
    half = codes + rng.standard_normal(codes.shape)
    assert factor_metrics.sap_correlation(half, values) == pytest.approx(0.5, abs=0.04)


def test_importances_are_weighed_by_their_share() -> None:
    """Two latents of three in four and one in four of the whole; the second one is for both factors alike."""
    importances = np.array([[3.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    expected = 0.75 + 0.25 * (1 - math.log(2) / math.log(3))
    assert factor_metrics._one_each(importances) == pytest.approx(expected, abs=1e-6)


def test_a_collapsed_code_has_no_active_latent() -> None:
    rng = np.random.default_rng(0)
    assert factor_metrics.factor_vae(0.01 * noise(4), SIZES, votes=100, rng=rng) == 0
