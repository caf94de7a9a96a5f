"""Everything that needs a GPU, in one command: `make gpu-check`, or

    python bench/proof/gpu_check.py [--out runs/gpu] [--rounds 50] [--only suite,graphs]

writes DIR/gpu_report.md: the machine, the tests on the GPU, steps without synchronisation, CUDA graphs,
compute-sanitizer, and the benchmark. Each section ends in "ok", "not run" or "FAILED" with the reason.

Exit code: 0 if nothing failed, 1 if a section did, 2 if there is no GPU (and then no report).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from torch import Tensor

from fused_elbo import backends, decoupled_elbo, decoupled_elbo_backward

REPO = Path(__file__).resolve().parents[2]
NUMERICAL = {  # rooms of tests/, and their files
    "loss": (
        "elbo", "step", "step_graph", "layout", "levels", "properties", "facts", "corners", "modules", "memory",
        "module_state",
    ),
    "operators": ("autograd", "ops", "compile"),
}  # fmt: skip
NO_GPU = 2


class Failed(Exception):
    """A section's reason."""


class NotRun(Exception):
    """What is missing."""


@dataclass
class Section:
    name: str
    title: str  # says what is shown, also where it cannot be run
    run: Callable[[argparse.Namespace], list[str]]  # lines of Markdown; raises Failed or NotRun
    lines: list[str] = field(default_factory=list)
    verdict: str = ""

    def __call__(self, options: argparse.Namespace) -> bool:
        try:
            self.lines, self.verdict = self.run(options), "ok"
        except NotRun as missing:
            self.verdict = f"not run: {missing}"
        except Exception as error:  # the sections after it are still worth having
            self.verdict = (
                f"FAILED: {error}" if isinstance(error, Failed) else f"FAILED: {type(error).__name__}: {error}"
            )
        return not self.verdict.startswith("FAILED")

    def markdown(self) -> str:
        return "\n".join([f"## {self.title}", "", *self.lines, "", f"**{self.verdict}**", ""])


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().replace("\n", ", ") or "unknown"


