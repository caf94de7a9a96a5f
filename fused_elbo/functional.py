"""The public functions: validate, then call. No maths here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from . import arguments, autograd, checks, distributed, levels
from .arguments import Call
from .options import ElboOptions, GaussianOptions, KLOptions, NLLOptions, complete, defaults_of, plain, shown
from .sigma import Kind

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ELBO, _NLL, _GAUSSIAN, _KL = map(defaults_of, (ElboOptions, NLLOptions, GaussianOptions, KLOptions))


class ELBO(NamedTuple):
    """What `decoupled_elbo` returns. `loss`, `distortion` and `rate` are differentiable, together and apart."""

    loss: Tensor  #: distortion + β·rate: what to minimise
    distortion: Tensor  #: −log p(x|z), in nats
    rate: Tensor  #: KL(q(z|x) ‖ p(z)), in nats, before β, free bits, capacity and limit
    sigma: Tensor | None  #: the decoder's scale, detached: (), (B,), or None if it varies inside a sample


@shown(ElboOptions)
def decoupled_elbo(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    **options: Unpack[ElboOptions],
) -> ELBO:
    """The negative ELBO of a Gaussian VAE, with the decoder's σ and the weight β apart.

    For sample i with D data dimensions, e = recon − target and l = logvar::

        distortion_i = Σ_d [ e_id² / (2σ²) + ½ log(2πσ²) ]            −log p(x_i|z_i), in nats
        rate_i       = ½ Σ_k [ μ_ik² + exp(l_ik) − 1 − l_ik ]         KL(q(z|x_i) ‖ N(0, I)), in nats
        loss         = distortion + β · rate

    That is the Gaussian likelihood, of exponent q = 2. For q = 1 and 2 alike, with A_i = Σ_d |e_id|^q::

        distortion_i = A_i / (q σ^q) + D (log σ + const)              q = 1: −log Laplace(x_i | x̂_i, σ)
        optimal σ^q  = ΣA / (B D)                                     q = 1: the mean absolute error

    Args:
        recon: the decoder's mean, (B, *data), any shape after the batch; or what `activation` makes the mean of.
        target: the data, of recon's shape. May require a gradient. Bytes (uint8) are read as they lie, as numbers of
            `target_range`.
        mu: the posterior's mean, (B, *latent), any shape after the batch.
        logvar: log σ_z², of mu's shape.
        beta: weight of the rate: a number, a 0-d tensor, or (B,), one per sample. A tensor β gets a gradient.
        sigma: where the decoder's σ comes from: "optimal" (σ² = MSE of the batch, in closed form), "optimal-per-image"
            (of each sample), a number (a constant standard deviation), or a mode from `fused_elbo.sigma`.
        log_sigma: a learned log σ, which takes the place of `sigma`: (), (1,) shared; (B,) one per image, which is
            also how it is read where B is the number of features too (a warning says so). Any other shape broadcasts
            against recon from the right: (C, 1, 1) per channel of images, (1, D) per feature, recon.shape per pixel.
        min_log_sigma: floor of log σ in the optimal modes, within ±40. The default −7 lies just below the quantisation
            noise of 8-bit data in [0, 1], log(1/(255·√12)) = −6.8. Has no part in a constant or learned σ.
        likelihood: "gaussian", or "laplace" with the scale σ = b of exp(−|e|/b)/2b. All modes of σ serve both.
        activation: None, or "sigmoid" or "tanh": recon is then the decoder's last pre-activation y, and x̂ = act(y).
            The gradient is that of y. It saves the passes over memory that an activation by itself costs.
        target_range: what 0 and 255 of a target of dtype uint8 stand for; (−1, 1) for those who centre images.
        weight: a mask (bool) or weights (floating, at least 0, without gradient) of the elements, of any shape that
            broadcasts against recon: A_i = Σ_d m_id |e_id|^q, and n_i = Σ_d m_id takes the place of D. Elements of
            weight 0 are not seen, NaN included; a sample without others has distortion 0.
        extra_error: () or (B,), added to each A_i before the scale and its optimum, with its gradient. A perceptual
            term that has w times the weight of the mean |e|^q is D·w·LPIPS_i. Not where σ varies inside a sample.
        constant: False leaves log 2π (Laplace: log 2) out of the value, as `F.gaussian_nll_loss(full=False)` does.
        prior: (mu_p, logvar_p), a Gaussian prior in place of N(0, I); each broadcasts to mu's shape. Keep logvar_p, as
            any learned log σ, within fp32's reach: exp(−logvar_p) overflows below −88.
        logvar_range: logvar is clamped to these two numbers, as with (−30, 20) in latent diffusion's autoencoders.
            Outside the gradient is 0; NaN passes.
        free_bits: nats below which a latent element costs no less: the loss has Σ_k max(KL_ik, free_bits).
        capacity: C, in nats per sample: the loss has β·|mean_i KL_i − C| in place of β·KL, KL_i being what free_bits
            make of it. A number or a 0-d tensor (without gradient). Needs a scalar reduction and a scalar β.
        limit: `FreeNats(λ)` or `Capacity(C)` from `fused_elbo.rate`, each per sample or per batch: what the loss has in
            the place of the rate. `capacity=C` is short for `limit=Capacity(C)`.
        reduction: "batchmean" (nats per sample), "sum", "mean" (nats per data dimension: all three are divided by D;
            with weights, by their mean sum) or "none" ((B,) tensors).
        process_group: the ProcessGroup (torch.distributed.group.WORLD, or any other that this process is in) whose
            ranks each have a shard of the batch. See below.

    Returns:
        ELBO(loss, distortion, rate, sigma). They are fp32, or fp64 if any of the four inputs or the prior is fp64, and
        sums are accumulated in that dtype; inputs may be fp64, fp32, bf16 and fp16, mixed as you like. `rate` is the
        plain KL, before β, free_bits, capacity and limit, so that rate–distortion plots stay true.

    Raises:
        TypeError, ValueError: before any work, naming the argument and showing what was passed. Values inside tensors
            are not looked at: NaN goes in, NaN comes out.
        RuntimeError: for a process_group where torch.distributed is missing or not initialised, inside torch.func's
            transforms, and when its loss is differentiated twice.

    With a process_group, an optimal σ and capacity's mean are those of the batch of all R ranks. A sample weighs R/B,
    with B samples on all ranks; for "mean" R/N, with N elements, or their weights; for "sum" R. So the mean of loss,
    distortion and rate over the ranks is what one process with the whole batch returns. The mean of the gradients, as
    DistributedDataParallel and FSDP form it, is that process's gradient, whatever the sizes of the shards. An optimal σ
    of the batch is the same on all ranks.

    - Every rank makes the same calls, in evaluation too, with the same options.
    - A rank without data passes tensors of batch size 0. (A batch that is empty on all ranks has NaN for σ and means.)
    - The grad_outputs are the same on all ranks, as with loss.backward(), because no rank learns another's.
    - A learned log_sigma and a tensor β need the average of their gradients as well: let the wrapped module hold them.
    - It costs one all-reduce of four numbers in forward and none in backward; torch.compile breaks its graph there.
    - reduction="none" and second derivatives are refused.

    A second derivative goes through plain PyTorch; torch.compile has it by torch.func.jacrev alone. There is no
    forward-mode derivative, except inside `with fused_elbo.backend("reference"):`. Where torch.compile meets the
    transforms of torch.func (vmap, grad, vjp, jacrev, in any order), values and gradients are right, but what is
    compiled is plain PyTorch, and a backend that was asked for is refused there. torch.export takes the loss with a
    batch of any size, and vmap of it with the sizes of the example; an error says that it makes no graph of grad, vjp
    and jacrev. make_fx takes all of them, except vmap with tracing_mode="symbolic".

    "optimal" looks at the target: for test-time likelihoods use a σ from training
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
    given = complete(options, _ELBO, "decoupled_elbo")
    call = arguments.elbo(recon, target, mu, logvar, given, plain(options))
    if given["process_group"] is not None:
        return _elbo(call, distributed.elbo(*call, process_group=given["process_group"]))
    return _elbo(call, autograd.elbo(*call))


