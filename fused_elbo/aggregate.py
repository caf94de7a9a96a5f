"""The aggregate posterior q(z), the mean of the posteriors of all data, and the parts of the KL that are made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from . import autograd, backends, checks, distributed, tracing
from .call import GradLogSums, LogSums, Mixture, compute_dtype
from .dispatch import aggregate_implementation, check_served
from .operators import registry
from .operators.aggregate import MIXTURE
from .reference import aggregate as reference
from .reference.math import log_normal, reduction_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_operator = registry.find("log_aggregate")


class KLTerms(NamedTuple):
    """What `kl_decomposition` returns. The sum of the three is an estimate of E log q(z|x)/p(z), the rate."""

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise: Tensor


def log_aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    own: bool = True,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log q̂(z) and log q̂(z_k) in nats, q̂ being a mixture of the posteriors N(μ_j, exp l_j), j < M.

        joint_i       = log Σ_j w_ij Π_k N(z_ik; μ_jk, exp l_jk)
        marginals_ik  = log Σ_j w_ij N(z_ik; μ_jk, exp l_jk)

    No tensor of B·M·K elements is made: the sums are streamed, forward and backward, each in a fixed order.

    Args:
        z: (B, *latent), where the densities are asked for.
        mu, logvar: (M, *latent), the mixture's components.
        own: whether component i is the posterior that z_i was drawn from; then M ≥ B. It weighs w_ii = 1/N, and each
            other one (N − 1)/(N (M − 1)), so that a batch stands for its data set. False: every component weighs 1/M,
            as for points that come from elsewhere, or to leave the own one out of mu and logvar.
        dataset_size: N ≥ M. None: N = M, all weights are 1/M, and for all posteriors of a data set q̂ is exactly q.
        process_group: ranks with a shard of the batch each. The mixture is that of all ranks, in their order; gradients
            of mu and logvar are summed over the ranks, so that with the mean of the ranks' losses, which data-parallel
            training forms, they are those of one process. All ranks must call, forward and backward.

    Returns:
        (joint, marginals): (B,) and (B, *latent), in fp32, or fp64 if an input is. fp32, fp64, bf16 and fp16 are taken.

    Raises:
        TypeError, ValueError: for what does not fit together, before any work, naming the argument.

    log q̂ is no unbiased estimate of log q where M < N; with own=True, −log q̂(z_i) ≤ log N − log q(z_i|x_i). The weights
    are those of Chen et al. 2018 (arXiv 1802.04942) for stratified minibatches, with all others alike.

    >>> mu, logvar = torch.zeros(5, 2), torch.zeros(5, 2)  # all posteriors are N(0, I)
    >>> joint, marginals = log_aggregate_posterior(torch.zeros(5, 2), mu, logvar, dataset_size=1000)
    >>> joint[0], marginals[0]
    (tensor(-1.8379), tensor([-0.9189, -0.9189]))
    """
    checks.aggregate(z, mu, logvar, own, dataset_size, process_group is not None)
    if process_group is not None:
        checks.process_group(process_group, checks.reduction("sum"))
    latent = z.shape[1:]
    mixture = _mixture(z.flatten(1), mu.flatten(1), logvar.flatten(1), own, dataset_size, process_group)
    joint, marginals = _log_aggregate(mixture)
    return joint, marginals.reshape(-1, *latent)


