"""The results as pages: bench/RESULTS.md, and the table in README.md between its markers.

    python bench/results.py                                 # from the results that are kept, in bench/results
    python bench/results.py --from runs/bench               # keep a new run's first, and draw its plots
    python bench/results.py --from runs/bench runs/avx2     # and that of a narrower instruction set

The first run is results.json, which all of the pages but one section are made of. The others are of the same machine
under ATEN_CPU_CAPABILITY, and named after their instruction sets; a kept one that is not given stays.

`make bench-docs` is the same. tests/bench/test_bench.py checks that the pages are what this makes of the kept results;
how old those are it does not ask.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import page
import plots
import report

BENCH = Path(__file__).resolve().parent
KEPT, PAGE, README = BENCH / "results", BENCH / "RESULTS.md", BENCH.parent / "README.md"
START, END = "<!-- bench: written by make bench-docs -->\n", "<!-- /bench -->\n"


def between(text: str, inserted: str) -> str:
    """`text` with what is between the markers replaced. Raises ValueError if they are not there once each."""
    pattern = re.compile(f"({re.escape(START)}).*?({re.escape(END)})", re.DOTALL)
    replaced, count = pattern.subn(lambda m: f"{m[1]}\n{inserted}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{START.strip()} … {END.strip()}: {count} of them in README.md, not 1")
    return replaced


def rendered() -> dict[Path, str]:
    """The pages as they ought to be."""
    images = [image.name for image in sorted(KEPT.glob("*.png"))]
    results = report.read_json(KEPT / "results.json")
    narrower = [report.read_json(path) for path in sorted(KEPT.glob("*.json")) if path.stem != "results"]
    return {
        PAGE: page.results_page(results, images, narrower),
        README: between(README.read_text(encoding="utf-8"), page.readme_table(results)),
    }


def keep(folder: Path, *narrower: Path) -> None:
    results = report.read_json(folder / "results.json")
    KEPT.mkdir(exist_ok=True)
    for image in KEPT.glob("*.png"):
        image.unlink()
    write(results, "results")
    plots.draw(results, KEPT)
    for other in narrower:
        results = report.read_json(other / "results.json")
        write(results, results["flags"]["instruction_set"].lower())


def write(results: report.Record, name: str) -> None:
    report.write_json(results, KEPT / f"{name}.json")
    report.write_csv(results, KEPT / f"{name}.csv")


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
