"""The machine code of the CUDA kernels, for GPUs that need not be here; bench/proof/compiled_cuda.py reads it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiers import together

if "cuda_plugin" not in sys.modules:
    pytest.skip("minutes of compiling, which `make test-cuda` takes", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton, whose wheel has the tools that read machine code, is not here")
PROOF = Path(__file__).parents[2] / "bench" / "proof"


def load() -> ModuleType:
    sys.path.insert(0, str(PROOF))
    try:
        return importlib.import_module("compiled_cuda")
    finally:
        sys.path.remove(str(PROOF))


bench = load()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(bench.nvcc() is None, reason="no nvcc on this machine (PATH, /usr/local/cuda)"),
]
ROWS = [(k, d, t) for k in bench.KERNELS for t in bench.TARGETS for d in bench.dtypes_of(k)]


def for_each(rows: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    """`make check` compiles for one target, and fp16 is like bf16; each kernel in one process."""
    seldom = pytest.mark.release("the machine code of the CUDA kernels for every target and dtype")
    marked = [
        pytest.param(*row, marks=[together(row[0]), *([] if row[2] == "sm_90" and row[1] != "fp16" else [seldom])])
        for row in rows
    ]
    return pytest.mark.parametrize(("kernel", "dtype", "target"), marked)


# 128-bit accesses. Of the latents, whatever their dtype: elbo_stats reads four tensors, elbo_grads writes four too, and
# a step does both. Of the data: recon and target in a loop of two turns and in one for what is left, and as many
# gradients; where σ varies inside a sample and elements are of 16 bits, both loops have one turn. elbo_step has every
# row that registers hold, twice, since it has a copy of the loop for batches that are cut off in the middle of a row.
HELD = 56  # floats of a thread, as in csrc/cuda/step_plan.h
OF_LATENTS = {"elbo_stats": 4, "elbo_grads": 8, "elbo_step_each": 12, "elbo_step": 12}


def wide_at_least(kernel: str, dtype: str) -> int:
    stem, _, case = kernel.partition("[")
    of_data = of_mixed_data(stem, dtype) if bench.is_mixed(kernel) else of_plain_data(stem, case, dtype)
    return of_data + OF_LATENTS[stem]


def of_plain_data(stem: str, case: str, dtype: str) -> int:
    if stem == "elbo_step":
        return 2 * 2 * HELD // (4 if dtype == "fp32" else 8)
    of_data = 4 if case == "pixel]" and dtype != "fp32" else 6
    return of_data if stem == "elbo_stats" else 2 * of_data


def of_mixed_data(stem: str, dtype: str) -> int:
    """Vectors have four elements, of a half dtype 64 bits. recon, target, weight and, in two passes, log σ are loaded
    ahead of the loop and in it; each but the weight has a gradient."""
    half, in_two_passes = dtype != "fp32", stem in ("elbo_stats", "elbo_grads")
    loads = 2 * (3 - half + in_two_passes)
    return loads if stem == "elbo_stats" else loads + 2 - half + in_two_passes


@for_each(ROWS)
def test_compiles_without_spills(kernel: str, dtype: str, target: str) -> None:
    row = bench.row(kernel, dtype, target)
    assert row.spill_bytes == 0
    assert 0 < row.registers <= 128
    # Of a block's sum: the step plans with it. Or of the sums of all levels; or of tiles, beside which two blocks on an
    # SM have room for what they keep of 128 latents each.
    room = {"elbo_level_sums": 4096, "aggregate": 25600, "aggregate_grads": 25600}
    assert row.shared_bytes <= room.get(kernel.partition("[")[0], 1024)


@for_each([row for row in ROWS if row[0] in ("elbo_levels", "elbo_levels_grads")])
def test_levels_have_wide_accesses(kernel: str, dtype: str, target: str) -> None:
    assert bench.row(kernel, dtype, target).wide_accesses >= (4 if kernel == "elbo_levels" else 8)


@for_each([row for row in ROWS if row[0] not in bench.OF_ANY_DTYPE])
def test_large_tensors_have_wide_accesses(kernel: str, dtype: str, target: str) -> None:
    assert bench.row(kernel, dtype, target).wide_accesses >= wide_at_least(kernel, dtype)


@for_each([row for row in ROWS if row[0] not in bench.OF_ANY_DTYPE and not bench.is_mixed(row[0])])
def test_large_tensors_are_asked_for_at_once(kernel: str, dtype: str, target: str) -> None:
    row = bench.row(kernel, dtype, target)
    assert row.bytes_in_flight_per_sm is not None
    # An H100's memory moves 17 kB for each SM in the time of one access. The reader takes the look-ups of a broadcast
    # log σ, which wait for a division, for the end of a batch of loads.
    assert row.bytes_in_flight_per_sm >= (16384 if "pixel" in kernel else 32768)


def test_the_reading_of_machine_code() -> None:
    """Against a dump written by hand, so that a reader which finds nothing does not pass for kernels without faults."""
    dump = (
        "\t\tFunction : kernel\n"
        '\t.headerflags\t@"EF_CUDA_SM90"\n'
        "        /*0000*/                   LDG.E.128 R12, desc[UR8][R28.64] ;    /* 0x0000a4ff01017624 */\n"
        "                                                                         /* 0x000fe400078e00ff */\n"
        "        /*0010*/              @!P0 STG.E desc[UR8][R2.64], R4 ;          /* 0x0000a4ff01017624 */\n"
        "        /*0020*/                   NOP ;                                 /* 0x0000a4ff01017624 */\n"
    )
    code = bench.read_sass(
        bench.as_triton_prints(dump), "Used 40 registers\n8 bytes spill stores, 12 bytes spill loads"
    )
    assert (code.registers, code.spill_bytes, code.instructions, code.widths) == (40, 20, 2, [16, 4])


def test_the_table_has_every_kernel() -> None:
    committed = (PROOF / "compiled_cuda.csv").read_text().splitlines()
    assert committed[0] == ",".join(bench.Row.__dataclass_fields__)
    assert [tuple(line.split(",")[:3]) for line in committed[1:]] == ROWS
