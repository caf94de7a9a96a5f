"""The losses of examples/latent_autoencoder.py: what public trainers write in plain PyTorch is one call of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_examples import one_thread  # noqa: F401

# isort: split
import latent_autoencoder
from common.adversarial import adaptive_weight
from torch import Tensor, nn

PERCEPTUAL, BETA = 0.5, 1.5


def outputs(seed: int) -> tuple[Tensor, ...]:
    """What the networks give for a batch, in fp64, and the batch; logvar leaves its range on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    recon = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    mu, logvar = torch.randn(2, 4, 4, 2, 2, generator=generator, dtype=torch.float64)
    logvar[0, 0, 0], logvar[1, 0, 0] = -40, 25
    p = torch.rand(4, generator=generator, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (recon, mu, logvar, p)) + (x,)


def apply(loss: nn.Module, recon: Tensor, mu: Tensor, logvar: Tensor, p: Tensor, x: Tensor) -> Any:
    return loss(recon, x if loss.reads_bytes else x.double() / 127.5 - 1, mu, logvar, p)


def test_both_losses_are_one_function() -> None:
    ours, theirs = (latent_autoencoder.make_loss(kind, PERCEPTUAL, BETA).double() for kind in ("ours", "theirs"))
    for seed in range(3):  # the running scale, too, over three batches
        found = []
        for loss in (ours, theirs):
            *leaves, x = outputs(seed)
            elbo = apply(loss.train(), *leaves, x)
            found.append([*elbo, *torch.autograd.grad(elbo.loss, leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            evaluated = [apply(loss.eval(), *leaves, x) for loss in (ours, theirs)]
        for a, b in zip(*evaluated, strict=True):  # the average's momentum is a number of fp32 in one of them
            torch.testing.assert_close(a, b, rtol=1e-8, atol=0)
    assert found[0][6][0, 0, 0].eq(0).all()  # logvar below its range: no gradient


def test_a_learned_scale_rests_where_the_closed_form_is() -> None:
    *leaves, x = outputs(0)
    closed = apply(latent_autoencoder.make_loss("ours", PERCEPTUAL, BETA).double(), *leaves, x)
    learned = latent_autoencoder.make_loss("learned", PERCEPTUAL, BETA).double()
    learned.log_sigma.data.copy_(closed.sigma.log())
    elbo = apply(learned, *leaves, x)
    assert elbo.loss.item() == pytest.approx(closed.loss.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(elbo.loss, learned.log_sigma)
    assert abs(gradient.item()) < 1e-9 * elbo.distortion.item()


def test_the_adaptive_weight_is_that_of_either_loss() -> None:
    """Distortion A/b + …, whose gradient at recon is sign(e)/(B b): so at W = Σ_n ∂recon_n/∂W, in closed form."""
    recon, mu, logvar, p, x = outputs(0)
    last = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    decoded = last * recon.detach()
    adversarial = 7 * last.sum()
    for kind in ("ours", "theirs"):
        elbo = apply(latent_autoencoder.make_loss(kind, PERCEPTUAL, BETA).double(), decoded, mu, logvar, p, x)
        error = decoded - (x.double() / 127.5 - 1)
        scale = error.abs().mean() + PERCEPTUAL * p.mean()
        of_distortion = (error.sign() * recon).sum((0, 2, 3)) / (4 * scale)
        ratio = of_distortion.norm() / (7 * 3**0.5 + 1e-4)
        found = adaptive_weight(elbo.distortion, adversarial, last)
        torch.testing.assert_close(found, ratio.detach(), rtol=1e-10, atol=0)
        assert not found.requires_grad
        assert elbo.sigma.item() == pytest.approx(scale.item(), rel=1e-12)
