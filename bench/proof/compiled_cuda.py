"""What nvcc makes of the CUDA kernels, for GPUs that need not be here: compiled.py's table for csrc/cuda.

    python bench/proof/compiled_cuda.py --out bench/proof

Writes compiled_cuda.md and .csv: files of their own, for nvcc is not everywhere where Triton is. The columns
are those of compiled.py, and so is the reading of machine code, with these differences:

- kernel: elbo_stats and so on, with recon and target of one dtype; [pixel]: σ varies inside a sample; [given],
  [image]: σ is given, is each sample's own; [z], [mu]: gradients of z, of mu and logvar; [mixed]: the one kernel for
  Laplace, weights, a target of bytes, and activations, which it is told at run time. Extra errors, limits and logvar's
  range are in all of them.
- global_accesses, wide_accesses: a kernel reads elements one by one too, where vectors do not fit, and latents of any
  dtype, chosen at run time. So the code has narrow accesses that large aligned tensors never come to; how wide those
  are that they do come to is counted in tests/csrc/test_cuda_ptx.py, where the code runs.
- bytes_in_flight_per_sm: between two branches, so of the data; each access of a latent is behind a branch of its own.
  Blank where each access of the data is, too: [mixed].
- instructions_per_element is blank: no pass through the code covers a fixed number of elements.

nvcc's own folder may lack the tools that read machine code; Triton's wheel has them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from compiled import Row
from machine_code import WIDE, Code, read_sass, threads_per_sm

from fused_elbo import csrc

TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"fp32": "float", "bf16": "BFloat16", "fp16": "Half"}
FLAGS = ("-std=c++17", "-O3", "-fmad=false")  # as in the build
EACH = "elbo_step_each"
# kernel -> file, template and argument, threads of a block; {T}: the dtype
KERNELS = {
    "elbo_stats": ("elbo_stats", "elbo_stats_kernel<float, {T}, {T}, false>(StatsArguments)", 256),
    "elbo_stats[pixel]": ("elbo_stats", "elbo_stats_kernel<float, {T}, {T}, true>(StatsArguments)", 256),
    "elbo_finalize": ("elbo_finalize", "elbo_finalize_kernel<float>(FinalizeArguments)", 1024),
    "elbo_grads": ("elbo_grads", "elbo_grads_kernel<float, {T}, {T}, false>(GradsArguments)", 256),
    "elbo_grads[pixel]": ("elbo_grads", "elbo_grads_kernel<float, {T}, {T}, true>(GradsArguments)", 256),
    "elbo_step_each[given]": (EACH, "elbo_step_each_kernel<{T}, {T}, false>(StepEachArguments)", 512),
    "elbo_step_each[image]": (EACH, "elbo_step_each_kernel<{T}, {T}, true>(StepEachArguments)", 512),
    "elbo_step": ("elbo_step", "elbo_step_kernel<{T}, {T}>(StepArguments)", 512),
    "elbo_stats[mixed]": ("elbo_stats", "elbo_stats_kernel<float, {T}, Mixed, true>(StatsArguments)", 256),
    "elbo_grads[mixed]": ("elbo_grads", "elbo_grads_kernel<float, {T}, Mixed, true>(GradsArguments)", 256),
    "elbo_step_each[mixed-given]": (EACH, "elbo_step_each_kernel<{T}, Mixed, false>(StepEachArguments)", 512),
    "elbo_step_each[mixed-image]": (EACH, "elbo_step_each_kernel<{T}, Mixed, true>(StepEachArguments)", 512),
    "elbo_step[mixed]": ("elbo_step", "elbo_step_kernel<{T}, Mixed>(StepArguments)", 512),
    "elbo_levels": ("elbo_levels", "elbo_levels_kernel<float>(LevelsArguments)", 256),
    "elbo_level_sums": ("elbo_levels", "elbo_level_sums_kernel<float>(LevelSumsArguments)", 256),
    "elbo_levels_grads": ("elbo_levels", "elbo_levels_grads_kernel<float>(LevelsArguments)", 256),
    "aggregate": ("aggregate", "aggregate_kernel<float>(AggregateArguments)", 256),
    "aggregate_sums": ("aggregate", "aggregate_sums_kernel<float>(LogSumsArguments)", 256),
    "aggregate_grads[z]": (
        "aggregate_grads",
        "aggregate_grads_kernel<float, OfPoints<float>>(AggregateArguments)",
        256,
    ),
    "aggregate_grads[mu]": (
        "aggregate_grads",
        "aggregate_grads_kernel<float, OfComponents<float>>(AggregateArguments)",
        256,
    ),
    "aggregate_grad_sums": ("aggregate_grads", "aggregate_grad_sums_kernel<float>(GradSumsArguments)", 256),
}
OF_LEVELS = ("elbo_levels", "elbo_level_sums", "elbo_levels_grads")
OF_AGGREGATE = ("aggregate", "aggregate_sums", "aggregate_grads[z]", "aggregate_grads[mu]", "aggregate_grad_sums")
OF_ANY_DTYPE = ("elbo_finalize", *OF_LEVELS, *OF_AGGREGATE)  # chosen at run time, or none


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def compiled(kernel: str, dtype: str, target: str) -> tuple[Code, int]:
    """(code, bytes of shared memory that the code itself has)."""
    stem, instance, _ = KERNELS[kernel]
    source = f'#include "cuda/{stem}.cuh"\nnamespace elbo {{\ntemplate __global__ void {instance};\n}}\n'
    includes = (f"-I{csrc.ROOT}", f"-I{Path(torch.__file__).parent / 'include'}")
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source.replace("{T}", DTYPES[dtype]), encoding="utf-8")
        command = [nvcc() or "nvcc", *FLAGS, f"-arch={target}", "-Xptxas", "-v", "-cubin", *includes]
        done = subprocess.run([*command, str(text), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        tool = triton.knobs.nvidia.cuobjdump.path
        sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    shared = re.search(r"(\d+) bytes smem", done.stderr)
    return read_code(sass, done.stderr), int(shared[1]) if shared else 0


def read_code(sass: str, log: str) -> Code:
    whole, branch = as_triton_prints(sass), r"^.*\b(?:BRA|BRX|CALL|RET|EXIT|BSYNC)\b.*$"
    parts = [read_sass(part, log).in_flight or 0 for part in re.split(branch, whole, flags=re.MULTILINE)]
    return replace(read_sass(whole, log), in_flight=max(parts))


def as_triton_prints(sass: str) -> str:
    """cuobjdump's "/*0010*/  LDG.E R0, [R2] ;  /* 0x… */" with its control codes in front, as `read_sass` knows it."""
    return "\n".join(f"--:-:-:-:-\t{line}" for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+;)", sass))


