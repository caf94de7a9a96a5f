"""The results as pages: bench/RESULTS.md, and the table in README.md between its markers, both from one results.json.

    python bench/results.py                      # from the results that are kept, bench/results/results.json
    python bench/results.py --from runs/bench    # keep a new run's results first, and draw its plots

`make bench-docs` is the same. tests/test_bench.py checks that the pages are what this makes of the kept results; how
old those are it does not ask.
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


def rendered(results: report.Record) -> dict[Path, str]:
    """The pages as they ought to be."""
    images = [image.name for image in sorted(KEPT.glob("*.png"))]
    return {
        PAGE: page.results_page(results, images),
        README: between(README.read_text(encoding="utf-8"), page.readme_table(results)),
    }


def keep(folder: Path) -> None:
    results = report.read_json(folder / "results.json")
    KEPT.mkdir(exist_ok=True)
    for image in KEPT.glob("*.png"):
        image.unlink()
    report.write_json(results, KEPT / "results.json")
    report.write_csv(results, KEPT / "results.csv")
    plots.draw(results, KEPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="of a run: its --out")
    args = parser.parse_args()
    if args.folder:
        keep(args.folder)
    for path, text in rendered(report.read_json(KEPT / "results.json")).items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(BENCH.parent)}")


if __name__ == "__main__":
    main()
