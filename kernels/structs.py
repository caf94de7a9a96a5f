"""The structures of pointers, strides and numbers that the kernels work with: csrc's elbo.h has the same.

A NamedTuple of arguments is a structure to Triton. A field that is None is known to be so when a kernel is compiled,
and so is the value of a tl.constexpr; pointers and integers are specialised as a kernel's own arguments are.

A kernel is passed a `Call`: the pointers (`call.Tensors`), the `Numbers`, and a `Layout` with all that shapes, strides,
dtypes and kinds of options decide, which a plan keeps from call to call (`_plan.py`). All stages share them, so an
option that is arithmetic of O(batch) is named here and where `_factors.py` uses it, and in no kernel between.

Ask of a pointer or a number whether it is None, never of a structure: Triton 3.6 fails where that one holds a None. So
what is absent is a structure of Nones.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_elbo import call
from fused_elbo.reference.math import nats_of_one
from fused_elbo.sigma import Kind

constant = functools.lru_cache(maxsize=None, typed=True)(tl.constexpr)  # one object each: making one takes a while
PRESENT = constant(True)


class Bits(NamedTuple):
    """The bits of a double, as whole numbers: 24, 24 and 16 of them."""

    high: float
    middle: float
    low: float


Number = float | Bits


def number(value: float, dtype: torch.dtype) -> Number:
    """Makes the field that `_math.number` reads. Triton passes a Python float in a structure as fp32, which is all that
    a kernel needs that computes in fp32; for one that computes in fp64, three floats hold the number to the last bit.
    """
    if dtype != torch.float64:
        return value
    bits = int.from_bytes(struct.pack(">d", value), "big")
    return Bits(float(bits >> 40), float(bits >> 16 & 0xFFFFFF), float(bits & 0xFFFF))


def whole(n: int) -> int:
    """Makes the field that `_math.whole` reads. Triton compiles a kernel anew for an integer that is 1, and for one
    that 16 divides; an odd number from 3 on is neither, so that one kernel serves batches of all sizes."""
    return 2 * n + 3


class Run(NamedTuple):
    """Dimensions that can be walked as one: they put element k of a sample at k // divisor % size · stride."""

    divisor: int
    size: int
    stride: int


class Broadcast(NamedTuple):
    """What belongs to the elements of a sample and may be repeated, log σ or weights, over one run of dimensions or
    two; samples are `stride` elements apart. Without runs it lies as the data do, and `stride` counts in units."""

    stride: int | None  # None where there is no such thing
    inner: Run | None
    outer: Run | None


class Tiles(NamedTuple):
    """How samples are cut, which `_layout.Tiles` explains."""

    length: int
    chunks: int
    per_chunk: int  # in a layout 2n − 1: odd as `whole` has it, but 1 for 1, which saves the kernel a loop
    programs: int  # that walk them all
    VEC: tl.constexpr
    ROWS: tl.constexpr
    COLS: tl.constexpr
    BY_CHUNK: tl.constexpr


class Data(NamedTuple):
    """recon and target: how far apart their samples lie, in units of VEC elements; None where there are no data. A
    sample is dense."""

    recon: int | None
    target: int | None
    BYTES: tl.constexpr | None  # None where the target has no bytes
    ACTIVATION: tl.constexpr | None  # a likelihood.Activation; None for none
    log_sigma: Broadcast
    weight: Broadcast
    tiles: Tiles


class Latents(NamedTuple):
    """The posterior and, if there is one, the prior, as `Data` has them."""

    mu: int | None
    logvar: int | None
    prior_mu: int | None
    prior_logvar: int | None
    FREE_BITS: tl.constexpr | None  # None without
    RANGE: tl.constexpr | None  # None where logvar is not clamped
    tiles: Tiles


class Batch(NamedTuple):
    """What all samples have in common."""

    size: int
    n: Number  # size, once more
    dims: Number  # elements of a sample
    scale: Number  # what the reduction multiplies a sample by
    ACC: tl.constexpr  # the compute type
    WIDE: tl.constexpr  # whether offsets need 64 bits

    @classmethod
    def of(cls, inputs: Any, reduction: int) -> Batch:
        """`inputs`: a `_layout.Inputs`."""
        batch, dims = inputs.batch, inputs.dims or inputs.latent_dims
        scale = (1 / batch, 1.0, 1 / (batch * dims), 1.0)[reduction]
        numbers = (number(float(value), inputs.dtype) for value in (batch, inputs.dims, scale))
        acc = tl.float64 if inputs.dtype == torch.float64 else tl.float32
        return cls(whole(batch), *numbers, constant(acc), constant(inputs.wide))


class Scalar(NamedTuple):
    """One value for all samples, or one for each: a tensor's, or where there is none a number."""

    PRESENT: tl.constexpr | None  # None where there is neither
    stride: int | None  # between samples; None where one value is for all

    @classmethod
    def of(cls, tensor: Tensor | None, is_number: bool) -> Scalar:
        """`is_number`: where there is no tensor, there is a number."""
        if tensor is not None:
            return cls(PRESENT, whole(tensor.stride(0)) if tensor.dim() else None)
        return cls(PRESENT if is_number else None, None)


