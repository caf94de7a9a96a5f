"""What is measured of a case, and when a ratio may be printed.

Times: all providers of a case take turns in every round, in random order, on the same tensors in one process, so that a
noisy machine slows all alike. A round's time is the mean over as many steps as take a millisecond. Forward is the loss,
backward is from there to the gradients of all leaves and includes giving their memory back. The first call, which
compiles what is compiled at first use, is told apart. A GPU is waited for at the end of each.

Ratios are medians of the rounds' ratios, so that what slows a whole round cancels. One is shown only if the rounds
agree on it, and if the machine had time for them (`Ratio.hidden`).

Memory: `saved_bytes` are of the tensors that autograd is given to keep for backward, in storages that are not the
inputs'. Operators are those that PyTorch dispatches below autograd in one step; code under torch.compile has `kernels`
in their place, those that it generated (on a GPU: those launched).
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from providers import Disagrees, Provider, Step, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Case, backward_bytes, forward_bytes, step_bytes

WARM_UP = 3  # rounds
SAMPLE = 1e-3  # seconds that a round gives a provider at least, in whole steps
MOST_STEPS = 50
WIDE = 0.30  # of a ratio: no more may lie between its quartiles
NARROW = 0.05  # of a ratio: quartiles this close say "equal", where 1 lies between them
BUSY = 0.10  # of the threads' time: no more may pass in waiting for a processor
TASKS = Path("/proc/self/task")


# ------------------------------------------------------------------------------------------------------- spread, ratios


@dataclass(frozen=True)
class Spread:
    """Of one number over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    @property
    def width(self) -> float:
        """Between the quartiles, over the median."""
        return (self.q3 - self.q1) / self.median


@dataclass(frozen=True)
class Ratio:
    of: Spread
    waited: float | None = None  # see `waiting`; the larger of both sides'

    @classmethod
    def of_rounds(cls, own: Timing, other: Timing) -> Ratio:
        waits = [t.waited for t in (own, other) if t.waited is not None]
        return cls(Spread.of([a / b for a, b in zip(own.steps, other.steps, strict=True)]), max(waits, default=None))

    @property
    def hidden(self) -> str | None:
        """Why this ratio must not be printed, or None.

        Half of the rounds lie between the quartiles. If those are further apart than 30% of the median, the run was too
        noisy for any number; if 1 lies between them, it does not even say which is faster, unless they are within 5%,
        which says that both are equal. And if the threads of either side waited for a processor in more than 10% of
        their time, other processes had it, and what was measured is the scheduler, however steady it looks.
        """
        q1, q3, width = self.of.q1, self.of.q3, self.of.width
        if self.waited is not None and self.waited > BUSY:
            return f"the threads waited for a processor {self.waited:.0%} of the time"
        if not width <= WIDE:
            return f"quartiles {q1:.2f} to {q3:.2f} are {width:.0%} of the median apart"
        if q1 < 1 < q3 and width > NARROW:
            return f"1 lies between the quartiles, {q1:.2f} and {q3:.2f}"
        return None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.of) | {"hidden": self.hidden}


def gb_per_s(count: int, seconds: float) -> float:
    """Of the bytes that have to be moved, whatever a provider does move: so that all compare."""
    return count / seconds / 1e9


# ----------------------------------------------------------------------------------------------------------------- time


def synchronise(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Timing:
    """Of one provider: seconds of each round, and how much of them its threads waited."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # of all threads; empty where the system does not tell

    @property
    def steps(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    @property
    def waited(self) -> float | None:
        """Of the time of all threads that PyTorch uses, what passed in waiting for a processor."""
        if not self.waits:
            return None
        return sum(self.waits) / (sum(self.steps) * torch.get_num_threads())


def waiting() -> float | None:
    """Seconds that this process's threads have been ready to run, but not running (Linux)."""
    try:
        return sum(int((task / "schedstat").read_text().split()[1]) for task in TASKS.iterdir()) * 1e-9
    except OSError:  # no Linux, or a thread that ends meanwhile
        return None


def steps_in_a_sample(step: Step, case: Case) -> int:
    started = time.perf_counter()
    step()
    synchronise(case)
    return max(1, min(MOST_STEPS, int(SAMPLE / (time.perf_counter() - started)) + 1))


def sample(step: Step, case: Case, steps: int, timing: Timing) -> None:
    """One round's."""
    forward = backward = 0.0
    waited = waiting()
    for _ in range(steps):
        started = time.perf_counter()
        kept = step.forward()
        synchronise(case)
        between = time.perf_counter()
        gradients = step.backward(kept)
        del gradients, kept
        synchronise(case)
        backward += time.perf_counter() - between
        forward += between - started
    after = waiting()
    timing.forward.append(forward / steps)
    timing.backward.append(backward / steps)
    if waited is not None and after is not None:
        timing.waits.append((after - waited) / steps)


def interleaved(steps: dict[str, Step], case: Case, rounds: int) -> dict[str, Timing]:
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    counts = {name: steps_in_a_sample(step, case) for name, step in steps.items()}
    times = {name: Timing() for name in steps}
    order, shuffled = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)  # no provider always follows the same one, and finds its leavings in the caches
        for name in order:
            sample(steps[name], case, counts[name], times[name])
    return times


