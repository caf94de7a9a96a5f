"""Stage two, O(B): S and KL of the samples to loss, distortion, rate and σ."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..call import NONE, Options, Tensors, first, has_capacity
from ..sigma import Kind
from . import math


class BatchTerms(NamedTuple):
    """What the samples of a batch have in common: these samples, or with them those of other processes."""

    s: Tensor  # ΣS
    elements: float | Tensor  # how many recon has, of all samples
    kl_clamped: Tensor  # the mean over the samples of Σ_k max(KL_ik, free_bits): what capacity is held against
    dims: int  # D; 0 where there are no data
    weight: float | Tensor  # of a sample, by the reduction


def batch_terms(stats: Tensor, tensors: Tensors, options: Options) -> BatchTerms:
    """Those of the batch that stats are of."""
    s, _, kl_clamped = stats[:, :-1].unbind(0)
    x = first(tensors)
    batch, dims = x.shape[0], x.shape[1:].numel()
    d = dims if tensors.recon is not None else 0
    weight = math.reduction_weight(options.reduction, batch, dims)
    return BatchTerms(s.sum(), math.elements(batch, dims), kl_clamped.mean(), d, weight)


def finalize(
    stats: Tensor, batch: BatchTerms, tensors: Tensors, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma)."""
    s, kl, kl_clamped = stats[:, :-1].unbind(0)
    if options.sigma_mode == Kind.ELEMENT:
        distortion, sigma = math.distortion(s, None, batch.dims), s.new_empty(0)
    else:
        log_sigma = log_sigma_of(s, batch, tensors, options)
        distortion, sigma = math.distortion(s, log_sigma, batch.dims), log_sigma.detach().exp()

    beta = math.scalar(tensors.beta, options.beta_value, s)
    if options.reduction == NONE:
        return distortion + beta * kl_clamped, distortion, kl.clone(), sigma
    distortion = batch.weight * distortion.sum()
    if has_capacity(tensors, options):
        gap = capacity_gap(batch, tensors, options)
        loss = distortion + batch.weight * s.shape[0] * beta * gap.abs()
    else:
        loss = distortion + batch.weight * (beta * kl_clamped).sum()
    return loss, distortion, batch.weight * kl.sum(), sigma


def capacity_gap(batch: BatchTerms, tensors: Tensors, options: Options) -> Tensor:
    """By how much the batch's mean rate, as β sees it, exceeds the capacity."""
    return batch.kl_clamped - math.scalar(tensors.capacity, options.capacity_value, batch.kl_clamped)


def log_sigma_of(s: Tensor, batch: BatchTerms, tensors: Tensors, options: Options) -> Tensor:
    """log σ of the samples, (), or (B,); for all modes in which it is one number within a sample."""
    if options.sigma_mode == Kind.BATCH:
        return math.optimal_log_sigma(batch.s, batch.elements, options)
    if options.sigma_mode == Kind.IMAGE:
        return math.optimal_log_sigma(s, batch.dims, options)
    return math.scalar(tensors.log_sigma, options.log_sigma_value, s)
