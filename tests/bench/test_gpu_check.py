"""`make gpu-check` without a GPU: what it says there, and what its sections compute, on CPU tensors.

test_gpu_sections.py is about processes and limits, test_gpu_tools.py about NVIDIA's tools, test_gpu_pages.py about the
pages.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SOME

from fused_elbo import autograd, decoupled_elbo, dispatch
from fused_elbo.call import Options, Tensors
from fused_elbo.functional import ELBO
from fused_elbo.sigma import Kind

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "bench" / "proof"), str(REPO / "bench")]

import gpu_cases  # noqa: E402
import gpu_check  # noqa: E402
import gpu_pool  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_values  # noqa: E402
import providers  # noqa: E402
import record  # noqa: E402
import workloads  # noqa: E402
from gpu_section import Failed, Part  # noqa: E402


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "bench" / "proof" / "gpu_check.py"), "--budget", "60"]
    command += ["--out", str(tmp_path / "out")]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | hidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU, done.stderr
    assert "No GPU was found" in done.stdout
    for section in gpu_check.SECTIONS:
        assert section.title in done.stdout
    assert not (tmp_path / "out").exists()


def test_arguments() -> None:
    options = gpu_check.parse([])
    assert options.budget == gpu_check.BUDGET
    assert options.out == REPO / "runs" / "gpu"
    assert options.only == [section.name for section in gpu_check.SECTIONS]
    assert gpu_check.parse(["--only", "suite,traffic"]).only == ["suite", "traffic"]
    with pytest.raises(SystemExit):
        gpu_check.parse(["--only", "suite,trafic"])


NOT_ON_A_GPU = {
    "distributed/distributed": "its process groups and device meshes are of the CPU",
    "hosts/accelerate": "the machine has no accelerate",
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
    numerical = {file.removeprefix("tests/").removesuffix(".py").replace("test_", "") for file in gpu_suite.FILES}
    assert numerical <= set(there)
    on_backends = {name for name, path in there.items() if uses_backend(path)}
    assert on_backends - numerical == set(NOT_ON_A_GPU)


def test_the_tests_run_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine has "meta": shapes and devices are compared there, and a look at a value fails."""
    monkeypatch.setattr(gpu_pool, "processes", lambda: 2)
    part = Part(tmp_path / "part.json", time.monotonic() + 300)
    chosen = "test_operators_equal_the_reference or test_half_precision_sums"
    files = ("tests/operators/test_ops.py", "tests/loss/test_elbo.py")
    with pytest.raises(Failed, match=r"the first: tests/loss/test_elbo\.py::test_half_precision_sums"):
        gpu_suite.run_tests(part, files, "meta", "-k", chosen)
    assert part.found["counts"]["passed"] == len(SOME)


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
    monkeypatch.setattr(autograd, "nearest", lambda *_: watch)
    gpu_cases.steps("cpu")
    assert watch.kinds == {"forward": set(Kind), "step": set(Kind)}
    assert watch.masks == {"grads": 0xFF, "step": 0xFF}  # each of recon, …, log σ, prior and β
    assert {(1, 3, 1, 1), (3, 3, 9, 11)} <= watch.shapes  # for each channel, and each pixel


SMALL = [item for item in gpu_values.cases("reference") if item.split("|")[2] in "03"]


@pytest.mark.parametrize("item", SMALL)
def test_values_agree_with_fp64_in_every_mode(item: str) -> None:
    found = gpu_values.one(item, "cpu")
    assert found["wrong"] == []
    assert 0 <= found["worst"] <= 1


