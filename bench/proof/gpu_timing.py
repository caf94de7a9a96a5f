"""How long a training step of the loss takes on a GPU, beside the code it replaces and a copy of the same bytes.

Cases and providers are those of bench/run.py. Two times for each provider, all in turns within a round:

- GPU: a CUDA graph of the step, between two events, so without Python; caches are cold, since a buffer larger than any
  L2 cache is overwritten before each;
- step: the same step as eager code launches it, to the end of its last kernel: short steps wait for Python there.

GB/s are of the bytes that the loss has to move in two passes (`workloads.step_bytes`) and not of those that a provider
does move, so that all compare; decoupled_elbo_backward moves fewer, where it reads the data once.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import providers
import workloads
from measure import launched_kernels
from workloads import Case

FLUSH_BYTES = 512 << 20  # the largest L2 today is 126 MB
LARGE = Case((256, 3, 256, 256), (16, 32, 32))
LAUNCHES = {  # of a step of ours with a σ of the batch, beside autograd's ones_like
    "triton": {3},
    "cuda": {3},
    "single_pass": {1, 3},  # one where the batch fits on the chip
}
Run = Callable[[], object]


def cases() -> list[Case]:
    usual = [replace(case, dtype=dtype) for dtype in ("fp32", "bf16") for case in (*workloads.SHAPES, LARGE)]
    others = [replace(workloads.SHAPES[1], sigma=sigma) for sigma in workloads.OTHER_SIGMAS]
    return [replace(case, device="cuda") for case in (*usual, *others)]


def serving(case: Case) -> list[providers.Provider]:
    return [provider for provider in providers.chosen(None, case) if provider.kind in ("ours", "baseline")]


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


def gpu_time(run: Run, flush: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def step_time(run: Run) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def measure(eager: dict[str, Run], graphs: dict[str, Run | None], rounds: int) -> dict[str, tuple[float | None, float]]:
    """name -> medians, in µs, of the GPU's time (None without a graph) and of the whole step's."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    gpu: dict[str, list[float]] = {name: [] for name in graphs}
    whole: dict[str, list[float]] = {name: [] for name in eager}
    for _ in range(rounds):
        for name, run in eager.items():
            if (graph := graphs[name]) is not None:
                gpu[name].append(gpu_time(graph, flush))
            whole[name].append(step_time(run))
    return {
        name: (statistics.median(gpu[name]) if gpu[name] else None, statistics.median(whole[name])) for name in eager
    }


def rows_of(case: Case, rounds: int) -> tuple[list[str], list[str]]:
    """Rows of the table, and what is wrong: gradients, the number of launches, or ours that cannot be captured."""
    torch._dynamo.reset()  # else the cases before count towards the limit of recompilations
    tensors, faults = case.tensors(), []
    runs: dict[str, Run] = {}
    for provider in serving(case):
        step = providers.Step(provider, case, tensors)
        try:
            providers.check(step, case)
            runs[provider.name] = step
        except providers.Disagrees as fault:
            faults.append(str(fault))
    ours = [name for name in runs if name in LAUNCHES]
    count = workloads.step_bytes(tensors)
    runs["copy"] = copy_of(count)
    graphs = {name: captured(run) for name, run in runs.items()}
    faults += [f"{name} at {case.name}: no CUDA graph of it can be made" for name in ours if graphs[name] is None]
    times = measure(runs, graphs, rounds)
    rows = []
    for name, (gpu, whole) in times.items():
        kernels = launched_kernels(runs[name])
        own = sum("elbo_" in kernel for kernel in kernels)
        if name in ours and case.sigma == "batch" and own not in LAUNCHES[name]:
            faults.append(f"{name} at {case.name}: a step launches {own} kernels of ours: {kernels}")
        rows.append(row(case, name, gpu, whole, count, times["copy"][0], times[ours[0]][0] if ours else None, kernels))
    return rows, faults


def row(
    case: Case,
    name: str,
    gpu: float | None,
    whole: float,
    count: int,
    copy: float | None,
    ours: float | None,
    kernels: list[str],
) -> str:
    """What needs a graph is left blank where there is none."""
    rate = f"{count / gpu / 1e3:.0f}" if gpu else ""
    of_a_copy = f"{copy / gpu:.0%}" if gpu and copy else ""
    against_ours = f"{gpu / ours:.2f}" if gpu and ours else ""
    time_ = f"{gpu:.1f}" if gpu else ""
    return f"| {case.name} | {name} | {time_} | {whole:.1f} | {rate} | {of_a_copy} | {against_ours} | {len(kernels)} |"


def table(rounds: int) -> tuple[list[str], list[str]]:
    """The benchmark as Markdown, and what is wrong."""
    lines = [
        "| case | provider | GPU µs | step µs | GB/s | of a copy | × fused | launches |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    faults: list[str] = []
    for case in cases():
        rows, wrong = rows_of(case, rounds)
        lines += rows
        faults += wrong
        torch.cuda.empty_cache()
    return lines, faults
