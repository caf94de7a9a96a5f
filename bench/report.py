"""A run's results as pages: bench/RESULTS.md, and the table in README.md between its markers.

    python bench/report.py                                 # pages of the results that are kept, in bench/results
    python bench/report.py --from runs/bench               # keep a new run's first, and draw its plots
    python bench/report.py --from runs/bench runs/avx2     # and that of a narrower instruction set
    python bench/report.py --from runs/gpu                 # keep what bench/proof/gpu_check.py found on a GPU
    python bench/report.py --from runs/host                # keep what bench/host.py found of the host's side

The first run is results.json, which all of the pages but one section are made of. The others are of narrower
instruction sets (another machine's, or this one's under ATEN_CPU_CAPABILITY), and named after them; a kept one that is
not given stays. A run on a GPU, gpu-NAME.json, has its part of the section about GPUs, and host.json its own section.
`make bench-docs` is the same. What RESULTS.md says beside its tables is in RESULTS.template.md.

tests/bench/test_results.py checks that the pages are what this makes of the kept results; it does not ask how old
those are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import gpu_pages
import plots
import record
import workloads
from providers import title
from record import HIDDEN, Columns, Record, count, median, number, quartiles, rate, ratio, seconds, table

BENCH = Path(__file__).resolve().parent
KEPT, PAGE, README = BENCH / "results", BENCH / "RESULTS.md", BENCH.parent / "README.md"
TEMPLATE = BENCH / "RESULTS.template.md"
HOST_RUN = "host.json"
# Runs of nothing but what has these σ stand beside the others.
OF_SOME = {
    "trainers.json": workloads.OF_TRAINERS,
    "aggregate.json": ("aggregate",),
    "evaluation.json": ("evaluation",),
}
START, END = "<!-- bench: written by make bench-docs -->\n", "<!-- /bench -->\n"


def times(value: Record | None) -> str:
    """A ratio for the pages, to two figures."""
    return ratio(value, lambda v: f"{v:.0f} ×" if v >= 10 else f"{v:.1f} ×" if v >= 1 else f"{v:.2f} ×")


def with_interval(value: Record | None) -> str:
    shown = times(value)
    if not value or shown == HIDDEN or value["low"] == value["high"]:
        return shown
    return f"{shown} ({value['low']:.2f}–{value['high']:.2f})"


# --------------------------------------------------------------------------------------------------------------- tables


class Case:
    """A case of a run, with its records by provider."""

    def __init__(self, run: Record, name: str) -> None:
        self.name, self.run, self.about = name, run, run["cases"].get(name, {})
        self.records = {r["provider"]: r for r in run["results"] if r["case"] == name}
        served = [r for r in self.records.values() if r["kind"] == "ours" and not r["one_call"]]
        self.ours = served[0] if served else None  # fused_elbo's, by the backend that serves
        self.best = title(self.ours["best_baseline"] or "") if self.ours else ""

    def ratio(self, key: str, provider: str | None = None) -> Record | None:
        """A ratio of this provider's, or of ours."""
        own = self.records.get(provider) if provider else self.ours
        return own[key] if own else None


def cases(run: Record, names: Iterable[str]) -> list[Case]:
    """Those of these names that ours are measured in."""
    return [case for case in (Case(run, name) for name in names) if case.ours]


