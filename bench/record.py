"""What a run leaves: its conditions, and its results as JSON, as CSV, and as the console's tables.

The JSON (`FORMAT`) is what report.py and plots.py make pages of: {"format", "machine", "versions", "flags", "settings",
"cases": {name: …}, "results": [a record of measure.py for each case and provider], "train_step": …}.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from workloads import SIGMAS, Case, step_bytes

import fused_elbo
from fused_elbo import BackendUnavailable, build
from fused_elbo.build import spec as build_spec

FORMAT = 1
REPO = Path(__file__).resolve().parent.parent
ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "MALLOC_", "MKL_", "ATEN_", "TORCHINDUCTOR_")
PACKAGES = ("torch", "triton", "numpy")
HIDDEN = "?"  # in the place of a number that the run cannot support
Record = dict[str, Any]
Columns = list[tuple[str, Callable[[Any], str]]]  # a table's heads, and the text of each cell from what a row is of


# ----------------------------------------------------------------------------------------------------------- conditions


def read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def processor() -> str:
    lines = [line for line in (read("/proc/cpuinfo") or "").splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """The first core's caches, with how many cores share each: {"L2": "1024K for 1"}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read(str(folder / name)) for name in ("level", "type", "size"))
        sharing = len(parsed(read(str(folder / "shared_cpu_list")) or ""))
        if kind != "Instruction":
            found[f"L{level}"] = f"{size} for {sharing}"
    return found


def parsed(cpus: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]"""
    numbers: list[int] = []
    for part in filter(None, cpus.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def machine(device: str) -> Record:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_before": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def versions() -> Record:
    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True)
    try:
        compiler = str(build.resolve(build_spec.cpu_spec()).compiler)
    except BackendUnavailable as error:
        compiler = f"none: {error.reason}"
    return {
        "fused_elbo": fused_elbo.__version__,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "compiler": compiler,
        **{package: of(package) for package in PACKAGES},
    }


def flags() -> Record:
    spec = build_spec.cpu_spec()
    return {
        "instruction_set": build_spec.instruction_set(),
        "cflags": " ".join([*spec.cflags, *spec.parts[-1].cflags]),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT) and name != "TORCHINDUCTOR_CACHE_DIR"  # a folder, whatever is in it
        },
    }


def described(case: Case) -> Record:
    tensors = case.tensors()
    return {
        "shape": list(case.shape),
        "latent": list(case.latent),
        "dtype": case.dtype,
        "sigma": case.sigma,
        "device": case.device,
        "threads": case.threads or torch.get_num_threads(),
        "elements": case.elements,
        "step_bytes": step_bytes(tensors),
    }


# ---------------------------------------------------------------------------------------------------------------- files


def write_json(report: Record, path: Path) -> None:
    """The file is whole at every moment, whoever reads it and whenever its writer is killed."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Record:
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} has format {report.get('format')}, and this reads {FORMAT}: measure anew")
    return report


def flat(record: Record) -> Record:
    """The record without nesting: step_s.median and so on."""
    row: Record = {}
    for name, value in record.items():
        row |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return row


def write_csv(report: Record, path: Path) -> None:
    """Writes the results; a ratio that the run's spread hides is left out, with the reason beside it."""
    rows = [flat(shown(record)) for record in report["results"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def shown(record: Record) -> Record:
    """The record without ratios that must not be printed."""
    hidden = {"median": None, "low": None, "high": None}
    return {
        name: value | hidden if isinstance(value, dict) and value.get("hidden") else value
        for name, value in record.items()
    }


# -------------------------------------------------------------------------------------------------------------- numbers


def seconds(value: float) -> str:
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def count(value: float | None) -> str:
    """A number of bytes."""
    if value is None:
        return ""
    return f"{value:.0f} B" if value < 1e4 else f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def number(value: int | None) -> str:
    return "" if value is None else str(value)


def median(own: Record | None, part: str = "step") -> str:
    """The median of "forward", "backward" or "step", or "?" where others had the processors."""
    if own is None or own[f"{part}_s"] is None:
        return ""
    return HIDDEN if own["busy"] else seconds(own[f"{part}_s"]["median"])


def quartiles(own: Record) -> str:
    return HIDDEN if own["busy"] else f"{seconds(own['step_s']['q1'])} – {seconds(own['step_s']['q3'])}"


def rate(own: Record) -> str:
    return HIDDEN if own["busy"] else f"{own['step_gb_s']:.3g}"


def ratio(value: Record | None, form: Callable[[float], str] = "{:.2f}".format) -> str:
    """A ratio, or "?" where the spread hides it."""
    if value is None:
        return ""
    return HIDDEN if value["hidden"] else form(value["median"])


def table(columns: Columns, rows: Iterable[Any], left: int = 1) -> str:
    """Markdown, or nothing without rows; the first columns stand to the left, the others to the right."""
    texts = [[cell(row) for _, cell in columns] for row in rows]
    rule = ["---"] * left + ["--:"] * (len(columns) - left)
    lines = [[head for head, _ in columns], rule, *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if texts else ""


# -------------------------------------------------------------------------------------------------------------- console


CONSOLE: Columns = [
    ("provider", lambda r: r["provider"]),
    ("first call", lambda r: seconds(r["first_call_s"])),
    ("forward", lambda r: median(r, "forward")),
    ("backward", lambda r: median(r, "backward")),
    ("step", median),
    ("quartiles", quartiles),
    ("GB/s", rate),
    ("/ limit", lambda r: ratio(r["own_to_limit"])),
    ("best / it", lambda r: ratio(r["best_to_own"])),
    ("saved", lambda r: count(r["saved_bytes"])),
    ("peak", lambda r: count(r.get("peak_bytes"))),
    ("operators", lambda r: number(r["operators"])),
    ("kernels", lambda r: number(r["kernels"])),
]


def console(name: str, case: Record, records: list[Record]) -> list[str]:
    """A case's table, and what it does not show."""
    columns = [[head, *map(cell, records)] for head, cell in CONSOLE]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [text.ljust(width) if i == 0 else text.rjust(width) for text in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    lines = ["  " + "  ".join(row) for row in zip(*aligned, strict=True)]
    head = (
        f"{name}: {SIGMAS[case['sigma']]}; {case['dtype']}, {case['device']}, {case['threads']} threads; "
        f"{count(case['step_bytes'])} to move"
    )
    best = next((r["best_baseline"] for r in records if r["best_baseline"]), None)
    return [head, *lines, *([f"  best: {best}"] if best else []), *refusals(records)]


def refusals(records: Iterable[Record]) -> list[str]:
    """Why there are question marks."""
    named = {"own_to_limit": "/ limit", "best_to_own": "best / it"}
    reasons: dict[str, list[str]] = {}
    for own in records:
        if own["busy"]:
            reasons.setdefault("others had the processors in most rounds", []).append(f"{own['provider']}'s times")
        for key, column in named.items():
            if own[key] and (reason := own[key]["hidden"]):
                reasons.setdefault(reason, []).append(f"{own['provider']} {column}")
    return [f"  {HIDDEN} {', '.join(who)}: {reason}" for reason, who in reasons.items()]
