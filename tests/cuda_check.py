"""What the CUDA kernels must satisfy, for a library that tests/cuda_shim compiled: run by test_cuda_shim.py.

    python tests/cuda_check.py LIBRARY

prints, as JSON, what the checks of kernel_check.py say of it under every schedule: null, or the fault.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from cuda_shim import Shim
from kernel_check import Case, cases

SCHEDULES = (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2))


def fault_of(operators: SimpleNamespace, every: dict[str, Case]) -> str | None:
    for name, case in every.items():
        try:
            case.check(operators)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def main() -> None:
    shim = Shim(Path(sys.argv[1]))
    shim.multiprocessors(1)
    namespace = torch.ops.fused_elbo_cuda
    operators = SimpleNamespace(forward=namespace.forward.default, grads=namespace.grads.default)
    with cases() as every:
        for name, seed in SCHEDULES:
            shim.schedule(name, seed)
            if fault := fault_of(operators, every):
                print(json.dumps(f"{name} {seed}, {fault}"))
                return
    print(json.dumps(None))


if __name__ == "__main__":
    main()
