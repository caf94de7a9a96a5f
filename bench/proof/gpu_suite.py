"""The project's tests on the GPU, in parallel processes, the quickest files first; each result is kept as it comes.

The plugins of the machine's pytest are not ours to choose. pytest-benchmark warns under pytest-xdist, and is left out;
warnings are shown, where at home they are errors. pytest-xdist and pytest-timeout are used where they are.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gpu_pool
from gpu_section import Failed, Part, Record, environment, last_of, limited, shown

# Files of tests that run on backends. What compiles anew for each example (properties) or traces (compile) comes last.
FILES = tuple(
    f"tests/{name}.py"
    for name in (
        "loss/test_facts", "loss/test_elbo", "loss/test_step", "loss/test_elements", "loss/test_levels",
        "loss/test_per_level", "loss/test_aggregate", "loss/test_aggregate_calls", "loss/test_modules",
        "loss/test_module_state", "loss/test_memory", "loss/test_corners",
        "loss/test_layout", "operators/test_autograd", "operators/test_ops", "loss/test_step_graph",
        "operators/test_compile", "loss/test_properties",
    )
)  # fmt: skip
GPU_FILE = "tests/kernels/test_gpu.py"
ONE_TEST = 60  # seconds
MARGIN = 3.0  # seconds to say what was found
MOST = 60  # kinds of failures that are told
LINES = "GPU_CHECK_LINES"  # the variable with the file that gpu_lines.py writes


def suite(part: Part) -> str:
    return run_tests(part, FILES, "cuda")


def synchronisation(part: Part) -> str:
    return run_tests(part, (GPU_FILE,), "cuda")


def run_tests(part: Part, files: Sequence[str], device: str, *more: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        lines.touch()
        environ = environment(OMP_NUM_THREADS="1", **{LINES: str(lines)})
        watch, words = partial(take, part, lines), command(files, device, *more)
        try:
            ended = limited(words, part.left() - MARGIN, log, environ, watch)
        finally:
            last = last_of(shown(log))
    counts = part.found["counts"]
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    if counts.get("failed") or not counts or (ended.in_time and ended.status):
        first = next(iter(part.found["failures"]), last)
        raise Failed(f"{told or 'no test was run'}; the first: {first}")
    return f"ok: {told}" if ended.in_time else f"ok: {told}, then time was up"


def command(files: Sequence[str], device: str, *more: str) -> list[str]:
    """Tests go to whoever is free, one by one and in their order."""
    there = {name: importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout")}
    parallel = ["-n", str(gpu_pool.processes()), "--dist", "load", "--maxschedchunk", "1"] if there["xdist"] else []
    # By a thread, since a process that waits in the driver takes no signal; the process ends with the test.
    limit = [f"--timeout={ONE_TEST}", "--timeout-method=thread"] if there["pytest_timeout"] else []
    plain = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "filterwarnings=default", "--tb=short", "-q"]
    plain += ["--continue-on-collection-errors"]
    ours = ["-p", "gpu_lines", "-p", "device_plugin", "--device", device]
    return [sys.executable, "-m", "pytest", *plain, *parallel, *limit, *ours, *more, *files]


def take(part: Part, lines: Path) -> None:
    """Adds up the results that are there. Failures are told by their message, since one fault fails many tests."""
    counts: Counter[str] = Counter()
    failures: dict[str, Record] = {}
    for line in lines.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        result = json.loads(line)
        counts[result["outcome"]] += 1
        if result["outcome"] == "failed":
            failure = failures.setdefault(result["message"], {"count": 0, "test": result["test"]})
            failure["count"] += 1
    told = {f"{found['test']}: {message}": found["count"] for message, found in list(failures.items())[:MOST]}
    part.found |= {"counts": dict(counts), "failures": told}
    part.save()
