"""What NVIDIA's tools see: compute-sanitizer's memcheck and racecheck, and the bytes of DRAM that ncu counts.

Both watch a worker of gpu_pool.py, whose answers say how far it came if its time runs out.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_cases
import gpu_section
import gpu_values
import providers
import torch
import workloads
from gpu_section import Ended, Failed, NotRun, Part, Record, environment, last_of, limited, shown
from gpu_timing import Flush
from workloads import DTYPES

import fused_elbo

CHECKS = ("memcheck", "racecheck")
MARGIN = 3.0  # seconds to say what was found
WORDS = 4.0  # seconds that a worker's last item and its tool's words may take
MARKER = "spin_kernel"  # of torch.cuda._sleep: it stands before each step that ncu watches
METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
TRAFFIC_CASES = tuple(
    replace(workloads.SHAPES[i], dtype=dtype, device="cuda") for i in (1, 2, 4) for dtype in ("fp32", "bf16")
)
# What compute-sanitizer finds stands at a line's begin. The rest is indented, or it is about itself:
NO_ERROR = (
    "COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|Target application|"
    "Error: (?:Device not supported|No attachable|process didn't)"
)
ERROR = re.compile(rf"^=+ (?!{NO_ERROR})(\S.*)$", re.M)


def watched(
    tool: Sequence[str], kind: str, items: Sequence[str], seconds: float, folder: Path
) -> tuple[Ended, list[str]]:
    """Runs a worker under a tool; its end, and all that both printed. The answers are in the folder.

    The worker stops by itself before its time is over, since it is then that the tools say what they have seen.
    """
    command = [*tool, *gpu_section.PROGRAM, "--worker", kind, "--end", repr(time.monotonic() + seconds - WORDS)]
    command += ["--answers", str(folder / "answers"), "--items", *items]
    # Without the caching allocator every tensor has bounds of its own.
    environ = environment(**{"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if kind == "steps" else {})
    ended = limited(command, seconds, folder / "log", environ)
    return ended, shown(folder / "log")


def answers(folder: Path) -> dict[str, Record]:
    """Item -> what was found, of those that were done."""
    path = folder / "answers"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return {answer["item"]: answer["found"] for answer in told if "found" in answer}


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise NotRun(f"{name} is not on PATH; it comes with the CUDA toolkit")
    return found


# ---------------------------------------------------------------------------------------------------- compute-sanitizer


def sanitizer(part: Part) -> str:
    program = tool("compute-sanitizer")
    both = zip(*(gpu_values.cases(backend) for backend in gpu_values.BACKENDS), strict=True)
    items = [item for pair in both for item in pair if gpu_values.LEVELS not in item and "fp16" not in item]
    for i, name in enumerate(CHECKS):
        with tempfile.TemporaryDirectory() as folder:
            command = [program, "--tool", name, "--report-api-errors", "no"]
            seconds = (part.left() - MARGIN) / (len(CHECKS) - i)
            ended, lines = watched(command, "steps", items, seconds, Path(folder))
            done = answers(Path(folder))
        part.found[name] = sanitized(done, items, lines) | {"in_time": ended.in_time}
        part.save()
    if bad := [f"{name}: {found['first']}" for name, found in part.found.items() if found["first"]]:
        raise Failed("; ".join(bad))
    if not any(found["steps"] for found in part.found.values()):
        raise NotRun(f"no step was watched: {last_of(lines)}")
    return "ok: " + ", ".join(f"{name} of {found['steps']} of {len(items)} steps" for name, found in part.found.items())


def sanitized(done: dict[str, Record], items: Sequence[str], lines: Sequence[str]) -> Record:
    """How many steps were watched, and what is wrong: the tool's errors, then the steps'."""
    failed = [f"{item}: {found['error']}" for item, found in done.items() if "error" in found]
    errors = [*ERROR.findall("\n".join(lines)), *failed]
    return {"steps": len(done), "of": len(items), "errors": len(errors), "first": errors[0] if errors else None}


def one_step(item: str, device: str = "cuda") -> Record:
    backend, mode, number, dtype = item.split("|")
    leaf = partial(torch.rand, device=device, dtype=DTYPES[dtype], requires_grad=True)
    with fused_elbo.backend(backend):
        gpu_cases.step(leaf, *gpu_cases.SHAPES[int(number)], mode)
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


# ------------------------------------------------------------------------------------------------------------------ ncu


def traffic(part: Part) -> str:
    part.found["rows"] = []
    command = [
        tool("ncu"), "--csv", "--print-units", "base", "--metrics", ",".join(METRICS.values()),
        "--kernel-name", f"regex:elbo_|{MARKER}", "--profile-from-start", "off", "--target-processes", "all",
        "--cache-control", "none", "--clock-control", "none",  # what L2 keeps from one kernel to the next is the point
    ]  # fmt: skip
    first, *others = ([f"{case.name}|{provider.name}" for provider in ours(case)] for case in TRAFFIC_CASES)
    items = [item for own in others for item in own]
    for own in (first, items):  # ncu tells at its end what it has counted, so the first case has a run of its own
        if part.left() < MARGIN + 2 * WORDS:
            break
        with tempfile.TemporaryDirectory() as folder:
            _, lines = watched(command, "traffic", own, part.left() - MARGIN, Path(folder))
            part.found["rows"] += counted(lines, answers(Path(folder)))
        if not part.found["rows"]:
            raise NotRun(f"ncu counted nothing: {last_of(lines)}")
        part.save()
    return f"ok: {len(part.found['rows'])} of {len(first) + len(items)} steps"


def ours(case: workloads.Case) -> list[providers.Provider]:
    return [provider for provider in providers.chosen(None, case) if provider.kind == "ours"]


def one_measured(item: str) -> Record:
    name, _, provider = item.partition("|")
    case = next(case for case in TRAFFIC_CASES if case.name == name)
    tensors = case.tensors()
    step = providers.Step(next(p for p in ours(case) if p.name == provider), case, tensors)
    step()
    Flush()()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1000)
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    once = workloads.forward_bytes(tensors) + workloads.size(workloads.leaves(tensors))
    return {"two_passes": workloads.step_bytes(tensors), "one_pass": once}


def counted(lines: Sequence[str], done: dict[str, Record]) -> list[Record]:
    """A row for each step that ncu saw to its end."""
    steps: list[list[Record]] = []
    for kernel in kernels(lines):
        if MARKER in kernel["kernel"]:
            steps.append([])
        elif steps:
            steps[-1].append(kernel)
    rows = []
    for (item, found), seen in zip(((i, f) for i, f in done.items() if "two_passes" in f), steps, strict=False):
        name, _, provider = item.partition("|")
        reads_once = all("elbo_step" in kernel["kernel"] for kernel in seen)
        count = found["one_pass" if reads_once else "two_passes"]
        rows.append({"case": name, "provider": provider, "bytes": count, "kernels": seen})
    return [row for row in rows if row["kernels"]]


def kernels(lines: Sequence[str]) -> list[Record]:
    """ncu's CSV, which has a line for each metric of each kernel, among whatever else was printed."""
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, Record] = {}
    for row in csv.DictReader([line for line in lines[first:] if line.startswith('"')]):
        kernel = found.setdefault(row["ID"], {"kernel": short(row["Kernel Name"])})
        for name, metric in METRICS.items():
            if row["Metric Name"] == metric:
                kernel[name] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def short(name: str) -> str:
    """elbo_stats_kernel of "void elbo::elbo_stats_kernel<elbo::Access, …>(…)"."""
    found = re.search(rf"elbo_\w+|{MARKER}", name)
    return found[0] if found else name
