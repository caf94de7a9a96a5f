"""What a σ mode is, as data.

The decoder's likelihood is N(x | x̂, σ²). Where σ comes from is the mode:

=====================  ==========================================================================================
mode                   log σ
=====================  ==========================================================================================
`Constant(value)`      log value
`Optimal()`            ½ log MSE over the whole batch: the σ that maximises the likelihood
`Optimal(per_image)`   ½ log MSE of each sample by itself
learned `log_sigma`    what you pass: shared, per image, or varying inside a sample (per channel, per pixel)
=====================  ==========================================================================================

A mode whose σ is the same within a sample enters the loss through the sum of squared errors alone, so it is O(B)
arithmetic in `finalize` and in the prologue of `grads`; only `Kind.ELEMENT` touches the element loops.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from enum import IntEnum

import torch.nn.functional as F
from torch import Tensor

LOG_SIGMA_RANGE = 40.0  # beyond it 1/σ² comes near the ends of fp32, and 0 · inf is NaN where the error is 0


class Kind(IntEnum):
    """The modes as the operators know them."""

    GIVEN = 0  # log σ is an input: a number, () or (B,)
    BATCH = 1  # σ² = MSE of the batch
    IMAGE = 2  # σ² = MSE of the sample
    ELEMENT = 3  # log σ is an input that varies inside a sample


@dataclass(frozen=True)
class Constant:
    """One fixed standard deviation. σ = 1 is ½Σe², σ² = ½ is Σe², both up to a constant."""

    value: float

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, numbers.Real):
            raise TypeError(f"sigma: a constant σ is a Python number, got {self.value!r}")
        if not math.exp(-LOG_SIGMA_RANGE) <= self.value <= math.exp(LOG_SIGMA_RANGE):  # type: ignore[operator]
            limits = f"positive and finite, with log σ within ±{LOG_SIGMA_RANGE:g}"
            raise ValueError(f"sigma: a constant σ must be {limits}, got {self.value!r}")


@dataclass(frozen=True)
class Optimal:
    """The σ that maximises the likelihood, σ² = MSE, in closed form (Rybkin et al. 2021).

    per_image: one σ for every sample instead of one for the batch.
    softclip: bound log σ from below by m + softplus(½ log MSE − m), m being the floor, as the calibrated-decoder code
        does, instead of by max(½ log MSE, m). Kept to reproduce that code: it is biased above the floor too
        (½ log MSE = −5 becomes −4.69 at m = −6).
    """

    per_image: bool = False
    softclip: bool = False

    def __post_init__(self) -> None:
        for name in ("per_image", "softclip"):
            if not isinstance(getattr(self, name), bool):  # Optimal(0.1) would otherwise mean per image
                raise TypeError(f"sigma: Optimal's {name} is True or False, got {getattr(self, name)!r}")


BY_NAME = {"optimal": Optimal(), "optimal-per-image": Optimal(per_image=True)}


def resolve(sigma: str | float | Constant | Optimal) -> Constant | Optimal:
    """The mode that a `sigma=` argument means."""
    if isinstance(sigma, (Constant, Optimal)):
        return sigma
    if isinstance(sigma, str):
        if sigma in BY_NAME:
            return BY_NAME[sigma]
        raise ValueError(f"sigma: unknown mode {sigma!r}; the modes are {_MODES}")
    if isinstance(sigma, numbers.Real) and not isinstance(sigma, bool):
        return Constant(sigma)  # type: ignore[arg-type]
    if isinstance(sigma, Tensor):
        raise TypeError("sigma: got a tensor; pass a learned σ as log_sigma=sigma.log()")
    raise TypeError(f"sigma: expected {_MODES}, got {type(sigma).__name__}")


_MODES = (
    ", ".join(repr(name) for name in BY_NAME)
    + ", a positive float, or Constant(value) / Optimal(per_image=…, softclip=…) from fused_elbo.sigma"
)


def softclip(log_sigma: Tensor, minimum: float) -> Tensor:
    """A smooth lower bound for a learned log σ: `minimum + softplus(log_sigma − minimum)`.

    A learned log_sigma gets no hard floor in this library, since below one its gradient would vanish and it would stay
    there. This bound keeps a gradient everywhere.

    >>> softclip(torch.tensor([-20.0, -3.0]), -6.0)
    tensor([-6.0000, -2.9514])
    """
    return minimum + F.softplus(log_sigma - minimum)
