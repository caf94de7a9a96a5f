"""What the loss has in the place of the rate, as data.

With K_i = KL(q(z|x_i) ‖ p(z)) of sample i, after free_bits, the loss has β times

===============================  ==================================================================================
no limit                         the mean of K_i
`FreeNats(λ)`                    the mean of max(K_i, λ): below λ nats a sample's rate costs no less
`FreeNats(λ, per="batch")`       max(mean of K_i, λ)
`Capacity(C)`                    |mean of K_i − C|: the batch's rate is drawn to C nats
`Capacity(C, per="sample")`      the mean of |K_i − C|
===============================  ==================================================================================

and `free_bits=λ` acts before that, on each latent element: K_i = Σ_k max(KL_ik, λ). The reported rate is the plain KL
in all of them. Maximum and mean do not commute: max(mean, λ) and the mean of max are different losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Kind(IntEnum):
    """The limits as the operators know them; see `of_batch` and `is_floor`."""

    NONE = 0
    BATCH_CAPACITY = 1
    SAMPLE_CAPACITY = 2
    BATCH_FREE_NATS = 3
    SAMPLE_FREE_NATS = 4


def of_batch(kind: int) -> bool:
    """Whether it is held against the batch's mean rate, so that the samples have a gradient in common."""
    return kind in (Kind.BATCH_CAPACITY, Kind.BATCH_FREE_NATS)


def is_floor(kind: int) -> bool:
    return kind in (Kind.BATCH_FREE_NATS, Kind.SAMPLE_FREE_NATS)


def _check_per(limit: str, per: object) -> None:
    if per not in ("sample", "batch"):
        raise ValueError(f"{limit}: per is 'sample' or 'batch', got {per!r}")


@dataclass(frozen=True, eq=False)
class FreeNats:
    """A rate of up to `nats` costs as much as `nats`, so it has no gradient there.

    nats: a number of at least 0, or a 0-d tensor (without gradient).
    per: "sample", each sample's rate by itself; or "batch", the mean rate of the batch.
    """

    nats: float | Tensor
    per: str = "sample"

    def __post_init__(self) -> None:
        _check_per("FreeNats", self.per)


@dataclass(frozen=True, eq=False)
class Capacity:
    """The loss has the distance of the rate from `nats`, which a schedule raises (Burgess et al. 2018).

    nats: a number of at least 0, or a 0-d tensor (without gradient).
    per: "batch", the mean rate of the batch; or "sample", each sample's rate by itself.
    """

    nats: float | Tensor
    per: str = "batch"

    def __post_init__(self) -> None:
        _check_per("Capacity", self.per)


def kind_of(limit: FreeNats | Capacity) -> Kind:
    if isinstance(limit, FreeNats):
        return Kind.BATCH_FREE_NATS if limit.per == "batch" else Kind.SAMPLE_FREE_NATS
    return Kind.BATCH_CAPACITY if limit.per == "batch" else Kind.SAMPLE_CAPACITY
