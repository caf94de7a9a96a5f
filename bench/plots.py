"""The plots of a report: time against N with the limit's line, against threads, bars beside the baselines, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import workloads
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

Record = dict[str, Any]
LABELS = {
    "cpp": "fused_elbo",
    "triton": "fused_elbo, Triton",
    "cuda": "fused_elbo, CUDA",
    "single_pass": "decoupled_elbo_backward",
    "one_liner": "N/2·log(mse_loss)",
    "stock": "stock σ-VAE code",
    "limit": "limit",
}
COLOURS = {
    "cpp": "#0b6e4f",
    "triton": "#0b6e4f",
    "cuda": "#4a9c7f",
    "single_pass": "#4a9c7f",
    "one_liner": "#d1495b",
    "one_liner_compiled": "#e8a0a9",
    "stock": "#30638e",
    "stock_compiled": "#95b5d0",
    "limit": "black",
}
LINES = ("stock", "one_liner", "one_liner_compiled", "cpp", "triton", "limit")  # of a sweep
STYLE = {
    "font.size": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 2.5,
    "lines.markersize": 7,
}


def draw(report: Record, out: Path) -> list[Path]:
    """Those plots that there are results for, in the order of a page."""
    drawn = []
    for name, plot in {"scaling": scaling, "bars": bars, "threads": threads, "memory": memory}.items():
        with plt.rc_context(STYLE):
            figure = plot(report)
            if figure is not None:
                drawn.append(out / f"{name}.png")
                figure.savefig(drawn[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
    return drawn


def label(name: str) -> str:
    base = name.removesuffix("_compiled")
    return LABELS[base] + ("\n  under torch.compile" if base != name else "")


def by_provider(report: Record, cases: list[str]) -> dict[str, dict[str, Record]]:
    """provider -> case -> record, in the order of COLOURS."""
    found: dict[str, dict[str, Record]] = {}
    for name in COLOURS:
        of = {r["case"]: r for r in report["results"] if r["provider"] == name and r["case"] in cases}
        if of:
            found[name] = {case: of[case] for case in cases if case in of}
    return found


def present(report: Record, cases: tuple[workloads.Case, ...]) -> list[str]:
    return [case.name for case in cases if case.name in report["cases"]]


def lines(ax: Axes, report: Record, cases: list[str], at: Callable[[Record], float]) -> None:
    """Median step times with their quartiles."""
    found = by_provider(report, cases)
    for name in LINES:
        records = found.get(name, {})
        if not records:
            continue
        xs = [at(report["cases"][case]) for case in records]
        median, q1, q3 = ([1e3 * r["step_s"][key] for r in records.values()] for key in ("median", "q1", "q3"))
        ax.plot(xs, median, "--" if name == "limit" else "o-", color=COLOURS[name], label=label(name))
        ax.fill_between(xs, q1, q3, color=COLOURS[name], alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log", ylabel="ms for a step of the loss")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def scaling(report: Record) -> Any:
    cases = present(report, workloads.SWEEP)
    if len(cases) < 2:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 5))
    lines(ax, report, cases, lambda case: case["elements"])
    ax.set(xlabel="elements of recon", title="fp32, σ of the batch")
    return figure


def threads(report: Record) -> Any:
    cases = [name for name, case in report["cases"].items() if name.endswith("threads")]
    if len(cases) < 2:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 5))
    lines(ax, report, cases, lambda case: case["threads"])
    counts = [report["cases"][case]["threads"] for case in cases]
    ax.set(xlabel="threads", title=workloads.THREADED.name)
    ax.set_xticks(counts)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    return figure


def grouped(ax: Axes, found: dict[str, dict[str, Record]], cases: list[str], value: Callable[[Record], float]) -> None:
    """Horizontal bars: a group for each case, the first on top."""
    height = 0.85 / len(found)
    for i, (name, records) in enumerate(found.items()):
        ys = [cases.index(case) + (i - (len(found) - 1) / 2) * height for case in records]
        ax.barh(
            ys, [value(r) for r in records.values()], height, color=COLOURS[name], label=label(name),
            hatch="//" if name == "limit" else None, fill=name != "limit",
        )  # fmt: skip
    ax.set_yticks(range(len(cases)), cases)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def bars(report: Record) -> Any:
    cases = present(report, (workloads.TINY, *workloads.SHAPES))
    found = by_provider(report, cases)
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 1.2 + 1.4 * len(cases)))
    grouped(ax, found, cases, lambda r: 1e3 * r["step_s"]["median"])
    ax.set(xscale="log", xlabel="ms for a step of the loss (median)", title="fp32, σ of the batch")
    return figure


def memory(report: Record) -> Any:
    """In multiples of recon: what is saved for backward, and where it was measured the peak."""
    cases = present(report, workloads.SHAPES)[-2:]
    found = by_provider(report, cases)
    found.pop("limit", None)
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 1.8 + 1.4 * len(cases)))

    def saved(record: Record) -> float:
        case = report["cases"][record["case"]]
        return record["saved_bytes"] / (case["elements"] * 4)

    grouped(ax, found, cases, saved)
    ax.set(xlabel="memory kept for backward, in sizes of recon (fp32)")
    return figure
