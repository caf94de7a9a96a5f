"""How much memory a step needs on top of its inputs, at its peak, and its gradients among it.

    python bench/peak.py CASE PROVIDER [--threads 2]

On a CPU it is the resident set, which has all allocators in it, in this process of its own: Linux's VmHWM, set back
before the steps, less VmRSS then. Steps before that have compiled and loaded what is needed; what they left in
allocators is given back first, and glibc is told to give back whatever is freed, so that what it would keep is not in
the number. On a GPU it is what PyTorch's allocator had given out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import providers
import torch
import workloads

import fused_elbo

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)
STEPS = 3
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; by default it grows to the largest block that was ever freed


def available() -> bool:
    """Whether this system can tell a process's peak, and set it back."""
    return STATUS.exists() and CLEAR.exists()


def resident(field: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """What allocators keep of what is free."""
    gc.collect()
    if hasattr(fused_elbo, "empty_cache"):
        fused_elbo.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(step: providers.Step, device: str) -> int:
    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    give_back()
    CLEAR.write_text(RESET_PEAK)
    before = resident("VmRSS")
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before


def in_a_process(case: workloads.Case, provider: str, threads: int) -> int:
    command = [sys.executable, __file__, case.name, provider, "--threads", str(threads), "--device", case.device]
    done = subprocess.run(command, env=os.environ | GLIBC, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (case,) = workloads.chosen([args.case], args.device)
    (provider,) = providers.chosen([args.provider], case)
    print(json.dumps(peak_bytes(providers.Step(provider, case, case.tensors()), case.device)))


if __name__ == "__main__":
    main()