# ------------------------------------------------------------------------------------------------- memory and operators


def saved_bytes(step: Step) -> int:
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = step.forward()
    inputs = {t.untyped_storage().data_ptr() for t in step.tensors}
    step.backward(kept)
    return sum(count for address, count in saved.items() if address not in inputs)


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(step: Step) -> int:
    with Counter() as counter:
        step()
    return counter.count


def launched_kernels(run: Callable[[], object]) -> list[str]:
    """The kernels that a GPU runs in one step, by name."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


# ------------------------------------------------------------------------------------------------------------- a case


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def first_call(step: Step, case: Case) -> tuple[float, int]:
    """(seconds, kernels that torch.compile generated)."""
    from torch._inductor import metrics

    metrics.reset()
    started = time.perf_counter()
    step()
    synchronise(case)
    return time.perf_counter() - started, metrics.generated_kernel_count


def measure(case: Case, providers: list[Provider], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A record of each provider, and the faults of those that do not compute the loss."""
    with threads(case.threads):
        return _measure(case, providers, rounds)


def _measure(case: Case, providers: list[Provider], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    torch._dynamo.reset()  # else the cases before count towards the limit of recompilations
    tensors, faults = case.tensors(), []
    steps: dict[str, Step] = {}
    records: dict[str, dict[str, Any]] = {}
    for provider in providers:
        step = Step(provider, case, tensors)
        try:
            seconds, kernels = first_call(step, case)
            check(step, case)
        except Disagrees as fault:
            faults.append(str(fault))
            continue
        steps[provider.name] = step
        records[provider.name] = {
            "case": case.name,
            "provider": provider.name,
            "kind": provider.kind,
            "first_call_s": seconds,
            **of_a_step(step, case, kernels),
        }
    if steps:
        add_times(records, interleaved(steps, case, rounds), tensors)
    return list(records.values()), faults


def of_a_step(step: Step, case: Case, kernels: int) -> dict[str, int | None]:
    if step.provider.kind == "limit":
        return {"saved_bytes": 0, "operators": None, "kernels": None}
    compiled = step.provider.compiled
    return {
        "saved_bytes": saved_bytes(step),
        "operators": None if compiled else operators(step),
        "kernels": len(launched_kernels(step)) if case.device == "cuda" else kernels if compiled else None,
    }


def add_times(records: dict[str, dict[str, Any]], times: dict[str, Timing], tensors: list[Tensor]) -> None:
    def first(kind: str, fastest: bool = False) -> str | None:
        names = [name for name, record in records.items() if record["kind"] == kind]
        key = (lambda name: statistics.median(times[name].steps)) if fastest else names.index
        return min(names, key=key, default=None)

    def ratio(one: str | None, other: str | None) -> dict[str, Any] | None:
        return Ratio.of_rounds(times[one], times[other]).as_dict() if one and other else None

    limit, best, ours = first("limit"), first("baseline", fastest=True), first("ours")
    for name, record in records.items():
        time_, split = times[name], name != "single_pass"
        forward, backward, step = (Spread.of(part) for part in (time_.forward, time_.backward, time_.steps))
        record |= {
            "forward_s": asdict(forward) if split else None,
            "backward_s": asdict(backward) if split else None,
            "step_s": asdict(step),
            "forward_gb_s": gb_per_s(forward_bytes(tensors), forward.median) if split else None,
            "backward_gb_s": gb_per_s(backward_bytes(tensors), backward.median) if split else None,
            "step_gb_s": gb_per_s(step_bytes(tensors), step.median),
            "waited": time_.waited,
            "best_baseline": best,
            "own_to_limit": ratio(name, limit),
            "best_to_own": ratio(best, name),
            "own_to_ours": ratio(name, ours),
        }