@shown(ElboOptions)
def decoupled_elbo_backward(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    grad_scale: float | Tensor | None = None,
    retain_graph: bool = False,
    **options: Unpack[ElboOptions],
) -> ELBO:
    """`decoupled_elbo(…).loss.backward()` in one go: the loss and its gradients together, then autograd's backward.

    The data are at hand when the loss is known, so its gradients need not read them from memory again: 3N bytes moved
    in place of 5N, N being recon's, where a backend has such a kernel. Values and gradients are those of the two calls,
    up to rounding; so are hooks, `retain_grad`, gradients added to `.grad`, and DistributedDataParallel.

    Args:
        grad_scale: what the gradients are multiplied by, before they are rounded to their tensors' dtypes: a finite
            number, or a tensor of one element on recon's device. With a GradScaler `scaler.scale(torch.ones((),
            device=recon.device))`; to accumulate over n batches, 1/n (with both, `scaler.scale(torch.full((), 1 / n,
            device=recon.device))`). The returned loss is not multiplied.
        retain_graph: keep the graph of recon, mu and logvar, for another loss that goes back through it.

        All others as in `decoupled_elbo`, except that reduction="none" is refused.

    Returns:
        ELBO(loss, distortion, rate, sigma), all detached.

    Raises:
        TypeError, ValueError: as `decoupled_elbo`, and for a bad grad_scale.
        RuntimeError: if no tensor requires a gradient, under torch.no_grad, or inside torch.func's transforms.

    It calls backward, so it ends the graph as `loss.backward()` does. If another loss goes back through the same
    decoder, add it to `decoupled_elbo(…).loss` instead: one backward is cheaper than two. torch.compile breaks its
    graph here, as it does at `loss.backward()`. With a process_group it saves nothing: it takes the two passes.

    >>> x, weight = torch.rand(2, 8), torch.ones(8, requires_grad=True)
    >>> mu, logvar = torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4)
    >>> elbo = decoupled_elbo_backward(x * weight, x + 0.1, mu, logvar, beta=4.0)
    >>> elbo.loss.requires_grad, weight.grad.shape, mu.grad[0]
    (False, torch.Size([8]), tensor([2., 2., 2., 2.]))
    """
    given = complete(options, _ELBO, "decoupled_elbo_backward")
    if given["reduction"] == "none":
        raise ValueError('reduction: "none" gives a loss for each sample, and backward starts from one number')
    call = arguments.elbo(recon, target, mu, logvar, given, plain(options))
    scale = arguments.grad_scale(grad_scale, recon)
    if given["process_group"] is not None:
        group = given["process_group"]
        return _elbo(
            call, distributed.elbo_backward(*call, process_group=group, grad_scale=scale, retain_graph=retain_graph)
        )
    return _elbo(call, autograd.elbo_backward(*call, grad_scale=scale, retain_graph=retain_graph))


