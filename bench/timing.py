"""How a step is timed, and when a ratio of two times may be printed.

All providers of a case take turns in every round, in random order, on the same tensors in one process, so that a noisy
machine slows all alike. A round's time is the mean over as many steps as take ten milliseconds, after half as many that
are not timed; where a thread waited for a processor in more than 10% of it, other processes had that, and it is taken
again. If it is never calm, the round is left out. Forward is the loss; backward is from there to the gradients of all
leaves, and includes giving their memory back. A GPU is waited for at each end.

Ratios are medians of the rounds' ratios, so that what slows a whole round cancels. One is shown only if the rounds
agree on it, and if half of them were calm (`Ratio.hidden`).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from providers import Step
from workloads import Case

WARM_UP = 3  # rounds
SAMPLE = 1e-2  # seconds that a round gives a provider at least, in whole steps
MOST_STEPS = 50
CASE = 5.0  # seconds for which a case of short steps has more rounds than were asked for, five times as many at most
MORE = 5
BUSY = 0.10  # of the time: for longer no thread may wait for a processor in a calm round
CALM = 0.5  # of the rounds: as many must be calm
PATIENCE = 3.0  # seconds that a case's provider may spend on samples that are taken again
CONFIDENCE = 0.95
WIDE = 0.25  # of a ratio: no wider may the interval be that holds its median
NARROW = 0.05  # of a ratio: an interval this narrow says "equal", where 1 lies in it
TASKS = Path("/proc/self/task")


# ------------------------------------------------------------------------------------------------------- spread, ratios


@dataclass(frozen=True)
class Spread:
    """How one number is spread over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Ratio:
    """The median over the calm rounds, between `low` and `high` with a confidence of 95%, whatever the distribution."""

    median: float
    low: float
    high: float
    calm: float = 1.0  # of the rounds, those in which neither side's threads waited

    @classmethod
    def of_rounds(cls, own: Timing, other: Timing) -> Ratio:
        pairs = list(zip(own.steps, other.steps, strict=True))
        calm = [pair for pair, a, b in zip(pairs, own.calm, other.calm, strict=True) if a and b]
        ratios = sorted(a / b for a, b in calm or pairs)
        k = outside(len(ratios))
        return cls(statistics.median(ratios), ratios[k], ratios[-1 - k], len(calm) / len(pairs))

    @property
    def hidden(self) -> str | None:
        """Why this ratio must not be printed, or None.

        If the interval is wider than 25% of the median, the run was too noisy, or too short, for any number; if 1 lies
        in it, it does not even say which is faster, unless it is within 5%, which says that both are equal. And if less
        than half of the rounds were calm, what was measured is the scheduler, however steady it looks.
        """
        width = (self.high - self.low) / self.median
        if self.calm < CALM:
            return f"others had the processors in more than {1 - CALM:.0%} of the rounds"
        if not width <= WIDE:
            return f"between {self.low:.2f} and {self.high:.2f}, {width:.0%} of the median apart"
        if self.low < 1 < self.high and width > NARROW:
            return f"between {self.low:.2f} and {self.high:.2f}, so either may be faster"
        return None

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "hidden": self.hidden}


def outside(count: int) -> int:
    """How many values to leave out at each end of `count` sorted ones, for the median to lie between the rest with
    CONFIDENCE: each value is below the median with probability ½. None may be left out of five or fewer."""
    below, k = 0.5**count, 0  # P(at most k values are below the median)
    while 2 * below <= 1 - CONFIDENCE:
        k += 1
        below += math.comb(count, k) * 0.5**count
    return max(0, k - 1)


# ----------------------------------------------------------------------------------------------------------------- time


def synchronise(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Timing:
    """One provider's seconds of a forward and of a backward, for each round; and its waits: for which share of both the
    thread that waited most waited for a processor (0 where the system does not tell)."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    repeated: float = 0.0  # seconds of samples that were taken again

    @property
    def steps(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    @property
    def calm(self) -> list[bool]:
        """Tells for each round whether its threads had the processors to themselves."""
        return [waited <= BUSY for waited in self.waits]

    @property
    def calm_share(self) -> float:
        return sum(self.calm) / len(self.waits)

    def spread(self, seconds: list[float]) -> Spread:
        """The spread over the calm rounds, if there are any, else over all."""
        return Spread.of([s for s, calm in zip(seconds, self.calm, strict=True) if calm] or seconds)


def waiting() -> dict[str, int] | None:
    """Thread -> nanoseconds for which it has been ready to run, but had no processor (Linux)."""
    try:
        return {task.name: int((task / "schedstat").read_text().split()[1]) for task in TASKS.iterdir()}
    except OSError:  # no Linux, or a thread that ends meanwhile
        return None


def steps_in_a_sample(step: Step, case: Case) -> int:
    started = time.perf_counter()
    step()
    synchronise(case)
    return max(1, min(MOST_STEPS, int(SAMPLE / (time.perf_counter() - started)) + 1))


def sample(step: Step, case: Case, steps: int) -> tuple[float, float, float]:
    """Takes one round, for `Timing`. The first steps are not timed: they find in the caches what another provider left
    there, and what counts is a provider's own steady state."""
    forward = backward = 0.0
    for _ in range(max(1, steps // 2)):
        step()
    synchronise(case)
    earlier = waiting()
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
    later = waiting()
    if earlier is None or later is None:
        return forward / steps, backward / steps, 0.0
    longest = max(nanoseconds - earlier.get(task, 0) for task, nanoseconds in later.items())
    return forward / steps, backward / steps, longest * 1e-9 / (forward + backward)


def take_turn(step: Step, case: Case, steps: int, timing: Timing, patience: float = PATIENCE) -> None:
    """A round's sample, taken again while others have the processors and there is patience."""
    forward, backward, waited = sample(step, case, steps)
    while waited > BUSY and timing.repeated < patience:
        timing.repeated += (forward + backward) * steps
        forward, backward, waited = sample(step, case, steps)
    timing.forward.append(forward)
    timing.backward.append(backward)
    timing.waits.append(waited)


def interleaved(steps: dict[str, Step], case: Case, rounds: int, patience: float) -> dict[str, Timing]:
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    started = time.perf_counter()
    counts = {name: steps_in_a_sample(step, case) for name, step in steps.items()}
    for name, step in steps.items():
        sample(step, case, counts[name])
    rounds = max(rounds, min(MORE * rounds, int(CASE / (time.perf_counter() - started))))
    times = {name: Timing() for name in steps}
    order, shuffled = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)  # no provider always follows the same one, and finds its leavings in the caches
        for name in order:
            take_turn(steps[name], case, counts[name], times[name], patience)
    return times
