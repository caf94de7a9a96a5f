"""Which β a sweep takes: those at which a VAE of these data goes from many nats to none."""

from __future__ import annotations

import math

import numpy as np

from . import linear
from .data import DataError, Splits, to_unit


def grids(data: Splits, latents: int, points: int) -> dict[str, list[float]]:
    """The betas of each family, log-spaced, from what a linear VAE of these data would do.

    The decoupled families' are powers of two, from just below where it collapses. As sigma² falls with beta, SSE +
    beta * rate has to go through more decades to the same rates: from one end's 2 * beta * sigma² to the other's.
    """
    x = to_unit(data.train).flatten(1)
    eigenvalues = linear.spectrum(x)
    if not eigenvalues[0] > 0:
        raise DataError("the training images are all alike: there is nothing to encode")
    top = 2.0 ** math.floor(math.log2(2 / 3 * linear.switches_off(eigenvalues, 0)))
    decoupled = [top / 2**i for i in reversed(range(points))]
    latents = min(latents, data.dims - 1)
    ends = [2 * linear.optimum(eigenvalues, latents, beta).level for beta in (decoupled[0], decoupled[-1])]
    squared_error = [float(f"{beta:.3g}") for beta in np.geomspace(*ends, points)]
    return {"squared error": squared_error, "decoupled": decoupled, "per image": decoupled}