OURS: Columns = [
    ("of the limit", lambda c: with_interval(c.ratio("own_to_limit"))),
    ("fastest baseline takes", lambda c: with_interval(c.ratio("best_to_own"))),
    ("which is", lambda c: c.best),
]
STEPS: Columns = [
    ("recon", lambda c: c.name),
    ("fused_elbo", lambda c: median(c.ours)),
    ("GB/s", lambda c: rate(c.ours)),
    *OURS,
    ("stock code takes", lambda c: times(c.ratio("own_to_ours", "stock"))),
    ("`decoupled_elbo_backward`", lambda c: ", ".join(filter(None, one_call(c)))),
]
HALVES: Columns = [
    ("recon", lambda c: c.name),
    ("fused_elbo", lambda c: median(c.ours)),
    ("its fp32", lambda c: median(Case(c.run, c.name.removesuffix(f"-{c.about['dtype']}")).ours)),
    *OURS,
]
PROVIDERS: Columns = [
    ("", lambda r: title(r["provider"])),
    ("forward", lambda r: median(r, "forward")),
    ("backward", lambda r: median(r, "backward")),
    ("step", median),
    ("quartiles", quartiles),
]
TO_OURS = ("of fused_elbo", lambda r: with_interval(r["own_to_ours"]))
RATES: Columns = [("GB/s", rate), ("of the limit", lambda r: with_interval(r["own_to_limit"])), TO_OURS]
COUNTS: Columns = [
    TO_OURS,
    ("operators", lambda r: number(r["operators"])),
    ("kernels", lambda r: number(r["kernels"])),
]
MEMORY: Columns = [
    ("case", lambda r: r["case"]),
    *PROVIDERS[:1],
    ("kept for backward", lambda r: count(r["saved_bytes"])),
    ("peak of a step", lambda r: count(r.get("peak_bytes"))),
]
FIRST_CALLS: Columns = [*PROVIDERS[:1], ("first call", lambda r: seconds(r["first_call_s"]))]
HOST: Columns = [
    *PROVIDERS[:1],
    ("step", median),
    ("of `N/2·log(F.mse_loss)` + KL", lambda r: with_interval(r["to_one_liner"])),
]
SHARES: Columns = [  # of (network, loss)
    ("network", lambda r: r[0]["network"]),
    ("parameters", lambda r: f"{r[0]['parameters'] / 1e6:.2f} M"),
    ("loss", lambda r: "fused_elbo" if r[1] == "fused" else title(r[1])),
    ("time of the loss", lambda r: seconds(r[0]["losses"][r[1]]["loss_s"]["median"])),
    ("of the step", lambda r: seconds(r[0]["losses"][r[1]]["step_s"]["median"])),
    ("share (quartiles)", lambda r: "{median:.1%} ({q1:.1%}–{q3:.1%})".format(**r[0]["losses"][r[1]]["share"])),
]
COMPARED = ("one_liner", "one_liner_compiled", "stock", "stock_compiled")


def one_call(case: Case) -> tuple[str, str]:
    return median(case.records.get("single_pass")), times(case.ratio("own_to_ours", "single_pass"))


def each_case(run: Record, sigmas: Iterable[str]) -> str:
    """All providers of the cases with these σ."""
    found = [Case(run, name) for name, about in run["cases"].items() if about["sigma"] in sigmas]
    return "\n\n".join(
        f"{case.name}: {workloads.SIGMAS[case.about['sigma']]}.\n\n{table(PROVIDERS + RATES, case.records.values())}"
        for case in found
    )


def of_some(run: Record, sigmas: Iterable[str]) -> str:
    found = each_case(run, sigmas)
    return f"{measured_on(run)}, commit {run['versions']['commit']}.\n\n{found}" if found else ""


def narrower_table(run: Record, narrower: Record) -> str:
    """A row for each case of a narrower run, beside the same case of the page's own run."""
    widest = run["flags"]["instruction_set"]
    columns: Columns = [
        *STEPS[:2],
        *OURS,
        (f"{widest}: fused_elbo", lambda c: median(Case(run, c.name).ours)),
        ("of the limit", lambda c: with_interval(Case(run, c.name).ratio("own_to_limit"))),
    ]
    return table(columns, cases(narrower, narrower["cases"]))


def narrower_on(run: Record) -> str:
    switch = run["flags"]["environment"].get("ATEN_CPU_CAPABILITY")
    by = f", under `ATEN_CPU_CAPABILITY={switch}`" if switch else ""
    return f"{measured_on(run)}, commit {run['versions']['commit']}{by}."


