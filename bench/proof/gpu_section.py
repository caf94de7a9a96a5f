"""A section of the GPU check: its process, its time limit, and what it has found so far, on disk.

A section runs in a process of its own, so that a crash, a hang or a poisoned CUDA context takes nothing else with it.
It keeps what it finds in a `Part`, a JSON file that is whole at every moment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from record import Record

REPO = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, str(REPO / "bench" / "proof" / "gpu_check.py"))  # is all of our processes
POLL = 0.25  # seconds between two looks at what runs
OWN_GROUP: Any = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
LOG = 1 << 20  # characters of a log that are kept
GRACE = 1.0  # seconds between SIGTERM and SIGKILL


class Failed(Exception):
    """A section's reason."""


class NotRun(Exception):
    """What is missing."""


class Part:
    """What a section has found, and how long it may still take."""

    def __init__(self, path: Path, end: float) -> None:
        self.path, self.end = path, end  # by time.monotonic(), which all processes share
        self.found: Record = {}
        self.verdict: str | None = None  # while it runs

    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        record.write_json({"format": record.FORMAT, "verdict": self.verdict, "found": self.found}, self.path)

    def run(self, section: Callable[[Part], str]) -> None:
        """Runs the section to its verdict, which is what it returns, or why it does not return."""
        self.save()
        try:
            self.verdict = section(self)
        except NotRun as missing:
            self.verdict = f"not run: {missing}"
        except Failed as reason:
            self.verdict = f"FAILED: {reason}"
        except Exception as error:  # the sections after it are still worth having
            self.verdict = f"FAILED: {said(error)}"
        self.save()


def said(error: BaseException) -> str:
    """An exception's type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def poisoned(error: BaseException) -> bool:
    """Whether it may have made this process's CUDA context useless: PyTorch's words, and Triton's."""
    return "CUDA error" in str(error) or "[CUDA]" in str(error)


@dataclass(frozen=True)
class Ended:
    status: int
    in_time: bool
    seconds: float

    @property
    def trouble(self) -> str | None:
        """Why it did not come to its own end."""
        if not self.in_time:
            return f"out of time after {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"ended with exit code {self.status}" if self.status else None


def limited(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environ: Mapping[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
    grace: float = GRACE,
) -> Ended:
    """Runs a command, and ends it with all that it started when its time is over. `watch` is called meanwhile.

    Its output is appended to `log`. The process leads a group of its own. One that starts groups itself, by this
    function, ends them at SIGTERM (`end_at_sigterm`); it needs a longer `grace` than they do.
    """
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=REPO, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            **OWN_GROUP,
        )  # fmt: skip
    in_time = True
    try:
        while process.poll() is None:
            watch()
            if time.monotonic() - started > seconds:
                in_time = False
                break
            time.sleep(min(POLL, max(0.01, seconds / 10)))
    finally:
        end_group(process, grace)
    watch()
    return Ended(process.returncode, in_time, time.monotonic() - started)


def end_at_sigterm() -> None:
    """Makes SIGTERM an exception, so that `limited` does not leave a group behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def end_group(process: subprocess.Popen[Any], grace: float) -> None:
    """Ends a group's leader and whoever is left of the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        try:
            process.wait(grace if number == signal.SIGTERM else None)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def shown(log: Path) -> list[str]:
    """What a process has printed, which goes into our own log, too; its end, where that is too long."""
    text = log.read_text(encoding="utf-8", errors="replace")[-LOG:] if log.exists() else ""
    print(text, flush=True)
    return text.splitlines()


def last_of(lines: Sequence[str]) -> str:
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing was printed")


def environment(**more: str) -> dict[str, str]:
    """That of a section's processes: they find the checkout, the tests and the benchmark without an installation."""
    folders = (REPO, REPO / "tests", REPO / "bench" / "proof", os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    # torch.compile would have as many compilers as there are cores, in each of many processes.
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, **own, **more}
