"""The Laplace likelihood, weights of elements, what is added to their error, activations, targets of bytes, and limits
of the rate: what must hold of each, on every backend. Values and gradients of all modes are test_elbo.py's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_elbo import Capacity, FreeNats, decoder_nll, decoupled_elbo, gaussian_kl, gaussian_nll

pytestmark = pytest.mark.usefixtures("backend")


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.rand(4, 3, 8, 8, dtype=dtype)
    return (target + 0.3 * torch.randn_like(target)).requires_grad_(), target


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), of)[0]


# ------------------------------------------------------------------------------------------------------------- Laplace


def test_the_optimal_scale_is_the_mean_absolute_error() -> None:
    recon, target = data(torch.float64)
    elbo = decoupled_elbo(recon, target, torch.zeros(4, 2), torch.zeros(4, 2), likelihood="laplace")
    torch.testing.assert_close(elbo.sigma, (recon - target).abs().mean())
    nats = [decoder_nll(recon, target, likelihood="laplace", sigma=k * elbo.sigma.item()) for k in (0.9, 1.0, 1.1)]  # type: ignore[union-attr]
    torch.testing.assert_close(nats[1], elbo.distortion)
    assert nats[1] < min(nats[0], nats[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_pixels_are_not_pushed(dtype: torch.dtype) -> None:
    """PyTorch's and ours alike: the sign of 0 is 0, −0 included."""
    target = torch.randn(2, 33).to(dtype)
    recon = target.clone().requires_grad_()
    with torch.no_grad():
        recon[0, 3] += 1
        recon[1, :2], target[1, :2] = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
    pushed = gradient(decoder_nll(recon, target, likelihood="laplace", sigma=1.0, reduction="sum"), recon)
    assert pushed[0, 3] == 1
    assert pushed.abs().sum() == 1


@pytest.mark.parametrize("sigma", [0.5, "optimal-per-image"])
def test_a_diverged_pixel_shows_in_its_gradient(sigma: float | str) -> None:
    recon, target = data()
    with torch.no_grad():
        recon[1, 0, 0, 0] = float("nan")
    g = gradient(decoder_nll(recon, target, likelihood="laplace", sigma=sigma, reduction="none"), recon)
    assert g[1, 0, 0, 0].isnan()
    assert g[[0, 2, 3]].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize("sigma", ["optimal", "optimal-per-image", 0.5])
def test_a_mask_is_the_loss_of_what_it_selects(likelihood: str, sigma: str | float) -> None:
    """Padding, NaN included, might as well not be there."""
    recon, target = data()
    mask = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    mask[..., :5] = True
    padded, of_padding = recon.detach().clone(), target.clone()
    padded[..., 5:] = float("nan")
    of_padding[..., 6:] = float("inf")
    padded.requires_grad_()
    options = {"likelihood": likelihood, "sigma": sigma, "reduction": "mean"}
    masked = decoder_nll(padded, of_padding, weight=mask, **options)  # type: ignore[arg-type]
    cut = decoder_nll(recon[..., :5], target[..., :5], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(masked, cut)
    found, true = gradient(masked, padded), gradient(cut, recon)
    torch.testing.assert_close(found, true)
    assert (found[..., 5:] == 0).all()


def test_nothing_to_reconstruct_costs_nothing() -> None:
    recon, target = data()
    mask = torch.ones(4, 3, 8, 8, dtype=torch.bool)
    mask[2] = False
    for options in ({}, {"sigma": "optimal-per-image"}, {"log_sigma": torch.zeros(4, 3, 8, 8)}):
        nats = decoder_nll(recon, target, weight=mask, reduction="none", **options)  # type: ignore[arg-type]
        assert nats[2] == 0
        assert (gradient(nats, recon)[2] == 0).all()
        for reduction in ("batchmean", "mean"):
            none = decoder_nll(recon, target, weight=torch.zeros_like(mask), reduction=reduction, **options)  # type: ignore[arg-type]
            assert none == 0
            assert (gradient(none, recon) == 0).all()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1), (3, 1, 1), (4, 1, 1, 1), (4, 3, 1, 8), (1, 1, 1, 1)], ids=str)
def test_weights_broadcast_as_pytorch_has_it(shape: tuple[int, ...]) -> None:
    recon, target = data(torch.float64)
    weight = torch.rand(shape, dtype=torch.float64) + 0.1
    full = weight.expand(recon.shape).contiguous()
    found, true = (decoder_nll(recon, target, weight=w, reduction="none") for w in (weight, full))
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradient(found, recon), gradient(true, recon))


def test_all_weights_alike_are_none_at_all() -> None:
    recon, target = data(torch.float64)
    for weight in (torch.ones(1, dtype=torch.bool), torch.ones(4, 3, 8, 8), torch.full((), 1.0, dtype=torch.float16)):
        torch.testing.assert_close(decoder_nll(recon, target, weight=weight), decoder_nll(recon, target))


# ------------------------------------------------------------------------------------------------- what is added to A


def test_an_extra_error_is_inside_the_scale() -> None:
    """As one more pixel whose error it is, but for the count; so its optimum is that of both."""
    recon, target = data(torch.float64)
    extra = torch.rand(4, dtype=torch.float64).requires_grad_()
    elbo = decoupled_elbo(recon, target, torch.zeros(4, 2), torch.zeros(4, 2), extra_error=extra, likelihood="laplace")
    with torch.no_grad():
        scale = ((recon - target).abs().sum() + extra.sum()) / recon.numel()
    torch.testing.assert_close(elbo.sigma, scale)
    torch.testing.assert_close(gradient(elbo.distortion, extra), (1 / (4 * scale)).expand(4))