def conditions(run: Record) -> str:
    flat: Record = {}
    for part in ("machine", "versions", "flags", "settings"):
        flat |= run[part]

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"

    rows = [(name.replace("_", " "), text(value)) for name, value in flat.items() if value not in (None, {}, [])]
    return table([("", lambda row: row[0]), ("", lambda row: row[1])], rows, left=2)


# ---------------------------------------------------------------------------------------------------------------- pages


def host_table(run: Record) -> str:
    return f"{measured_on(run)}, Triton {run['versions']['triton']}.\n\n{table(HOST, run['results'])}"


UNTIMED = "No kernel has been timed on a GPU. "  # stands before what is known without one


def results_page(
    run: Record,
    images: list[str],
    narrower: Iterable[Record] = (),
    on_gpus: Iterable[Record] = (),
    host: Record | None = None,
    of_its_own: dict[str, Record] | None = None,
) -> str:
    compiled = next((c for c in (Case(run, s.name) for s in workloads.SHAPES) if "stock_compiled" in c.records), None)
    halved = [name for name, about in run["cases"].items() if about["dtype"] != "fp32"]
    runs = [run, *(of_its_own or {}).values()]
    of_peaks = [Case(each, name).records.values() for name in workloads.PEAKS for each in runs]
    peaks = [r for records in of_peaks for r in records if r["kind"] != "limit"]
    values = {name: f"![{name}](results/{name}.png)" if f"{name}.png" in images else "" for name in plots.ALL} | {
        "conditions": conditions(run),
        "steps": table(STEPS, cases(run, (case.name for case in workloads.SHAPES))),
        "halves": table(HALVES, cases(run, halved)),
        "other_sigmas": each_case(run, workloads.OTHER_SIGMAS),
        "hierarchy": each_case(run, ["levels"]),
        **{Path(name).stem: of_some((of_its_own or {}).get(name, run), sigmas) for name, sigmas in OF_SOME.items()},
        "narrower": "\n\n".join(f"{narrower_on(other)}\n\n{narrower_table(run, other)}" for other in narrower),
        "memory_table": table(MEMORY, peaks, left=2),
        "overhead": table(PROVIDERS + COUNTS, Case(run, workloads.TINY.name).records.values()),
        "compiled_case": compiled.name if compiled else "",
        "first_calls": table(FIRST_CALLS, compiled.records.values()) if compiled else "",
        "shares": table(SHARES, [(of, loss) for of in run.get("train_step") or () for loss in of["losses"]], left=3),
        "gpus": "\n\n".join(map(gpu_pages.results, on_gpus)),
        "host": host_table(host) if host else "",
    }
    values["untimed"] = "" if values["gpus"] else UNTIMED
    return filled(TEMPLATE.read_text(encoding="utf-8"), values)


def filled(template: str, values: dict[str, str]) -> str:
    """The template with values for its {{names}}, without the sections whose names have no value at all."""
    name, sections = re.compile(r"{{(\w+)}}"), []
    for section in re.split(r"^(?=## )", template, flags=re.M):
        names = name.findall(section)
        if not names or any(values[n] for n in names):
            paragraphs = [name.sub(lambda m: values[m[1]], part) for part in section.strip().split("\n\n")]
            sections.append("\n\n".join(filter(None, paragraphs)))
    return "\n\n".join(sections) + "\n"


def readme_table(run: Record) -> str:
    """Step times at a σ of the batch, fp32, and the time of what they replace, as a multiple of that."""
    found = cases(run, (case.name for case in (*workloads.SHAPES, workloads.TINY)))

    def column(name: str) -> tuple[str, Callable[[Case], str]]:
        head = "the same, `torch.compile`" if name.endswith("_compiled") else title(name)
        return head, lambda case: times(case.ratio("own_to_ours", name))

    columns = [*STEPS[:2], ("of the limit", lambda c: times(c.ratio("own_to_limit")))]
    columns += [column(name) for name in COMPARED if any(name in case.records for case in found)]
    return f"{measured_on(run)};\n{HIDDEN}: the run's spread hides it.\n\n{table(columns, found)}"