def test_a_wrong_value_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A factor of 1.001 in the two calls, and in what they add up; the truth, in fp64, and the one call stay right."""

    def wrong(*args: Any, **kw: Any) -> ELBO:
        found = decoupled_elbo(*args, **kw)
        return found if args[0].dtype == torch.float64 else found._replace(loss=found.loss * 1.001)

    monkeypatch.setattr(gpu_values, "decoupled_elbo", wrong)
    part = Part(tmp_path / "part.json", time.monotonic() + 60)
    part.found |= {"backends": {}, "wrong": []}
    item = "reference|learned|0|fp32"
    found = gpu_values.one(item, "cpu")
    assert "batchmean, loss: 100 of the tolerance" in found["wrong"]
    assert any(fault.startswith("none, gradient 0") for fault in found["wrong"])
    assert not any(fault.startswith("in one call") for fault in found["wrong"])
    for answer in (
        found,
        {"error": "its process ended with -9"},
        {"unavailable": "no nvcc"},
        {"worst": 0.5, "wrong": [], "seconds": 1.0},
    ):
        gpu_values.take(part, item, answer)
    own = record.read_json(part.path)["found"]["backends"]["reference"]
    assert (own["right"], own["wrong"], own["worst"], own["unavailable"]) == (1, 2, {"fp32": 0.5}, "no nvcc")
    assert f"{item}: its process ended with -9" in part.found["wrong"]


def test_every_mode_is_among_the_cases() -> None:
    cases = gpu_values.cases("cuda")
    assert len(set(cases)) == len(cases)
    assert {item.split("|")[1] for item in cases} == {*gpu_cases.NAMES, gpu_values.LEVELS, gpu_values.AGGREGATE}
    assert {item.split("|")[3] for item in cases} == set(workloads.DTYPES)


def test_the_benchmark_has_all_shapes_and_providers() -> None:
    cases = gpu_timing.cases()
    assert {case.device for case in cases.values()} == {"cuda"}
    assert {case.shape for case in workloads.SHAPES} <= {case.shape for case in cases.values() if case.dtype == "bf16"}
    assert {"triton", "cuda", "single_pass", "cuda_single_pass"} <= gpu_timing.OURS
    for compiled, wanted in ((False, {"one_liner", "stock"}), (True, {"one_liner_compiled", "stock_compiled"})):
        assert {p.name for p in gpu_timing.serving(cases["128x3x64x64-bf16"], compiled)} >= wanted
    learned = {p.name for p in gpu_timing.serving(cases["128x3x64x64-learned"], False)}
    assert "latent_diffusion" in learned


def test_rows_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where no clock of a GPU and no graph is: who is timed, who is refused, and what a row has."""
    case = workloads.Case((4, 3, 8, 8), (5,))

    def broken(*tensors: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    known = {p.name: p for p in providers.ALL}
    chosen = [known["cpp"], known["stock"], replace(known["one_liner"], name="broken", loss=broken)]
    chosen.append(replace(known["one_liner"], name="wrong", left_out=lambda case: 0.0))
    monkeypatch.setattr(providers, "ALL", chosen)
    monkeypatch.setattr(gpu_timing, "cases", lambda: {case.name: case})
    monkeypatch.setattr(gpu_timing, "captured", lambda step: None)
    monkeypatch.setattr(gpu_timing, "copy_of", lambda count: lambda: None)
    monkeypatch.setattr(gpu_timing, "Flush", lambda: None)
    monkeypatch.setattr(gpu_timing, "step_times", lambda run: (run(), (3.0, 5.0))[1])
    monkeypatch.setattr(gpu_timing, "OURS", {"cpp"})
    found = gpu_timing.measure(f"{case.name}|0|")
    rows = {row["provider"]: row for row in found["rows"]}
    assert set(rows) == {"cpp", "stock", gpu_timing.COPY}
    assert rows["cpp"] | {"bytes": 0} == {
        "case": case.name, "dtype": "fp32", "sigma": "batch", "provider": "cpp", "bytes": 0,
        "gpu_us": None, "host_us": 3.0, "step_us": 5.0,
    }  # fmt: skip
    told = "; ".join(found["faults"])
    assert "broken at 4x3x8x8: RuntimeError: no kernel image" in told
    assert "wrong at 4x3x8x8: the loss differs" in told
    assert "cpp at 4x3x8x8: no CUDA graph of it can be made" in told
    assert {row["provider"] for row in gpu_timing.measure(f"{case.name}|0|stock")["rows"]} == {"stock"}


def answering(found: dict[str, Any], asked: list[str], done: bool) -> Any:
    """Stands in the place of gpu_pool.spread."""

    def spread(kind: str, lanes: list[list[str]], folder: Path, seconds: float, take: Any) -> bool:
        for item in (item for lane in lanes for item in lane):
            asked.append(f"{kind} {item}")
            if answer := found.get(asked[-1]):
                take(item, answer)
        return done

    return spread


def benchmark(
    found: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> tuple[Part, list[str]]:
    """The section with these answers of workers, and what they were asked."""
    asked: list[str] = []
    monkeypatch.setattr(gpu_timing, "cases", lambda: {"1x1": workloads.TINY})
    monkeypatch.setattr(gpu_pool, "spread", answering(found, asked, done))
    part = Part(folder / "part.json", time.monotonic() + 60)
    part.run(gpu_timing.run)
    return part, asked


def row(provider: str) -> dict[str, Any]:
    return {"case": "1x1", "provider": provider}


def test_the_benchmark_adds_launches_to_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "warm 1x1|0|": {"kernels": {"triton": ["elbo_stats", "elbo_grads", "fill"]}},
        "timing 1x1|0|": {"rows": [row("triton"), row("copy")], "faults": []},
    }
    part, asked = benchmark(found, tmp_path, monkeypatch, done=False)
    assert asked == ["warm 1x1|0|", "warm 1x1|1|", "timing 1x1|0|", "timing 1x1|1|"]
    assert part.found["rows"] == [row("triton") | {"launches": 3, "own_launches": 2}, row("copy")]
    assert part.verdict == "ok: 2 rows, then time was up"
    assert benchmark(found, tmp_path, monkeypatch, done=True)[0].verdict == "ok"


def test_of_a_case_that_crashes_each_provider_is_tried_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "warm 1x1|0|": {"kernels": {"triton": ["elbo_stats"] * 4}},
        "timing 1x1|0|": {"error": "its process ended with -9"},
        "timing 1x1|0|stock": {"rows": [row("stock")], "faults": []},
    }
    part, asked = benchmark(found, tmp_path, monkeypatch, done=True)
    assert asked[4:] == [f"timing 1x1|0|{p.name}" for p in gpu_timing.serving(workloads.TINY, False)]
    assert part.found["rows"] == [row("stock")]
    assert part.verdict is not None
    assert part.verdict.startswith("FAILED: triton at 1x1: a step launches 4 kernels of ours: ")
    assert part.verdict.endswith("; 1x1|0|: its process ended with -9")
