"""The GPU check's sections: their time limits, what is left of one that is killed, and the file, whole at every moment.

A program that only speaks the protocol stands in for the sections' own processes, which import PyTorch for seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "bench" / "proof"), str(REPO / "bench")]

import gpu_check  # noqa: E402
import gpu_pool  # noqa: E402
import gpu_section  # noqa: E402
import gpu_suite  # noqa: E402
import record  # noqa: E402
from gpu_check import Report, Section  # noqa: E402
from gpu_section import Failed, NotRun, Part  # noqa: E402

PROGRAM = """
    import json, os, signal, sys, time
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    name, part = options["--section"], options["--part"]
    def save(verdict, **found):
        with open(part + ".new", "w") as file:
            json.dump({"format": 1, "verdict": verdict, "found": found}, file)
        os.replace(part + ".new", part)
    print("this is", name, flush=True)
    if name == "well":
        save("ok: all of it", seconds=float(options["--end"]) - time.monotonic())
    elif name == "failing":
        save("FAILED: of nothing", right=1, wrong=1)
    elif name == "crashing":
        save(None, right=1)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "silent":
        pass
    elif name == "endless":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for i in range(1 << 30):
            save(None, steps=i)
            time.sleep(0.01)
"""


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Section]:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setattr(gpu_section, "PROGRAM", (sys.executable, "-S", str(tmp_path / "program.py")))
    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    names = ("failing", "crashing", "silent", "endless", "well")
    return {name: Section(name, f"What is {name}", 1.0, lambda part: "") for name in names}


def made(out: Path) -> Report:
    machine = {"gpu": "NVIDIA Pretended 80GB", "multiprocessors": 132, "gpu_memory_gib": 80, "driver": None}
    versions = {"torch": "2", "triton": "3", "commit": None}
    return Report(out, {"format": record.FORMAT, "machine": machine, "versions": versions, "sections": {}})


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    parent = f"import subprocess as s, sys, time; print(s.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    command = [sys.executable, "-S", "-c", f"{parent}; time.sleep(600)"]
    looks: list[float] = []
    log = tmp_path / "log"
    ended = gpu_section.limited(command, 2.0, log, watch=lambda: looks.append(time.monotonic()), grace=0.2)
    assert not ended.in_time
    assert ended.seconds < 10
    assert ended.trouble is not None
    assert "out of time" in ended.trouble
    assert len(looks) > 3
    pid = int(log.read_text().split()[0])
    deadline = time.monotonic() + 10
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_who_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    """By SIGTERM, which the driver sends to a section, and whoever limits the driver's time sends to that."""
    log, before = tmp_path / "log", signal.getsignal(signal.SIGTERM)
    command = [sys.executable, "-S", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]

    def end_us() -> None:
        if log.read_text().endswith("\n"):
            os.kill(os.getpid(), signal.SIGTERM)

    gpu_section.end_at_sigterm()
    try:
        with pytest.raises(SystemExit):
            gpu_section.limited(command, 60.0, log, watch=end_us)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not running(int(log.read_text()))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("code", "trouble"), [("pass", None), ("raise SystemExit(4)", "exit code 4"), ("import os; os.abort()", "SIGABRT")]
)
def test_how_a_command_ended(code: str, trouble: str | None, tmp_path: Path) -> None:
    ended = gpu_section.limited([sys.executable, "-S", "-c", code], 60.0, tmp_path / "log")
    assert ended.in_time
    assert trouble in ended.trouble if trouble else ended.trouble is None  # type: ignore[operator]


def test_a_section_s_verdict(tmp_path: Path) -> None:
    def ending(error: Exception) -> Any:
        def section(part: Part) -> str:
            part.found["before"] = 1
            raise error

        return section

    wanted = {
        "ok: 3": lambda part: "ok: 3",
        "FAILED: why": ending(Failed("why")),
        "not run: a tool is missing": ending(NotRun("a tool is missing")),
        "FAILED: ZeroDivisionError: of nothing": ending(ZeroDivisionError("of nothing\nat all")),
    }
    for verdict, section in wanted.items():
        part = Part(tmp_path / "part.json", time.monotonic() + 60)
        part.run(section)
        kept = record.read_json(tmp_path / "part.json")
        assert kept["verdict"] == verdict
        assert kept["found"] == ({} if verdict == "ok: 3" else {"before": 1})


# -------------------------------------------------------------------------------------------------------------- driver


