"""What the compilers make of the Triton kernels, for GPUs that need not be here.

    python bench/proof/compiled.py --out bench/proof

Runs the loss once for each case under a driver that launches nothing, which shows every launch with the arguments that
a real one has; each is then compiled for each target as Triton would at its first launch, and the machine code is read.
Writes compiled.md and compiled.csv. No GPU is needed and nothing here has been measured on one. The columns:

- kernel: of the default loss at 64×3×64×64 with 128 latents; [pixel]: a log σ for each pixel; [channel]: for each
  channel, which every element looks up by its index; [prior]: a Gaussian prior; [large]: 3072 images, of which each
  program walks several tiles in a loop; [by8]: 3×50×36 with 200 latents, sizes that 8 divides and 16 does not.
  elbo_step is the whole step in one launch, in which a program holds three tiles of 2048 elements (sm_80: two of
  4096); [full]: 250 images, three tiles of 8192 (sm_80: two of 16384, which is all that a program can hold);
  [image], [given]: σ per image, and constant, where no program waits for another. [laplace]: that likelihood;
  [decoder]: a sigmoid before the loss, a target of bytes, a mask that the channels share, and logvar in a range;
  [hierarchy]: 16 levels with priors in one launch, of 1024 to 16384 latents; [batch]: the aggregate posterior of 512
  of 50000 images with 64 latents.
- registers of a thread (gfx942: VGPRs); spill_bytes: stores and loads of spilled registers in ptxas's log, once each
  (gfx942: private memory of a lane); shared_bytes of a block.
- global_accesses: loads and stores of global memory in the code, wide_accesses: those of 128 bits or more. The rest are
  of O(batch) values: partial sums, grad_outputs, stats.
- instructions_per_element: instructions in the code, over the elements that one pass through it covers in a thread: a
  tile of data and one of latents. It is static: it counts both paths, the arithmetic of addresses and the reductions,
  of which a thread runs a part. For comparing versions, no estimate of time.
- bytes_in_flight_per_sm: the most bytes that a thread has asked for before it uses the first of them, reading the code
  from top to bottom (so never across turns of a loop), times the threads that an SM's 65536 registers and 2048 threads
  hold, or one program of elbo_step whose programs wait for one another. It says how much latency is covered if all of
  them load at once.

The last two are blank for the kernel of one block, which holds O(batch) values, and for the aggregate posterior, whose
loops read little and compute much; the last one for gfx942.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine_code import WIDE, Code, read_amdgcn, read_sass, threads_per_sm
from offline import Offline, active

from fused_elbo import backend, decoupled_elbo, decoupled_elbo_backward, gaussian_kl, log_aggregate_posterior
from fused_elbo.kernels import _plan, aggregate, elbo_finalize, elbo_grads, elbo_levels, elbo_stats, elbo_step
from fused_elbo.kernels.structs import Call, Data, Latents

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
JITTED = (
    (elbo_stats, "elbo_stats_kernel"),
    (elbo_finalize, "elbo_shared_sigma_term_kernel"),
    (elbo_grads, "elbo_grads_kernel"),
    (elbo_step, "elbo_step_kernel"),
    (elbo_levels, "elbo_levels_kernel"),
    (elbo_levels, "elbo_levels_grads_kernel"),
    (aggregate, "aggregate_sums_kernel"),
    (aggregate, "aggregate_totals_kernel"),
    (aggregate, "aggregate_shares_kernel"),
    (aggregate, "aggregate_grads_kernel"),
    (aggregate, "aggregate_grads_totals_kernel"),
)
# what a case is called -> its kernels in the table
CASES = {
    "": ("elbo_stats", "elbo_shared_sigma_term", "elbo_grads", "elbo_step"),
    "pixel": ("elbo_stats", "elbo_grads"),
    "channel": ("elbo_stats", "elbo_grads"),
    "prior": ("elbo_stats", "elbo_grads", "elbo_step"),
    "large": ("elbo_stats", "elbo_grads"),
    "by8": ("elbo_stats", "elbo_grads", "elbo_step"),
    "full": ("elbo_step",),
    "image": ("elbo_step",),
    "given": ("elbo_step",),
    "laplace": ("elbo_stats", "elbo_grads", "elbo_step"),
    "decoder": ("elbo_stats", "elbo_grads", "elbo_step"),
    "hierarchy": ("elbo_levels", "elbo_levels_grads"),
    "batch": (
        "aggregate_sums", "aggregate_totals", "aggregate_shares", "aggregate_grads", "aggregate_grads_totals",
    ),
}  # fmt: skip
KERNELS = [f"{kernel}[{case}]" if case else kernel for case, kernels in CASES.items() for kernel in kernels]
SIZES = {
    "large": (3072, (3, 64, 64), 128),
    "by8": (64, (3, 50, 36), 200),
    "full": (250, (3, 64, 64), 128),
    "hierarchy": (64, (), 1024),
    "batch": (512, (), 64),
}  # batch, image, latents
USUAL = (64, (3, 64, 64), 128)
SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # of A100, H100, B200 and MI300X


def dtypes(kernel: str) -> list[str]:
    """Those of the loss have no fp64 in the table: who computes in it does not do so for speed. But what holds sums in
    registers may spill twice as many."""
    return ["fp32", "bf16", "fp64"] if kernel.startswith("aggregate") else ["fp32", "bf16", "fp16"]


def offline(name: str) -> contextlib.AbstractContextManager[None]:
    """A driver for a target."""
    return active(Offline(TARGETS[name], SMS[name], 1000 + list(TARGETS).index(name)))


# ---------------------------------------------------------------------------------------------------------- launches


@dataclass
class Launch:
    """The arguments that the launcher passed to a kernel."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    args: list[Any]  # with what Triton's warmup takes in place of tensors: aligned pointers
    kwargs: dict[str, Any]
    tensors: list[Tensor] = field(repr=False)  # on the meta device

    @property
    def how(self) -> elbo_step.How | None:
        return next((a for a in self.args if isinstance(a, elbo_step.How)), None)

    def tile_elements(self, *kinds: type) -> int:
        """`kinds`: Data, Latents, or both."""
        if levels := [a for a in self.args if isinstance(a, elbo_levels.LevelsCall)]:  # of which a program has one
            return levels[0].how.ROWS.value * levels[0].how.COLS.value if Latents in kinds else 0
        calls = [a for a in self.args if isinstance(a, Call)]
        walked = [a for call in calls for a in (call.data, call.latents) if isinstance(a, kinds)]
        return sum(a.tiles.ROWS.value * a.tiles.COLS.value * self.tiles(type(a)) for a in walked)

    def tiles(self, kind: type) -> int:
        """Of one pass through the code: programs of elbo_step that wait hold some of the data."""
        return self.how.TILES.value if kind is Data and self.how is not None else 1

    def bytes_per_thread(self, elements: dict[int, type], warp_size: int) -> int:
        """Of the big tensors in one tile of data and one of latents, with {elements of a tensor: kind of its tile}."""
        total = 0
        for t in self.tensors:
            expanded = 0 in t.stride()  # as large by its shape alone
            if t.element_size() == 1:  # bytes: a thread reads as many of them as of wider numbers
                continue
            if not expanded and (kind := elements.get(t.numel())):
                total += self.tile_elements(kind) * t.element_size()
                if kind is Latents and self.how is not None:  # elbo_step reads latents twice, and writes them once
                    total += self.tile_elements(kind) * t.element_size() // 2
        return total // (self.kwargs["num_warps"] * warp_size)


