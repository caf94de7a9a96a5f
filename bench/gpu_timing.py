"""How long a training step of the loss takes on a GPU, beside the code it replaces and a copy of the same bytes.

Two times for each provider, all in turns within a round:

- GPU: a CUDA graph of the step, between two events, so without Python; caches are cold, since a buffer larger than any
  L2 cache is overwritten before each;
- step: the same step as eager code launches it, to the end of its last kernel: short steps wait for Python there.

GB/s are of the bytes that the loss has to move (recon and target read twice, one gradient written; four reads and two
writes of the latents) and not of those that a provider does move, so that all compare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import baselines
import torch
from run import CASES, LATENTS, Loss, make, step
from torch import Tensor

from fused_elbo import backend

FLUSH_BYTES = 512 << 20  # the largest L2 today is 126 MB
LARGE = [(256, 3, 256, 256)]
LAUNCHES = 3  # of a step of ours, beside autograd's ones_like
Run = Callable[[], object]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]


def fused(*tensors: Tensor) -> Tensor:
    """On the GPU's kernels, or not at all."""
    with backend("triton"):
        return baselines.fused(*tensors)


def providers() -> dict[str, Loss]:
    eager: dict[str, Loss] = {"one_liner": baselines.one_liner, "elementwise": baselines.elementwise}
    return {"fused": fused, **eager, **{f"{name}_compiled": torch.compile(loss) for name, loss in eager.items()}}


def step_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    elements = torch.Size(shape).numel()
    return itemsize * (5 * elements + 6 * shape[0] * LATENTS)


def fault(name: str, loss: Loss, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Against fp64: ours against the one-liner, which is the same loss; a baseline against itself."""
    exact = baselines.one_liner if loss is fused else loss
    rounded = make(shape, dtype)
    truth = step(exact, on_gpu([t.detach().double().requires_grad_(t.requires_grad) for t in rounded]))
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for got, true in zip(step(loss, on_gpu(rounded)), truth, strict=True):
        worst = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not worst < bound:
            return f"{name} at {shape}, {dtype}: gradients differ from fp64 by {worst:.1e}"
    return None


def captured(run: Run) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator's pool
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_of(count: int) -> Run:
    """A device copy that moves `count` bytes: half of them read, half written."""
    source, target = torch.zeros(2, count // 2, dtype=torch.uint8, device="cuda").unbind(0)
    return lambda: target.copy_(source)


def launches(run: Run) -> list[str]:
    """The kernels of one step, by name."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


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


def measure(eager: dict[str, Run], graphs: dict[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """name -> medians, in µs, of the GPU's time and of the whole step's."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    gpu: dict[str, list[float]] = {name: [] for name in graphs}
    whole: dict[str, list[float]] = {name: [] for name in eager}
    for _ in range(rounds):
        for name in eager:
            gpu[name].append(gpu_time(graphs[name], flush))
            whole[name].append(step_time(eager[name]))
    return {name: (statistics.median(gpu[name]), statistics.median(whole[name])) for name in eager}


def case(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> tuple[list[str], list[str]]:
    """Rows of the table, and what is wrong."""
    losses, tensors = providers(), on_gpu(make(shape, dtype))
    faults = [found for name, loss in losses.items() if (found := fault(name, loss, shape, dtype))]
    count = step_bytes(shape, dtype.itemsize)
    runs: dict[str, Run] = {name: lambda loss=loss: step(loss, tensors) for name, loss in losses.items()}
    runs["copy"] = copy_of(count)
    graphs = {name: captured(run) for name, run in runs.items()}
    times = measure(runs, graphs, rounds)
    rows = []
    for name, (gpu, whole) in times.items():
        kernels = launches(runs[name])
        own = sum("elbo_" in kernel for kernel in kernels)
        if name == "fused" and own != LAUNCHES:
            faults.append(f"{shape}: a step launches {own} kernels of ours, not {LAUNCHES}: {kernels}")
        rows.append(
            f"| {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} | {name} | {gpu:.1f} | {whole:.1f} "
            f"| {count / gpu / 1e3:.0f} | {times['copy'][0] / gpu:.0%} | {gpu / times['fused'][0]:.2f} "
            f"| {len(kernels)} |"
        )
    return rows, faults


def table(rounds: int) -> tuple[list[str], list[str]]:
    """The benchmark as Markdown, and what is wrong: gradients, or the number of launches."""
    lines = [
        "| case | provider | GPU µs | step µs | GB/s | of a copy | × fused | launches |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    faults: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (*CASES[1:], *LARGE):
            rows, wrong = case(shape, dtype, rounds)
            lines += rows
            faults += wrong
            torch.cuda.empty_cache()
    return lines, faults
