"""Every instruction set of this machine that the CPU library is built for, and what a step gives on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from cases import MODES, Call

HERE = Path(__file__).parent

RUN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from fused_elbo import backend, decoupled_elbo, decoupled_elbo_backward, log_aggregate_posterior
(calls, mixtures), values = torch.load(sys.argv[2], weights_only=False), []
with backend("cpp"):
    for mixture in mixtures:
        sums = log_aggregate_posterior(*mixture, dataset_size=1000)
        values += [*(s.detach() for s in sums), *torch.autograd.grad(sums, mixture, [s.detach().cos() for s in sums])]
    for call in calls:
        outputs = call(decoupled_elbo)
        values += [o.detach() for o in outputs if o is not None] + call.gradients(outputs)
        at_once = call(decoupled_elbo_backward)
        values += [o for o in at_once if o is not None] + [leaf.grad for leaf in call.leaves()]
torch.save(values, sys.argv[3])
"""


def capabilities() -> list[str]:
    """What ATEN_CPU_CAPABILITY can be on this machine."""
    levels = ["default", "avx2", "avx512"]
    return levels[: levels.index(torch.backends.cpu.get_cpu_capability().lower()) + 1]


def of_each_instruction_set(folder: Path, program: str = sys.executable) -> dict[str, list[torch.Tensor]]:
    """Outputs and gradients by PyTorch's name for it, for all that this machine has. (PyTorch's switch also changes
    torch.randn, so the inputs are made once.)"""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    calls = [Call(mode, data=(3, 11, 13), latent=(70,), dtype=dtype) for mode in MODES for dtype in dtypes]
    mixtures = [[torch.randn(150, 9, dtype=dtype, requires_grad=True) for _ in range(3)] for dtype in dtypes]
    torch.save((calls, mixtures), folder / "calls.pt")
    results = {}
    for capability in capabilities():
        paths = (str(HERE), str(folder / "calls.pt"), str(folder / f"{capability}.pt"))
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        subprocess.run([program, "-c", RUN, *paths], check=True, env=environment, cwd=folder)
        results[capability] = torch.load(paths[-1])
    return results
