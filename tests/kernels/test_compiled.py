"""The machine code of the Triton kernels, for GPUs that need not be here: bench/proof/compiled.py reads it."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from tiers import together

triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
PROOF = Path(__file__).parents[2] / "bench" / "proof"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(PROOF))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(PROOF))


def missing() -> str | None:
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1: the interpreter compiles nothing"
    try:
        tools = triton.knobs.nvidia
        for name in ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm"):
            _ = getattr(tools, name).path
    except RuntimeError as error:
        return f"Triton's wheel lacks a tool: {error}"
    if absent := {"nvidia", "amd"} - set(triton.backends.backends):
        return f"this Triton has no backend for {', '.join(sorted(absent))}"
    return None


if reason := missing():
    pytest.skip(reason, allow_module_level=True)

bench, machine_code = load("compiled"), load("machine_code")
NVIDIA = [name for name, target in bench.TARGETS.items() if target.backend == "cuda"]

# What the code may read and write a value at a time, for it is O(batch). elbo_stats writes a partial sum of S and one
# of KL; its last program reads those of all, and writes the outputs. elbo_grads reads grad_loss and ΣS for the one
# sample of a tile of data, and grad_loss for each of the samples, up to four, of which a thread has latents. Those of
# levels likewise; AMD's have the loads of a loop's first turn twice.
NARROW = {"elbo_stats": 2 + 32, "elbo_grads": 6, "elbo_levels": 1 + 40, "elbo_levels_grads": 4}
BLOCKS_PER_SM = 2  # that fit at least: 16 warps, at most 128 registers

# What differs little from what `make check` reads: fp16 from bf16, one target from another.
seldom = pytest.mark.release("the machine code of Triton's kernels for every target and dtype")


def each_dtype(kernel: str) -> pytest.MarkDecorator:
    names = [pytest.param(d, marks=seldom if d == "fp16" else ()) for d in bench.dtypes(kernel)]
    return pytest.mark.parametrize("dtype", names)


for_each_dtype = each_dtype("elbo_")


def for_each_target(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", [pytest.param(t, marks=() if t == "sm_90" else seldom) for t in names])


def for_each_kernel(*stages: str) -> pytest.MarkDecorator:
    """A kernel is compiled once for all that is asked of it: in one process."""
    names = [kernel for kernel in bench.KERNELS if kernel.startswith(stages)]
    return pytest.mark.parametrize("kernel", [pytest.param(k, marks=together(k)) for k in names])


@for_each_dtype
@for_each_target(bench.TARGETS)
@for_each_kernel("elbo_")
def test_compiles_without_spills(kernel: str, target: str, dtype: str) -> None:
    row = bench.row(kernel, dtype, target)
    assert row.spill_bytes == 0
    assert row.registers > 0
    assert row.global_accesses > 0


@for_each_dtype
@for_each_target(bench.TARGETS)
@for_each_kernel("elbo_stats", "elbo_grads", "elbo_levels")
def test_every_access_of_big_tensors_is_wide(kernel: str, target: str, dtype: str) -> None:
    """The wide accesses move the bytes of one tile of each big tensor, no more and no less: so no part of any of them
    is left to narrow ones, or moved twice. What narrow ones there are, are as few as O(batch) values need."""
    code, _ = bench.compiled(kernel, dtype, target)
    launch = bench.launch_of(kernel, dtype, target)
    threads = launch.kwargs["num_warps"] * 32
    if target in NVIDIA:
        # elbo_grads asks for recon and target of the next tile in its loop, and of the first one ahead of that.
        ahead = 2 * bench.DTYPES[dtype].itemsize * launch.tile_elements(bench.Data) // threads
        looped = kernel == "elbo_grads[large]"
        assert sum(code.wide) == bench.big_bytes(kernel, dtype, target) + (ahead if looped else 0)
    else:  # loads of a loop's first turn may be written out ahead of it, and data and latents end in the same stores
        assert sum(code.wide) >= bench.big_bytes(kernel, dtype, target, of_latents=False)
    # For a σ of each channel, what an element looks up, and the gradient of a segment; for a decoder, what an element
    # looks up of the mask, and the bytes of the target, four or more at a time.
    each = launch.tile_elements(bench.Data) // threads
    of_elements = each + 1 if "[channel]" in kernel else each + each // 4 if "[decoder]" in kernel else 0
    of_elements += 12 if kernel == "elbo_stats[decoder]" else 0  # the weights' partial sums, and their row of stats
    assert len(code.widths) - len(code.wide) <= NARROW[kernel.partition("[")[0]] + of_elements


@for_each_dtype
@for_each_target(NVIDIA)
@for_each_kernel("elbo_stats", "elbo_grads", "elbo_levels")
def test_occupancy(kernel: str, target: str, dtype: str) -> None:
    launch, row = bench.launch_of(kernel, dtype, target), bench.row(kernel, dtype, target)
    warps = launch.kwargs["num_warps"]
    assert warps == 8
    assert machine_code.threads_per_sm(row.registers, warps) >= BLOCKS_PER_SM * warps * 32
    # Of a reduction: no tile goes through shared memory to be stored. But the fp32 gradients of a broadcast log σ,
    # beside half-precision data, are laid out anew for it, and by Triton 3.6 beside any, which leaves the blocks room.
    before = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    # So are bytes, beside fp32.
    relaid = ("[channel]" in kernel and (dtype != "fp32" or before)) or "[decoder]" in kernel
    assert row.shared_bytes <= ((16384 if before else 8192) if relaid else 1024)


@each_dtype("aggregate_")
@for_each_target(NVIDIA)
@for_each_kernel("aggregate_")
def test_the_aggregate_posterior_holds_its_sums_in_registers(kernel: str, target: str, dtype: str) -> None:
    launch, row = bench.launch_of(kernel, dtype, target), bench.row(kernel, dtype, target)
    warps = launch.kwargs["num_warps"]
    assert warps == 4
    assert row.spill_bytes == 0
    assert machine_code.threads_per_sm(row.registers, warps) >= (4 if dtype != "fp64" else 3) * warps * 32


@for_each_dtype
@for_each_target(NVIDIA)
@for_each_kernel("elbo_step")
def test_a_program_of_the_step_fits_on_every_sm(kernel: str, target: str, dtype: str) -> None:
    """Its launcher counts on one for each SM; programs that wait for one another hang if one is missing."""
    launch, row = bench.launch_of(kernel, dtype, target), bench.row(kernel, dtype, target)
    warps = launch.kwargs["num_warps"]
    assert machine_code.threads_per_sm(row.registers, warps) >= warps * 32
    assert row.shared_bytes <= (16384 if "[decoder]" in kernel else 1024)  # see above
    code, _ = bench.compiled(kernel, dtype, target)
    assert sum(code.wide) == bench.big_bytes(kernel, dtype, target)


def test_the_threads_that_registers_allow() -> None:
    assert machine_code.threads_per_sm(32, 8) == 2048
    assert machine_code.threads_per_sm(33, 8) == 1536
    assert machine_code.threads_per_sm(128, 8) == 512
    assert machine_code.threads_per_sm(129, 8) == 256


def test_the_reading_of_machine_code() -> None:
    """Against code written by hand, so that a reader which finds nothing does not pass for kernels without faults."""
    sass = "\n".join(
        "--:-:-:-:1\t" + line
        for line in (
            "@P1 LDG.E.128 R12, desc[UR8][R28.64+0x1000];",
            "@P1 LDG.E.U16.CONSTANT R16, desc[UR8][R24.64];",
            "LDG.E R17, desc[UR8][R24.64];",
            "FADD R0, R1, R14;",
            "LDG.E.64 R4, [R2.64];",
            "STG.E.128 desc[UR8][R2.64], R4;",
            "NOP;",
        )
    )
    code = machine_code.read_sass(
        sass, "Used 40 registers\n0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"
    )
    assert (code.registers, code.spill_bytes, code.instructions) == (40, 20, 6)
    assert (code.widths, code.in_flight) == ([16, 2, 4, 8, 16], 22)
    assert machine_code.sass_width("LDG.E.ENL2.256") == 32

    amdgcn = "\tbuffer_load_dwordx4 v[0:3], v1\n\tglobal_load_ushort v1, v2\n\tbuffer_store_dword v1, v2\n\ts_endpgm\n"
    notes = "    .private_segment_fixed_size: 4\n    .vgpr_count:     56\n"
    code = machine_code.read_amdgcn(f"kernel:\n{amdgcn}\t.section x\n{notes}")
    assert (code.registers, code.spill_bytes, code.instructions) == (56, 4, 4)
    assert (code.widths, code.in_flight) == ([16, 2, 4], None)


TABLED = ("elbo_stats", "elbo_grads", "elbo_levels[hierarchy]", "aggregate_sums[batch]", "aggregate_grads[batch]")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [pytest.param(k, marks=together(k)) for k in TABLED])
def test_the_committed_table_is_of_this_code(kernel: str, dtype: str) -> None:
    """A few of its rows, compiled anew: `python bench/proof/compiled.py --out bench/proof` writes them all."""
    folder = Path(bench.__file__).parent
    named = re.search(r"Triton (\S+)\.\n", (folder / "compiled.md").read_text(encoding="utf-8"))
    assert named is not None
    if named[1] != triton.__version__:
        pytest.skip(f"the committed table is of Triton {named[1]}, and this is {triton.__version__}")
    with (folder / "compiled.csv").open(newline="", encoding="utf-8") as file:
        committed = [row for row in csv.reader(file) if row[:3] == [kernel, dtype, "sm_90"]]
    assert [bench.cells(bench.row(kernel, dtype, "sm_90"))] == committed


def test_the_table_has_every_kernel(tmp_path: Path) -> None:
    rows = [bench.Row("k", "fp32", "sm_90", 32, 0, 128, 18, 16, 1.5, None)]
    bench.write(rows, tmp_path)
    names = "kernel,dtype,target,registers,spill_bytes,shared_bytes,global_accesses,wide_accesses,"
    names += "instructions_per_element,bytes_in_flight_per_sm"
    assert (tmp_path / "compiled.csv").read_text() == f"{names}\nk,fp32,sm_90,32,0,128,18,16,1.5,\n"
    assert "| k | fp32 | sm_90 | 32 | 0 | 128 | 18 | 16 | 1.5 |  |" in (tmp_path / "compiled.md").read_text()
    committed = (Path(bench.__file__).parent / "compiled.csv").read_text().splitlines()
    assert committed[0] == names
    expected = [(k, d, t) for k in bench.KERNELS for t in bench.TARGETS for d in bench.dtypes(k)]
    assert [tuple(line.split(",")[:3]) for line in committed[1:]] == expected
