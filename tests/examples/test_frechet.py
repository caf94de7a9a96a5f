"""The Fréchet distance against closed forms, scipy and a nuclear norm; its networks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
from common import metrics
from common.checkpoint import CheckpointError
from common.data import DataError, Images, Splits, load_labels
from common.metrics import features_of, frechet_distance, load_inception, small_classifier
from torch import Tensor, nn


def with_moments(mean: Tensor, root: Tensor, seed: int, count: int = 50) -> Tensor:
    """Features [count, F] of exactly this mean and the covariance root rootᵀ."""
    raw = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    white = torch.linalg.qr(raw - raw.mean(0)).Q * (count - 1) ** 0.5
    return mean + white @ root.T


def random(count: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    return torch.randn(count, features, dtype=torch.float64, generator=generator) @ mixing + seed


def test_closed_form_of_commuting_covariances() -> None:
    """‖Δμ‖² + Σ (s_a − s_b)² where the two share their axes."""
    axes = torch.linalg.qr(random(4, 4, 0)).Q
    a, b = torch.tensor([3.0, 1.0, 0.5, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5, 0.7]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    found = frechet_distance(with_moments(torch.zeros_like(shift), axes * a, 1), with_moments(shift, axes * b, 2))
    assert found == pytest.approx((shift.square().sum() + (a - b).square().sum()).item(), rel=1e-6)


def test_one_feature() -> None:
    a, b = random(30, 1, 1), random(40, 1, 2)
    assert frechet_distance(a, b) == pytest.approx(((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2).item())


def test_against_scipys_root() -> None:
    a, b = random(60, 7, 1), random(80, 7, 3)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features() -> None:
    """Tr (C_a C_b)^½ is the nuclear norm of A Bᵀ, centred and scaled, which takes no root."""
    a, b = random(6, 20, 1), random(9, 20, 2)
    centred_a, centred_b = (a - a.mean(0)) / 5**0.5, (b - b.mean(0)) / 8**0.5
    expected = (a.mean(0) - b.mean(0)).square().sum() + centred_a.square().sum() + centred_b.square().sum()
    expected -= 2 * torch.linalg.matrix_norm(centred_a @ centred_b.T, "nuc")
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_symmetric_zero_at_itself_and_in_fp64() -> None:
    a, b = random(60, 7, 1), random(80, 7, 3)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    far = 1e4  # in fp32 its square leaves nothing of the covariances
    assert frechet_distance((a + far).float(), (b + far).float()) == pytest.approx(frechet_distance(a, b), rel=1e-2)


def test_biased_upwards_the_fewer_images_there_are() -> None:
    many = random(4000, 10, 1)
    few, more, reference = many[:100], many[100:1100], many[2000:]
    assert frechet_distance(few, reference) > 3 * frechet_distance(more, reference) > 0


@pytest.mark.parametrize("shape", [(1, 5), (5,), (5, 2, 2)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features: expected"):
        frechet_distance(torch.zeros(shape), torch.zeros(4, 5))


def test_features_take_either_storage_clip_and_keep_the_order() -> None:
    images = torch.randint(0, 256, (250, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features_of(nn.Flatten(), images)
    torch.testing.assert_close(found, images.flatten(1) / 255)
    assert features_of(nn.Flatten(), images / 255 * 3 - 1).aminmax() == (0, 1)


def bars(count: int) -> tuple[Images, Splits]:
    """Noisy 8-bit images with a bright row at one of four heights, which is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randint(0, 100, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), 0, 2 * labels] += 100
    held_out = count // 10
    parts = [count - 2 * held_out, held_out, held_out]
    return Images(*images.split(parts)), Splits(*labels.split(parts))


def test_classifier_learns_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars(600)
    cache = tmp_path / "classifier.pt"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network, accuracy = small_classifier(images, labels, epochs=3, cache=cache, resume=False)
    assert torch.equal(torch.get_rng_state(), before)  # the models' seed is not touched
    assert accuracy > 0.9
    features = features_of(network.features, images.test)
    assert features.shape == (60, metrics.FEATURES)

    torch.manual_seed(6)
    other, _ = small_classifier(images, labels, epochs=3, cache=tmp_path / "other.pt", resume=False)
    assert torch.equal(features_of(other.features, images.test), features)  # nor does it matter

    monkeypatch.setattr(metrics, "_train", lambda *args: pytest.fail("it was trained again"))
    again, same = small_classifier(images, labels, epochs=3, cache=cache, resume=True)
    assert same == accuracy
    assert torch.equal(features_of(again.features, images.test), features)

    with pytest.raises(CheckpointError, match="classifier-epochs"):  # nor is another one's work overwritten
        small_classifier(images, labels, epochs=4, cache=cache, resume=True)


def test_labels_lie_beside_their_images() -> None:
    labels = load_labels("mnist")
    assert labels is not None
    assert [len(part) for part in (labels.train, labels.val, labels.test)] == [4000, 500, 500]
    assert torch.cat([labels.train, labels.val, labels.test]).bincount().tolist() == [500] * 10
    assert load_labels("somewhere.npz") is None


class Network(nn.Module):
    """Called as the FID network is."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        assert x.size(1) == 3
        if not return_features:
            return x.float().mean()
        return x.float().mean((2, 3))


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the file that people have is in it
        torch.jit.script(module).save(path)
    return path


def test_inception_is_called_as_its_file_wants(tmp_path: Path) -> None:
    network = load_inception(script(Network(), tmp_path / "network.pt"), (1, 5, 6))
    images = torch.randint(0, 256, (3, 1, 5, 6), dtype=torch.uint8)
    torch.testing.assert_close(features_of(network, images), images.float().mean((2, 3)).expand(-1, 3))


@pytest.mark.parametrize("what", ["missing", "torn", "another network", "no features"])
def test_an_unusable_inception_is_one_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    if what == "torn":
        path.write_bytes(b"torn")
    elif what == "another network":
        script(nn.Flatten(), path)
    elif what == "no features":
        script(NotFinite(), path)
    with pytest.raises(DataError, match="--inception") as caught:
        load_inception(path, (1, 8, 8))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class NotFinite(Network):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float().mean((2, 3)) / 0
