"""What the decoder's likelihood is, and what stands just before it, as data.

=============  ========================  =======================================  =======================
likelihood     density of x              −log p of one element, e = x̂ − x        optimal scale
=============  ========================  =======================================  =======================
"gaussian"     N(x̂, s²)                  e²/(2s²) + log s + ½ log 2π              s² = mean of e²
"laplace"      Laplace(x̂, s)             |e|/s + log s + log 2                    s = mean of |e|
=============  ========================  =======================================  =======================

With the exponent q = 2 or 1 both are |e|^q/(q s^q) + log s + const, so A = Σ|e|^q is all that a sample's distortion
needs of its data. The exponent is what the operators are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

EXPONENTS = {"gaussian": 2, "laplace": 1}


class Activation(IntEnum):
    """What makes x̂ of `recon`, as the operators know it."""

    NONE = 0
    SIGMOID = 1
    TANH = 2


ACTIVATIONS = {None: Activation.NONE, "sigmoid": Activation.SIGMOID, "tanh": Activation.TANH}


def exponent(likelihood: object) -> int:
    """q of the likelihood that a `likelihood=` argument means."""
    return _one_of("likelihood", likelihood, EXPONENTS)


def activation(value: object) -> int:
    return int(_one_of("activation", value, ACTIVATIONS))


def _one_of(name: str, value: Any, values: Mapping[Any, int]) -> int:
    if not isinstance(value, str) and value is not None:
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, values))}, got {type(value).__name__}")
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")
    return values[value]
