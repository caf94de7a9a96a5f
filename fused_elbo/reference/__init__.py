"""The operators in plain PyTorch: the truth in tests, the formulas of second derivatives, the backend of last resort.

Three stages of the loss, each in a file of the stem that it has in every language; the formulas are in math.py, and
aggregate.py has the operators of the aggregate posterior:

    elbo_stats       A_i = Σ_d |e_id|^q   and   KL_i                   the only numbers through which the data enter
    elbo_finalize    A, KL → loss, distortion, rate, σ                 O(B)
    elbo_grads       ∂L/∂x̂ = a_i |e|^(q−1) sign e    ∂L/∂μ = b_i μ    ∂L/∂l = b_i ½(exp(l) − 1)

q is 2 for the Gaussian likelihood, and 1 for the Laplace one. Where σ varies inside a sample, A_i is
Σ_d [|e|^q/σ_d^q + q log σ_d] and elbo_grads has σ_d in it; where elements have weights, each term is multiplied by its
own.
Everything is computed in fp32, or in fp64 if recon, target, mu or logvar is fp64, and is differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Gradients, GradOutputs, Options, Outputs, Tensors, first, masked
from . import aggregate
from .elbo_finalize import batch_terms, finalize
from .elbo_grads import gradients
from .elbo_stats import stats

__all__ = ["aggregate", "finalize", "forward", "gradients", "grads", "stats", "step"]


def forward(tensors: Tensors, options: Options) -> Outputs:
    sums = stats(tensors, options)
    return Outputs(*finalize(sums, batch_terms(sums, tensors, options), tensors, options), sums)


def grads(tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs, mask: int) -> Gradients:
    """`gradients` as the operator promises them: those that the mask asks for, with empty_like's strides."""

    def with_strides(pair: tuple[Tensor, Tensor]) -> Tensor:
        wanted = torch.empty_like(pair[0])
        return pair[1] if pair[1].stride() == wanted.stride() else wanted.copy_(pair[1])

    pairs = Gradients._make(zip(tensors, gradients(tensors, options, stats, grad_outputs), strict=False))
    return masked(pairs, mask, with_strides, first(tensors))


def step(
    tensors: Tensors, options: Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
) -> tuple[Tensor, ...]:
    """(loss, distortion, rate, sigma, *gradients of grad_scale · loss)."""
    outputs = forward(tensors, options)
    scale = outputs.loss.new_full((), grad_scale_value) if grad_scale is None else grad_scale
    return (*outputs[:4], *grads(tensors, options, outputs.stats, GradOutputs(scale), mask))
