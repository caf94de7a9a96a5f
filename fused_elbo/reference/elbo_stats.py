"""Stage one: the sums through which the data and the latents enter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Options, Tensors, compute_dtype, element_sigma, first
from . import math


class Elements(NamedTuple):
    """The data of a call as the formulas take them, of recon's shape and the compute dtype. What has weight 0 is 0."""

    y: Tensor  # recon, before the activation
    error: Tensor  # x̂ − x
    log_sigma: Tensor | None  # where it varies inside a sample
    weight: Tensor | None


def elements(tensors: Tensors, options: Options, dtype: torch.dtype) -> Elements:
    recon, target, weight = tensors.recon, tensors.target, tensors.weight
    assert recon is not None
    assert target is not None
    y, x, log_sigma = recon.to(dtype), math.scaled_target(target, dtype, options), element_sigma(tensors, options)
    if log_sigma is not None:
        log_sigma = log_sigma.to(dtype).expand(recon.shape)
    if weight is not None:
        weight = weight.to(dtype).expand(recon.shape)
        # Before anything is computed: 0 times NaN is NaN, in the gradients of gradients too.
        y, x, log_sigma = (None if t is None else torch.where(weight != 0, t, 0.0) for t in (y, x, log_sigma))
        assert y is not None
        assert x is not None
    return Elements(y, math.activated(y, options) - x, log_sigma, weight)


def stats(tensors: Tensors, options: Options) -> Tensor:
    """[3 or 4, B + 1]: A_i, KL_i, Σ_k max(KL_ik, free_bits), and with weights their sum n_i, of each sample; their sums
    over the batch at the end."""
    dtype = compute_dtype(*tensors[:4])
    a = rate = clamped = torch.zeros_like(rows(first(tensors), dtype)[:, 0])  # of a tensor, so that vmap maps it too
    counts = []
    if tensors.recon is not None:
        data = elements(tensors, options, dtype)
        if data.log_sigma is None:
            of_each = math.power(data.error, options.exponent)
        else:
            of_each = math.scaled_error(data.error, data.log_sigma, options.exponent)
        if data.weight is not None:
            of_each = data.weight * of_each
            counts = [rows(data.weight, dtype).sum(1)]
        a = rows(of_each, dtype).sum(1)
        if tensors.extra_error is not None:
            a = a + tensors.extra_error.to(dtype)
    if tensors.mu is not None and tensors.logvar is not None:
        prior = [None if t is None else rows(t, dtype) for t in (tensors.prior_mu, tensors.prior_logvar)]
        kl = math.kl(rows(tensors.mu, dtype), math.clamped(rows(tensors.logvar, dtype), options), *prior)
        rate, clamped = kl.sum(1), kl.clamp(min=options.free_bits).sum(1)
    each = torch.stack([a, rate, clamped, *counts])
    return torch.cat([each, each.sum(1, keepdim=True)], 1)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:  # [B, *any] -> [B, D]
    return x.to(dtype).reshape(x.shape[0], -1)
