"""What a run leaves, and the pages made of it; numbers that mean nothing are shown nowhere.

No test looks at how long anything takes.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
BENCH = REPO / "bench"
sys.path.insert(0, str(BENCH))

import record  # noqa: E402
import report  # noqa: E402
import workloads  # noqa: E402


def test_a_quick_run_from_end_to_end(tmp_path: Path) -> None:
    few = ["cpp", "single_pass", "one_liner", "latent_diffusion", "limit"]
    command = [sys.executable, BENCH / "run.py", "--quick", "--rounds", "2", "--out", tmp_path, "--providers", *few]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = record.read_json(tmp_path / "results.json")
    assert tuple(found["cases"]) == workloads.QUICK
    assert {"processor", "cores", "caches"} <= set(found["machine"])
    assert {"torch", "commit", "compiler"} <= set(found["versions"])
    for own in found["results"]:
        assert own["step_s"]["q1"] <= own["step_s"]["median"] <= own["step_s"]["q3"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(found["results"])
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    for name in workloads.QUICK:
        assert f"{name}: " in done.stdout
    text = report.results_page(found, ["bars.png"])
    assert "![bars](results/bars.png)" in text
    assert "| 64x1x28x28 |" in report.readme_table(found)


def test_what_is_hidden_is_not_shown() -> None:
    ratio = {"median": 1.234, "low": 0.5, "high": 2.5, "hidden": "between …"}
    own = {"case": "c", "own_to_limit": ratio, "step_s": {"median": 1.0}, "busy": True}
    assert record.median(own, "step") == "?"
    assert record.median(own | {"busy": False}, "step") == "1.00 s"
    assert record.ratio(ratio) == report.times(ratio) == report.with_interval(ratio) == "?"
    assert record.flat(record.shown(own))["own_to_limit.median"] is None
    assert "1.2" in report.with_interval(ratio | {"hidden": None})


def test_the_pages_are_what_the_kept_results_make() -> None:
    """This is about their format: numbers may be as old as the kept run."""
    for path, text in report.rendered().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run make bench-docs"


def test_a_narrower_instruction_set_s_run_is_kept_beside_the_widest_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has its name, and one section, where each case stands beside the same one of the page's own run."""
    found = record.read_json(report.KEPT / "results.json")
    other = json.loads(json.dumps(found))
    other["flags"]["instruction_set"] = "AVX2"
    for own in other["results"]:
        own["step_s"]["median"] = 123e-6
    for name, run_ in (("widest", found), ("narrower", other)):
        (tmp_path / name).mkdir()
        record.write_json(run_, tmp_path / name / "results.json")
    monkeypatch.setattr(report, "KEPT", tmp_path / "kept")
    report.keep(tmp_path / "widest", tmp_path / "narrower")
    assert {"results.json", "results.csv", "avx2.json", "avx2.csv"} <= {p.name for p in (tmp_path / "kept").iterdir()}
    assert record.read_json(tmp_path / "kept/avx2.json") == other
    text = report.rendered()[report.PAGE]
    before, _, section = text.partition("## Narrower instruction sets")
    section, _, after = section.partition("\n## ")
    own = found["results"][[r["provider"] for r in found["results"]].index("cpp")]
    assert "AVX2)" in section.partition("|")[0]  # which machine it is
    assert f"| {own['case']} | 123.0 µs |" in section
    assert record.seconds(own["step_s"]["median"]) in section
    assert "123.0 µs" not in before + after
    assert "AVX512)" in report.rendered()[report.README]  # which machine


def test_a_section_without_results_is_left_out() -> None:
    template = (
        "# Page\n\nText.\n\n## One\n\n{{picture}}\n\nWords.\n\n{{table}}\n\n## Two\n\n{{other}}\n\n## Three\n\nEnd.\n"
    )
    page = report.filled(template, {"picture": "", "table": "| t |", "other": ""})
    assert page == "# Page\n\nText.\n\n## One\n\nWords.\n\n| t |\n\n## Three\n\nEnd.\n"


def test_what_the_results_page_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", report.PAGE.read_text(encoding="utf-8")):
        assert (BENCH / link).exists(), link


def test_the_readme_has_one_place_for_the_table() -> None:
    with pytest.raises(ValueError, match=r"0 of them in README\.md"):
        report.between("no markers", "table")
    assert report.between(f"a\n{report.START}old{report.END}b", "new") == f"a\n{report.START}\nnew\n{report.END}b"
