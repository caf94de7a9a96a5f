"""What the public functions refuse, before any work: every message names the argument and shows what was passed.

Only what the host knows is checked (shapes, dtypes, devices, Python numbers); values inside tensors never are, since
looking at them would wait for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import tracing
from .call import REDUCTIONS
from .options import NUMBERS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


MAX = float(torch.finfo(torch.float32).max)  # numbers meet fp32 tensors
_NUMBERS = tuple((name, low, MAX if high is None else high) for name, (low, high) in NUMBERS.items())


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def tensor(name: str, value: object, like: Tensor | None = None, called: str = "recon") -> None:
    """A floating-point tensor, on the device of `like`, which the user knows as `called`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        hint = "; scale images to [0, 1] first: x.float() / 255" if value.dtype == torch.uint8 else ""
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}{hint}")
    if value.is_nested:  # of either layout; before the layout, for to_dense() knows no jagged one
        advice = f"use torch.nested.to_padded_tensor({name}, 0.0), of which the padding counts as data"
        raise TypeError(f"{name}: expected a dense tensor, got a nested one, of layout {value.layout}; {advice}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; use {name}.to_dense()")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: on {value.device}, but {called} is on {like.device}")


def pair(name_a: str, a: Tensor, name_b: str, b: Tensor, may_be_empty: bool = False) -> None:
    """Two tensors of one shape (B, …), with everything after B at least 1, and B too unless it may be empty."""
    tensor(name_a, a)
    tensor(name_b, b, like=a, called=name_a)
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


def number(name: str, value: object, minimum: float = -MAX, maximum: float = MAX) -> None:
    """A Python (or NumPy) number between two bounds."""
    if type(value) is not float and type(value) is not int:  # what it mostly is; the rest is slower to tell
        if isinstance(value, (torch.SymFloat, torch.SymInt)):  # traced by torch.compile: there is no value to check
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not minimum <= value <= maximum:  # type: ignore[operator]
        least = "" if minimum == -MAX else f" of at least {minimum:g}"
        most = "" if maximum == MAX else f" and at most {maximum:g}"
        raise ValueError(f"{name}: expected a finite number{least}{most}, got {value!r}")


def weight(value: object, batch: int, like: Tensor) -> None:
    """β: a number, a 0-d tensor or one value per sample."""
    if isinstance(value, Tensor):
        tensor("beta", value, like)
        if value.dim() > 0 and value.shape != (batch,):
            raise ValueError(
                f"beta: expected a number, shape () or ({batch},), one per sample, got shape {shape(value)}"
            )
    else:
        number("beta", value, 0)


def numbers(options: Mapping[str, Any]) -> list[float]:
    """The options that are numbers, in the order of `options.NUMBERS`."""
    for name, minimum, maximum in _NUMBERS:
        number(name, options[name], minimum, maximum)
    return [float(options[name]) for name in NUMBERS]


def configuration(given: Mapping[str, object]) -> None:
    """The options that a module keeps, of which the tensors are not known yet."""
    for name in ("beta", "capacity"):
        if given[name] is not None and not isinstance(given[name], Tensor):
            number(name, given[name], 0)
    numbers(given)
    index = reduction(given["reduction"])
    if given["process_group"] is not None:
        process_group(given["process_group"], index)


def capacity(value: object, beta: object, reduction: str, like: Tensor) -> None:
    why = "capacity: is held against the batch mean, so it excludes"
    if reduction == "none":
        raise ValueError(f'{why} reduction="none"')
    if isinstance(beta, Tensor) and beta.dim() > 0:
        raise ValueError(f"{why} a beta per sample, got {shape(beta)}")
    if not isinstance(value, Tensor):
        number("capacity", value, 0)
        return
    tensor("capacity", value, like)
    if value.dim() > 0:
        raise ValueError(f"capacity: expected a number or a 0-d tensor, got shape {shape(value)}")
    if tracing.requires_grad(value):
        raise ValueError("capacity: has no gradient here; pass capacity.detach()")