@shown(NLLOptions)
def decoder_nll(
    recon: Tensor,
    target: Tensor,
    **options: Unpack[NLLOptions],
) -> Tensor:
    """The distortion alone: −log p(target | recon) in nats, of a Gaussian or a Laplace likelihood.

    Arguments (process_group too), dtypes and errors as in `decoupled_elbo`; "mean" divides by D. With a scalar
    reduction the result is a 0-d tensor, with "none" it is (B,).

    >>> x = torch.zeros(4, 10)
    >>> nll = decoder_nll(x + 1.0, x, likelihood="laplace", sigma=0.5)
    >>> torch.allclose(nll, -torch.distributions.Laplace(x + 1.0, 0.5).log_prob(x).sum() / 4)
    True
    """
    return _nll(recon, target, complete(options, _NLL, "decoder_nll"))


@shown(GaussianOptions)
def gaussian_nll(
    recon: Tensor,
    target: Tensor,
    **options: Unpack[GaussianOptions],
) -> Tensor:
    """`decoder_nll` of the Gaussian likelihood: Σ_d [e²/(2σ²) + ½ log(2πσ²)].

    >>> x = torch.zeros(4, 10)
    >>> nll = gaussian_nll(x + 1.0, x, sigma=1.0)
    >>> torch.allclose(nll, -torch.distributions.Normal(x + 1.0, 1.0).log_prob(x).sum() / 4)
    True
    """
    return _nll(recon, target, complete(options, _GAUSSIAN, "gaussian_nll"))


