"""Everything that needs a GPU, in one command and a given time: `make gpu-check`, or in a checkout as it lies

    PYTHONPATH=. python3 bench/proof/gpu_check.py [--budget 480] [--out runs/gpu] [--only suite,traffic]

The sections come in the order of what they are worth. Each runs in a process of its own and may take its share of the
time that is left, so that one that fails, crashes, hangs or runs out of time takes no other with it. DIR gets three
files: gpu-NAME.json, which is whole at every moment and has what each section has found so far, also the running one;
gpu-NAME.md, the same as pages show it; and gpu-NAME.log, all that was printed. `make bench-docs ARGS=--from=DIR` takes
the result into the pages.

Nothing is installed. It needs torch, and uses what else there is: Triton; nvcc, g++ and ninja for the CUDA backend;
pytest, pytest-xdist, pytest-timeout and hypothesis; compute-sanitizer; ncu. It says what is missing, and goes on.

Exit code: 0 if every section ended well or was not run for what is missing; 1 if one failed or ran out of time; 2 if
there is no GPU (and then no file is written).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_pages
import gpu_pool
import gpu_section
import gpu_suite
import gpu_timing
import gpu_tools
import gpu_values
import record
import torch
from gpu_section import REPO, Part, Record, environment, limited

NO_GPU = 2
BUDGET = 1800.0
LEAST = 5.0  # seconds without which no section is begun
GRACE = 3.0  # of a section's seconds, those that it has to end what it started when its time is over


@dataclass(frozen=True)
class Section:
    name: str
    title: str  # says what is shown, also where it cannot be run
    share: float  # of the time, in seconds of eight minutes
    run: Callable[[Part], str]  # gives its verdict; raises Failed or NotRun


SECTIONS = [
    Section("values", "First launches, and values and gradients of every mode against fp64", 100, gpu_values.run),
    Section("benchmark", "Benchmark: microseconds, GB/s against a measured copy, launches", 160, gpu_timing.run),
    Section("suite", "The tests, on the GPU", 90, gpu_suite.suite),
    Section("synchronisation", "Steps that never wait, on streams, in CUDA graphs", 30, gpu_suite.synchronisation),
    Section("sanitizer", "compute-sanitizer: memcheck and racecheck", 60, gpu_tools.sanitizer),
    Section("traffic", "Bytes of DRAM that ncu counts, beside 5N + 6L", 40, gpu_tools.traffic),
]
WORKERS: dict[str, tuple[Callable[[str], Record], Callable[[list[str]], None]]] = {  # one item; before the first
    "values": (gpu_values.one, gpu_values.prepare),
    "warm": (gpu_timing.warm, lambda items: None),
    "timing": (gpu_timing.measure, lambda items: None),
    "steps": (gpu_tools.one_step, lambda items: None),
    "traffic": (gpu_tools.one_measured, lambda items: None),
}


def conditions() -> Record:
    gpu = torch.cuda.get_device_properties(0)
    about = {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "gpu_memory_gib": round(gpu.total_memory / 2**30),
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    return {"machine": record.machine("cuda") | about, "versions": record.versions()}


def driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().replace("\n", ", ") or None


def slug(gpu: str) -> str:
    """h100-80gb-hbm3 of "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


class Report:
    """What is known so far, on disk."""

    def __init__(self, out: Path, result: Record) -> None:
        out.mkdir(parents=True, exist_ok=True)
        stem = f"gpu-{slug(result['machine']['gpu'])}"
        self.result, self.json, self.page, self.log = result, *(out / f"{stem}.{end}" for end in ("json", "md", "log"))
        self.log.write_bytes(b"")
        self.save()

    def save(self) -> None:
        record.write_json(self.result, self.json)

    def add(self, section: Section, seconds: float, limit: float, part: Record, trouble: str | None) -> None:
        """What a section has found, or has found so far."""
        verdict = part.get("verdict")
        if verdict is None:
            verdict = f"FAILED: {trouble}" if trouble else "running"
        own = {"title": section.title, "verdict": verdict, "seconds": round(seconds, 1), "limit": round(limit, 1)}
        self.result["sections"][section.name] = own | {"found": part.get("found", {})}
        self.save()

    def verdict(self, section: Section) -> str:
        return self.result["sections"][section.name]["verdict"]


def run_section(section: Section, limit: float, folder: Path, report: Report) -> None:
    """Runs it in a process of its own, and keeps what it finds as it comes."""
    path, started, seen = folder / f"{section.name}.json", time.monotonic(), 0
    seconds = max(limit - GRACE, limit / 2)

    def watch(trouble: str | None = None, ended: bool = False) -> None:
        nonlocal seen
        changed = path.stat().st_mtime_ns if path.exists() else 0
        if ended or changed != seen:
            seen = changed
            part = record.read_json(path) if changed else {}
            report.add(section, time.monotonic() - started, limit, part, trouble)

    own = ["--section", section.name, "--part", str(path), "--end", repr(started + seconds)]
    ended = limited([*gpu_section.PROGRAM, *own], seconds, report.log, environment(), watch, GRACE)
    watch(ended.trouble or "it gave no verdict", ended=True)


def check(chosen: list[Section], budget: float, report: Report) -> bool:
    """Runs the sections, each within its share of the time that is left. Tells whether all ended well."""
    end = time.monotonic() + budget
    with tempfile.TemporaryDirectory(prefix="fused_elbo_gpu_") as folder:
        for i, section in enumerate(chosen):
            left = end - time.monotonic()
            limit = left * section.share / sum(other.share for other in chosen[i:])
            print(f"== {section.title} ({limit:.0f} s)", flush=True)
            if limit < LEAST:
                report.add(section, 0.0, limit, {}, "no time was left for it")
            else:
                run_section(section, limit, Path(folder), report)
            print(f"   {report.verdict(section)}", flush=True)
            report.page.write_text(gpu_pages.report(report.result), encoding="utf-8")
    return not any(report.verdict(section).startswith("FAILED") for section in chosen)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, add = [section.name for section in SECTIONS], parser.add_argument
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all sections together ({BUDGET:.0f})")
    add("--out", type=Path, default=REPO / "runs" / "gpu", metavar="DIR", help="folder of the results (runs/gpu)")
    add("--only", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    for name, kind in (("section", str), ("part", Path), ("end", float), ("worker", str), ("answers", Path)):
        add(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of the processes that it starts
    add("--items", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}: unknown; the sections are {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    gpu_section.end_at_sigterm()
    if options.worker:
        one, prepare = WORKERS[options.worker]
        return gpu_pool.work(options.items, options.answers, one, prepare, options.end)
    if options.section:
        section = next(section for section in SECTIONS if section.name == options.section)
        Part(options.part, options.end).run(section.run)
        return 0
    chosen = [section for section in SECTIONS if section.name in options.only]
    if not torch.cuda.is_available():
        print(f"No GPU was found: torch {torch.__version__} sees none. No report is written. On a GPU this would run:")
        print("\n".join(f"  {section.name:16} {section.title}" for section in chosen))
        return NO_GPU
    result: Record = {"format": record.FORMAT, **conditions(), "settings": {"budget": options.budget}, "sections": {}}
    report = Report(options.out, result)
    passed = check(chosen, options.budget, report)
    print(f"Results: {report.json}, {report.page.name} and {report.log.name}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
