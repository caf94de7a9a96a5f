"""Lightning's Trainer around train_vae's model: mixed precision, accumulation, validation, manual optimisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_hosts import assert_close, assert_falls, blobs, by_hand, gradients
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="needs lightning: pip install fused-elbo[hosts]")

# isort: split
import lightning
from common.models import VAEOutput
from common.objective import make_objective

from fused_elbo import ELBO, decoupled_elbo_backward

SHAPE, BETA = (1, 16, 16), 2.0
# A bf16 gradient of a weight is rounded once for each micro-batch: 2⁻⁹, and more where the micro-batches' cancel.
PRECISIONS = pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-2)])


class TrainVAE(lightning.LightningModule):
    """examples/train_vae.py's objective, and what a test wants to see of its steps."""

    def __init__(self, sigma: str, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.objective = make_objective(SHAPE, sigma, BETA, latent_dim=16, width=8)
        self.lr = lr
        self.outputs: list[tuple[Tensor, VAEOutput]] = []
        self.elbos: list[ELBO] = []
        self.grads: list[dict[str, Tensor]] = []
        self.objective.model.register_forward_hook(lambda _, args, out: self.outputs.append((args[0], out)))

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1)  # z's noise is then the same for one batch as for its micro-batches one after another

    def training_step(self, x: Tensor, index: int) -> Tensor:
        elbo = self.objective(x)
        self.elbos.append(elbo)
        return elbo.loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append(gradients(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Validated(TrainVAE):
    def __init__(self, sigma: str, lr: float) -> None:
        super().__init__(sigma, lr)
        self.validated: list[float] = []

    def validation_step(self, x: Tensor, index: int) -> None:
        self.validated.append(self.objective(x).loss.item())


class InOneCall(TrainVAE):
    """The loss and its gradients by decoupled_elbo_backward, which wants manual optimisation."""

    def __init__(self, sigma: str, lr: float) -> None:
        super().__init__(sigma, lr)
        self.automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        out = self.objective.model(x)
        optimizer.zero_grad()
        self.elbos.append(decoupled_elbo_backward(out.recon, x, out.mu, out.logvar, beta=BETA))
        optimizer.step()


def fit(module: TrainVAE, images: Tensor, batch: int, validate: Tensor | None = None, **options: Any) -> TrainVAE:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(images, batch), None if validate is None else DataLoader(validate, len(validate)))
    return module


@pytest.mark.parametrize("sigma", ["0.3", "learned"])
@PRECISIONS
def test_accumulation_is_the_large_batch(sigma: str, precision: Any, tolerance: float) -> None:
    images = blobs(32, *SHAPE[::2])
    (whole,) = fit(TrainVAE(sigma, 1e-3), images, 32, max_epochs=1, precision=precision).grads
    parts = fit(TrainVAE(sigma, 1e-3), images, 8, max_epochs=1, precision=precision, accumulate_grad_batches=4)
    assert len(parts.elbos) == 4
    (accumulated,) = parts.grads
    assert ("objective.criterion.log_sigma" in accumulated) == (sigma == "learned")
    assert_close(accumulated, whole, tolerance)


@PRECISIONS
def test_loss_and_dtypes(precision: Any, tolerance: float) -> None:
    """Under autocast the model's outputs are bf16, the loss is fp32 and is exact for them; weights stay fp32."""
    module = fit(TrainVAE("learned", 0.0), blobs(32, *SHAPE[::2]), 8, max_epochs=1, precision=precision)
    expected_dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    log_sigma = module.objective.criterion.get_parameter("log_sigma").detach().double()
    assert len(module.outputs) == len(module.elbos) == 4
    for (x, out), elbo in zip(module.outputs, module.elbos, strict=True):
        assert {t.dtype for t in (out.recon, out.mu, out.logvar)} == {expected_dtype}
        assert {t.dtype for t in elbo} == {torch.float32}
        wide = [t.detach().double() for t in (out.recon, x, out.mu, out.logvar)]
        assert elbo.loss.item() == pytest.approx(by_hand(*wide, log_sigma, BETA).item(), rel=1e-6)
    assert {g.dtype for grads in module.grads for g in grads.values()} == {torch.float32}


@PRECISIONS
def test_loss_falls_and_validation_has_the_running_sigma(precision: Any, tolerance: float) -> None:
    images = blobs(80, *SHAPE[::2])
    module = Validated("optimal", 3e-3)
    fit(module, images[:64], 32, validate=images[64:], max_epochs=12, precision=precision)
    assert_falls(elbo.loss.item() for elbo in module.elbos)
    assert len(module.validated) == 12
    assert module.validated[-1] < module.validated[0]
    (x, out), running = module.outputs[-1], module.objective.criterion.get_buffer("running_var")
    wide = [t.detach().double() for t in (out.recon, x, out.mu, out.logvar)]
    assert module.validated[-1] == pytest.approx(by_hand(*wide, running.double().log() / 2, BETA).item(), rel=1e-6)


@PRECISIONS
def test_one_call_in_manual_optimisation(precision: Any, tolerance: float) -> None:
    images = blobs(32, *SHAPE[::2])
    automatic, manual = (
        fit(kind("optimal", 1e-3), images, 8, max_epochs=1, precision=precision) for kind in (TrainVAE, InOneCall)
    )
    of_losses = [[elbo.loss.item() for elbo in module.elbos] for module in (manual, automatic)]
    assert of_losses[0] == pytest.approx(of_losses[1], rel=tolerance / 100)
    assert_close(manual.grads[0], automatic.grads[0], tolerance / 10)