def row(kernel: str, dtype: str, target: str) -> Row:
    code, shared = compiled(kernel, dtype, target)
    in_flight = None
    if kernel not in OF_ANY_DTYPE and not is_mixed(kernel) and code.in_flight is not None:
        in_flight = code.in_flight * threads_per_sm(code.registers, KERNELS[kernel][2] // 32)
    wide = [w for w in code.widths if w >= WIDE]
    return Row(
        kernel, dtype, target, code.registers, code.spill_bytes, shared, len(code.widths), len(wide), None, in_flight
    )  # fmt: skip


def is_mixed(kernel: str) -> bool:
    return "[mixed" in kernel


def dtypes_of(kernel: str) -> list[str]:
    return ["fp32"] if kernel in OF_ANY_DTYPE else list(DTYPES)


def write(rows: list[Row], out: Path) -> None:
    names = list(Row.__dataclass_fields__)
    cells = [["" if value is None else str(value) for value in asdict(row).values()] for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "compiled_cuda.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *cells])
    version = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    lines = [names, ["---"] * 3 + ["---:"] * (len(names) - 3), *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = "Written by `python bench/proof/compiled_cuda.py`, which says what the columns mean; nvcc"
    (out / "compiled_cuda.md").write_text(f"{head} {release and release[1]}.\n\n{table}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the two files (default .)")
    out = parser.parse_args().out
    if nvcc() is None:
        raise SystemExit("There is no nvcc here (PATH, /usr/local/cuda).")
    rows = []
    for kernel in KERNELS:
        for target in TARGETS:
            rows += [row(kernel, dtype, target) for dtype in dtypes_of(kernel)]
        print(f"{kernel}: compiled for {', '.join(TARGETS)}", flush=True)
    write(rows, out)


if __name__ == "__main__":
    main()
