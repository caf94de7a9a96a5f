"""The operators of fused_elbo/ops.py on the Triton kernels: arguments in the schemas' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._factors import ELEMENT
from ._grid import resident_programs
from ._layout import Inputs, Output
from .elbo_finalize import Knobs, elbo_finalize
from .elbo_grads import Outputs, elbo_grads
from .elbo_stats import elbo_stats
from .elbo_step import Plan, elbo_step


def element_sigma(log_sigma: Tensor | None, sigma_mode: int) -> Tensor | None:
    return log_sigma if sigma_mode == ELEMENT.value else None


def knobs_of(log_sigma: Tensor | None, beta: Tensor | None, capacity: Tensor | None, *values: Any) -> Knobs:
    return Knobs(None if values[0] == ELEMENT.value else log_sigma, beta, capacity, *values)


def stats(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, free_bits: float) -> Tensor:
    inputs = Inputs(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar)
    mode = ELEMENT.value if log_sigma is not None else 0
    knobs = Knobs(None, None, None, mode, False, 0.0, 0.0, free_bits, 1.0, None, 1)
    return elbo_finalize(inputs, elbo_stats(inputs, free_bits), knobs)[4]


def forward(
    recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, capacity, *values
) -> tuple[Tensor, ...]:  # fmt: skip
    knobs = knobs_of(log_sigma, beta, capacity, *values)
    element = element_sigma(log_sigma, knobs.sigma_mode)
    inputs = Inputs(recon, target, mu, logvar, element, prior_mu, prior_logvar)
    return elbo_finalize(inputs, elbo_stats(inputs, knobs.free_bits), knobs)


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
    grad_loss, grad_distortion, grad_rate,
    recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, capacity, stats, *values_and_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    *values, mask = values_and_mask
    knobs = knobs_of(log_sigma, beta, capacity, *values)
    element = element_sigma(log_sigma, knobs.sigma_mode)
    inputs = Inputs(recon, target, mu, logvar, element, prior_mu, prior_logvar)
    tensors = (recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta)
    gradients = Gradients(inputs, mask, tensors, element)
    grad_outputs = (grad_loss, grad_distortion, grad_rate)
    elbo_grads(inputs, stats, knobs, grad_outputs, gradients.outputs, gradients.log_sigma, gradients.beta)
    return gradients.finish()


def step(
    recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, capacity, grad_scale, *values_and_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    *values, grad_scale_value, mask = values_and_mask
    knobs = knobs_of(log_sigma, beta, capacity, *values)
    element = element_sigma(log_sigma, knobs.sigma_mode)
    inputs = Inputs(recon, target, mu, logvar, element, prior_mu, prior_logvar)
    tensors = (recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta)
    gradients = Gradients(inputs, mask, tensors, element)
    where = (gradients.outputs, gradients.log_sigma, gradients.beta)
    plan = Plan.of(inputs, knobs, resident_programs(inputs.like.device))
    if plan is not None:
        results = elbo_step(inputs, knobs, plan, grad_scale, grad_scale_value, *where)
    else:
        results = elbo_finalize(inputs, elbo_stats(inputs, knobs.free_bits), knobs)
        grad_loss = results.loss.new_full((), grad_scale_value) if grad_scale is None else grad_scale
        elbo_grads(inputs, results.stats, knobs, (grad_loss, None, None), *where)
    return (*results[:4], *gradients.finish())