def _nll(recon: Tensor, target: Tensor, given: dict[str, Any]) -> Tensor:
    call = arguments.nll(recon, target, given)
    if given["process_group"] is not None:
        return distributed.elbo(*call, process_group=given["process_group"])[1]
    return autograd.elbo(*call)[1]


@shown(KLOptions)
def gaussian_kl(
    mu: Tensor | Sequence[Tensor],
    logvar: Tensor | Sequence[Tensor],
    *,
    prior: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor] | None] | None = None,
    per_level: bool = False,
    **options: Unpack[KLOptions],
) -> Tensor:
    """The rate alone: KL(N(μ, exp l) ‖ N(μ_p, exp l_p)) in nats, against N(0, I) if no prior is given.

    ½ Σ_k [ (μ − μ_p)²/exp(l_p) + exp(l − l_p) − 1 − (l − l_p) ], with free_bits Σ_k max(KL_ik, free_bits), and what a
    limit makes of it. Arguments (process_group, for its weights, too), dtypes and errors as in `decoupled_elbo`, except
    that "mean" divides by the number of latents, there being no data, and that lists take no limit and no logvar_range.

    For the levels of a hierarchical VAE, give lists: mu and logvar with a tensor for each level, (B, *latent) of any
    shape after the same B, and `prior` with (mu_p, logvar_p), or None for N(0, I), for each. The result is the sum of
    their rates. One call of a CPU's kernel computes all of them; on GPUs 43 levels are 3 launches and 3 in backward
    with Triton, 3 and 2 with CUDA C++, and levels without a prior, or of another dtype, need launches of their own.

    per_level=True, for lists alone, returns the rate of each level: (B, L) for L levels with "none", (L,) with the
    other reductions. So a loss weighs every level as it likes: `(coefficients * rates).sum()`. Their sum is what
    per_level=False returns; so "mean" divides by the latents of all levels here too.

    >>> mu, logvar = torch.ones(2, 4), torch.zeros(2, 4)
    >>> gaussian_kl(mu, logvar), gaussian_kl(mu, logvar, prior=(mu, logvar))
    (tensor(2.), tensor(0.))
    >>> gaussian_kl([mu, mu[:, :2]], [logvar, logvar[:, :2]], prior=[None, (mu[:, :2], logvar[:, :2])])
    tensor(2.)
    >>> gaussian_kl([mu, mu[:, :2]], [logvar, logvar[:, :2]], per_level=True)
    tensor([2., 1.])
    """
    given = complete(options, _KL, "gaussian_kl")
    are_lists = isinstance(mu, (list, tuple)) or isinstance(logvar, (list, tuple))
    checks.per_level(per_level, are_lists)
    if are_lists:
        return levels.rate(mu, logvar, prior, per_level, given)
    call = arguments.kl(cast(Tensor, mu), cast(Tensor, logvar), prior, given)
    if given["process_group"] is not None:
        return distributed.elbo(*call, process_group=given["process_group"])[0]
    return autograd.elbo(*call)[0]


def _elbo(call: Call, outputs: tuple[Tensor, ...]) -> ELBO:
    """`outputs` begin with loss, distortion, rate and sigma; the operators' sigma is empty where it is None here."""
    loss, distortion, rate, sigma = outputs[:4]
    return ELBO(loss, distortion, rate, None if call[1].sigma_mode == Kind.ELEMENT else sigma)
