"""Of the other options: numbers, names, what limits a rate, process groups."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import likelihood, tracing
from ..call import REDUCTIONS
from ..options import NUMBERS
from ..rate import Capacity, FreeNats
from .tensors import DTYPES, kind, shape, tensor

MAX = float(torch.finfo(torch.float32).max)  # numbers meet fp32 tensors
_NUMBERS = tuple((name, low, MAX if high is None else high) for name, (low, high) in NUMBERS.items())


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


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def ascending(name: str, value: object) -> tuple[float, float]:
    """Two finite numbers, the first one below the second."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"{name}: expected a pair of numbers, got {value!r}")
    low, high = value
    number(f"{name}[0]", low)
    number(f"{name}[1]", high)
    if not low < high:
        raise ValueError(f"{name}: expected the least value before the greatest, got {value!r}")
    return float(low), float(high)


def beta(value: object, batch: int, like: Tensor) -> None:
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
    limit(given["limit"], given["capacity"])
    likelihood.exponent(given["likelihood"])
    likelihood.activation(given["activation"])
    flag("constant", given["constant"])
    ascending("target_range", given["target_range"])
    if given["logvar_range"] is not None:
        ascending("logvar_range", given["logvar_range"])
    numbers(given)
    index = reduction(given["reduction"])
    if given["process_group"] is not None:
        process_group(given["process_group"], index)


def limit(value: object, capacity: Any) -> FreeNats | Capacity | None:
    """What limits the rate: `limit`, or `capacity`, which is short for one of them."""
    if value is None:
        return None if capacity is None else Capacity(capacity)
    if not isinstance(value, (FreeNats, Capacity)):
        hint = "; free nats of each element are free_bits" if isinstance(value, (int, float)) else ""
        raise TypeError(f"limit: expected FreeNats(…) or Capacity(…) from fused_elbo.rate, got {value!r}{hint}")
    if capacity is not None:
        raise ValueError(f"capacity and limit exclude each other, got capacity={capacity!r} beside limit={value!r}")
    return value


def of_batch(name: str, beta: object, reduction: str) -> None:
    why = f"{name}: is held against the batch mean, so it excludes"
    if reduction == "none":
        raise ValueError(f'{why} reduction="none"')
    if isinstance(beta, Tensor) and beta.dim() > 0:
        raise ValueError(f"{why} a beta per sample, got {shape(beta)}")


def nats(name: str, value: object, like: Tensor) -> None:
    """Of a limit."""
    if not isinstance(value, Tensor):
        number(name, value, 0)
        return
    tensor(name, value, like)
    if value.dim() > 0:
        raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {shape(value)}")
    if tracing.requires_grad(value):
        raise ValueError(f"{name}: has no gradient here; pass {name}.detach()")


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
        raise TypeError(f"process_group: expected a ProcessGroup, as dist.group.WORLD, got {kind(value)}{hint}")
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
