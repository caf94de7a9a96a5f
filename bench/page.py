"""The Markdown of a report: tables that say "?" where the run's spread hides a ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import providers
import texts
import workloads
from report import HIDDEN, Record, count, median, quartiles, rate, seconds

Cell = Callable[[Record], str]


class Results:
    """A report's records, by case and provider."""

    def __init__(self, report: Record) -> None:
        self.report, self.cases = report, report["cases"]
        self.records = {(r["case"], r["provider"]): r for r in report["results"]}

    def of(self, case: str) -> list[Record]:
        return [record for (name, _), record in self.records.items() if name == case]

    def ours(self, case: str) -> Record | None:
        """fused_elbo's, by the backend that serves."""
        return next((r for r in self.of(case) if r["kind"] == "ours" and not r["one_call"]), None)

    def measured(self, cases: Iterable[str]) -> list[str]:
        return [case for case in cases if self.ours(case)]


# ---------------------------------------------------------------------------------------------------------------- cells


def times(value: float) -> str:
    """A ratio, to two figures."""
    return f"{value:.0f} ×" if value >= 10 else f"{value:.1f} ×" if value >= 1 else f"{value:.2f} ×"


def ratio(value: Record | None) -> str:
    if value is None:
        return ""
    return HIDDEN if value["hidden"] else times(value["median"])


def with_interval(value: Record | None) -> str:
    shown = ratio(value)
    if not value or shown == HIDDEN or value["low"] == value["high"]:
        return shown
    return f"{shown} ({value['low']:.2f}–{value['high']:.2f})"


def table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """Markdown; the first columns to the left, the others to the right."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


# --------------------------------------------------------------------------------------------------------------- README


COMPARED = ("one_liner", "one_liner_compiled", "stock", "stock_compiled")


def readme_table(report: Record) -> str:
    """Step times at a σ of the batch, fp32, and how many times as long the others take."""
    results = Results(report)
    cases = results.measured(case.name for case in (*workloads.SHAPES, workloads.TINY))
    compared = [name for name in COMPARED if any((case, name) in results.records for case in cases)]

    def row(case: str) -> list[str]:
        ours = results.ours(case)
        assert ours is not None
        others = [results.records.get((case, name)) for name in compared]
        return [
            case,
            median(ours, "step"),
            ratio(ours["own_to_limit"]),
            *(ratio(other["own_to_ours"]) if other else "" for other in others),
        ]

    heads = ["the same, `torch.compile`" if name.endswith("_compiled") else providers.title(name) for name in compared]
    head = ["recon", "fused_elbo", "of the limit", *heads]
    return f"{machine_line(report)}\n\n{table(head, map(row, cases))}"


def machine_line(report: Record) -> str:
    machine, versions, settings = (report[key] for key in ("machine", "versions", "settings"))
    cpu = f"{machine['processor']} ({machine['cores']} cores, {report['flags']['instruction_set']})"
    where = machine["gpu"] or f"{settings['threads']} threads of {cpu}"
    return (
        f"Medians of {settings['rounds']} or more interleaved rounds on {where}, torch {versions['torch']};\n"
        f"{HIDDEN}: the run's spread hides it."
    )


# --------------------------------------------------------------------------------------------------------- results page


def results_page(report: Record, images: list[str], narrower: Iterable[Record] = ()) -> str:
    results = Results(report)
    sections = [
        ("The machine", conditions(report)),
        ("A step of the loss: fp32, σ of the batch", picture("bars", images) + steps(results, workloads.SHAPES)),
        ("Time against size", picture("scaling", images)),
        ("Time against threads", picture("threads", images)),
        ("bf16 and fp16", halves(results)),
        ("Other σ", each_case(results, workloads.OTHER_SIGMAS)),
        ("A hierarchy of latents", hierarchy(results)),
        ("Narrower instruction sets", narrower_sets(results, narrower)),
        ("Memory", picture("memory", images) + memory(results)),
        ("Overhead of a call", overhead(results)),
        ("First calls", first_calls(results)),
        ("What these figures do not show", shares(report.get("train_step"))),
        ("GPUs", texts.GPU),
    ]
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections if text.strip())
    return f"# Results of the benchmark\n\n{texts.HOW_TO_READ}\n\n{body}\n"


def picture(name: str, images: list[str]) -> str:
    return f"![{name}](results/{name}.png)\n\n" if f"{name}.png" in images else ""


def conditions(report: Record) -> str:
    flat: dict[str, object] = {}
    for part in ("machine", "versions", "flags", "settings"):
        flat |= report[part]

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"

    rows = [[name.replace("_", " "), text(value)] for name, value in flat.items() if value not in (None, {}, [])]
    return table(["", ""], rows, left=2)


def steps(results: Results, cases: Iterable[workloads.Case]) -> str:
    """A row for each case: fused_elbo beside the limit and the fastest baseline."""

    def row(case: str) -> list[str]:
        ours = results.ours(case)
        assert ours is not None
        one_call = results.records.get((case, "single_pass"))
        stock = results.records.get((case, "stock"))
        return [
            case,
            median(ours, "step"),
            rate(ours),
            with_interval(ours["own_to_limit"]),
            with_interval(ours["best_to_own"]),
            providers.title(ours["best_baseline"]) if ours["best_baseline"] else "",
            ratio(stock["own_to_ours"]) if stock else "",
            f"{median(one_call, 'step')}, {ratio(one_call['own_to_ours'])}" if one_call else "",
        ]

    head = ["recon", "fused_elbo", "GB/s", "of the limit", "fastest baseline takes", "which is", "stock code takes",
            "`decoupled_elbo_backward`"]  # fmt: skip
    measured = results.measured(case.name for case in cases)
    return table(head, map(row, measured)) if measured else ""


def halves(results: Results) -> str:
    """Half precision beside fp32 at the same shape."""
    found = [name for name in results.cases if results.cases[name]["dtype"] != "fp32"]

    def row(case: str) -> list[str]:
        ours, dtype = results.ours(case), results.cases[case]["dtype"]
        assert ours is not None
        full = results.ours(case.removesuffix(f"-{dtype}"))
        fp32 = median(full, "step") if full else ""
        return [case, median(ours, "step"), fp32, with_interval(ours["own_to_limit"]),
                with_interval(ours["best_to_own"]), providers.title(ours["best_baseline"] or "")]  # fmt: skip

    measured = results.measured(found)
    head = ["recon", "fused_elbo", "its fp32", "of the limit", "fastest baseline takes", "which is"]
    return table(head, map(row, measured)) if measured else ""


COLUMNS: dict[str, Cell] = {
    "": lambda r: providers.title(r["provider"]),
    "forward": lambda r: median(r, "forward"),
    "backward": lambda r: median(r, "backward"),
    "step": lambda r: median(r, "step"),
    "quartiles": quartiles,
    "GB/s": rate,
    "of the limit": lambda r: with_interval(r["own_to_limit"]),
    "of fused_elbo": lambda r: with_interval(r["own_to_ours"]),
}


def each_case(results: Results, sigmas: Iterable[str]) -> str:
    """All providers of the cases with these σ."""
    parts = []
    for name, case in results.cases.items():
        if case["sigma"] in sigmas:
            rows = [[cell(r) for cell in COLUMNS.values()] for r in results.of(name)]
            parts.append(f"{name}: {workloads.SIGMAS[case['sigma']]}.\n\n{table(list(COLUMNS), rows)}")
    return "\n\n".join(parts)


def hierarchy(results: Results) -> str:
    found = each_case(results, ["levels"])
    return f"{texts.LEVELS}\n\n{found}" if found else ""


def narrower_sets(results: Results, narrower: Iterable[Record]) -> str:
    """A row for each case of each run, beside the same case of the page's own run."""

    def row(run: Results, case: str) -> list[str]:
        ours, widest = run.ours(case), results.ours(case)
        assert ours is not None
        best = providers.title(ours["best_baseline"]) if ours["best_baseline"] else ""
        return [run.report["flags"]["instruction_set"], case, median(ours, "step"),
                with_interval(ours["own_to_limit"]), with_interval(ours["best_to_own"]), best,
                median(widest, "step") if widest else "",
                with_interval(widest["own_to_limit"]) if widest else ""]  # fmt: skip

    runs = [Results(report) for report in narrower]
    rows = [row(run, case) for run in runs for case in run.measured(run.cases)]
    if not rows:
        return ""
    widest = results.report["flags"]["instruction_set"]
    head = ["", "case", "fused_elbo", "of the limit", "fastest baseline takes", "which is", f"{widest}: fused_elbo",
            "of the limit"]  # fmt: skip
    return f"{texts.NARROWER}\n\n{table(head, rows, left=2)}"


