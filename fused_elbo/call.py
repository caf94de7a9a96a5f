"""What the operators take and give: named, and in order, here alone.

Schemas, fakes, autograd, the reference and every backend take the names and the order from these structures. A new
option is a field of `Options`, a new tensor a field of `Tensors`; csrc/elbo.h and kernels/structs.py have the same.
What begins with `Mixture` belongs to the aggregate posterior; csrc/aggregate.h has the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import rate
from .likelihood import Activation
from .sigma import Kind

REDUCTIONS = ("batchmean", "sum", "mean", "none")  # an operator's `reduction` is the index
BATCHMEAN, SUM, MEAN, NONE = range(4)


class Tensors(NamedTuple):
    """The tensors of a call. recon and target, or mu and logvar, may be absent together, and both priors.

    log_sigma, beta and limit count where they are present; where they are None, the number in `Options` does.
    """

    recon: Tensor | None = None
    target: Tensor | None = None  # uint8 too: see target_low
    mu: Tensor | None = None
    logvar: Tensor | None = None
    log_sigma: Tensor | None = None  # (), (B,), or of recon's rank where σ varies inside a sample (Kind.ELEMENT)
    prior_mu: Tensor | None = None
    prior_logvar: Tensor | None = None
    beta: Tensor | None = None  # () or (B,)
    extra_error: Tensor | None = None  # () or (B,): added to a sample's A
    limit: Tensor | None = None  # ()
    weight: Tensor | None = None  # of each element, of recon's rank: bool or floating


LATENTS = ("mu", "logvar", "prior_mu", "prior_logvar")  # the fields of one level, and their order in lists of levels


class Options(NamedTuple):
    """The plain values of a call."""

    exponent: int = 2  # q of the likelihood: 2 Gaussian, 1 Laplace
    activation: int = int(Activation.NONE)  # a likelihood.Activation
    constant: bool = True  # whether log 2π, or log 2, is part of the distortion
    target_low: float = 0.0  # what 0 and 255 of a target of dtype uint8 mean
    target_high: float = 1.0
    sigma_mode: int = int(Kind.GIVEN)  # a sigma.Kind
    softclip: bool = False
    log_sigma_value: float = 0.0
    min_log_sigma: float = 0.0
    free_bits: float = 0.0
    beta_value: float = 1.0
    limit_mode: int = int(rate.Kind.NONE)
    limit_value: float = 0.0
    logvar_min: float | None = None  # logvar is clamped to these; both, or neither
    logvar_max: float | None = None
    reduction: int = BATCHMEAN


class Outputs(NamedTuple):
    """What `forward` gives; all have the compute dtype."""

    loss: Tensor
    distortion: Tensor
    rate: Tensor
    sigma: Tensor  # (0,) where σ varies inside a sample
    stats: Tensor  # [3, B + 1]: A_i, KL_i, Σ_k max(KL_ik, free_bits); the last column has their sums over the batch.
    # With weights [4, B + 1]: n_i, their sum, besides.


class GradOutputs(NamedTuple):
    """The gradients that come in, of the first three outputs; None where an output was not used."""

    loss: Tensor | None = None
    distortion: Tensor | None = None
    rate: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients that go out, of the first nine tensors and in their order; bit i of a mask asks for the i-th.

    Each has its tensor's dtype and the strides of `torch.empty_like`; what the mask does not ask for has shape (0,).
    """

    recon: Any
    target: Any
    mu: Any
    logvar: Any
    log_sigma: Any
    prior_mu: Any
    prior_logvar: Any
    beta: Any
    extra_error: Any


class Mixture(NamedTuple):
    """A mixture's components, mu and logvar, and the points z where its densities are asked for."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    own: int  # the component that z[0] was drawn from, z[1] from the next one, and so on; or negative
    dataset_size: int | None


class LogSums(NamedTuple):
    """What `aggregate` gives; both have the compute dtype."""

    joint: Tensor  # [B]
    marginals: Tensor  # [B, K]


class GradLogSums(NamedTuple):
    """The gradients that come in; None where an output was not used."""

    joint: Tensor | None
    marginals: Tensor | None


class MixtureGradients(NamedTuple):
    """The gradients that go out, as `Gradients` are: bit i of a mask asks for the i-th."""

    z: Any
    mu: Any
    logvar: Any


def first(tensors: Tensors) -> Tensor:
    """recon, or mu where there are no data: the tensor that tells batch size and device."""
    x = tensors.recon if tensors.recon is not None else tensors.mu
    assert x is not None
    return x


def element_sigma(tensors: Tensors, options: Options) -> Tensor | None:
    """log σ where it varies inside a sample; everywhere else the passes over the data do not see it."""
    return tensors.log_sigma if options.sigma_mode == Kind.ELEMENT else None


def stats_rows(tensors: Tensors) -> int:
    return 3 if tensors.weight is None else 4


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What is computed and returned in: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def mask_of(wanted: Any) -> int:
    """The bits of the gradients that are wanted, of as many bools as `Gradients` has fields (or more)."""
    a, b, c, d, e, f, g, h, i, *_ = wanted
    return a | b << 1 | c << 2 | d << 3 | e << 4 | f << 5 | g << 6 | h << 7 | i << 8


def masked(values: Gradients, mask: int, make: Callable[[Any], Tensor], device_of: Tensor) -> Gradients:
    """`make` of the values whose bits are set, and empty tensors in the place of the others."""
    return Gradients._make(
        make(value) if mask >> i & 1 else device_of.new_empty(0, dtype=torch.float32) for i, value in enumerate(values)
    )


_IN_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    float: "float",
    float | None: "float?",
}


def schema(structure: type, prefix: str = "") -> str:
    """A structure's fields as the arguments of an operator's schema: "Tensor? recon, Tensor? target, …"."""
    return ", ".join(f"{_IN_SCHEMA[kind]} {prefix}{name}" for name, kind in get_type_hints(structure).items())


def returns(count: int) -> str:
    """What an operator's schema says that it returns, where that is so many tensors."""
    return f"({', '.join(['Tensor'] * count)})"
