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
    """log σ where it varies inside a sample, over one run of dimensions or two; samples are `stride` elements apart.
    Without runs it lies as the data do, and `stride` counts in units."""

    stride: int | None  # None where σ does not vary inside a sample
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
    log_sigma: Broadcast
    tiles: Tiles


class Latents(NamedTuple):
    """The posterior and, if there is one, the prior, as `Data` has them."""

    mu: int | None
    logvar: int | None
    prior_mu: int | None
    prior_logvar: int | None
    FREE_BITS: tl.constexpr | None  # None without
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

    MODE: tl.constexpr  # of σ
    SOFTCLIP: tl.constexpr
    log_sigma: Scalar  # where it does not vary inside a sample
    beta: Scalar
    capacity: Scalar  # absent where the rate is not limited

    @classmethod
    def of(cls, tensors: call.Tensors, options: call.Options) -> Options:
        given = None if options.sigma_mode == Kind.ELEMENT else tensors.log_sigma
        return cls(
            constant(int(options.sigma_mode)), constant(options.softclip), Scalar.of(given, True),
            Scalar.of(tensors.beta, True), Scalar.of(tensors.capacity, options.capacity_value is not None),
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
    capacity: Number
    free_bits: Number
    grad_scale: Number  # of a step

    @classmethod
    def of(cls, options: call.Options, dtype: torch.dtype, grad_scale: float = 0.0) -> Numbers:
        values = (
            options.log_sigma_value, options.min_log_sigma, options.beta_value, options.capacity_value or 0.0,
            options.free_bits, grad_scale,
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

    s: Tensor | None
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
    totals: Tensor | None  # what each program of a step has found of S, and then of KL
    barrier: Tensor


class Written(NamedTuple):
    """What a step writes; gradients as `elbo_grads` does."""

    outputs: call.Outputs
    gradients: call.Gradients


class Sums(NamedTuple):
    """What a kernel knows of a block of samples: S and the clamped KL of each, and their sums over the batch."""

    s: tl.tensor
    total: tl.tensor
    clamped: tl.tensor
    clamped_total: tl.tensor


class Factors(NamedTuple):
    """What a sample's elements are multiplied by, and its part of the gradients of a given log σ and of β."""

    recon_scale: tl.tensor  # of x̂ − x; the sample's weight where σ varies inside it
    grad_kl_clamped: tl.tensor  # of the KL that free_bits let through
    grad_kl: tl.tensor  # of every KL
    log_sigma: tl.tensor
    beta: tl.tensor