def grad_scale(value: object, like: Tensor) -> None:
    if isinstance(value, torch.amp.GradScaler):
        raise TypeError("grad_scale: got a GradScaler; pass scaler.scale(torch.ones((), device=recon.device))")
    if not isinstance(value, Tensor):
        number("grad_scale", value)
        return
    tensor("grad_scale", value, like)
    if value.numel() != 1:
        raise ValueError(f"grad_scale: expected a number or a tensor of one element, got shape {shape(value)}")
    if value.requires_grad:
        raise ValueError("grad_scale: has no gradient here; pass grad_scale.detach()")


def reduction(value: object) -> int:
    if value not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    return REDUCTIONS.index(value)  # type: ignore[arg-type]


def process_group(value: object, reduction: int) -> None:
    if not dist.is_available():
        raise RuntimeError("process_group: this PyTorch is built without torch.distributed")
    if value == dist.GroupMember.NON_GROUP_MEMBER:  # what dist.new_group returns to those that are not in it
        raise ValueError("process_group: this process is not a member of the group; its members alone may call")
    if not isinstance(value, dist.ProcessGroup):
        hint = ""
        if type(value).__name__ == "DeviceMesh":
            several = getattr(value, "ndim", 1) > 1
            which = "mesh.get_group(…) of the dimension along which the batch is sharded"
            hint = f": pass {which if several else 'mesh.get_group()'}"
        raise TypeError(f"process_group: expected a ProcessGroup, as dist.group.WORLD, got {_kind(value)}{hint}")
    if not dist.is_initialized():
        raise RuntimeError("process_group: torch.distributed is not initialised; call dist.init_process_group first")
    try:
        dist.get_rank(value)
    except ValueError as error:
        raise ValueError(f"process_group: this process has no such group (any more): {error}") from None
    if REDUCTIONS[reduction] == "none":
        raise ValueError(
            'process_group: excludes reduction="none", whose samples get their weights in backward, where ranks tell '
            "each other nothing; for values of each sample pass log_sigma=elbo.sigma.log() of a call with the group"
        )


def dtype(value: object) -> None:
    """Of a module's state; None is the default."""
    if value is not None and value not in DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {value!r}")


def channels(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:  # NumPy's integers are Integral
        raise ValueError(f"channels: expected None or a positive integer, got {value!r}")
    return int(value)


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
    fits = value.dim() <= recon.dim() and all(
        a in (1, b) for a, b in zip(reversed(value.shape), reversed(recon.shape), strict=False)
    )
    if not fits:
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


def _kind(value: object) -> str:
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def prior(value: object, mu: Tensor, called: str = "prior", beside: str = "mu") -> None:
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"{called}: expected a pair (mu_p, logvar_p) of tensors, got {_kind(value)}")
    for name, t in zip((f"{called}[0], mu_p", f"{called}[1], logvar_p"), value, strict=True):
        tensor(name, t, mu, called=beside)
        fits = t.dim() <= mu.dim() and all(
            a in (1, b) for a, b in zip(reversed(t.shape), reversed(mu.shape), strict=False)
        )
        if not fits:
            raise ValueError(f"{name}: shape {shape(t)} does not broadcast to {beside}'s {shape(mu)}")


def levels(mu: object, logvar: object, prior: object) -> None:
    """One entry for each level of a hierarchy, in all three; the tensors themselves are looked at level by level."""
    if not isinstance(mu, (tuple, list)):
        raise TypeError(f"mu: expected a list, as logvar is, with one tensor for each level, got {_kind(mu)}")
    if not isinstance(logvar, (tuple, list)):
        raise TypeError(f"logvar: expected a list, as mu is, with one tensor for each level, got {_kind(logvar)}")
    if not mu:
        raise ValueError("mu: no levels, got an empty list")
    if len(logvar) != len(mu):
        raise ValueError(f"mu and logvar must have as many levels, got {len(mu)} and {len(logvar)}")
    if prior is None:
        return
    if not isinstance(prior, (tuple, list)):
        raise TypeError(f"prior: expected a list with (mu_p, logvar_p) or None for each level, got {_kind(prior)}")
    if len(prior) != len(mu):
        raise ValueError(f"prior: expected (mu_p, logvar_p) or None for each of {len(mu)} levels, got {len(prior)}")


def per_level(value: object, are_lists: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"per_level: expected True or False, got {value!r}")
    if value and not are_lists:
        raise ValueError("per_level: it is for lists of levels, and mu and logvar are no lists")
