"""The Fréchet distance to the test images, in the features that there are for a data set."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from . import latents
from .data import Images, load_labels
from .metrics import Features, features_of, frechet_distance, small_classifier
from .training import EVAL_SEED

CLASSIFIER_EPOCHS = 6
SAMPLES = 2000  # of every set that is measured, for the distance depends on how many there are


class Ruler:
    """`ruler(images)` is the distance, or None where there are no features: neither `inception` nor labels.

    `cache` is where the small classifier is kept, which is trained on the labels of `data`.
    """

    def __init__(
        self, data: str, images: Images, *, cache: Path, resume: bool, inception: Features | None = None
    ) -> None:
        self.count, self.label, self.note = min(SAMPLES, len(images.train)), "Fréchet", "no features, so no distance"
        self.network = inception
        labels = load_labels(data)
        if inception is not None:
            self.label, self.note = "FID", "Inception features"
        elif labels is not None:
            network, accuracy = small_classifier(images, labels, epochs=CLASSIFIER_EPOCHS, cache=cache, resume=resume)
            self.network = network.features
            self.note = (
                f"features of a small classifier trained here (test accuracy {accuracy:.3f}), not FID: never to be "
                "compared with papers' FID"
            )
        if self.network is not None:
            self.note += f"; {self.count} images against {len(images.test)} test images"
            self.reference = features_of(self.network, images.test)

    def __call__(self, images: Tensor) -> float | None:
        if self.network is None:
            return None
        return frechet_distance(features_of(self.network, images[: self.count]), self.reference)


def from_prior(model: nn.Module, count: int) -> Tensor:
    """E[x|z] at z ~ N(0, I), the same z for every model of so many latents; clipped, on the CPU."""
    return latents.images_of(model, latents.prior(count, model.latent_dim, EVAL_SEED))