def environment(options: argparse.Namespace) -> list[str]:
    gpu = torch.cuda.get_device_properties(0)
    rows = {
        "GPU": f"{gpu.name}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})",
        "triton": installed("triton"),
        "CUDA C++ backend": backends.cuda.status(build=True).detail,
        "Python": f"{platform.python_version()} on {platform.platform()}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    status = backends.triton.status()
    if not status.ready:
        raise Failed(f"the Triton backend cannot serve: {status.detail} {status.remedy}")
    return lines


def pytest(*arguments: str, device: str) -> list[str]:
    """The last line that pytest prints; raises Failed with the failures."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "device_plugin", "--device", device, *arguments]
    path = os.pathsep.join(filter(None, [str(REPO / "tests"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest printed nothing"]
    if done.returncode:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Failed("\n\n" + "\n".join(["```text", *failures[:40], lines[-1], "```", f"Command: {' '.join(command)}"]))
    return [lines[-1]]


def suite(options: argparse.Namespace) -> list[str]:
    files = [f"tests/{room}/test_{name}.py" for room, names in NUMERICAL.items() for name in names]
    return pytest(*files, device="cuda")


def synchronisation(options: argparse.Namespace) -> list[str]:
    return pytest("tests/kernels/test_gpu.py", "-k", "never_waits or stream or current_one or every_sm", device="cuda")


def graphs(options: argparse.Namespace) -> list[str]:
    return pytest("tests/kernels/test_gpu.py", "-k", "replay", device="cuda")


def sanitizer(options: argparse.Namespace) -> list[str]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotRun("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    lines = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--steps"]
        # Without the caching allocator every tensor has bounds of its own.
        environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True)
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")][-40:]
        if done.returncode:
            raise Failed("\n\n" + "\n".join([f"{tool}:", "```text", *(last or [done.stderr[-2000:]]), "```"]))
        lines.append(f"- {tool}: {last[-1].strip('= ') if last else 'no output'}")
    return lines


def modes(leaf: Callable[..., Tensor], shape: tuple[int, ...], latents: int) -> list[dict[str, Any]]:
    """Those that differ in code. A leaf wants a gradient."""
    batch, channels = shape[:2]
    return [
        {},
        {"sigma": "optimal-per-image", "free_bits": 0.2},
        {"log_sigma": leaf((1, 1, 1)), "beta": leaf(())},
        {"log_sigma": leaf((batch,)), "beta": leaf((batch,))},
        {"log_sigma": leaf((channels, 1, 1), dtype=torch.float32)},
        {"log_sigma": leaf(shape)},
        {"prior": (leaf((batch, latents)), leaf((batch, latents))), "beta": leaf(())},
        {"sigma": 0.3, "capacity": 5.0, "beta": leaf(())},
    ]


def steps(device: str) -> None:
    """What runs under compute-sanitizer: sizes beside every boundary of a tile, in every mode."""
    for shape, latents in (((1, 1, 1, 1), 1), ((3, 3, 9, 11), 5), ((5, 1, 64, 64), 16), ((2, 3, 75, 150), 4097)):
        for dtype in (torch.float32, torch.bfloat16):
            leaf = partial(torch.rand, device=device, dtype=dtype, requires_grad=True)
            for kw in modes(leaf, shape, latents):
                for reduction in ("batchmean",) if "capacity" in kw else ("batchmean", "none"):
                    tensors = [leaf(size) for size in (shape, shape, (shape[0], latents), (shape[0], latents))]
                    given = [t for v in kw.values() for t in (v if isinstance(v, tuple) else (v,))]
                    leaves = [*tensors, *(t for t in given if isinstance(t, Tensor))]
                    loss = decoupled_elbo(*tensors, **kw, reduction=reduction).loss
                    torch.autograd.grad(loss, leaves, torch.rand(loss.shape, device=device))
                    if reduction != "none":
                        decoupled_elbo_backward(*tensors, **kw, reduction=reduction)


def benchmark(options: argparse.Namespace) -> list[str]:
    lines, faults = gpu_timing.table(options.rounds)
    if faults:
        raise Failed("; ".join(faults) + "\n\n" + "\n".join(lines))
    return lines


SECTIONS = [
    Section("environment", "The machine", environment),
    Section("suite", "The tests, on the GPU", suite),
    Section("synchronisation", "Steps under set_sync_debug_mode('error'), on streams and devices", synchronisation),
    Section("graphs", "CUDA graphs: capture, and replay after inputs and β have changed", graphs),
    Section("sanitizer", "compute-sanitizer: memcheck and racecheck", sanitizer),
    Section("benchmark", "Benchmark: microseconds, GB/s against a measured copy, launches", benchmark),
]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, default=REPO / "runs" / "gpu", help="folder of the report (runs/gpu)")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds of the benchmark (default 50)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    parser.add_argument("--steps", action="store_true", help="only the steps that compute-sanitizer watches")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}: unknown; the sections are {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [section for section in SECTIONS if section.name in options.only]
    if not torch.cuda.is_available():
        print(f"No GPU was found: torch {torch.__version__} sees none. No report is written. On a GPU this would run:")
        print("\n".join(f"  {section.name:16} {section.title}" for section in chosen))
        return NO_GPU
    if options.steps:
        steps("cuda")
        torch.cuda.synchronize()
        return 0
    passed = True
    for section in chosen:
        print(f"== {section.title}", flush=True)
        passed &= section(options)
        print(f"   {section.verdict}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report = options.out / "gpu_report.md"
    heading = f"# fused_elbo on a GPU: {'ok' if passed else 'FAILED'}\n\n"
    report.write_text(heading + "\n".join(section.markdown() for section in chosen), encoding="utf-8")
    print(f"Report: {report}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