def leaves(arguments: Any) -> Iterator[Any]:
    """What arguments hold, and the structures among them."""
    for a in arguments:
        if isinstance(a, tuple):
            yield from leaves(a)
        else:
            yield a


def without_memory(argument: Any) -> Any:
    """The same argument with a pretended pointer for each tensor."""
    if isinstance(argument, tuple):
        made = map(without_memory, argument)
        return argument._make(made) if hasattr(argument, "_make") else tuple(made)
    return MockTensor(argument.dtype) if isinstance(argument, Tensor) else argument


class Spy:
    """In a kernel's place: takes down its launches."""

    def __init__(self, kernel: triton.JITFunction, seen: dict[str, Launch]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [a for a in leaves(args) if isinstance(a, Tensor)]
            if any(t.data_ptr() % WIDE for t in tensors):
                raise RuntimeError("a tensor is not aligned, so Triton would compile narrower accesses than usual")
            name = self.kernel.__name__.removesuffix("_kernel")
            shapes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
            self.seen[name] = Launch(self.kernel, grid, [without_memory(a) for a in args], kwargs, shapes)

        return launch


@contextlib.contextmanager
def spied() -> Iterator[dict[str, Launch]]:
    seen: dict[str, Launch] = {}
    kernels = [getattr(module, name) for module, name in JITTED]
    _plan.forget()  # of the kernels themselves, and then of the spies
    try:
        for (module, name), kernel in zip(JITTED, kernels, strict=True):
            setattr(module, name, Spy(kernel, seen))
        yield seen
    finally:
        for (module, name), kernel in zip(JITTED, kernels, strict=True):
            setattr(module, name, kernel)
        _plan.forget()


@functools.cache
def launches(case: str, dtype: str, target_name: str) -> dict[str, Launch]:
    """The launches of training steps of a case. Kernels do not run, so what they would have read and written is not."""

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=DTYPES[dtype], requires_grad=True)

    batch, image, latents = SIZES.get(case, USUAL)
    if case == "hierarchy":
        every = [[leaf(batch, latents * i) for i in range(1, 17)] for _ in range(4)]
        with offline(target_name), spied() as seen, backend("triton"):
            rate = gaussian_kl(*every[:2], prior=list(zip(*every[2:], strict=True)))
            torch.autograd.grad(rate, [t for each in every for t in each])
        return seen
    if case == "batch":
        given = [leaf(batch, latents) for _ in range(3)]
        with offline(target_name), spied() as seen, backend("triton"):
            sums = log_aggregate_posterior(*given, dataset_size=50000)
            torch.autograd.grad(sums, given, [torch.ones_like(t) for t in sums])
        return seen
    recon, target, mu, logvar = leaf(batch, *image), leaf(batch, *image), leaf(batch, latents), leaf(batch, latents)
    extra: dict[str, Any] = {}
    leaves = [recon, mu, logvar]
    if case in ("pixel", "channel"):
        extra["log_sigma"] = leaf(batch, *image) if case == "pixel" else leaf(image[0], 1, 1)
        leaves.append(extra["log_sigma"])
    if case == "prior":
        extra["prior"] = leaf(batch, latents), leaf(batch, latents)
        leaves.extend(extra["prior"])
    if case == "image":
        extra["sigma"] = "optimal-per-image"
    if case == "given":
        extra["sigma"] = 0.1
    if case == "laplace":
        extra["likelihood"] = "laplace"
    if case == "decoder":
        target = torch.zeros(batch, *image, dtype=torch.uint8)
        mask = torch.ones(batch, 1, *image[1:], dtype=torch.bool)
        extra = {"activation": "sigmoid", "weight": mask, "logvar_range": (-30, 20)}
    with offline(target_name), spied() as seen, backend("triton"):
        if not case:  # unequal weights of the samples need one kernel more, and specialise the gradients' differently
            loss = decoupled_elbo(recon, target.detach(), mu, logvar, reduction="none").loss
            torch.autograd.grad(loss, leaves, torch.linspace(0.5, 1.0, batch))
        loss = decoupled_elbo(recon, target.detach(), mu, logvar, **extra).loss
        torch.autograd.grad(loss, leaves)
        if "elbo_step" in CASES[case]:
            decoupled_elbo_backward(recon, target.detach(), mu, logvar, **extra)
    return seen


