"""`make gpu-check` as far as it goes without a GPU: what it says there, its report, its exit codes, its pytest runs."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import MODES

from fused_elbo import autograd, dispatch
from fused_elbo.call import Options, Tensors
from fused_elbo.sigma import Kind

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "bench" / "proof"), str(REPO / "bench")]

import gpu_check  # noqa: E402
import gpu_timing  # noqa: E402
import providers  # noqa: E402


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "bench" / "proof" / "gpu_check.py"), "--out", str(tmp_path / "out")]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | hidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU, done.stderr
    assert "No GPU was found" in done.stdout
    for section in gpu_check.SECTIONS:
        assert section.title in done.stdout
    assert not (tmp_path / "out").exists()


def test_arguments() -> None:
    options = gpu_check.parse([])
    assert options.out == REPO / "runs" / "gpu"
    assert options.only == [section.name for section in gpu_check.SECTIONS]
    assert gpu_check.parse(["--only", "suite,graphs"]).only == ["suite", "graphs"]
    with pytest.raises(SystemExit):
        gpu_check.parse(["--only", "suite,grahps"])


NOT_ON_A_GPU = {
    "distributed/distributed": "its process groups and device meshes are of the CPU",
}


def uses_backend(path: Path) -> bool:
    """Whether a test, or a mark, asks for the fixture."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        asked: list[object] = []
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            asked = [argument.arg for argument in node.args.args]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "usefixtures":
            asked = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if "backend" in asked:
            return True
    return False


def test_it_runs_every_file_of_tests_that_run_on_backends() -> None:
    paths = (REPO / "tests").glob("*/test_*.py")
    there = {f"{path.parent.name}/{path.stem.removeprefix('test_')}": path for path in paths}
    numerical = {f"{room}/{name}" for room, names in gpu_check.NUMERICAL.items() for name in names}
    assert numerical <= set(there)
    on_backends = {name for name, path in there.items() if uses_backend(path)}
    assert on_backends - numerical == set(NOT_ON_A_GPU)


def well(options: argparse.Namespace) -> list[str]:
    return ["| a | table |"]


def absent(options: argparse.Namespace) -> list[str]:
    raise gpu_check.NotRun("a tool is missing")


def broken(options: argparse.Namespace) -> list[str]:
    raise ZeroDivisionError("of nothing")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


def test_the_report_and_the_exit_code(pretended: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sections = [gpu_check.Section(run.__name__, run.__name__.title(), run) for run in (broken, absent, well)]
    pretended.setattr(gpu_check, "SECTIONS", sections)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    report = (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert report.startswith("# fused_elbo on a GPU: FAILED")
    assert "## Broken\n\n\n**FAILED: ZeroDivisionError: of nothing**" in report
    assert "**not run: a tool is missing**" in report
    assert "| a | table |\n\n**ok**" in report
    assert gpu_check.main(["--out", str(tmp_path), "--only", "absent,well"]) == 0
    assert (tmp_path / "gpu_report.md").read_text(encoding="utf-8").startswith("# fused_elbo on a GPU: ok")


def test_the_tests_run_on_another_device() -> None:
    """Every machine has "meta": shapes and devices are compared there, and a look at a value fails."""
    ops, elbo = "tests/operators/test_ops.py", "tests/loss/test_elbo.py"
    (summary,) = gpu_check.pytest(ops, "-k", "test_operators_equal_the_reference", device="meta")
    assert f"{len(MODES)} passed" in summary
    with pytest.raises(gpu_check.Failed, match=r"FAILED tests/loss/test_elbo\.py"):
        gpu_check.pytest(elbo, "-k", "test_half_precision_sums", device="meta")


class Watch:
    """Stands in the operators' place: calls them, and takes down the kinds of σ and which gradients were wanted."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[Kind]] = {"forward": set(), "step": set()}
        self.shapes: set[tuple[int, ...]] = set()  # of log σ
        self.masks: dict[str, int] = {"grads": 0, "step": 0}

    def forward(self, tensors: Tensors, options: Options) -> Any:
        self.kinds["forward"].add(Kind(options.sigma_mode))
        if tensors.log_sigma is not None:
            self.shapes.add(tuple(tensors.log_sigma.shape))
        return dispatch.operators.forward(tensors, options)

    def grads(self, *args: Any) -> Any:
        self.masks["grads"] |= args[-1]
        return dispatch.operators.grads(*args)

    def step(self, tensors: Tensors, options: Options, *args: Any) -> Any:
        self.kinds["step"].add(Kind(options.sigma_mode))
        self.masks["step"] |= args[-1]
        return dispatch.operators.step(tensors, options, *args)


def test_the_steps_under_compute_sanitizer_have_every_sigma_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    monkeypatch.setattr(autograd, "implementation", lambda *_: watch)
    gpu_check.steps("cpu")
    assert watch.kinds == {"forward": set(Kind), "step": set(Kind)}
    assert watch.masks == {"grads": 0xFF, "step": 0xFF}  # each of recon, …, log σ, prior and β
    assert {(1, 3, 1, 1), (3, 3, 9, 11)} <= watch.shapes  # for each channel, and each pixel


def test_the_benchmark_has_a_row_for_the_single_pass() -> None:
    names = {provider.name for provider in providers.ALL}
    assert set(gpu_timing.LAUNCHES) <= names
    cases = gpu_timing.cases()
    assert {case.device for case in cases} == {"cuda"}
    assert len({case.name for case in cases}) == len(cases)
