"""The public functions: validate, then call. No maths here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, checks
from . import sigma as modes
from .reference import compute_dtype
from .sigma import Constant, Kind, Optimal


class ELBO(NamedTuple):
    """What `decoupled_elbo` returns. `loss`, `distortion` and `rate` are differentiable, together and apart."""

    loss: Tensor  #: distortion + β·rate: what to minimise
    distortion: Tensor  #: −log p(x|z), in nats
    rate: Tensor  #: KL(q(z|x) ‖ p(z)), in nats, before β, free bits and capacity
    sigma: Tensor | None  #: the decoder's standard deviation, detached: (), (B,), or None if it varies inside a sample


def decoupled_elbo(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    beta: float | Tensor = 1.0,
    sigma: str | float | Constant | Optimal = "optimal",
    log_sigma: Tensor | None = None,
    min_log_sigma: float = -7.0,
    prior: tuple[Tensor, Tensor] | None = None,
    free_bits: float = 0.0,
    capacity: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> ELBO:
    """The negative ELBO of a Gaussian VAE, with the decoder's σ and the weight β apart.

    For sample i with D data dimensions, e = recon − target and l = logvar::

        distortion_i = Σ_d [ e_id² / (2σ²) + ½ log(2πσ²) ]            −log p(x_i|z_i), in nats
        rate_i       = ½ Σ_k [ μ_ik² + exp(l_ik) − 1 − l_ik ]         KL(q(z|x_i) ‖ N(0, I)), in nats
        loss         = distortion + β · rate

    Args:
        recon: the decoder's mean, (B, *data), any shape after the batch.
        target: the data, of recon's shape. May require a gradient.
        mu: the posterior's mean, (B, *latent), any shape after the batch.
        logvar: log σ_z², of mu's shape.
        beta: weight of the rate: a number, a 0-d tensor, or (B,), one per sample. A tensor β gets a gradient.
        sigma: where the decoder's σ comes from: "optimal" (σ² = MSE of the batch, in closed form), "optimal-per-image"
            (of each sample), a number (a constant standard deviation), or a mode from `fused_elbo.sigma`.
        log_sigma: a learned log σ, which takes the place of `sigma`: (), (1,) shared; (B,) per image; any other shape
            broadcasts against recon from the right: (C, 1, 1) per channel, (1, D) per feature, recon.shape per pixel.
        min_log_sigma: floor of log σ in the optimal modes, within ±40. The default −7 lies just below the quantisation
            noise of 8-bit data in [0, 1], log(1/(255·√12)) = −6.8. Has no part in a constant or learned σ.
        prior: (mu_p, logvar_p), a Gaussian prior in place of N(0, I); each broadcasts to mu's shape. Keep logvar_p, as
            any learned log σ, within fp32's reach: exp(−logvar_p) overflows below −88.
        free_bits: nats below which a latent element costs no less: the loss has Σ_k max(KL_ik, free_bits).
        capacity: C, in nats per sample: the loss has β·|mean_i KL_i − C| in place of β·KL, KL_i being what free_bits
            make of it. A number or a 0-d tensor (without gradient). Needs a scalar reduction and a scalar β.
        reduction: "batchmean" (nats per sample), "sum", "mean" (nats per data dimension: all three are divided by D)
            or "none" ((B,) tensors).

    Returns:
        ELBO(loss, distortion, rate, sigma). fp32, or fp64 if any of the four inputs or the prior is fp64; sums are
        accumulated so whatever the inputs' dtypes (fp64, fp32, bf16 and fp16, mixed as you like). `rate` is the plain
        KL, before β, free_bits and capacity, so that rate–distortion plots stay true.

    Raises:
        TypeError, ValueError: before any work, naming the argument and showing what was passed. Values inside tensors
            are not looked at: NaN goes in, NaN comes out.

    A second derivative goes through plain PyTorch and is not available inside torch.compile; there is no forward-mode
    derivative. "optimal" looks at the target: for test-time likelihoods use a σ from training
    (`fused_elbo.DecoupledELBO(momentum=…)`), and note that with "optimal-per-image" the distortion is no valid bound.

    Source: Rybkin, Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021, for
    the optimal σ; arXiv 2409.09361 (Beta-Sigma VAE) for β beside it.

    >>> x, recon = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.1)
    >>> mu, logvar = torch.ones(2, 4), torch.zeros(2, 4)
    >>> elbo = decoupled_elbo(recon, x, mu, logvar, beta=4.0)
    >>> round(elbo.rate.item(), 3), round(elbo.sigma.item(), 3)
    (2.0, 0.1)
    >>> torch.allclose(elbo.loss, elbo.distortion + 4.0 * elbo.rate)
    True
    """
    checks.pair("recon", recon, "target", target)
    checks.pair("mu", mu, "logvar", logvar)
    checks.same_batch(recon, mu)
    checks.weight(beta, mu.shape[0], recon)
    if capacity is not None:
        checks.capacity(capacity, beta, reduction, recon)
    return _call(
        (recon, target, *_latents(mu, logvar, prior)),
        beta=beta,
        sigma=_sigma_arguments((recon, target, mu, logvar), sigma, log_sigma, min_log_sigma),
        free_bits=free_bits,
        capacity=capacity,
        reduction=reduction,
    )


def gaussian_nll(
    recon: Tensor,
    target: Tensor,
    *,
    sigma: str | float | Constant | Optimal = "optimal",
    log_sigma: Tensor | None = None,
    min_log_sigma: float = -7.0,
    reduction: str = "batchmean",
) -> Tensor:
    """The distortion alone: Σ_d [e²/(2σ²) + ½ log(2πσ²)], −log N(target | recon, σ²) in nats.

    Arguments, dtypes and errors as in `decoupled_elbo`; "mean" divides by D. With a scalar reduction the result is a
    0-d tensor, with "none" it is (B,).

    >>> x = torch.zeros(4, 10)
    >>> nll = gaussian_nll(x + 1.0, x, sigma=1.0)
    >>> torch.allclose(nll, -torch.distributions.Normal(x + 1.0, 1.0).log_prob(x).sum() / 4)
    True
    """
    checks.pair("recon", recon, "target", target)
    arguments = _sigma_arguments((recon, target), sigma, log_sigma, min_log_sigma)
    return _call((recon, target, None, None, None, None), sigma=arguments, reduction=reduction).distortion


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    free_bits: float = 0.0,
    reduction: str = "batchmean",
) -> Tensor:
    """The rate alone: KL(N(μ, exp l) ‖ N(μ_p, exp l_p)) in nats, against N(0, I) if no prior is given.

    ½ Σ_k [ (μ − μ_p)²/exp(l_p) + exp(l − l_p) − 1 − (l − l_p) ], with free_bits Σ_k max(KL_ik, free_bits). Arguments,
    dtypes and errors as in `decoupled_elbo`, except that "mean" divides by the number of latents, there being no data.
    For a hierarchical VAE, sum it over the levels, each with its own prior.

    >>> mu, logvar = torch.ones(2, 4), torch.zeros(2, 4)
    >>> gaussian_kl(mu, logvar), gaussian_kl(mu, logvar, prior=(mu, logvar))
    (tensor(2.), tensor(0.))
    """
    checks.pair("mu", mu, "logvar", logvar)
    return _call((None, None, *_latents(mu, logvar, prior)), free_bits=free_bits, reduction=reduction).loss


# ---------------------------------------------------------------------------------------------- arguments to operator


def _sigma_arguments(
    inputs: tuple[Tensor, ...],
    sigma: str | float | Constant | Optimal,
    log_sigma: Tensor | None,
    min_log_sigma: float,
) -> tuple[Tensor | None, Kind, bool, float, float]:
    """(log_sigma, sigma_mode, softclip, log_sigma_value, min_log_sigma)."""
    recon = inputs[0]
    checks.number("min_log_sigma", min_log_sigma, -modes.LOG_SIGMA_RANGE, modes.LOG_SIGMA_RANGE)
    if log_sigma is not None:
        if sigma != "optimal":
            raise ValueError(f"sigma and log_sigma exclude each other, got sigma={sigma!r} beside a log_sigma")
        checks.log_sigma(log_sigma, recon)
        batch = recon.shape[0]
        if log_sigma.numel() == 1:
            return log_sigma.reshape(()), Kind.GIVEN, False, 0.0, min_log_sigma
        per_image = log_sigma.shape[0] == log_sigma.numel() == batch and log_sigma.dim() in (1, recon.dim())
        if per_image:
            return log_sigma.reshape(batch), Kind.GIVEN, False, 0.0, min_log_sigma
        shape = (1,) * (recon.dim() - log_sigma.dim()) + tuple(log_sigma.shape)
        return log_sigma.reshape(shape), Kind.ELEMENT, False, 0.0, min_log_sigma
    mode = modes.resolve(sigma)
    if isinstance(mode, Optimal):
        kind = Kind.IMAGE if mode.per_image else Kind.BATCH
        return None, kind, mode.softclip, 0.0, min_log_sigma
    if torch.compiler.is_compiling():
        return _on_device(mode.value, *inputs).log(), Kind.GIVEN, False, 0.0, min_log_sigma
    return None, Kind.GIVEN, False, math.log(mode.value), min_log_sigma


def _on_device(value: float, *like: Tensor | None) -> Tensor:
    """A Python number as a tensor. A number is part of the code that Dynamo compiles; a schedule of β as plain floats
    would compile anew at every value and fail after eight."""
    first = next(t for t in like if t is not None)
    return first.new_ones((), dtype=compute_dtype(*like)) * value


def _latents(
    mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of one dtype, the widest, and one shape; autograd turns their gradients back."""
    if prior is not None:
        checks.prior(prior, mu)
    every = (mu, logvar, *(prior or ()))
    # A prior that the batch shares sums its gradient over the batch: in fp32, then rounded once to its own dtype.
    shared = prior is not None and any(t.shape != mu.shape for t in prior)
    if shared or any(t.dtype != mu.dtype for t in every):
        dtype = compute_dtype(*every)
        every = tuple(t.to(dtype) for t in every)
    if prior is None:
        return every[0], every[1], None, None
    return every[0], every[1], every[2].expand(mu.shape), every[3].expand(mu.shape)