def launch_of(kernel: str, dtype: str, target: str) -> Launch:
    """`kernel` as in KERNELS."""
    name, _, case = kernel.rstrip("]").partition("[")
    return launches(case, dtype, target)[name]


def big_bytes(kernel: str, dtype: str, target: str, *, of_latents: bool = True) -> int:
    """What one pass through the code must read and write of recon, target, mu, logvar, …, in bytes of a thread."""
    batch, image, latents = SIZES.get(kernel.rstrip("]").partition("[")[2], USUAL)
    elements: dict[int, type] = {batch * torch.Size(image).numel(): Data}
    if of_latents:
        elements[batch * latents] = Latents
    return launch_of(kernel, dtype, target).bytes_per_thread(elements, TARGETS[target].warp_size)


# ---------------------------------------------------------------------------------------------------- machine code


_logs: dict[str, str] = {}  # of ptxas, which speaks only when it compiles


@functools.cache
def compiled(kernel: str, dtype: str, target: str) -> tuple[Code, int]:
    """(code, bytes of shared memory)."""
    launch, log = launch_of(kernel, dtype, target), io.StringIO()
    knobs = triton.knobs
    with offline(target), knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
    if TARGETS[target].backend == "hip":
        return read_amdgcn(binary.asm["amdgcn"]), binary.metadata.shared
    return read_sass(binary.asm["sass"], _logs.setdefault(binary.hash, log.getvalue())), binary.metadata.shared


# ----------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    kernel: str
    dtype: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    global_accesses: int
    wide_accesses: int
    instructions_per_element: float | None
    bytes_in_flight_per_sm: int | None


def row(kernel: str, dtype: str, target: str) -> Row:
    code, shared = compiled(kernel, dtype, target)
    launch = launch_of(kernel, dtype, target)
    warps = launch.kwargs["num_warps"]
    per_element = in_flight = None
    if big_bytes(kernel, dtype, target):
        per_element = round(
            code.instructions * warps * TARGETS[target].warp_size / launch.tile_elements(Data, Latents), 1
        )
        alone = launch.how is not None and launch.how.WAITS.value
        threads = 32 * warps if alone else threads_per_sm(code.registers, warps)
        in_flight = None if code.in_flight is None else code.in_flight * threads
    return Row(
        kernel, dtype, target, code.registers, code.spill_bytes, shared, len(code.widths), len(code.wide),
        per_element, in_flight,
    )  # fmt: skip


def cells(row: Row) -> list[str]:
    return ["" if value is None else str(value) for value in asdict(row).values()]


def write(rows: list[Row], out: Path) -> None:
    names = list(Row.__dataclass_fields__)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "compiled.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *map(cells, rows)])
    lines = [names, ["---"] * 3 + ["---:"] * (len(names) - 3), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = "Written by `python bench/proof/compiled.py`, which says what the columns mean; Triton"
    (out / "compiled.md").write_text(f"{head} {triton.__version__}.\n\n{table}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for compiled.md and compiled.csv (default .)"
    )
    out = parser.parse_args().out
    if triton.knobs.runtime.interpret:
        raise SystemExit("Triton's interpreter compiles nothing: unset TRITON_INTERPRET.")
    rows = []
    for kernel in KERNELS:
        for target in TARGETS:
            rows += [row(kernel, dtype, target) for dtype in dtypes(kernel)]
        print(f"{kernel}: compiled for {', '.join(TARGETS)}", flush=True)
    write(rows, out)


if __name__ == "__main__":
    main()