def memory(results: Results) -> str:
    rows = []
    for case in workloads.PEAKS:
        for r in results.of(case):
            if r["kind"] != "limit":
                rows.append([case, providers.title(r["provider"]), count(r["saved_bytes"]), count(r.get("peak_bytes"))])
    head = ["case", "", "kept for backward", "peak of a step"]
    return f"{texts.MEMORY}\n\n{table(head, rows, left=2)}" if rows else ""


def overhead(results: Results) -> str:
    def row(r: Record) -> list[str]:
        return [providers.title(r["provider"]), median(r, "forward"), median(r, "backward"), median(r, "step"),
                quartiles(r), with_interval(r["own_to_ours"]),
                "" if r["operators"] is None else str(r["operators"]),
                "" if r["kernels"] is None else str(r["kernels"])]  # fmt: skip

    head = ["", "forward", "backward", "step", "quartiles", "of fused_elbo", "operators", "kernels"]
    rows = [row(r) for r in results.of(workloads.TINY.name)]
    return f"{texts.OVERHEAD}\n\n{table(head, rows)}" if rows else ""


def first_calls(results: Results) -> str:
    """Of what has to be compiled, at the first shape that has all."""
    cases = [case.name for case in workloads.SHAPES if (case.name, "stock_compiled") in results.records]
    if not cases:
        return ""
    rows = [[providers.title(r["provider"]), seconds(r["first_call_s"])] for r in results.of(cases[0])]
    return f"{texts.FIRST.format(cases[0])}\n\n{table(['', 'first call'], rows)}"


def shares(found: list[Record] | None) -> str:
    if not found:
        return ""

    def row(of: Record, name: str) -> list[str]:
        own = of["losses"][name]
        share = own["share"]
        return [
            of["network"],
            f"{of['parameters'] / 1e6:.2f} M",
            "fused_elbo" if name == "fused" else providers.title(name),
            seconds(own["loss_s"]["median"]),
            seconds(own["step_s"]["median"]),
            f"{share['median']:.1%} ({share['q1']:.1%}–{share['q3']:.1%})",
        ]

    rows = [row(of, name) for of in found for name in of["losses"]]
    head = ["network", "parameters", "loss", "time of the loss", "of the step", "share (quartiles)"]
    return f"{texts.SHARE}\n\n{table(head, rows, left=3)}\n\n{texts.WHERE}"
