"""What is found on a GPU as pages, from a small run made by hand: none of its numbers was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "bench"))

import gpu_pages  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402


def row(provider: str, gpu: float | None, step: float, **more: Any) -> dict[str, Any]:
    about = {"case": "128x3x64x64", "dtype": "fp32", "sigma": "batch", "provider": provider, "bytes": 32_000_000}
    return about | {"gpu_us": gpu, "step_us": step, "host_us": step / 2} | more


def section(title: str, verdict: str, **found: Any) -> dict[str, Any]:
    return {"title": title, "verdict": verdict, "seconds": 12.3, "limit": 100.0, "found": found}


KERNELS = [
    {"kernel": "elbo_stats_kernel", "read": 12e6, "written": 1e6},
    {"kernel": "elbo_grads_kernel", "read": 9e6, "written": 6e6},
]
RUN = {
    "format": record.FORMAT,
    "machine": {"gpu": "NVIDIA Pretended 80GB", "multiprocessors": 132, "gpu_memory_gib": 79, "driver": "580.1"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"},
    "settings": {"budget": 480.0},
    "sections": {
        "values": section(
            "Values", "ok", wrong=[],
            backends={"triton": {"cases": 81, "right": 81, "wrong": 0, "first_s": 1.0, "worst": {"fp32": 0.0213}}},
        ),
        "benchmark": section(
            "Benchmark", "FAILED: a | b\nand more",
            rows=[
                row("triton", 20.0, 300.0, launches=4), row("one_liner", 50.0, 150.0, launches=14),
                row("gaussian_nll", None, 600.0), row("copy", 16.0, 25.0),
            ],
        ),
        "traffic": section(
            "Traffic", "ok: 1 of 24 steps",
            rows=[{"case": "128x3x64x64", "provider": "triton", "bytes": 28_000_000, "kernels": KERNELS}],
        ),
        "suite": section("The tests", "running"),
    },
}  # fmt: skip


def test_the_report_of_a_run() -> None:
    text = gpu_pages.report(RUN)
    assert text.startswith(
        "# fused_elbo on a GPU: FAILED\n\n### NVIDIA Pretended 80GB\n\n132 SMs, 79 GiB, driver 580.1, "
    )
    assert "| Benchmark | FAILED: a \\| b and more | 12 s |" in text
    assert "| The tests | running | 12 s |" in text
    assert "| triton | 81 | 81 | 0 | fp32 0.021 |" in text
    kernels = "elbo_stats 12.0 MB + 1.0 MB, elbo_grads 9.0 MB + 6.0 MB"
    lines = [line for line in text.splitlines() if line.startswith("| 128x3x64x64 |")]
    assert lines == [
        "| 128x3x64x64 | fused_elbo, Triton | 20.0 | 300.0 | 150.0 | 1600 | 80% | 1.00 × | 1.00 × | 4 |",
        "| 128x3x64x64 | `N/2·log(F.mse_loss)` + KL | 50.0 | 150.0 | 75.0 | 640 | 32% | 2.50 × | 0.50 × | 14 |",
        "| 128x3x64x64 | `F.gaussian_nll_loss` + KL |  | 600.0 | 300.0 |  |  |  | 2.00 × |  |",
        "| 128x3x64x64 | a copy | 16.0 | 25.0 | 12.5 | 2000 | 100% | 0.80 × | 0.08 × |  |",
        f"| 128x3x64x64 | fused_elbo, Triton | {kernels} | 28.0 MB | 1.000 |",
    ]


def test_what_was_not_run_has_no_table() -> None:
    sections = {
        "values": section("Values", "not run: no Triton"),
        "traffic": section("Traffic", "not run: no ncu", rows=[]),
    }
    text = gpu_pages.report(RUN | {"sections": sections})
    assert text.startswith("# fused_elbo on a GPU: ok")
    assert gpu_pages.BENCHMARK not in text
    assert gpu_pages.TRAFFIC not in text


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kept results that are copies: those of CPUs, and none of a GPU."""
    folder = tmp_path / "kept"
    folder.mkdir()
    for name in ("results.json", "avx2.json", "bars.png"):
        (folder / name).write_bytes((report.KEPT / name).read_bytes())
    monkeypatch.setattr(report, "KEPT", folder)
    return folder


def test_a_run_lands_in_the_pages_by_one_command(pages: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in pages.iterdir()}
    without = report.rendered()
    assert report.UNTIMED in without[report.PAGE]
    (tmp_path / "run").mkdir()
    record.write_json(RUN, tmp_path / "run" / "gpu-pretended-80gb.json")
    report.keep(tmp_path / "run")
    assert record.read_json(pages / "gpu-pretended-80gb.json") == RUN
    assert {path: path.read_bytes() for path in before} == before  # what is of CPUs stays
    with_it = report.rendered()
    assert with_it[report.README] == without[report.README]
    above, _, section_ = with_it[report.PAGE].partition("\n## GPUs\n")
    assert above == without[report.PAGE].partition("\n## GPUs\n")[0]
    assert gpu_pages.results(RUN) in section_
    assert report.UNTIMED not in section_
    assert "\nWhat is known without one: " in section_


def test_runs_of_both_kinds_are_kept_at_once(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Path, ...]] = []
    monkeypatch.setattr(report, "keep_on_cpus", lambda *folders: kept.append(folders))
    for name in ("gpu", "widest", "narrower"):
        (tmp_path / name).mkdir()
    record.write_json(RUN, tmp_path / "gpu" / "gpu-pretended-80gb.json")
    report.keep(*(tmp_path / name for name in ("widest", "gpu", "narrower")))
    assert (pages / "gpu-pretended-80gb.json").exists()
    assert kept == [(tmp_path / "widest", tmp_path / "narrower")]


def test_a_file_of_another_format_is_refused(pages: Path, tmp_path: Path) -> None:
    record.write_json(RUN | {"format": 0}, tmp_path / "gpu-old.json")
    with pytest.raises(ValueError, match="format 0"):
        report.keep(tmp_path)
