"""Of the aggregate posterior's points and components."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import tracing
from .options import flag
from .tensors import pair, shape, tensor


def aggregate(z: Tensor, mu: Tensor, logvar: Tensor, own: object, size: object, may_be_empty: bool) -> None:
    """z of (B, …), mu and logvar of (M, …), how they belong together, and the size of the data set."""
    flag("own", own)
    tensor("z", z)
    pair("mu", mu, "logvar", logvar, may_be_empty)
    tensor("mu", mu, like=z, called="z")
    if z.dim() == 0 or z.shape[1:] != mu.shape[1:]:
        raise ValueError(
            f"z and mu must have the same shape after their first dimension, got {shape(z)} and {shape(mu)}"
        )
    if mu.dim() < 2:
        raise ValueError(f"mu: expected (M, K), a vector for each component, got shape {shape(mu)}; use mu[:, None]")
    if not may_be_empty and tracing.known(z.shape[0] == 0):
        raise ValueError(f"z: an empty batch, shape {shape(z)}")
    # Compiled code must serve batches of all sizes: it compares none.
    if own and not torch.compiler.is_compiling() and z.shape[0] > mu.shape[0]:
        raise ValueError(
            f"own: each z has a component of its own, but there are {z.shape[0]} of z and {mu.shape[0]} of mu; pass "
            "own=False if they have nothing to do with each other"
        )
    if size is not None and not own:
        raise ValueError(f"dataset_size: own=False weighs all components alike, got dataset_size={size!r} beside it")
    # With a process group the components of all ranks count, which are not known yet.
    dataset_size(size, mu.shape[0] if not may_be_empty else 1)


def dataset_size(size: object, components: int, whose: str = "") -> None:
    if size is None or isinstance(size, torch.SymInt):
        return
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"dataset_size: expected None or a whole number, got {size!r}")
    if not torch.compiler.is_compiling() and size < components:
        some = f"{components} components{' ' * bool(whose)}{whose}"
        raise ValueError(f"dataset_size: expected at least as many as the {some}, got {size!r}")


def samples_of(z: Tensor, mu: Tensor) -> None:
    """One z of each posterior."""
    if z.shape[0] != mu.shape[0]:
        raise ValueError(f"z and mu must have the same batch size, got {shape(z)} and {shape(mu)}")
