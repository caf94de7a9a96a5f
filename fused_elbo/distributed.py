"""The loss over the batch of all ranks of a process group, each of which has a shard of it.

Each rank weighs its samples by R·r: R ranks, r the weight of a sample in one process with the whole batch (1/B, 1 or
1/N: B samples and N elements on all ranks). Then the mean over the ranks of what they return is what that process
returns, and so is the mean of the gradients, which is what data-parallel training forms; shards may differ in size, or
be empty.

    stats       of the shard, by the operator
    all-reduce  of ΣS, Σ(clamped KL), N and B: all that ranks tell each other
    finalize    in plain PyTorch: O(shard)
    grads       the operator again, for stats that have each S_i at the global batch's mean

The last line needs no other kernel: every w_j = ∂L/∂distortion_j being the same, σ and Σ_j w_j (D − S_j/σ²)/ΣS are
functions of the mean of S alone. It also needs no other collective, since each rank knows w: its own grad_output is
that of all. The same holds for capacity and the mean of the clamped KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import Dynamo now: seconds

from . import autograd, backends, checks, reference
from .sigma import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@_disable_dynamo  # the all-reduce, and checks of a group, are not for a graph
def elbo(*args: Any, process_group: ProcessGroup) -> tuple[Tensor, ...]:
    """(loss, distortion, rate, sigma), as `autograd.elbo`, for the batch of all ranks."""
    checks.process_group(process_group, args[-1][-1])
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("process_group: not inside torch.func's transforms, which cannot cross processes")
    return cast(Any, _GlobalElbo).apply(*args, backends.forced, process_group)


def elbo_backward(
    *args: Any, process_group: ProcessGroup, grad_scale: tuple[Tensor | None, float], retain_graph: bool
) -> tuple[Tensor, ...]:
    """As `autograd.elbo_backward`, in two passes: σ is known when every rank has read its data."""
    autograd.refuse_backward(args)
    loss, *others = elbo(*args, process_group=process_group)
    scale, number = grad_scale
    torch.autograd.backward(loss, loss.new_full((), number) if scale is None else scale, retain_graph=retain_graph)
    return tuple(t.detach() for t in (loss, *others))


@_disable_dynamo
def mean(values: Tensor, process_group: ProcessGroup) -> Tensor:
    """Over all values of all ranks, which may have different numbers of them."""
    sums = torch.stack([values.sum(), values.new_full((), values.numel())])
    dist.all_reduce(sums, group=process_group)
    return sums[0] / sums[1]


class _GlobalElbo(autograd.Shared):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, values, backend, group = args
        recon, _, mu, _, log_sigma, _, _, beta, capacity = tensors
        kind, softclip, log_sigma_value, min_log_sigma, free_bits, beta_value, capacity_value, reduction = values
        x = recon if recon is not None else mu
        batch, d = x.shape[0], reference.dims_of(recon, None) if recon is not None else 0

        stats = _stats(tensors, kind, free_bits, backend)
        sums = torch.cat([stats[::2, -1], stats.new_full((1,), x.numel()), stats.new_full((1,), batch)])
        dist.all_reduce(sums, group=group)
        s, clamped, n, samples = sums.unbind(0)
        weight = dist.get_world_size(group) * reference.reduction_weight(reduction, samples, n / samples)
        outputs = reference.finalize(
            stats, s, n, clamped / samples, d, weight, log_sigma, beta, capacity,
            kind, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value, reduction,
        )  # fmt: skip

        if kind == Kind.BATCH:
            _level(stats[0], d * s / n)
        if capacity is not None or capacity_value is not None:
            _level(stats[2], clamped / samples)
        # In grads each sample weighs 1, and the grad_outputs bring the weight.
        autograd.Shared.save(ctx, (*tensors, (*values[:-1], reference.SUM), backend), stats)
        ctx.weight, ctx.empty = weight, batch == 0
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("process_group: no second derivatives, so no backward with create_graph=True")
        if ctx.empty:  # zeros, not None: whoever averages gradients counts on one of each rank
            pairs = zip(ctx.saved_tensors[:-1], ctx.needs_input_grad, strict=False)
            return (*[torch.zeros_like(t) if needed else None for t, needed in pairs], None, None, None)
        weighted = (None if g is None else g * ctx.weight for g in grad_outputs[:3])
        return (*autograd.Shared.backward(ctx, *weighted), None)


def _stats(tensors: list[Tensor | None], kind: int, free_bits: float, backend: str | None) -> Tensor:
    """Of the shard; the operators know no empty one."""
    recon, target, mu, logvar, log_sigma, *prior = tensors[:7]
    x = cast(Tensor, recon if recon is not None else mu)
    if x.shape[0] == 0:
        return x.new_zeros((3, 1), dtype=reference.compute_dtype(recon, target, mu, logvar))
    element = log_sigma if kind == Kind.ELEMENT else None
    implementation = autograd.implementation(backend, tensors)
    return implementation.stats(recon, target, mu, logvar, element, *prior, free_bits)


def _level(row: Tensor, value: Tensor) -> None:
    """A row of stats, its sum at the end included, as if each sample had this value."""
    row[:-1] = value
    row[-1] = value * (row.shape[0] - 1)
