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
from matplotlib.ticker import FuncFormatter, NullLocator

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
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # not 10⁻¹
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
    """Draws those plots that there are results for."""
    drawn = []
    for name, plot in ALL.items():
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
    """Gives provider -> case -> record, in the order of COLOURS."""
    found: dict[str, dict[str, Record]] = {}
    for name in COLOURS:
        of = {r["case"]: r for r in report["results"] if r["provider"] == name}
        if own := {case: of[case] for case in cases if case in of}:
            found[name] = own
    return found


def timed(report: Record, cases: list[str]) -> dict[str, dict[str, Record]]:
    """Gives the same, without times that others' processes made."""
    found = by_provider(report, cases)
    calm = {name: {case: r for case, r in own.items() if not r["busy"]} for name, own in found.items()}
    return {name: own for name, own in calm.items() if own}


def present(report: Record, cases: tuple[workloads.Case, ...]) -> list[str]:
    return [case.name for case in cases if case.name in report["cases"]]


def lines(ax: Axes, report: Record, cases: list[str], at: Callable[[Record], float]) -> None:
    """Draws median step times with their quartiles."""
    found = timed(report, cases)
    for name in LINES:
        records = found.get(name, {})
        if not records:
            continue
        xs = [at(report["cases"][case]) for case in records]
        median, q1, q3 = ([1e3 * r["step_s"][key] for r in records.values()] for key in ("median", "q1", "q3"))
        ax.plot(xs, median, "--" if name == "limit" else "o-", color=COLOURS[name], label=label(name))
        ax.fill_between(xs, q1, q3, color=COLOURS[name], alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log", ylabel="ms for a step of the loss")
    ax.yaxis.set_major_formatter(PLAIN)
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
    ax.xaxis.set_major_formatter(PLAIN)
    ax.xaxis.set_minor_locator(NullLocator())
    return figure


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def grouped(
    ax: Axes, groups: list[str], values: dict[str, dict[str, float]], shown: Callable[[float], str] = short
) -> None:
    """Draws horizontal bars of provider -> group -> value, with the values; the first group is on top."""
    height = 0.85 / len(values)
    for i, (name, own) in enumerate(values.items()):
        ys = [groups.index(group) + (i - (len(values) - 1) / 2) * height for group in own]
        limit = name == "limit"
        drawn = ax.barh(
            ys, list(own.values()), height, color=COLOURS[name], label=label(name),
            fill=not limit, hatch="//" if limit else None,
        )  # fmt: skip
        ax.bar_label(drawn, [shown(value) for value in own.values()], padding=3, fontsize=11)
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)


def bars(report: Record) -> Any:
    cases = present(report, (workloads.TINY, *workloads.SHAPES))
    found = timed(report, cases)
    cases = [case for case in cases if any(case in own for own in found.values())]
    if not cases:
        return None
    times = {name: {c: 1e3 * r["step_s"]["median"] for c, r in own.items()} for name, own in found.items()}
    figure, ax = plt.subplots(figsize=(9, 1.5 + 1.7 * len(cases)))
    ax.set(xscale="log", xlabel="ms for a step of the loss, median", title="fp32, σ of the batch")
    grouped(ax, cases, times)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def memory(report: Record) -> Any:
    """Draws what is kept for backward, and the peak of a step, in multiples of recon."""
    cases = [name for name in present(report, workloads.SHAPES) if name in workloads.PEAKS]
    found = by_provider(report, cases[:1])
    found.pop("limit", None)
    if not found:
        return None
    recon = report["cases"][cases[0]]["elements"] * 4
    kinds = {"kept for\nbackward": "saved_bytes", "peak of a step,\ngradients included": "peak_bytes"}
    values = {
        name: {kind: own[cases[0]][key] / recon for kind, key in kinds.items() if own[cases[0]].get(key) is not None}
        for name, own in found.items()
    }
    figure, ax = plt.subplots(figsize=(9, 5))
    ax.set(xlabel="memory, in sizes of recon", title=f"{cases[0]}, fp32")
    grouped(ax, list(kinds), values, lambda value: f"{value:.1f}")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


ALL = {"scaling": scaling, "bars": bars, "threads": threads, "memory": memory}
