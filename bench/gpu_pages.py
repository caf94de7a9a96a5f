"""A run of bench/proof/gpu_check.py as Markdown: for its own report, and for the section about GPUs in RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import record
from providers import title
from record import Columns, Record, table

COPY = "copy"
OURS = "triton"  # what the others are compared with


def kept(folder: Path) -> list[Path]:
    """The runs that are there."""
    return sorted(folder.glob("gpu-*.json"))


def report(run: Record) -> str:
    """All of it, also while sections are still to come."""
    bad = any(section["verdict"].startswith("FAILED") for section in run["sections"].values())
    return f"# fused_elbo on a GPU: {'FAILED' if bad else 'ok'}\n\n{results(run)}\n"


def results(run: Record) -> str:
    """Without what a section that was not run would have."""
    found = {name: section["found"] for name, section in run["sections"].items()}
    parts = [
        f"### {run['machine']['gpu']}",
        f"{where(run)}.",
        table(VERDICTS, run["sections"].values(), left=2),
        titled("Values and gradients against fp64, in small calls of every mode.", values(found.get("values", {}))),
        titled(BENCHMARK, benchmark(found.get("benchmark", {}))),
        titled(TRAFFIC, traffic(found.get("traffic", {}))),
    ]
    return "\n\n".join(filter(None, parts))


BENCHMARK = """GPU: a CUDA graph of the step with cold caches; step: as eager code launches it, to the end of its last
kernel; host: until the calls have returned. GB/s count 5N + 6L, whatever a provider moves; the copy moves as much."""
TRAFFIC = "Bytes of DRAM in one step with cold caches, as ncu counts them, beside those that the loss has to move."


def titled(text: str, shown: str) -> str:
    return f"{text}\n\n{shown}" if shown else ""


def where(run: Record) -> str:
    machine, versions = run["machine"], run["versions"]
    words = [
        f"{machine['multiprocessors']} SMs, {machine['gpu_memory_gib']} GiB",
        f"driver {machine['driver']}" if machine["driver"] else "",
        f"torch {versions['torch']}",
        f"Triton {versions['triton']}" if versions["triton"] else "",
        f"commit {versions['commit']}" if versions["commit"] else "",
    ]
    return ", ".join(filter(None, words))


VERDICTS: Columns = [
    ("what was run", lambda s: s["title"]),
    ("verdict", lambda s: cell(s["verdict"])),
    ("time", lambda s: f"{s['seconds']:.0f} s"),
]


def cell(text: str) -> str:
    """A text on one line of a table."""
    return " ".join(text.replace("|", "\\|").split())


# -------------------------------------------------------------------------------------------------------------- values


def values(found: Record) -> str:
    columns: Columns = [
        ("backend", lambda r: r[0]),
        *((name, lambda r, name=name: str(r[1][name])) for name in ("cases", "right", "wrong")),
        ("largest error, of what is tolerated", lambda r: ", ".join(f"{d} {e:.2g}" for d, e in r[1]["worst"].items())),
    ]
    return table(columns, found.get("backends", {}).items())


# ----------------------------------------------------------------------------------------------------------- benchmark


def benchmark(found: Record) -> str:
    rows = found.get("rows", [])
    by_case = {(row["case"], row["provider"]): row for row in rows}
    order = list(dict.fromkeys(row["case"] for row in rows))

    def other(name: str) -> Callable[[Record], Record]:
        return lambda row: by_case.get((row["case"], name), {})

    columns: Columns = [
        ("case", lambda r: r["case"]),
        ("", lambda r: "a copy" if r["provider"] == COPY else title(r["provider"])),
        *(
            (name.replace("_us", " µs"), lambda r, name=name: micro(r[name]))
            for name in ("gpu_us", "step_us", "host_us")
        ),
        ("GB/s", lambda r: f"{r['bytes'] / r['gpu_us'] / 1e3:.0f}" if r["gpu_us"] else ""),
        ("of a copy", lambda r: share(other(COPY)(r), r)),
        ("GPU, of fused_elbo", lambda r: times(r, other(OURS)(r), "gpu_us")),
        ("step, of fused_elbo", lambda r: times(r, other(OURS)(r), "step_us")),
        ("launches", lambda r: record.number(r.get("launches"))),
    ]
    return table(columns, sorted(rows, key=lambda row: order.index(row["case"])), left=2)


def micro(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def share(one: Record, other: Record) -> str:
    return f"{one['gpu_us'] / other['gpu_us']:.0%}" if one.get("gpu_us") and other["gpu_us"] else ""


def times(one: Record, other: Record, key: str) -> str:
    return f"{one[key] / other[key]:.2f} ×" if one[key] and other.get(key) else ""


# ------------------------------------------------------------------------------------------------------------- traffic


def traffic(found: Record) -> str:
    columns: Columns = [
        ("case", lambda r: r["case"]),
        ("", lambda r: title(r["provider"])),
        ("kernels: read + written", lambda r: ", ".join(map(of_a_kernel, r["kernels"]))),
        ("together", lambda r: record.count(moved(r["kernels"]))),
        ("of what it has to move", lambda r: f"{moved(r['kernels']) / r['bytes']:.3f}"),
    ]
    return table(columns, found.get("rows", []), left=3)


def of_a_kernel(kernel: Record) -> str:
    name = kernel["kernel"].removesuffix("_kernel")
    return f"{name} {record.count(kernel['read'])} + {record.count(kernel['written'])}"


def moved(kernels: Iterable[Record]) -> float:
    return sum(kernel["read"] + kernel["written"] for kernel in kernels)
