"""The operators (fused_elbo/operators/elbo.py) on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_elbo import call
from fused_elbo.call import NONE, SUM, Gradients, GradOutputs, Outputs, Tensors

from ._grid import resident_programs
from ._layout import Inputs, Output
from .elbo_finalize import elbo_finalize
from .elbo_grads import elbo_grads
from .elbo_stats import elbo_stats
from .elbo_step import Plan, elbo_step
from .structs import Batch, Options, Scalar


class Written:
    """Where the gradients that `mask` asks for are written, one for each bit, and what becomes of them."""

    def __init__(self, inputs: Inputs, tensors: Tensors, mask: int) -> None:
        def asked(name: str) -> bool:
            return bool(mask >> Gradients._fields.index(name) & 1)

        def output(name: str, lead: Tensor | None) -> Output | None:
            like = getattr(tensors, name)
            return Output(like, lead) if asked(name) and like is not None else None

        def of_log_sigma() -> Output | None:
            if not self.is_broadcast:
                return output("log_sigma", None if inputs.log_sigma is None else inputs.recon)
            return Output(inputs.recon, inputs.recon, inputs.dtype) if asked("log_sigma") else None

        # log σ that is broadcast gets the gradient of every element, which is then summed in PyTorch's fixed order.
        self.like, self.log_sigma = inputs.like, tensors.log_sigma
        self.is_broadcast = inputs.log_sigma is not None and self.log_sigma.shape != inputs.recon.shape
        self.outputs = Gradients(
            output("recon", inputs.recon), output("target", inputs.recon),
            output("mu", inputs.mu), output("logvar", inputs.mu), of_log_sigma(),
            output("prior_mu", inputs.mu), output("prior_logvar", inputs.mu), output("beta", None),
        )  # fmt: skip

    def buffers(self) -> Gradients:
        return Gradients(*(None if o is None else o.buffer for o in self.outputs))

    def finish(self) -> Gradients:
        finished = Gradients(*(None if o is None else o.finish() for o in self.outputs))
        if self.is_broadcast and finished.log_sigma is not None:
            summed = finished.log_sigma.sum_to_size(self.log_sigma.shape)
            finished = finished._replace(log_sigma=torch.empty_like(self.log_sigma).copy_(summed))
        return Gradients(*(self.like.new_empty(0, dtype=torch.float32) if g is None else g for g in finished))


def forward(tensors: Tensors, options: call.Options) -> Outputs:
    inputs = Inputs(tensors, options)
    batch, own = Batch.of(inputs, options.reduction), Options.of(tensors, options, inputs.dtype)
    return elbo_finalize(inputs, batch, elbo_stats(inputs, batch), own, options.reduction == NONE)


def stats(tensors: Tensors, options: call.Options) -> Tensor:
    plain = options._replace(capacity_value=None, reduction=SUM)
    return forward(tensors._replace(beta=None, capacity=None), plain).stats


def grads(tensors: Tensors, options: call.Options, stats: Tensor, grad_outputs: GradOutputs, mask: int) -> Gradients:
    inputs = Inputs(tensors, options)
    batch, own = Batch.of(inputs, options.reduction), Options.of(tensors, options, inputs.dtype)
    written = Written(inputs, tensors, mask)
    elbo_grads(inputs, batch, stats, own, grad_outputs, written.buffers())
    return written.finish()


def step(
    tensors: Tensors, options: call.Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
) -> tuple[Tensor, ...]:
    inputs = Inputs(tensors, options)
    batch, own = Batch.of(inputs, options.reduction), Options.of(tensors, options, inputs.dtype)
    written = Written(inputs, tensors, mask)
    plan = Plan.of(inputs, own, resident_programs(inputs.like.device))
    if plan is not None:
        scale = Scalar.of(grad_scale, grad_scale_value, inputs.dtype)
        outputs = elbo_step(inputs, batch, plan, own, scale, written.buffers())
    else:
        outputs = elbo_finalize(inputs, batch, elbo_stats(inputs, batch), own, False)
        grad_loss = outputs.loss.new_full((), grad_scale_value) if grad_scale is None else grad_scale
        elbo_grads(inputs, batch, outputs.stats, own, GradOutputs(grad_loss, None, None), written.buffers())
    return (*outputs[:4], *written.finish())
