"""What a step of the loss costs the host where the kernels run on a GPU: everything but the kernels, measured without
one.

    python bench/host.py             # two minutes, the first time one more; writes runs/host/host.json

Triton's kernels stand behind the operators for CPU tensors here, as they do for a GPU's, and its driver is one whose
launches do nothing. So the times are of fused_elbo's Python, PyTorch's dispatcher and allocator, and Triton's way to a
launch, on the smallest of batches; the driver's own launch, about 2 µs for each kernel, comes on top. What that is
compared with computes on the CPU, in about as much time as it takes to launch as many kernels from eager code.

The CUDA C++ backend is the library of its sources that tests/cuda_shim makes without a GPU, optimised as the real one,
and asked for by `fused_elbo.backend("cuda")`: its bindings, its plans of grids and its structures of arguments are what
a GPU gets. Its launches do nothing, and neither do CUDA's other calls, nor PyTorch's for a current device and stream.
What is left out, then, is the driver's launch; what it is asked for of the device before (how many blocks of a kernel
it holds, how many multiprocessors it has); and the stream. Memory is of PyTorch's allocator for the CPU, for both
backends.

`make bench-docs ARGS=--from=runs/host` keeps the result, and shows it in RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import providers
import record
import timing
import torch
import triton
from offline import H100_SMS, Offline
from workloads import Case

from fused_elbo import backends
from fused_elbo.build.tools import Settings
from fused_elbo.operators import elbo

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import cuda_shim

CASE = Case((4, 1, 8, 8), latent=(8,), limit=False)
OURS, ONE_LINER = ("triton", "single_pass", "cuda", "cuda_single_pass"), "one_liner"
NAMES = (*OURS, ONE_LINER, "one_liner_compiled", "stock", "stock_compiled")
ROUNDS = 100


def serve_by_triton() -> None:
    """For the rest of the process."""
    triton.runtime.driver.set_active(Offline())
    elbo.register(backends.triton.operators(), "CPU")
    backends.dispatched["cpu"] = "triton"


def load_cuda() -> None:
    """The library, which takes a minute to compile and is then kept in the cache, in the place of a GPU's."""
    shim = cuda_shim.Shim(cuda_shim.build(Settings.read().cache_dir / "cuda_shim", flags=("-O3", "-g0")))
    shim.idle()
    shim.multiprocessors(H100_SMS)
    backends.cuda.library.loaded, backends.cuda.device = "the shim in tests/cuda_shim, whose launches do nothing", "cpu"


def measure(rounds: int) -> record.Record:
    chosen = {p.name: p for p in providers.ALL if p.name in NAMES}
    tensors = CASE.tensors()
    steps = {name: providers.Step(chosen[name], CASE, tensors) for name in NAMES}
    for name in NAMES:
        if name not in OURS:  # whose kernels do not run
            providers.check(steps[name], CASE)
    times = timing.interleaved(steps, CASE, rounds, timing.PATIENCE)
    return {
        "format": record.FORMAT,
        "machine": record.machine("cpu"),
        "versions": record.versions(),
        "flags": record.flags(),
        "settings": {"threads": torch.get_num_threads(), "rounds": rounds},
        "case": CASE.name,
        "results": [
            {
                "provider": name,
                "busy": own.calm_share < timing.CALM,
                "step_s": vars(own.spread(own.steps)),
                "to_one_liner": timing.Ratio.of_rounds(own, times[ONE_LINER]).as_dict(),
            }
            for name, own in times.items()
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/host"), metavar="DIR", help="folder of host.json (runs/host)")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help=f"timed rounds (default: {ROUNDS})")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter has no launches: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    serve_by_triton()
    load_cuda()
    result = measure(args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_json(result, args.out / "host.json")
    for own in result["results"]:
        step, ratio = record.median(own), record.ratio(own["to_one_liner"])
        print(f"{own['provider']:20} {step:>10}  {ratio:>6} of the one-liner")
    return 0


if __name__ == "__main__":
    sys.exit(main())
