"""How long a training step of the loss takes on a GPU, beside the code it replaces and a copy of the same bytes.

Cases and providers are those of bench/run.py. Three times for each provider, in µs, medians of rounds in which all of a
case take turns:

- gpu_us: a CUDA graph of the step, between two events, so without Python. Caches are cold and clean: a buffer larger
  than any L2 cache is overwritten before each, and then another one is read, so that nothing is left to write back;
- step_us: the same step as eager code launches it, to the end of its last kernel: short steps wait for Python there;
- host_us: until the calls have returned.

What torch.compile makes of the baselines comes after everything else. A case that crashes, hangs or leaves CUDA with an
error costs itself: the next goes on in a new process, and its own providers are tried one by one at the end.

`bytes` are those that the loss has to move in two passes (`workloads.step_bytes`), whatever a provider does move, so
that all compare; decoupled_elbo_backward moves fewer where it reads the data once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_pool
import providers
import torch
import workloads
from gpu_section import Failed, Part, Record, poisoned, said
from measure import launched_kernels
from workloads import Case

ROUNDS = 20
FLUSH_BYTES, CLEAN_BYTES = 512 << 20, 128 << 20  # the largest L2 today is 126 MB
LARGE = Case((256, 3, 256, 256), (16, 32, 32))
SHORT = Case((4, 1, 8, 8), (8,))
COPY = "copy"
MOST_LAUNCHES = 3  # of our kernels in a step, whoever computes it, where the batch has one σ
OURS = {provider.name for provider in providers.ALL if provider.kind == "ours"}
WARMING = 0.4  # of the section's time, at most
MARGIN = 3.0  # seconds to say what was found
Run = Callable[[], object]


def cases() -> dict[str, Case]:
    """name -> case, in the order of what they are worth."""
    usual = (*workloads.SHAPES, SHORT, LARGE)
    levels = Case((8,), (), sigma="levels")
    found = [
        *usual,
        levels,
        *(replace(case, dtype="bf16") for case in (*usual, levels)),
        *(replace(case, sigma="learned", dtype=dtype) for dtype in ("fp32", "bf16") for case in workloads.SHAPES),
        *(replace(workloads.SHAPES[1], sigma=sigma) for sigma in ("image", "pixel")),
    ]
    return {case.name: replace(case, device="cuda") for case in found}


def run(part: Part) -> str:
    part.found |= {"rows": [], "faults": [], "launches": {}}
    ways = [f"{name}|{compiled:d}|" for compiled in (False, True) for name in cases()]
    failed: list[str] = []

    def take(item: str, found: Record) -> None:
        if "error" in found:
            failed.append(item)
            part.found["faults"].append(f"{item}: {found['error']}")
        else:
            part.found["faults"] += found["faults"]
            part.found["rows"] += [row | launches_of(part, row) for row in found["rows"]]
        part.save()

    with tempfile.TemporaryDirectory() as folder:
        warm_up(part, ways, Path(folder) / "warm")
        done = gpu_pool.spread("timing", [ways], Path(folder) / "all", part.left() - MARGIN, take)
        each = [f"{item}{provider.name}" for item in failed for provider in serving(*named(item))]
        gpu_pool.spread("timing", [each], Path(folder) / "each", part.left() - MARGIN, take)
    if part.found["faults"]:
        raise Failed("; ".join(part.found["faults"]))
    return "ok" if done else f"ok: {len(part.found['rows'])} rows, then time was up"


def launches_of(part: Part, row: Record) -> Record:
    return part.found["launches"].get(f"{row['case']}|{row['provider']}", {})


def named(item: str) -> tuple[Case, bool, str]:
    """An item's case, whether it is about compiled baselines, and the one provider that it is about, or ""."""
    name, compiled, only = item.split("|")
    return cases()[name], bool(int(compiled)), only


def serving(case: Case, compiled: bool, only: str = "") -> list[providers.Provider]:
    found = [p for p in providers.chosen(None, case) if p.kind in ("ours", "baseline") and p.compiled == compiled]
    return [p for p in found if only in ("", p.name)]