def test_no_section_takes_another_with_it(sections: dict[str, Section], tmp_path: Path) -> None:
    report, stop, seen = made(tmp_path / "out"), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(record.read_json(report.json))  # raises if the file is not whole

    reader = threading.Thread(target=read)
    reader.start()
    started = time.monotonic()
    try:
        assert not gpu_check.check(list(sections.values()), 12.0, report)
    finally:
        stop.set()
        reader.join()
    assert time.monotonic() - started < 13
    found = record.read_json(report.json)["sections"]
    assert list(found) == list(sections)
    assert found["failing"]["verdict"] == "FAILED: of nothing"
    assert found["failing"]["found"] == {"right": 1, "wrong": 1}
    assert found["crashing"]["verdict"] == "FAILED: ended by SIGSEGV"
    assert found["crashing"]["found"] == {"right": 1}
    assert found["silent"]["verdict"] == "FAILED: it gave no verdict"
    assert found["endless"]["verdict"].startswith("FAILED: out of time after ")
    assert found["endless"]["found"]["steps"] > 3
    assert found["well"]["verdict"] == "ok: all of it"
    assert found["well"]["found"]["seconds"] > 2  # what the others left
    partial = [run["sections"]["endless"] for run in seen if "endless" in run["sections"]]
    assert {"running"} < {section["verdict"] for section in partial}
    assert len({section["found"]["steps"] for section in partial}) > 2  # kept as they came
    assert [name in report.log.read_text() for name in ("this is failing", "this is well")] == [True, True]
    assert report.page.read_text().startswith("# fused_elbo on a GPU: FAILED")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_the_exit_code(sections: dict[str, Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_section, "end_at_sigterm", lambda: None)
    monkeypatch.setattr(gpu_check, "conditions", lambda: {k: made(tmp_path).result[k] for k in ("machine", "versions")})
    monkeypatch.setattr(gpu_check, "SECTIONS", [sections["failing"], sections["well"]])
    assert gpu_check.main(["--out", str(tmp_path), "--budget", "20"]) == 1
    assert gpu_check.main(["--out", str(tmp_path), "--budget", "20", "--only", "well"]) == 0
    kept = record.read_json(tmp_path / "gpu-pretended-80gb.json")
    assert kept["settings"]["budget"] == 20
    assert kept["sections"]["well"]["verdict"] == "ok: all of it"


# --------------------------------------------------------------------------------------------------------------- suite


def test_the_suite_adds_up_its_tests_and_groups_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run, in two processes. Warnings are no errors there, and a file that cannot be imported hides no other."""
    text = """
        import warnings
        import pytest
        @pytest.mark.parametrize("n", range(5))
        def test_of(n):
            warnings.warn("shown, and no more")
            if n == 4:
                pytest.skip("no need")
            assert n < 2, "too large"
    """
    (tmp_path / "test_made.py").write_text(textwrap.dedent(text))
    (tmp_path / "test_broken.py").write_text("import there_is_no_such_module")
    monkeypatch.setattr(gpu_pool, "processes", lambda: 2)
    files = [str(tmp_path / name) for name in ("test_broken.py", "test_made.py")]
    part = Part(tmp_path / "part.json", time.monotonic() + 300)
    part.run(lambda part: gpu_suite.run_tests(part, files, "cpu", "--rootdir", str(tmp_path)))
    assert part.found["counts"] == {"passed": 2, "failed": 3, "skipped": 1}
    (broken, one), (failing, two) = part.found["failures"].items()
    assert (one, two) == (1, 2)
    assert "No module named 'there_is_no_such_module'" in broken
    assert "too large" in failing
    assert part.verdict == f"FAILED: 3 failed, 2 passed, 1 skipped; the first: {broken}"


@pytest.mark.parametrize("lines", [0, 2, 3])
def test_a_suite_that_is_killed_keeps_what_was_done(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(command: Any, seconds: float, log: Path, environ: Any, watch: Any) -> gpu_section.Ended:
        tests = [{"test": f"a::{i}", "outcome": "passed", "message": "", "seconds": 1.0} for i in range(lines)]
        text = "".join(json.dumps(test) + "\n" for test in tests)
        Path(environ[gpu_suite.LINES]).write_text(text + '{"test": "half a li')
        watch()
        return gpu_section.Ended(-15, False, seconds)

    monkeypatch.setattr(gpu_suite, "limited", killed)
    part = Part(tmp_path / "part.json", time.monotonic() + 60)
    part.run(gpu_suite.suite)
    kept = record.read_json(tmp_path / "part.json")
    assert kept["found"]["counts"].get("passed", 0) == lines
    assert kept["verdict"].startswith(f"ok: {lines} passed, then time was up" if lines else "FAILED: no test was run")
