"""Stage one: the sums through which the data and the latents enter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Options, Tensors, compute_dtype, element_sigma, first
from . import math


def stats(tensors: Tensors, options: Options) -> Tensor:
    """[3, B + 1]: S_i, KL_i, and Σ_k max(KL_ik, free_bits) of each sample; their sums over the batch at the end."""
    recon, target, mu, logvar = tensors[:4]
    dtype = compute_dtype(recon, target, mu, logvar)
    s = rate = clamped = torch.zeros_like(rows(first(tensors), dtype)[:, 0])  # of a tensor, so that vmap maps it too
    if recon is not None and target is not None:
        e = rows(recon, dtype) - rows(target, dtype)
        log_sigma = element_sigma(tensors, options)
        if log_sigma is None:
            s = e.square().sum(1)
        else:
            s = math.scaled_error(e, rows(log_sigma.expand(recon.shape), dtype)).sum(1)
    if mu is not None and logvar is not None:
        prior = [None if t is None else rows(t, dtype) for t in (tensors.prior_mu, tensors.prior_logvar)]
        kl = math.kl(rows(mu, dtype), rows(logvar, dtype), *prior)
        rate, clamped = kl.sum(1), kl.clamp(min=options.free_bits).sum(1)
    each = torch.stack([s, rate, clamped])
    return torch.cat([each, each.sum(1, keepdim=True)], 1)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:  # [B, *any] -> [B, D]
    return x.to(dtype).reshape(x.shape[0], -1)
