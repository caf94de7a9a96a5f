"""Of tensors: shapes, dtypes, devices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import tracing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def tensor(
    name: str, value: object, like: Tensor | None = None, called: str = "recon", besides: torch.dtype | None = None
) -> None:
    """A floating-point tensor, or one of another dtype, on the device of `like`, which the user knows as `called`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES and value.dtype != besides:
        dtypes = "float32, float64, bfloat16 or float16"
        expected = dtypes if besides is None else f"{dtypes.replace(' or ', ', ')} or {str(besides)[6:]}"
        hint = "; scale images to [0, 1] first: x.float() / 255" if value.dtype == torch.uint8 else ""
        hint = f"; a mask is {name}.bool()" if besides == torch.bool else hint
        raise TypeError(f"{name}: expected {expected}, got {value.dtype}{hint}")
    if value.is_nested:  # of either layout; before the layout, for to_dense() knows no jagged one
        advice = f"use torch.nested.to_padded_tensor({name}, 0.0), of which the padding counts as data"
        raise TypeError(f"{name}: expected a dense tensor, got a nested one, of layout {value.layout}; {advice}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; use {name}.to_dense()")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: on {value.device}, but {called} is on {like.device}")


def data(recon: Tensor, target: Tensor, may_be_empty: bool = False) -> None:
    """A pair, of which the target may be of bytes."""
    pair("recon", recon, "target", target, may_be_empty, besides=torch.uint8)


def pair(
    name_a: str, a: Tensor, name_b: str, b: Tensor, may_be_empty: bool = False, besides: torch.dtype | None = None
) -> None:
    """Two tensors of one shape (B, …), with everything after B at least 1, and B too unless it may be empty."""
    tensor(name_a, a)
    tensor(name_b, b, like=a, called=name_a, besides=besides)
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {shape(a)} and {shape(b)}")
    if a.dim() == 0:
        raise ValueError(f"{name_a}: expected a batch dimension, got a 0-d tensor; use {name_a}.unsqueeze(0)")
    if tracing.known(a.numel() == 0) and not (may_be_empty and a.shape[1:].numel()):
        what = "an empty batch" if a.shape[0] == 0 and not may_be_empty else "no elements in a sample"
        raise ValueError(f"{name_a}: {what}, shape {shape(a)}")


def same_batch(recon: Tensor, mu: Tensor, first: str = "recon", second: str = "mu") -> None:
    if recon.shape[0] != mu.shape[0]:
        raise ValueError(f"{first} and {second} must have the same batch size, got {shape(recon)} and {shape(mu)}")
    if recon.device != mu.device:
        raise ValueError(f"{second}: on {mu.device}, but {first} is on {recon.device}")


def element_weight(value: object, recon: Tensor) -> None:
    """A mask or weights of elements, of a shape that broadcasts against recon."""
    tensor("weight", value, recon, besides=torch.bool)
    assert isinstance(value, Tensor)
    if not _broadcasts(value, recon):
        by_sample = value.reshape(*value.shape[:1], *[1] * (recon.dim() - value.dim()), *value.shape[1:])
        hint = f"; weight.reshape{shape(by_sample)} is one for each sample" if _broadcasts(by_sample, recon) else ""
        raise ValueError(f"weight: shape {shape(value)} does not broadcast to recon's {shape(recon)}{hint}")
    if tracing.requires_grad(value):
        raise ValueError("weight: has no gradient here; pass weight.detach()")


def _broadcasts(value: Tensor, to: Tensor) -> bool:
    return value.dim() <= to.dim() and all(
        a in (1, b) for a, b in zip(reversed(value.shape), reversed(to.shape), strict=False)
    )


def extra_error(value: object, recon: Tensor) -> None:
    tensor("extra_error", value, recon)
    assert isinstance(value, Tensor)
    if value.dim() > 0 and value.shape != (recon.shape[0],):
        batch = recon.shape[0]
        hint = "; pass extra_error.flatten()" if value.numel() == batch else ""
        raise ValueError(
            f"extra_error: expected shape () or ({batch},), one per sample, got shape {shape(value)}{hint}"
        )


def has_channels(channels: int, recon: object) -> None:
    tensor("recon", recon)
    assert isinstance(recon, Tensor)
    if recon.dim() < 2 or recon.shape[1] != channels:
        raise ValueError(
            f"channels: {channels} of them, with a σ each, are dimension 1 of recon, got shape {shape(recon)}; for "
            "another dimension use decoupled_elbo with a log_sigma that broadcasts against recon"
        )


def log_sigma(value: object, recon: Tensor) -> None:
    """() or (1,): one σ; (B,): one per image; any other shape: broadcasts against recon from the right."""
    tensor("log_sigma", value, recon)
    assert isinstance(value, Tensor)
    if value.dim() == 1:
        _one_dimensional(value, recon)
        return
    if not _broadcasts(value, recon):
        raise ValueError(f"log_sigma: shape {shape(value)} does not broadcast to recon's {shape(recon)}")


