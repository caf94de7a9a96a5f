"""One run by several processes on the CPU, as `torchrun --nproc-per-node N script.py` starts them.

Each takes its part of every batch; `process_group=` of the loss and DistributedDataParallel make of the parts what one
process makes of the whole. Without torchrun there is one process and no group.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Where torchrun has started this process."""
    if dist.is_available() and dist.is_torchelastic_launched():
        dist.init_process_group("gloo")


def leave(code: int) -> NoReturn:
    """End the process. Not by the interpreter's shutdown if there is a group: gloo's threads outlive that, and one that
    lets go of a tensor then may abort the process (pytorch/pytorch#179291)."""
    if group() is None:
        sys.exit(code)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() else None


def count() -> int:
    return 1 if group() is None else dist.get_world_size()


def number() -> int:
    return 0 if group() is None else dist.get_rank()


def is_first() -> bool:
    """Whose part it is to write files and to print."""
    return number() == 0


def seed_noise(seed: int) -> None:
    """Call it once the weights are made, the same on all ranks: from here on each draws random numbers of its own."""
    if count() > 1:
        torch.manual_seed(seed + 1_000_003 * number())


def part(batch: Tensor) -> Tensor:
    return batch.tensor_split(count())[number()]


def gather(value: Tensor) -> Tensor:
    """[ranks, *value]"""
    if group() is None:
        return value[None]
    every = [torch.empty_like(value) for _ in range(count())]
    dist.all_gather(every, value)
    return torch.stack(every)


def mean(value: Tensor) -> Tensor:
    return gather(value).mean(0) if count() > 1 else value


def agree(flag: bool) -> bool:
    """Whether it is set on any rank."""
    return flag if count() == 1 else bool(gather(torch.tensor(flag)).any())
