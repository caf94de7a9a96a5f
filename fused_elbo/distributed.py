"""The loss over the batch of all ranks of a process group, each of which has a shard of it.

Each rank weighs its samples by R·r: R ranks, r the weight of a sample in one process with the whole batch (1/B, 1 or
1/N: B samples and N elements on all ranks). Then the mean over the ranks of what they return is what that process
returns, and so is the mean of the gradients, which is what data-parallel training forms; shards may differ in size, or
be empty.

    stats       of the shard, by the operator
    all-reduce  of ΣA, Σ(clamped KL), N and B: all that ranks tell each other
    finalize    in plain PyTorch: O(shard)
    grads       the operator again, for stats that have each A_i at the global batch's mean

The last line needs no other kernel: every w_j = ∂L/∂distortion_j being the same, σ and Σ_j w_j (D − A_j/σ^q)/ΣA are
functions of the mean of A alone. (With weights of elements, A_i is n_i times the mean, and N is Σn.) It also needs no
other collective, since each rank knows w: its own grad_output is that of all. The same holds for a limit per batch and
the mean of the clamped KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import Dynamo now: seconds

from . import autograd, backends, checks, reference
from .call import SUM, Options, Tensors, compute_dtype, first, stats_rows
from .dispatch import implementation
from .rate import of_batch
from .reference.elbo_finalize import BatchTerms
from .reference.math import mean_error, reduction_weight
from .sigma import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TENSORS = len(Tensors._fields)


@_disable_dynamo  # the all-reduce, and checks of a group, are not for a graph
def elbo(tensors: Tensors, options: Options, *, process_group: ProcessGroup) -> tuple[Tensor, ...]:
    """(loss, distortion, rate, sigma), as `autograd.elbo`, for the batch of all ranks."""
    checks.process_group(process_group, options.reduction)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("process_group: not inside torch.func's transforms, which cannot cross processes")
    return cast(Any, _GlobalElbo).apply(*tensors, options, backends.forced, process_group)


def elbo_backward(
    tensors: Tensors,
    options: Options,
    *,
    process_group: ProcessGroup,
    grad_scale: tuple[Tensor | None, float],
    retain_graph: bool,
) -> tuple[Tensor, ...]:
    """As `autograd.elbo_backward`, in two passes: σ is known when every rank has read its data."""
    autograd.refuse_backward(tensors)
    loss, *others = elbo(tensors, options, process_group=process_group)
    scale, number = grad_scale
    torch.autograd.backward(loss, loss.new_full((), number) if scale is None else scale, retain_graph=retain_graph)
    return tuple(t.detach() for t in (loss, *others))


@_disable_dynamo
def mean(values: Tensor, process_group: ProcessGroup) -> Tensor:
    """Over all values of all ranks, which may have different numbers of them."""
    sums = torch.stack([values.sum(), values.new_full((), values.numel())])
    dist.all_reduce(sums, group=process_group)
    return sums[0] / sums[1]


class Shards(NamedTuple):
    """The components of a mixture on all ranks, in their order."""

    mu: Tensor
    logvar: Tensor
    first: int  # of this rank


@_disable_dynamo
def gather(mu: Tensor, logvar: Tensor, process_group: ProcessGroup) -> Shards:
    """(M, K) of all ranks from the shards (b, K). These may differ in size, so ranks first tell each other theirs,
    which a GPU's host waits for."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("process_group: not inside torch.func's transforms, which cannot cross processes")
    rank = dist.get_rank(process_group)
    told = mu.new_empty(dist.get_world_size(process_group), dtype=torch.int64)
    dist.all_gather(list(told.split(1)), told.new_full((1,), mu.shape[0]), group=process_group)
    sizes = told.tolist()
    of_all = cast(Any, _Gather).apply(mu, logvar, sizes, process_group)
    return Shards(of_all[0], of_all[1], sum(sizes[:rank]))


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("process_group: no second derivatives, so no backward with create_graph=True")


class _Gather(torch.autograd.Function):
    """Forward all ranks' rows; backward the sum of what all ranks found for this rank's."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, sizes: list[int], group: ProcessGroup) -> tuple[Tensor, ...]:
        rank = dist.get_rank(group)
        ctx.group, ctx.own = group, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        sent = mu.new_zeros(2, max(sizes), mu.shape[1])
        sent[:, : mu.shape[0]] = torch.stack([mu, logvar])
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent, group=group)
        rows = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)
        return rows[0].clone(), rows[1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        sums = torch.stack(grad_outputs)
        dist.all_reduce(sums, group=ctx.group)
        of_mu, of_logvar = sums[:, ctx.own].unbind(0)
        return of_mu, of_logvar, None, None


class _GlobalElbo(autograd.ElboFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        tensors, (options, backend, group) = Tensors._make(args[:_TENSORS]), args[_TENSORS:]
        stats = _stats(tensors, options, backend)
        batch = _all_reduce(stats, tensors, options, group)
        outputs = reference.finalize(stats, batch, tensors, options)

        if options.sigma_mode == Kind.BATCH:
            _equalise(stats[0], batch.dims * mean_error(batch.a, batch.elements))
        if of_batch(options.limit_mode):
            _equalise(stats[2], batch.kl_clamped)
        # In grads each sample weighs 1, and the grad_outputs bring the weight.
        autograd.ElboFunction.save(ctx, (*tensors, options._replace(reduction=SUM), backend), stats)
        ctx.weight, ctx.empty = batch.weight, first(tensors).shape[0] == 0
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        if ctx.empty:  # zeros, not None: whoever averages gradients counts on one of each rank
            pairs = zip(ctx.saved_tensors[:_TENSORS], ctx.needs_input_grad, strict=False)
            return autograd.for_inputs(
                tuple(torch.zeros_like(t) if needed else t for t, needed in pairs), ctx.needs_input_grad
            )
        weighted = (None if g is None else g * ctx.weight for g in grad_outputs[:3])
        return autograd.ElboFunction.backward(ctx, *weighted)


def _all_reduce(stats: Tensor, tensors: Tensors, options: Options, group: ProcessGroup) -> BatchTerms:
    """What the samples of all ranks have in common."""
    x, weighted = first(tensors), tensors.weight is not None
    counts = stats[3, -1:] if weighted else stats.new_full((1,), x.numel())
    sums = torch.cat([stats[:3:2, -1], counts, stats.new_full((1,), x.shape[0])])
    dist.all_reduce(sums, group=group)
    a, kl_clamped, elements, samples = sums.unbind(0)
    features = x.shape[1:].numel()
    if weighted:
        dims, of_sample = stats[3, :-1], reduction_weight(options.reduction, samples, features, elements)
    else:
        dims = 0 if tensors.recon is None else features
        of_sample = reduction_weight(options.reduction, samples, elements / samples)
        elements = torch.where(samples == 0, float("nan"), elements)  # no batch at all, and not one without weights
    return BatchTerms(a, elements, kl_clamped / samples, dims, dist.get_world_size(group) * of_sample)


def _stats(tensors: Tensors, options: Options, backend: str | None) -> Tensor:
    """Of the shard; the operators know no empty one."""
    x = first(tensors)
    if x.shape[0] == 0:
        return x.new_zeros((stats_rows(tensors), 1), dtype=compute_dtype(*tensors[:4]))
    return implementation(backend, tensors).stats(tensors, options)


def _equalise(row: Tensor, values: Tensor) -> None:
    """A row of stats, its sum at the end included, as if the samples had these values."""
    row[:-1] = values
    row[-1] = row[:-1].sum()