def warm_up(part: Part, items: list[str], folder: Path) -> None:
    """Fills the compilers' caches and counts launches, in many processes, whose profilers slow nobody's timing. What
    fails there fails again where it is timed, and is told."""

    def take(item: str, found: Record) -> None:
        case, _, _ = named(item)
        for name, kernels in found.get("kernels", {}).items():
            own = sum("elbo_" in kernel for kernel in kernels)
            part.found["launches"][f"{case.name}|{name}"] = {"launches": len(kernels), "own_launches": own}
            if name in OURS and case.sigma == "batch" and not 1 <= own <= MOST_LAUNCHES:
                part.found["faults"].append(f"{name} at {case.name}: a step launches {own} kernels of ours: {kernels}")
        part.save()

    gpu_pool.spread("warm", gpu_pool.dealt(items, gpu_pool.processes()), folder, WARMING * part.left(), take)


def warm(item: str) -> Record:
    """The kernels that a step of each provider launches, by name."""
    case, compiled, only = named(item)
    tensors, kernels = case.tensors(), {}
    for provider in serving(case, compiled, only):
        step = providers.Step(provider, case, tensors)
        step()
        kernels[provider.name] = launched_kernels(step)
    torch.cuda.empty_cache()
    return {"kernels": kernels}


# ------------------------------------------------------------------------------------------------------------ one case


def measure(item: str) -> Record:
    """A row for each provider, and what is wrong."""
    case, compiled, only = named(item)
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # else the cases before count towards the limit of recompilations
    tensors, faults = case.tensors(), []
    runs: dict[str, Run] = {}
    for provider in serving(case, compiled, only):
        step = providers.Step(provider, case, tensors)
        try:
            providers.check(step, case)
            runs[provider.name] = step
        except Exception as error:
            if poisoned(error):  # there is nothing to go on with
                raise
            text = str(error) if isinstance(error, providers.Disagrees) else said(error)
            faults.append(f"{provider.name} at {case.name}: {text}")
    count = workloads.step_bytes(tensors)
    if not compiled and not only:
        runs[COPY] = copy_of(count)
    graphs = {name: captured(step) for name, step in runs.items()}
    about = {"case": case.name, "dtype": case.dtype, "sigma": case.sigma, "bytes": count}
    rows = [about | {"provider": name} | times for name, times in timed(runs, graphs).items()]
    faults += [f"{n} at {case.name}: no CUDA graph of it can be made" for n in runs if n in OURS and graphs[n] is None]
    return {"rows": rows, "faults": faults}


def captured(run: Run) -> Run | None:
    """A CUDA graph of it; None for what looks at values on the host, as F.gaussian_nll_loss does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator's pool
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def copy_of(count: int) -> Run:
    """A device copy that moves `count` bytes: half of them read, half written."""
    source, target = torch.zeros(2, count // 2, dtype=torch.uint8, device="cuda").unbind(0)
    return lambda: target.copy_(source)


class Flush:
    """Leaves caches that hold nothing of ours, and nothing that must be written back."""

    def __init__(self) -> None:
        make = partial(torch.zeros, dtype=torch.uint8, device="cuda")
        self.dirty, self.clean = make(FLUSH_BYTES), make(CLEAN_BYTES).view(torch.int64)

    def __call__(self) -> None:
        self.dirty.zero_()
        self.clean.sum()


def gpu_time(run: Run, flush: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def step_times(run: Run) -> tuple[float, float]:
    """(host's, whole)"""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter()
    torch.cuda.synchronize()
    return (host - start) * 1e6, (time.perf_counter() - start) * 1e6


def timed(eager: dict[str, Run], graphs: dict[str, Run | None]) -> dict[str, Record]:
    """name -> medians; gpu_us is None without a graph."""
    flush = Flush()
    gpu: dict[str, list[float]] = {name: [] for name in eager}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in eager}
    for _ in range(ROUNDS):
        for name, run in eager.items():
            if (graph := graphs[name]) is not None:
                gpu[name].append(gpu_time(graph, flush))
            pairs[name].append(step_times(run))
    return {name: {"gpu_us": middle(gpu[name]), **of_pairs(pairs[name])} for name in eager}


def middle(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def of_pairs(pairs: list[tuple[float, float]]) -> Record:
    return {"host_us": middle([host for host, _ in pairs]), "step_us": middle([whole for _, whole in pairs])}