def _call(
    tensors: tuple[Tensor | None, ...],  # recon, target, mu, logvar, prior_mu, prior_logvar
    *,
    reduction: str,
    beta: float | Tensor = 1.0,
    sigma: tuple[Tensor | None, Kind, bool, float, float] = (None, Kind.GIVEN, False, 0.0, 0.0),
    free_bits: float = 0.0,
    capacity: float | Tensor | None = None,
) -> ELBO:
    recon, target, mu, logvar, prior_mu, prior_logvar = tensors
    log_sigma, kind, softclip, log_sigma_value, min_log_sigma = sigma
    index = checks.reduction(reduction)
    checks.number("free_bits", free_bits, 0)
    checks.device_served(recon if recon is not None else mu)  # type: ignore[arg-type]

    def knob(value: Any) -> tuple[Tensor | None, Any]:
        """(the tensor, the number): one of the two."""
        if value is None or isinstance(value, Tensor):
            return value, None
        return (_on_device(value, recon, target, mu, logvar), None) if torch.compiler.is_compiling() else (None, value)

    beta_tensor, beta_value = knob(beta)
    capacity_tensor, capacity_value = knob(capacity)
    loss, distortion, rate, std, _ = autograd.elbo(
        recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta_tensor, capacity_tensor,
        int(kind), softclip, log_sigma_value, float(min_log_sigma), float(free_bits),
        1.0 if beta_value is None else float(beta_value),
        None if capacity_value is None else float(capacity_value),
        index,
    )  # fmt: skip
    return ELBO(loss, distortion, rate, None if kind == Kind.ELEMENT else std)