# ------------------------------------------------------------------------------------------- activations, and bytes


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saturated_pixels_have_a_gradient_of_0(activation: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 88.0, -88.0, 89.0, -104.0, 1e4, -1e4, math.inf, -math.inf])
    y = ends.to(dtype).repeat(2, 3).requires_grad_()
    target = torch.zeros_like(y).detach()
    x = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[activation](y.detach().double())
    nats = decoder_nll(y, target, activation=activation, sigma=1.0, constant=False, reduction="sum")
    torch.testing.assert_close(nats.double(), (x * x).sum() / 2, rtol=1e-6, atol=0)
    g, slope = gradient(nats, y), x * (1 - x) if activation == "sigmoid" else 1 - x * x
    torch.testing.assert_close(g.double(), x * slope, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=2e-6)
    assert (g[y.detach().abs() > 200] == 0).all()


def test_nan_passes_an_activation() -> None:
    y = torch.randn(2, 40)
    y[0, 5] = float("nan")
    y.requires_grad_()
    nats = decoder_nll(y, torch.zeros(2, 40), activation="tanh", sigma=1.0, reduction="none")
    assert nats[0].isnan()
    assert nats[1].isfinite()
    assert gradient(nats, y).isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-7.0, -3.0)])
def test_bytes_stand_for_numbers_of_a_range(dtype: torch.dtype, low: float, high: float) -> None:
    target = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    recon = torch.randn(2, 128).to(dtype)
    as_numbers = low + (high - low) * target.double() / 255
    for options in ({"sigma": 1.0}, {}, {"likelihood": "laplace", "sigma": "optimal-per-image"}):
        found = decoder_nll(recon, target, target_range=(low, high), **options)  # type: ignore[arg-type]
        true = decoder_nll(recon.double(), as_numbers, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), true, rtol=2e-6, atol=0)


def test_a_range_is_for_bytes_alone() -> None:
    recon, target = data()
    assert gaussian_nll(recon, target, target_range=(-1, 1)) == gaussian_nll(recon, target)


# ---------------------------------------------------------------------------------------------------------- constants


def test_without_constants_it_is_pytorchs_loss() -> None:
    recon, target = data(torch.float64)
    var = torch.full_like(target, 0.25)
    for constant in (False, True):
        ours = gaussian_nll(recon, target, sigma=0.5, constant=constant, reduction="mean")
        torch.testing.assert_close(ours, F.gaussian_nll_loss(recon, target, var, full=constant))
    laplace = decoder_nll(recon, target, likelihood="laplace", sigma=1.0, constant=False, reduction="mean")
    torch.testing.assert_close(laplace, F.l1_loss(recon, target))


# ------------------------------------------------------------------------------------------------------------ the rate


def test_logvar_is_clamped_as_pytorch_clamps() -> None:
    mu, logvar = torch.randn(3, 50), 20 * torch.randn(3, 50)
    logvar[0, :3] = torch.tensor([-30.0, 20.0, float("nan")])
    logvar.requires_grad_()
    found = gaussian_kl(mu, logvar, logvar_range=(-30, 20), reduction="none")
    true = gaussian_kl(mu, logvar.clamp(-30, 20), reduction="none")
    torch.testing.assert_close(found, true, equal_nan=True)
    g, of_clamp = gradient(found, logvar), gradient(true, logvar)
    assert g[0, 2].isnan()  # and PyTorch has 0 there
    g[0, 2] = of_clamp[0, 2] = 0
    torch.testing.assert_close(g, of_clamp)


def test_the_maximum_of_the_mean_is_not_the_mean_of_maxima() -> None:
    mu = torch.tensor([[1.0], [3.0]], requires_grad=True)  # rates of ½ and 4½
    logvar = torch.zeros(2, 1)
    each, of_mean = (gaussian_kl(mu, logvar, limit=FreeNats(3.0, per=per)) for per in ("sample", "batch"))
    assert each.item() == pytest.approx(3.75)
    assert of_mean.item() == pytest.approx(3.0)
    assert gradient(each, mu).flatten().tolist() == [0.0, 1.5]
    assert gradient(of_mean, mu).flatten().tolist() == [0.0, 0.0]


def test_a_rate_of_just_the_free_nats_has_a_gradient() -> None:
    """As `clamp` has it; `maximum` would halve it."""
    mu = torch.tensor([[1.0]], requires_grad=True)
    for per in ("sample", "batch"):
        assert gradient(gaussian_kl(mu, torch.zeros(1, 1), limit=FreeNats(0.5, per=per)), mu).item() == 1.0


def test_a_capacity_is_of_the_batch_or_of_each_sample() -> None:
    mu = torch.tensor([[1.0], [3.0]], requires_grad=True)
    logvar = torch.zeros(2, 1)
    of_batch = gaussian_kl(mu, logvar, limit=Capacity(2.5))
    of_each = gaussian_kl(mu, logvar, limit=Capacity(torch.tensor(2.5), per="sample"), reduction="none")
    assert of_batch.item() == 0.0
    assert of_each.tolist() == [2.0, 2.0]
    assert gradient(of_each, mu).flatten().tolist() == [-1.0, 3.0]
    x = torch.rand(2, 6)
    same = [decoupled_elbo(x, x, mu, logvar, **o).loss for o in ({"capacity": 1.0}, {"limit": Capacity(1.0)})]  # type: ignore[arg-type]
    assert same[0] == same[1]


def test_the_rate_that_is_reported_has_no_limit() -> None:
    recon, target = data()
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    plain = decoupled_elbo(recon, target, mu, logvar).rate
    for limit in (FreeNats(100.0), FreeNats(100.0, per="batch"), Capacity(3.0), Capacity(3.0, per="sample")):
        assert decoupled_elbo(recon, target, mu, logvar, limit=limit).rate == plain
