"""diffusers' AutoencoderKL, trained by two of the recipes on its posterior's mean and logvar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_hosts import assert_close, assert_falls, blobs, gradients
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("diffusers", reason="needs diffusers: pip install fused-elbo[hosts]")

# isort: split
import diffusers
from recipes import latent_diffusion as recipes

B, SIDE = 4, 16
D = 3 * SIDE * SIDE
SQUARED, ABSOLUTE = "diffusers", "latent_diffusion"
MORE = {SQUARED: D * math.log(math.pi) / 2, ABSOLUTE: 0.0}  # what the recipe's value is more than the trainer's
each_recipe = pytest.mark.parametrize("recipe", [SQUARED, ABSOLUTE])


def autoencoder() -> Any:
    """As Stable Diffusion's, with two levels and few channels; random weights."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, sample_size=SIDE,
    )  # fmt: skip


class Perceptual(nn.Module):
    """In LPIPS' place: the distance of two images, (B, 1, 1, 1), between what a fixed network makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        return ((self.features(recon) - self.features(x)) ** 2).mean((1, 2, 3), keepdim=True)


def reconstruct(vae: Any, x: Tensor) -> tuple[Tensor, Any]:
    torch.manual_seed(1)  # of the sampled latent
    posterior = vae.encode(x).latent_dist
    return vae.decode(posterior.sample()).sample, posterior


def ours(recipe: str, recon: Tensor, x: Tensor, posterior: Any, perceptual: nn.Module) -> tuple[Tensor, Tensor]:
    """Loss and distortion."""
    lpips = [] if recipe == SQUARED else [perceptual(recon, x).flatten()]
    elbo = getattr(recipes, recipe)(recon, x, posterior.mean, posterior.logvar, *lpips)
    return elbo.loss, elbo.distortion


def theirs(recipe: str, recon: Tensor, x: Tensor, posterior: Any, perceptual: nn.Module) -> tuple[Tensor, Tensor]:
    """The trainers' lines; the rate is diffusers' own."""
    if recipe == SQUARED:
        error = F.mse_loss(recon, x, reduction="none")
    else:
        error = (recon - x).abs() + perceptual(recon, x)
    distortion = error.sum() / len(x)
    return distortion + 1e-6 * posterior.kl().sum() / len(x), distortion


@each_recipe
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_loss_and_gradients_are_the_trainers(recipe: str, layout: torch.memory_format) -> None:
    x, perceptual = 2 * blobs(B, 3, SIDE).double() - 1, Perceptual().double()
    values, grads = [], []
    for loss_of in (ours, theirs):
        vae = autoencoder().double().to(memory_format=layout)
        recon, posterior = reconstruct(vae, x)
        assert recon.is_contiguous(memory_format=layout)
        loss, distortion = loss_of(recipe, recon, x, posterior, perceptual)
        g_loss = -recon.mean()  # in the place of a discriminator's answer
        total = loss + recipes.adversarial(distortion, g_loss, vae.decoder.conv_out.weight)
        total.backward()
        values.append(total.item())
        grads.append(gradients(vae))
    assert values[0] - MORE[recipe] == pytest.approx(values[1], rel=1e-10)
    assert len(grads[0]) == len(list(autoencoder().parameters()))
    assert_close(grads[0], grads[1], 1e-9)


@each_recipe
def test_trains_as_with_the_trainers_loss(recipe: str) -> None:
    """In fp64, where rounding does not part two runs."""
    x, perceptual = 2 * blobs(B, 3, SIDE).double() - 1, Perceptual().double()
    losses = [train(autoencoder().double(), 4, x, loss_of, recipe, perceptual) for loss_of in (ours, theirs)]
    assert [value - MORE[recipe] for value in losses[0]] == pytest.approx(losses[1], rel=1e-7)


@each_recipe
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
def test_loss_falls(recipe: str, bf16: bool) -> None:
    x = 2 * blobs(B, 3, SIDE) - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert_falls(train(autoencoder(), 20, x, ours, recipe, Perceptual()))


def train(
    vae: Any, steps: int, x: Tensor, loss_of: Callable[..., Any], recipe: str, perceptual: nn.Module
) -> list[float]:
    optimiser = torch.optim.Adam(vae.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        recon, posterior = reconstruct(vae, x)
        loss = loss_of(recipe, recon, x, posterior, perceptual)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@each_recipe
def test_under_autocast_sums_are_fp32(recipe: str) -> None:
    """The loss of bf16 tensors, as the autoencoder makes them, is the one in fp64 up to the rounding of fp32."""
    x, lpips = 2 * blobs(B, 3, SIDE) - 1, torch.rand(B, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        recon, posterior = reconstruct(autoencoder(), x)
    moments = posterior.parameters
    assert {t.dtype for t in (recon, moments, posterior.mean, posterior.logvar)} == {torch.bfloat16}

    results = []
    for loss_of, dtype in ((ours, torch.bfloat16), (theirs, torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (recon, moments)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = loss_of(recipe, leaves[0], x, type(posterior)(leaves[1]), lambda *_: lpips)
        results.append((loss, torch.autograd.grad(loss, leaves)))
    (loss, grads), (expected, expected_grads) = results
    assert loss.dtype == torch.float32
    assert loss.item() - MORE[recipe] == pytest.approx(expected.item(), rel=1e-6)
    for grad, of_theirs in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), of_theirs, rtol=2**-8, atol=0)  # rounded once