def _one_dimensional(value: Tensor, recon: Tensor) -> None:
    """One log σ or one per image; of another length it is refused, and of one that is the features' too, asked for."""
    count, (batch, *data) = value.shape[0], recon.shape
    if count not in (1, batch):
        raise ValueError(
            f"log_sigma: a 1-D log_sigma is one value or one per image, so (1,) or ({batch},), got {shape(value)} for "
            f"recon of {shape(recon)}; {' or '.join(_along(recon, count)) or 'no dimension of recon is as long'}"
        )
    if count == batch > 1 and len(data) in (1, 2) and data[-1] == batch and not torch.compiler.is_compiling():
        warnings.warn(
            f"log_sigma: of {shape(value)} is one per image, and recon of {shape(recon)} has as many features; "
            f"log_sigma.reshape({', '.join(['-1', *['1'] * len(data)])}) says so without this warning, and "
            f"{_along(recon, count)[-1]}",
            stacklevel=6,
        )


def _along(recon: Tensor, count: int) -> list[str]:
    """How to spell a log_sigma of so many values along another dimension of recon than the batch."""
    ways = []
    for k in range(1, recon.dim()):
        if recon.shape[k] == count:
            sizes = ", ".join(str(count if j == k else 1) for j in range(recon.dim()))
            ways.append(f"log_sigma.reshape({sizes}) is one for each of dimension {k}")
    return ways


def kind(value: object) -> str:
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def prior(value: object, mu: Tensor, called: str = "prior", beside: str = "mu") -> None:
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"{called}: expected a pair (mu_p, logvar_p) of tensors, got {kind(value)}")
    for name, t in zip((f"{called}[0], mu_p", f"{called}[1], logvar_p"), value, strict=True):
        tensor(name, t, mu, called=beside)
        if not _broadcasts(t, mu):
            raise ValueError(f"{name}: shape {shape(t)} does not broadcast to {beside}'s {shape(mu)}")


_USUAL = (Tensor, torch.nn.Parameter)


def usual_level(first: Any, mu: Any, logvar: Any, prior: Any) -> bool:
    """Whether a level is of the kind that nearly all are of, four plain tensors of one shape, dtype and device, with
    the batch of the first level: what `pair`, `same_batch` and `prior` have nothing against. They ask of each tensor
    what could be wrong with it, which for the tens of levels of a hierarchy takes as long as a small one's arithmetic.
    """
    level = (mu, logvar, *prior) if isinstance(prior, (tuple, list)) else (mu, logvar)
    if not (type(first) in _USUAL and type(mu) in _USUAL and (prior is None or len(level) == 4)):
        return False
    if first.is_nested or mu.is_nested or torch.compiler.is_compiling():
        return False
    if not isinstance(mu.numel(), int):  # traced, with sizes that stand for any: to look at them would fix them
        return False
    shape, dtype, device = mu.shape, mu.dtype, mu.device
    for t in level:
        if type(t) not in _USUAL or t.is_nested or t.layout is not torch.strided:
            return False
        if t.shape != shape or t.dtype is not dtype or t.device != device:
            return False
    if dtype not in DTYPES or device != first.device or len(shape) == 0 or first.dim() == 0:
        return False
    return shape[0] == first.shape[0] and mu.numel() > 0


_OF_LEVELS = {"limit": 'clamp what reduction="none" returns', "logvar_range": "clamp the logvar of each level"}


def of_one_level(options: Mapping[str, Any]) -> None:
    """What `gaussian_kl` takes with tensors, and not with lists."""
    for name, advice in _OF_LEVELS.items():
        if options[name] is not None:
            raise ValueError(f"{name}: is not for lists of levels, got {options[name]!r}; {advice}")


def levels(mu: object, logvar: object, prior: object) -> None:
    """One entry for each level of a hierarchy, in all three; the tensors themselves are looked at level by level."""
    if not isinstance(mu, (tuple, list)):
        raise TypeError(f"mu: expected a list, as logvar is, with one tensor for each level, got {kind(mu)}")
    if not isinstance(logvar, (tuple, list)):
        raise TypeError(f"logvar: expected a list, as mu is, with one tensor for each level, got {kind(logvar)}")
    if not mu:
        raise ValueError("mu: no levels, got an empty list")
    if len(logvar) != len(mu):
        raise ValueError(f"mu and logvar must have as many levels, got {len(mu)} and {len(logvar)}")
    if prior is None:
        return
    if not isinstance(prior, (tuple, list)):
        raise TypeError(f"prior: expected a list with (mu_p, logvar_p) or None for each level, got {kind(prior)}")
    if len(prior) != len(mu):
        raise ValueError(f"prior: expected (mu_p, logvar_p) or None for each of {len(mu)} levels, got {len(prior)}")


def per_level(value: object, are_lists: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"per_level: expected True or False, got {value!r}")
    if value and not are_lists:
        raise ValueError("per_level: it is for lists of levels, and mu and logvar are no lists")
