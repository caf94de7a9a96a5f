"""What the tests of process_group= share: the shards of a batch, and one of the processes that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from cases import MODES, REDUCTIONS, SOME, Call
from torch import Tensor

BATCH = 7
SHARDS = {2: (5, 2), 3: (4, 3, 0)}  # of the ranks
SCALAR = [r for r in REDUCTIONS if r != "none"]

# This C lies above one shard's mean KL and below the batch's, but above what that is before free_bits.
BETWEEN = {"capacity": 4.2, "free_bits": 0.3, "beta": 2.0}
ALL_MODES = [*SOME, "mask", "weight-pixel", "capacity-sample", "capacity-between"]


def of_mode(mode: str, reduction: str = "batchmean", dtype: torch.dtype = torch.float32) -> Call:
    if mode in MODES:
        return Call(mode, reduction, batch=BATCH, dtype=dtype)
    call = Call("capacity", reduction, batch=BATCH, dtype=dtype)
    call.kw = dict(BETWEEN)
    return call


class Rank:
    """One of the processes: its part of a batch, averages over all, and the failures so far."""

    def __init__(self, rank: int, sizes: Sequence[int]) -> None:
        self.rank, self.ranks = rank, len(sizes)
        start = sum(sizes[:rank])
        self.rows = slice(start, start + sizes[rank])
        self.failures: list[str] = []
        self.checked = 0

    def shard(self, value: Any) -> Any:
        """Takes this rank's rows of what has a value for each sample; no other dimension of the tests is BATCH."""
        if isinstance(value, tuple):
            return tuple(map(self.shard, value))
        return value[self.rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == BATCH else value

    def average(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.ranks

    def close(self, what: str, got: Tensor | None, expected: Tensor | None) -> None:
        self.checked += 1
        try:
            if expected is None:
                assert got is None, "expected None"
                return
            wide = {"rtol": 1e-11, "atol": 1e-12} if expected.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got, expected.detach(), **wide)
        except AssertionError as error:
            self.failures.append(f"{what}: {' '.join(str(error).split())}")

    def refused(self, what: str, message: str, call: Callable[[], Any]) -> None:
        self.checked += 1
        try:
            call()
            self.failures.append(f"{what}: was not refused")
        except (ValueError, RuntimeError) as error:
            if message not in str(error):
                self.failures.append(f"{what}: {error}")
