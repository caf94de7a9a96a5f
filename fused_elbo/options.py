"""The options that the public functions and modules share: each has its type and its default here, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor

from .rate import Capacity, FreeNats
from .sigma import LOG_SIGMA_RANGE, Constant, Optimal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReductionOptions(TypedDict, total=False):
    reduction: str
    process_group: ProcessGroup | None


class DecoderOptions(TypedDict, total=False):
    """What the decoder's output and the target stand for."""

    activation: str | None
    target_range: tuple[float, float]
    constant: bool


class ElementOptions(TypedDict, total=False):
    """Those that belong to the data of one call."""

    weight: Tensor | None
    extra_error: Tensor | None


class GaussianOptions(ReductionOptions, DecoderOptions, ElementOptions, total=False):
    """Those of `gaussian_nll`."""

    sigma: str | float | Constant | Optimal
    log_sigma: Tensor | None
    min_log_sigma: float


class NLLOptions(GaussianOptions, total=False):
    """Those of `decoder_nll`."""

    likelihood: str


class KLOptions(ReductionOptions, total=False):
    """Those of `gaussian_kl`, but for its prior, which may be a list."""

    free_bits: float
    limit: FreeNats | Capacity | None
    logvar_range: tuple[float, float] | None


class LossOptions(KLOptions, DecoderOptions, total=False):
    """Those of the loss that have nothing to do with σ; `LearnedSigmaELBO` takes them."""

    beta: float | Tensor
    capacity: float | Tensor | None
    likelihood: str


class CriterionOptions(KLOptions, DecoderOptions, total=False):
    """Those that `DecoupledELBO` takes beside beta and sigma."""

    min_log_sigma: float
    capacity: float | Tensor | None
    likelihood: str


class ElboOptions(NLLOptions, LossOptions, total=False):
    """Those of `decoupled_elbo` and `decoupled_elbo_backward`."""

    prior: tuple[Tensor, Tensor] | None


DEFAULTS: ElboOptions = {
    "beta": 1.0,
    "sigma": "optimal",
    "log_sigma": None,
    "min_log_sigma": -7.0,
    "likelihood": "gaussian",
    "activation": None,
    "target_range": (0.0, 1.0),
    "weight": None,
    "extra_error": None,
    "constant": True,
    "prior": None,
    "logvar_range": None,
    "free_bits": 0.0,
    "capacity": None,
    "limit": None,
    "reduction": "batchmean",
    "process_group": None,
}
# The options that are numbers, and no tensors: least and greatest value. `call.Options` has them in this order.
NUMBERS = {"min_log_sigma": (-LOG_SIGMA_RANGE, LOG_SIGMA_RANGE), "free_bits": (0.0, None)}

F = TypeVar("F", bound=Callable[..., Any])


def defaults_of(options: Any) -> dict[str, Any]:
    """By the name of each option of a TypedDict, in the order of DEFAULTS."""
    return {name: value for name, value in DEFAULTS.items() if name in options.__optional_keys__}


def complete(given: Mapping[str, Any], taken: Mapping[str, Any], function: str) -> dict[str, Any]:
    """Every option there is: as given, or its default. TypeError for one that is not among those `taken`."""
    for name in given:
        if name not in taken:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; it takes {', '.join(taken)}")
    return {**DEFAULTS, **given}


_PLAIN = frozenset((float, int, bool, str, type(None)))


def plain(given: Mapping[str, Any]) -> Hashable:
    """A key for options that say nothing of tensors, and so mean the same in every call; None where there are others.
    With their types, since True is no number."""
    if torch.compiler.is_compiling():
        return None
    types: list[Hashable] = []
    for value in given.values():
        within = (type(value),) if type(value) is not tuple else tuple(map(type, value))
        if not _PLAIN.issuperset(within):
            return None
        types.append(within)
    return tuple(given.items()), tuple(types)


def shown(options: Any) -> Callable[[F], F]:
    """A decorator for a function with `**options: Unpack[…]`: help() and editors show each option and its default."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
        taken = {p.name for p in kept}
        only = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, only, default=value, annotation=_annotation(options, name))
            for name, value in defaults_of(options).items()
            if name not in taken
        ]
        positional = [p for p in kept if p.kind != only]
        keywords = [p for p in kept if p.kind == only]
        function.__signature__ = signature.replace(parameters=[*positional, *added, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate


def _annotation(options: Any, name: str) -> Any:
    annotation = options.__annotations__[name]
    return getattr(annotation, "__forward_arg__", annotation)
