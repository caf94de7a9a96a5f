"""pythae's BetaVAE with its loss replaced, in pythae's own trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_hosts import assert_close, assert_falls, blobs, gradients
from torch import Tensor

pytest.importorskip("pythae", reason="needs pythae: pip install fused-elbo[hosts]")

# isort: split
from pythae.data.datasets import BaseDataset
from pythae.models import BetaVAE, BetaVAEConfig
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from recipes import squared_error

from fused_elbo import decoupled_elbo

CONFIG = {"input_dim": (1, 8, 8), "latent_dim": 4, "beta": 2.0}


class ByRecipe(BetaVAE):
    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
        elbo = squared_error.pythae(recon_x, x, mu, log_var, beta=self.beta)
        return elbo.loss, elbo.distortion, elbo.rate


class Decoupled(BetaVAE):
    """With the batch's optimal σ, which BetaVAE has not."""

    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
        elbo = decoupled_elbo(recon_x, x, mu, log_var, beta=1.0)
        return elbo.loss, elbo.distortion, elbo.rate


class Losses(TrainingCallback):
    def __init__(self) -> None:
        self.of_epochs: list[float] = []

    def on_log(self, training_config: Any, logs: dict[str, float], **_: Any) -> None:
        self.of_epochs.append(logs["train_epoch_loss"])


def model(kind: type[BetaVAE]) -> BetaVAE:
    torch.manual_seed(0)
    return kind(BetaVAEConfig(**CONFIG))


def train(kind: type[BetaVAE], folder: Path, epochs: int) -> list[float]:
    torch.manual_seed(0)
    images = blobs(96, 1, 8)
    settings = BaseTrainerConfig(
        output_dir=str(folder), num_epochs=epochs, per_device_train_batch_size=32, learning_rate=2e-3, no_cuda=True
    )
    losses = Losses()
    data = BaseDataset(images, torch.zeros(len(images)))
    BaseTrainer(model(kind), data, training_config=settings, callbacks=[losses]).train()
    return losses.of_epochs


def test_loss_and_gradients_are_betavaes() -> None:
    x = {"data": blobs(8, 1, 8).double()}
    outputs, grads = [], []
    for kind in (ByRecipe, BetaVAE):
        vae = model(kind).double()
        torch.manual_seed(1)  # of z
        out = vae(x)
        out.loss.backward()
        outputs.append([out[key].item() for key in ("loss", "recon_loss", "reg_loss")])
        grads.append(gradients(vae))
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-10)
    assert len(grads[0]) == len(list(model(BetaVAE).parameters()))
    assert_close(*grads, 1e-9)


def test_trains_as_betavae(tmp_path: Path) -> None:
    """Six steps of fp32 part two runs by its rounding alone."""
    assert train(ByRecipe, tmp_path / "ours", 2) == pytest.approx(train(BetaVAE, tmp_path / "theirs", 2), rel=1e-4)


def test_optimal_sigma_trains(tmp_path: Path) -> None:
    losses = train(Decoupled, tmp_path, 20)
    assert_falls(losses)
    assert losses[-1] < 64 * (math.log(2 * math.pi) / 2 + math.log(0.2) + 0.5)  # as if σ were 0.2, without any rate
