"""What is measured of a case: a record for each provider.

- first_call_s: compiles what is compiled at first use, and is told apart from all other times (timing.py).
- forward_s, backward_s, step_s: medians and quartiles over the rounds; GB/s are of the bytes that the loss has to move,
  whatever a provider does move, so that all compare.
- own_to_limit, best_to_own, own_to_ours: ratios of step times, to the limit, of the fastest baseline, to fused_elbo.
- busy: times mean nothing, since others had the processors in most of the rounds; calm_rounds, repeated_s: timing.py.
- saved_bytes: of the tensors that autograd is given to keep for backward, in storages that are not the inputs'.
- operators: those that PyTorch dispatches below autograd in one step; code under torch.compile has `kernels` in their
  place, those that it generated. On a GPU `kernels` are those launched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from providers import Disagrees, Provider, Step, check
from timing import CALM, PATIENCE, Ratio, Timing, interleaved, synchronise
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Case, backward_bytes, forward_bytes, leaves, step_bytes


def gb_per_s(count: int, seconds: float) -> float:
    """Counts the bytes that have to be moved, whatever a provider does move, so that all compare."""
    return count / seconds / 1e9


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


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(step: Step) -> int:
    with Dispatched() as seen:
        step()
    return seen.count


def launched_kernels(run: Callable[[], object]) -> list[str]:
    """The kernels that a GPU runs in one step, by name."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() or () if e.device_type == DeviceType.CUDA]
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


def measure(
    case: Case, providers: list[Provider], rounds: int, patience: float = PATIENCE
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record of each provider, and the faults of those that do not compute the loss."""
    with threads(case.threads):
        return _measure(case, providers, rounds, patience)


def _measure(
    case: Case, providers: list[Provider], rounds: int, patience: float
) -> tuple[list[dict[str, Any]], list[str]]:
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
            "one_call": provider.calls_backward,  # has no forward and backward of its own
            "first_call_s": seconds,
            **of_a_step(step, case, kernels),
        }
    if steps:
        add_times(records, interleaved(steps, case, rounds, patience), tensors)
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
        key = (lambda name: times[name].spread(times[name].steps).median) if fastest else names.index
        return min(names, key=key, default=None)

    def ratio(one: str | None, other: str | None) -> dict[str, Any] | None:
        if not one or not other:
            return None
        found = Ratio.of_rounds(times[one], times[other]).as_dict()
        return found | {"hidden": None} if one == other else found  # 1, in any noise

    evaluated = not leaves(tensors)  # without a backward
    limit, best, ours = first("limit"), first("baseline", fastest=True), first("ours")
    for name, record in records.items():
        time_, split = times[name], not record["one_call"]
        forward, backward, step = (time_.spread(part) for part in (time_.forward, time_.backward, time_.steps))
        record |= {
            "forward_s": asdict(forward) if split else None,
            "backward_s": asdict(backward) if split and not evaluated else None,
            "step_s": asdict(step),
            "forward_gb_s": gb_per_s(forward_bytes(tensors), forward.median) if split else None,
            "backward_gb_s": gb_per_s(backward_bytes(tensors), backward.median) if split and not evaluated else None,
            "step_gb_s": gb_per_s(step_bytes(tensors), step.median),
            "busy": time_.calm_share < CALM,
            "calm_rounds": time_.calm_share,
            "rounds": len(time_.forward),
            "repeated_s": time_.repeated,
            "best_baseline": best,
            "own_to_limit": ratio(name, limit),
            "best_to_own": ratio(best, name) if name != limit else None,
            "own_to_ours": ratio(name, ours),
        }
