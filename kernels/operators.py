"""The operators (fused_elbo/operators/elbo.py) on the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_elbo.call import SUM, GradOutputs, Options, Tensors, element_sigma

from ._factors import ELEMENT
from ._grid import resident_programs
from ._layout import Inputs, Output
from .elbo_finalize import Knobs, elbo_finalize
from .elbo_grads import Outputs, elbo_grads
from .elbo_stats import elbo_stats
from .elbo_step import Plan, elbo_step


def knobs_of(tensors: Tensors, options: Options) -> Knobs:
    log_sigma = None if options.sigma_mode == ELEMENT.value else tensors.log_sigma
    return Knobs(log_sigma, tensors.beta, tensors.capacity, *options)


def inputs_of(tensors: Tensors, options: Options) -> Inputs:
    return Inputs(*tensors[:4], element_sigma(tensors, options), tensors.prior_mu, tensors.prior_logvar)


def stats(tensors: Tensors, options: Options) -> Tensor:
    return forward(tensors._replace(beta=None, capacity=None), options._replace(reduction=SUM, capacity_value=None))[4]


def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
    inputs = inputs_of(tensors, options)
    return elbo_finalize(inputs, elbo_stats(inputs, options.free_bits), knobs_of(tensors, options))


class Gradients:
    """Where the gradients that `mask` asks for are written, and what becomes of them: one for each bit."""

    def __init__(self, inputs: Inputs, mask: int, tensors: Sequence[Tensor | None], element: Tensor | None) -> None:
        """`tensors`: the operator's that have a gradient; `element`: log σ, where it varies inside a sample."""
        recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta = tensors
        wanted = [bool(mask >> bit & 1) for bit in range(8)]

        def output(bit: int, like: Tensor | None, lead: Tensor | None) -> Output | None:
            return Output(like, lead) if wanted[bit] and like is not None and lead is not None else None

        # log σ that is broadcast gets the gradient of every element, which is then summed in PyTorch's fixed order.
        self.inputs, self.element = inputs, element
        self.broadcast = element is not None and element.shape != recon.shape
        if self.broadcast and wanted[4]:
            of_element = Output(inputs.recon, inputs.recon, inputs.dtype)
        else:
            of_element = output(4, element, inputs.recon)
        self.outputs = Outputs(
            output(0, recon, inputs.recon), output(1, target, inputs.recon), of_element,
            output(2, mu, inputs.mu), output(3, logvar, inputs.mu),
            output(5, prior_mu, inputs.mu), output(6, prior_logvar, inputs.mu),
        )  # fmt: skip
        given = None if element is not None else log_sigma
        self.log_sigma, self.beta = (
            torch.empty_like(t) if t is not None and wanted[bit] else None for bit, t in ((4, given), (7, beta))
        )

    def finish(self) -> tuple[Tensor, ...]:
        finished = {name: o.finish() for name, o in self.outputs._asdict().items() if o is not None}
        of_log_sigma = finished.get("log_sigma", self.log_sigma)
        if self.broadcast and of_log_sigma is not None:
            of_log_sigma = torch.empty_like(self.element).copy_(of_log_sigma.sum_to_size(self.element.shape))
        order = (
            finished.get("recon"), finished.get("target"), finished.get("mu"), finished.get("logvar"), of_log_sigma,
            finished.get("prior_mu"), finished.get("prior_logvar"), self.beta,
        )  # fmt: skip
        return tuple(self.inputs.like.new_empty(0, dtype=torch.float32) if g is None else g for g in order)


def grads(
    tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs, mask: int
) -> tuple[Tensor, ...]:
    inputs = inputs_of(tensors, options)
    gradients = Gradients(inputs, mask, tensors[:8], element_sigma(tensors, options))
    knobs = knobs_of(tensors, options)
    elbo_grads(inputs, stats, knobs, grad_outputs, gradients.outputs, gradients.log_sigma, gradients.beta)
    return gradients.finish()


def step(
    tensors: Tensors, options: Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
) -> tuple[Tensor, ...]:
    inputs, knobs = inputs_of(tensors, options), knobs_of(tensors, options)
    gradients = Gradients(inputs, mask, tensors[:8], element_sigma(tensors, options))
    where = (gradients.outputs, gradients.log_sigma, gradients.beta)
    plan = Plan.of(inputs, knobs, resident_programs(inputs.like.device))
    if plan is not None:
        results = elbo_step(inputs, knobs, plan, grad_scale, grad_scale_value, *where)
    else:
        results = elbo_finalize(inputs, elbo_stats(inputs, knobs.free_bits), knobs)
        grad_loss = results.loss.new_full((), grad_scale_value) if grad_scale is None else grad_scale
        elbo_grads(inputs, results.stats, knobs, (grad_loss, None, None), *where)
    return (*results[:4], *gradients.finish())