ABSENT = Scalar(None, None)


class Options(NamedTuple):
    """The kinds of `call.Options`."""

    Q: tl.constexpr  # the likelihood's exponent
    NATS_OF_ONE: tl.constexpr  # what an element of error 0 costs where σ is 1
    MODE: tl.constexpr  # of σ
    SOFTCLIP: tl.constexpr
    LIMIT: tl.constexpr | None  # a rate.Kind; None where the rate is not limited
    MEAN: tl.constexpr | None  # None where the reduction is another one
    log_sigma: Scalar  # where it does not vary inside a sample
    beta: Scalar
    extra_error: Scalar

    @classmethod
    def of(cls, tensors: call.Tensors, options: call.Options) -> Options:
        given = None if options.sigma_mode == Kind.ELEMENT else tensors.log_sigma
        return cls(
            constant(options.exponent), constant(nats_of_one(options)),
            constant(int(options.sigma_mode)), constant(options.softclip),
            constant(options.limit_mode) if options.limit_mode else None,
            PRESENT if options.reduction == call.MEAN else None,
            Scalar.of(given, True), Scalar.of(tensors.beta, True), Scalar.of(tensors.extra_error, False),
        )  # fmt: skip


class GradOutputsLayout(NamedTuple):
    """Of the gradients that come in; one is absent where an output was not used."""

    loss: Scalar
    distortion: Scalar
    rate: Scalar


class GradOutputs(NamedTuple):
    """`call.GradOutputs`, and what reaches every error through a σ of the batch where the samples' weights differ."""

    loss: Tensor | None = None
    distortion: Tensor | None = None
    rate: Tensor | None = None
    shared_sigma_term: Tensor | None = None


class Numbers(NamedTuple):
    """What changes from call to call besides the tensors."""

    log_sigma: Number
    min_log_sigma: Number
    beta: Number
    limit: Number
    free_bits: Number
    logvar_min: Number
    logvar_max: Number
    target_low: Number
    target_step: Number  # what 1 of a byte is
    grad_scale: Number  # of a step

    @classmethod
    def of(cls, options: call.Options, dtype: torch.dtype, grad_scale: float = 0.0) -> Numbers:
        values = (
            options.log_sigma_value, options.min_log_sigma, options.beta_value, options.limit_value,
            options.free_bits, options.logvar_min or 0.0, options.logvar_max or 0.0, options.target_low,
            (options.target_high - options.target_low) / 255, grad_scale,
        )  # fmt: skip
        return cls(*values) if dtype != torch.float64 else cls(*(number(float(value), dtype) for value in values))


class Layout(NamedTuple):
    """What a plan keeps. Integers are as `whole` makes them."""

    data: Data
    latents: Latents
    batch: Batch
    options: Options
    grad_outputs: GradOutputsLayout


class Call(NamedTuple):
    """What a kernel is told of a call: its tensors and numbers, and then a `Layout`."""

    tensors: call.Tensors
    numbers: Numbers
    data: Data
    latents: Latents
    batch: Batch
    options: Options
    grad_outputs: GradOutputsLayout


class Partials(NamedTuple):
    """Partial sums, [batch, chunks]; None where there are no data, or no latents."""

    a: Tensor | None
    weights: Tensor | None  # None where elements have none
    kl: Tensor | None
    clamped: Tensor | None  # None without free bits: it is `kl` then


class Blocks(NamedTuple):
    """How `elbo_finalize.finalize` takes the partial sums."""

    PER_SAMPLE: tl.constexpr  # whether the loss is to be that of each sample
    ROWS: tl.constexpr  # samples at a time
    DATA: tl.constexpr  # partial sums of a sample's data at a time
    LATENT: tl.constexpr


class Workspace(NamedTuple):
    """What the programs of a launch tell one another by."""

    partials: Partials
    totals: Tensor | None  # what each program of a step has found of A, then of KL, and then of the weights
    barrier: Tensor


class Written(NamedTuple):
    """What a step writes; gradients as `elbo_grads` does."""

    outputs: call.Outputs
    gradients: call.Gradients


class Sums(NamedTuple):
    """What a kernel knows of a block of samples: A, the clamped KL, and how many elements, or weights of them, A is a
    sum of; of each sample, and in the batch."""

    a: tl.tensor
    total: tl.tensor
    clamped: tl.tensor
    clamped_total: tl.tensor
    dims: tl.tensor
    elements: tl.tensor


class Factors(NamedTuple):
    """What a sample's elements are multiplied by, and its part of the gradients of a given log σ and of β."""

    recon_scale: tl.tensor  # of x̂ − x; the sample's weight where σ varies inside it
    grad_kl_clamped: tl.tensor  # of the KL that free_bits let through
    grad_kl: tl.tensor  # of every KL
    log_sigma: tl.tensor
    beta: tl.tensor
