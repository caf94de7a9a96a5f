"""Stage two, O(B): A and KL of the samples to loss, distortion, rate and σ."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import rate
from ..call import NONE, Options, Tensors, first
from ..sigma import Kind
from . import math


class BatchTerms(NamedTuple):
    """What the samples of a batch have in common: these samples, or with them those of other processes."""

    a: Tensor  # ΣA
    elements: float | Tensor  # how many recon has, of all samples; or the sum of their weights
    kl_clamped: Tensor  # the mean over the samples of Σ_k max(KL_ik, free_bits): what a limit per batch is held against
    dims: float | Tensor  # D, or n_i, the sum of a sample's weights, [B]; 0 where there are no data
    weight: float | Tensor  # of a sample, by the reduction


def batch_terms(stats: Tensor, tensors: Tensors, options: Options) -> BatchTerms:
    """Those of the batch that stats are of."""
    a, _, kl_clamped = stats[:3, :-1].unbind(0)
    x = first(tensors)
    batch, dims = x.shape[0], x.shape[1:].numel()
    if tensors.weight is None:
        d = dims if tensors.recon is not None else 0
        weight = math.reduction_weight(options.reduction, batch, dims)
        return BatchTerms(a.sum(), math.elements(batch, dims), kl_clamped.mean(), d, weight)
    counts = stats[3, :-1]
    weight = math.reduction_weight(options.reduction, batch, dims, counts.sum())
    return BatchTerms(a.sum(), counts.sum(), kl_clamped.mean(), counts, weight)


def finalize(
    stats: Tensor, batch: BatchTerms, tensors: Tensors, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma)."""
    a, kl, kl_clamped = stats[:3, :-1].unbind(0)
    if options.sigma_mode == Kind.ELEMENT:
        distortion, sigma = math.distortion(a, None, batch.dims, options), a.new_empty(0)
    else:
        log_sigma = log_sigma_of(a, batch, tensors, options)
        distortion, sigma = math.distortion(a, log_sigma, batch.dims, options), log_sigma.detach().exp()

    beta, limit = math.scalar(tensors.beta, options.beta_value, a), limit_of(tensors, options, a)
    if limit is not None and not rate.of_batch(options.limit_mode):
        kl_clamped = math.limited(kl_clamped, limit, options)
    if options.reduction == NONE:
        return distortion + beta * kl_clamped, distortion, kl.clone(), sigma
    distortion = batch.weight * distortion.sum()
    if limit is not None and rate.of_batch(options.limit_mode):
        penalty = a.shape[0] * beta * math.limited(batch.kl_clamped, limit, options)
    else:
        penalty = (beta * kl_clamped).sum()
    return distortion + batch.weight * penalty, distortion, batch.weight * kl.sum(), sigma


def limit_of(tensors: Tensors, options: Options, like: Tensor) -> Tensor | None:
    if options.limit_mode == rate.Kind.NONE:
        return None
    return math.scalar(tensors.limit, options.limit_value, like)


def log_sigma_of(a: Tensor, batch: BatchTerms, tensors: Tensors, options: Options) -> Tensor:
    """log σ of the samples, (), or (B,); for all modes in which it is one number within a sample."""
    if options.sigma_mode == Kind.BATCH:
        return math.optimal_log_sigma(batch.a, batch.elements, options)
    if options.sigma_mode == Kind.IMAGE:
        return math.optimal_log_sigma(a, batch.dims, options)
    return math.scalar(tensors.log_sigma, options.log_sigma_value, a)
