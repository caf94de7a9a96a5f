"""The Fréchet distance between two sets of images, in the features of any network.

FID is that distance in the features of one network, Inception v3 trained on ImageNet, whose weights are no part of this
repository: `load_inception` reads the file of a user who has them. Without it `small_classifier` trains a network on
the data's own labels. Its distances rank models beside each other and are no FID: they must not be compared with one.

The distance is biased upwards, the more the fewer images there are (arXiv:1801.01401): compare only equal numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from .data import DataError, Images, Splits, to_unit

FEATURES = 64  # of the small classifier: far fewer than the images, so that their covariance has full rank
CHUNK = 100  # images at a time

Features = Callable[[Tensor], Tensor]  # [N, C, H, W] in [0, 1] -> [N, F]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + Tr(C_a + C_b − 2 (C_a C_b)^½) of two sets of features, [N, F] and [M, F], in fp64.

    C_a C_b has the eigenvalues of C_a^½ C_b C_a^½, which is symmetric: the trace of its root needs no root of a matrix
    that is not, and rank-deficient covariances (fewer images than features) do no harm.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: expected [N, F] with N of 2 or more, got {tuple(features.shape)}")
    features = features.double()
    return features.mean(0), torch.atleast_2d(features.T.cov())


@torch.no_grad()
def features_of(network: Features, images: Tensor) -> Tensor:
    """The features of images of either storage, clipped to [0, 1]: [N, F] on the CPU."""
    return torch.cat([network(to_unit(chunk).clamp(0, 1)).flatten(1).cpu() for chunk in images.split(CHUNK)])


class Inception(nn.Module):
    """The network in TorchScript that StyleGAN2-ADA and its successors measure FID with (inception-2015-12-05.pt).

    Its forward takes 8-bit RGB of any size, which it resizes itself, and `return_features=True`.
    """

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 255).round().to(torch.uint8).expand(-1, 3, -1, -1), return_features=True)


def load_inception(path: Path, shape: tuple[int, int, int]) -> Inception:
    """Tried on one black image, so that a wrong file is refused before any training."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what the file is in
            network = Inception(torch.jit.load(path, map_location="cpu").eval())
        found = features_of(network, torch.zeros(1, *shape))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"--inception {path}: not a usable TorchScript network ({reason})") from error
    if found.dim() != 2 or not found.isfinite().all():
        raise DataError(f"--inception {path}: its features have shape {tuple(found.shape)} or are not finite")
    return network


class Classifier(nn.Module):
    """A small convolutional network; `features` is its last hidden layer."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        height, width = (-(-n // 4) for n in shape[1:])
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * height * width, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def small_classifier(
    images: Images, labels: Splits, *, epochs: int, cache: Path, resume: bool
) -> tuple[Classifier, float]:
    """Trained on the training split, in evaluation mode, and its accuracy on the test split.

    Kept in `cache`, where --resume finds it. Its seed is fixed: models of all seeds are measured by one ruler.
    """
    settings = {"classifier_epochs": epochs, "data_shape": [len(images.train), *images.shape]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(images.shape, int(labels.train.max()) + 1)
        if resume and cache.exists():
            saved = load_checkpoint(cache)
            check_same_settings(saved["settings"], settings)
            network.load_state_dict(saved["network"])
        else:
            _train(network, to_unit(images.train), labels.train, epochs)
            save_checkpoint(cache, {"settings": settings, "network": network.state_dict()})
    network.eval()
    with torch.no_grad():
        right = network(to_unit(images.test)).argmax(1) == labels.test
    return network, right.float().mean().item()


def _train(network: Classifier, x: Tensor, labels: Tensor, epochs: int) -> None:
    batch = min(64, len(x))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in tqdm(range(epochs), desc="classifier for the Fréchet distance", unit="epoch"):
        for index in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), labels[index]).backward()
            optimizer.step()
