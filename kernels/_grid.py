"""What programs of one launch tell one another: a counter, a barrier that all wait at, and sums of what each has found.

Only programs that are all on the GPU at once may wait: a cooperative launch of `resident_programs` at most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .structs import Partials, Workspace

NUMBERS = 32  # of a barrier
COUNTERS = tl.constexpr(2)  # the first that `grid_barrier` leaves alone, which never sets its second one back


@triton.jit
def arrive(barrier, programs):
    """Whether all the other programs have arrived before. barrier[0] counts them, and is set back to 0 by the last one,
    for the next launch."""
    tl.debug_barrier()  # one thread arrives for its whole program, so all have written their sums before it does
    is_last = tl.atomic_add(barrier, 1, sem="acq_rel") == programs - 1
    if is_last:
        tl.atomic_xchg(barrier, 0, sem="relaxed")
    return is_last


@triton.jit
def grid_barrier(barrier, programs):
    """Returns when all programs have arrived, which the last one tells by adding 1 to barrier[1].

    What it returns is 0, but no compiler can know: what is computed again with it need not be kept in registers from
    before, where the differences are.
    """
    before = tl.atomic_add(barrier + 1, 0, sem="relaxed")
    now = before
    if arrive(barrier, programs):
        now = tl.atomic_add(barrier + 1, 1, sem="release") + 1
    else:
        while now == before:
            now = tl.atomic_add(barrier + 1, 0, sem="acquire")
    return now - before - 1


@triton.jit
def sum_of(values, n, MOST: tl.constexpr):
    at = tl.arange(0, MOST)
    return tl.sum(tl.load(values + at, at < n, 0.0), 0)


def resident_programs(device: torch.device) -> int:
    """One on each SM: 1024 threads of at most 64 registers are what an SM of any NVIDIA GPU since sm_80 holds of both.
    In Triton's interpreter programs run one after another, and none may wait for another."""
    if triton.knobs.runtime.interpret:
        return 1
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"]


def on_default_stream(device: torch.device) -> bool:
    """Whether launches run one after another, and so may share memory. (A CPU has no index.)"""
    return device.index is None or not torch.cuda.current_stream(device).cuda_stream


_barriers: dict[torch.device, Tensor] = {}


def barrier_of(device: torch.device) -> Tensor:
    """NUMBERS for the programs of a launch, of which those that `arrive` counts with are 0 before it and after it.

    Launches that may run at the same time need their own. Those of the default stream run one after another, and share
    theirs. On any other stream a launch gets new ones, and they may not be kept: a CUDA graph is captured there, whose
    memory is its own, and torch.compile's warm-up for one runs there (one small launch more, that sets them to 0).
    """
    if not on_default_stream(device):
        return torch.zeros(NUMBERS, dtype=torch.int32, device=device)
    if device not in _barriers:
        _barriers[device] = torch.zeros(NUMBERS, dtype=torch.int32, device=device)
    return _barriers[device]


MOST_KEPT = 16384  # bytes of a plan, of which there may be thousands: what any but large batches need


class Scratch:
    """The memory by which programs of a launch tell one another what they have found. Where launches run one after
    another it is kept for the next one, as their barrier is."""

    def __init__(
        self, device: torch.device, partials: Callable[[], Partials], totals: Callable[[], Tensor | None]
    ) -> None:
        self._device, self._partials, self._totals = device, partials, totals
        self._kept: Workspace | None = None

    def __call__(self) -> Workspace:
        if not on_default_stream(self._device):
            return self._new()
        if self._kept is not None:
            return self._kept
        made = self._new()
        if sum(t.nbytes for t in (*made.partials, made.totals) if t is not None) <= MOST_KEPT:
            self._kept = made
        return made

    def _new(self) -> Workspace:
        return Workspace(self._partials(), self._totals(), barrier_of(self._device))