def measured_on(run: Record) -> str:
    machine, settings = run["machine"], run["settings"]
    cpu = f"{machine['processor']} ({machine['cores']} cores, {run['flags']['instruction_set']})"
    threads = settings["threads"]
    where = machine["gpu"] or f"{threads} {'thread' if threads == 1 else 'threads'} of {cpu}"
    return f"Medians of {settings['rounds']} or more interleaved rounds on {where}, torch {run['versions']['torch']}"


def between(text: str, inserted: str) -> str:
    """`text` with what is between the markers replaced. Raises ValueError if they are not there once each."""
    pattern = re.compile(f"({re.escape(START)}).*?({re.escape(END)})", re.DOTALL)
    replaced, found = pattern.subn(lambda m: f"{m[1]}\n{inserted}\n{m[2]}", text)
    if found != 1:
        raise ValueError(f"{START.strip()} … {END.strip()}: {found} of them in README.md, not 1")
    return replaced


def rendered() -> dict[Path, str]:
    """The pages as they ought to be."""
    images = [image.name for image in sorted(KEPT.glob("*.png"))]
    run = record.read_json(KEPT / "results.json")
    of_gpus = gpu_pages.kept(KEPT)
    others = {KEPT / "results.json", KEPT / HOST_RUN, *(KEPT / name for name in OF_SOME), *of_gpus}
    narrower = [path for path in sorted(KEPT.glob("*.json")) if path not in others]
    host = record.read_json(KEPT / HOST_RUN) if (KEPT / HOST_RUN).exists() else None
    of_its_own = {name: record.read_json(KEPT / name) for name in OF_SOME if (KEPT / name).exists()}
    on_others = (map(record.read_json, paths) for paths in (narrower, of_gpus))
    return {
        PAGE: results_page(run, images, *on_others, host, of_its_own),
        README: between(README.read_text(encoding="utf-8"), readme_table(run)),
    }


def keep(*folders: Path) -> None:
    """Runs of bench/run.py, the widest first, and of bench/proof/gpu_check.py and bench/host.py, which a folder is told
    by; and runs of bench/run.py of nothing but what OF_SOME has."""
    KEPT.mkdir(exist_ok=True)
    for path in (path for folder in folders for path in gpu_pages.kept(folder)):
        record.write_json(record.read_json(path), KEPT / path.name)
    of_hosts = [folder for folder in folders if (folder / HOST_RUN).exists()]
    for folder in of_hosts:
        record.write_json(record.read_json(folder / HOST_RUN), KEPT / HOST_RUN)
    on_cpus = [folder for folder in folders if not gpu_pages.kept(folder) and folder not in of_hosts]
    names = {folder: name for folder in on_cpus if (name := of_some_only(folder))}
    for folder, name in names.items():
        record.write_json(record.read_json(folder / "results.json"), KEPT / name)
    if whole := [folder for folder in on_cpus if folder not in names]:
        keep_on_cpus(*whole)


def of_some_only(folder: Path) -> str | None:
    """Under which name of OF_SOME a run is kept."""
    if not (folder / "results.json").exists():
        return None
    found = {about["sigma"] for about in record.read_json(folder / "results.json")["cases"].values()}
    return next((name for name, sigmas in OF_SOME.items() if found.issubset(sigmas)), None)


def keep_on_cpus(folder: Path, *narrower: Path) -> None:
    run = record.read_json(folder / "results.json")
    for image in KEPT.glob("*.png"):
        image.unlink()
    plots.draw(run, KEPT)
    others = [record.read_json(other / "results.json") for other in narrower]
    named = {"results": run} | {other["flags"]["instruction_set"].lower(): other for other in others}
    for name, kept in named.items():
        record.write_json(kept, KEPT / f"{name}.json")
        record.write_csv(kept, KEPT / f"{name}.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="folders", type=Path, nargs="+", metavar="DIR", help="of runs: their --out, the widest first")
    args = parser.parse_args()
    if args.folders:
        keep(*args.folders)
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(BENCH.parent)}")


if __name__ == "__main__":
    main()