def kl_decomposition(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    reduction: str = "batchmean",
    process_group: ProcessGroup | None = None,
) -> KLTerms:
    """The rate's three parts (Chen et al. 2018, arXiv 1802.04942) in nats, estimated with a sample z of each posterior:

        mutual_information = log q(z|x) − log q̂(z)          I(x; z)
        total_correlation  = log q̂(z) − Σ_k log q̂(z_k)      KL(q(z) ‖ Π_k q(z_k))
        dimension_wise     = Σ_k log q̂(z_k) − log p(z)       Σ_k KL(q(z_k) ‖ p(z_k)),  p = N(0, 1)

    Their sum telescopes to log q(z|x) − log p(z), whatever q̂ is. q̂ is that of `log_aggregate_posterior` with own=True,
    and mutual_information is at most log N: where the true one is larger, the excess shows as total correlation.

    Args:
        z: (B, *latent), z_i drawn from N(mu_i, exp logvar_i); reparametrised, if gradients are to reach mu and logvar
            through it too.
        mu, logvar: (B, *latent), the encoder's outputs.
        dataset_size: N, the number of images in the data set that the batch is drawn from. None: the batch is all.
        reduction: "batchmean" (default) and "sum" over the batch, "mean" divides by the number of latents besides,
            "none" gives (B,).
        process_group: ranks with a shard of the batch each; the mean over the ranks of what they return, and of their
            gradients, is what one process with the whole batch has. Not with "none".

    Returns:
        KLTerms(mutual_information, total_correlation, dimension_wise): 0-d, or (B,) with "none".

    β-TCVAE in one line, the rate in closed form and total correlation alone estimated:

        loss = elbo.distortion + elbo.rate + (beta - 1) * kl_decomposition(z, mu, logvar, dataset_size=N)[1]

    Raises:
        TypeError, ValueError: as `log_aggregate_posterior`, and for a bad reduction.

    >>> mu, logvar = torch.zeros(64, 10), torch.zeros(64, 10)  # collapsed: all three are 0
    >>> terms = kl_decomposition(torch.randn(64, 10), mu, logvar, dataset_size=2000)
    >>> [round(abs(term.item()), 3) for term in terms]
    [0.0, 0.0, 0.0]
    """
    checks.aggregate(z, mu, logvar, True, dataset_size, process_group is not None)
    checks.samples_of(z, mu)
    index = checks.reduction(reduction)
    if process_group is not None:
        checks.process_group(process_group, index)
    z, mu, logvar = (t.flatten(1) for t in (z, mu, logvar))
    mixture = _mixture(z, mu, logvar, True, dataset_size, process_group)
    joint, marginals = _log_aggregate(mixture)
    of_all, dtype = marginals.sum(1), joint.dtype
    of_own, zero = (t.to(dtype) for t in (mu, logvar)), joint.new_zeros(())
    posterior, prior = (log_normal(z.to(dtype), *p).sum(1) for p in (of_own, (zero, zero)))
    each = KLTerms(posterior - joint, joint - of_all, of_all - prior)
    if reduction == "none":
        return each
    ranks = 1 if process_group is None else process_group.size()
    weight = ranks * reduction_weight(index, mixture.mu.shape[0], z.shape[1])
    return KLTerms._make(term.sum() * weight for term in each)


def _mixture(
    z: Tensor, mu: Tensor, logvar: Tensor, own: bool, dataset_size: int | None, process_group: ProcessGroup | None
) -> Mixture:
    """As the operators take it."""
    check_served(z)
    # Gradients that are added up over the ranks are so before they are rounded.
    if process_group is not None or not z.dtype == mu.dtype == logvar.dtype:
        dtype = compute_dtype(z, mu, logvar)
        z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    first = 0
    if process_group is not None:
        mu, logvar, first = distributed.gather(mu, logvar, process_group)
        checks.dataset_size(dataset_size, mu.shape[0], "of all ranks")
    return Mixture(z, mu, logvar, first if own else -1, dataset_size)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        sums = _without_gradients(*args)
        ctx.save_for_backward(*args[:3], *sums)
        ctx.weights, ctx.backend = args[3:MIXTURE], args[MIXTURE]
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        z, mu, logvar, *sums = ctx.saved_tensors
        mixture, needs = Mixture(z, mu, logvar, *ctx.weights), ctx.needs_input_grad
        mask = sum(1 << i for i in range(3) if needs[i])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a backward that is itself differentiated
            by, sums = reference, reference.aggregate(mixture)
        else:
            by, sums = _served(ctx.backend, z), LogSums._make(sums)
        return autograd.for_inputs(by.aggregate_grads(mixture, sums, GradLogSums(*grad_outputs), mask), needs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        autograd.refuse_forward_mode()


def _served(backend: str | None, z: Tensor) -> Any:
    """Who serves a call; the kernels know no empty shard."""
    return reference if tracing.known(z.shape[0] == 0) else aggregate_implementation(backend, z)


def _log_aggregate(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """As the operator, differentiable."""
    if autograd.plain() or torch._C._are_functorch_transforms_active():  # no operator of ours is differentiable there
        return reference.aggregate(mixture)
    if torch.compiler.is_compiling():
        return _operator(*mixture, backends.forced)
    return cast(Any, _Aggregate).apply(*mixture, backends.forced)


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        return reference.aggregate(Mixture._make(args[:MIXTURE]))
    return cast(Any, _Aggregate).apply(*args)


def _without_gradients(*args: Any) -> tuple[Tensor, ...]:
    return _served(args[MIXTURE], args[0]).aggregate(Mixture._make(args[:MIXTURE]))


registry.implement("log_aggregate", _differentiable, "Autograd")
registry.implement("log_aggregate", _without_gradients, "CompositeExplicitAutograd")
