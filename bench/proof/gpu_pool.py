"""Items of work for many processes: compiling takes the time, and it is of one core.

A worker that crashes or hangs costs the one item it was at: what it had left goes to a new process. A worker's answers
are lines of JSON in a file, {"item": …, "begun": true} and later {"item": …, "found": {…}}.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_section
from gpu_section import POLL, REPO, Record, environment, last_of, poisoned, said, shown

STALL = 60.0  # seconds for one item; a hang is one that takes longer
POISONED = 3  # exit code of a worker whose CUDA context an error has made useless


def work(
    items: list[str],
    answers: Path,
    one: Callable[[str], Record],
    prepare: Callable[[list[str]], None],
    end: float | None = None,
) -> int:
    """What a worker does: its items, in turn, until its end. What takes as long as it takes is for `prepare`."""
    prepare(items)
    with answers.open("a", encoding="utf-8") as file:

        def tell(**answer: object) -> None:
            file.write(json.dumps(answer) + "\n")
            file.flush()

        for item in items:
            if end is not None and time.monotonic() > end:
                break
            tell(item=item, begun=True)
            try:
                tell(item=item, found=one(item))
            except Exception as error:
                print(f"{item}:", flush=True)
                traceback.print_exc()
                tell(item=item, found={"error": said(error)})
                if poisoned(error):
                    return POISONED
    return 0


class Lane:
    """One worker after another, with the same list of items."""

    def __init__(self, command: Sequence[str], items: Sequence[str], folder: Path, number: int) -> None:
        self.command, self.pending = command, list(items)
        self.answers, self.log = folder / f"{number}.answers", folder / f"{number}.log"
        self.answers.touch()
        self.read, self.at, self.since = 0, "", 0.0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes] | None:
        self.at, self.since = "", time.monotonic()
        if not self.pending:
            return None
        command = [*self.command, "--answers", str(self.answers), "--items", *self.pending]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=REPO, env=environment(OMP_NUM_THREADS="1"), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def collect(self) -> dict[str, Record]:
        """Item -> what was found, of those that are done since the last look."""
        if self.process is None:
            return {}
        status = self.process.poll()  # before the file is read, or its last words could be missed
        found = self.answered()
        if status is not None or (self.at and time.monotonic() - self.since > STALL):
            if status is None:
                self.end()
            if self.at:
                why = f"its process ended with {status}" if status is not None else f"no answer in {STALL:.0f} s"
                found |= self.done(self.at, {"error": why})
            elif self.pending and status != POISONED:  # it does not even begin: a new one would not either
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                why = f"a worker ended with {status} before it began: {last_of(lines)}"
                for item in list(self.pending):
                    found |= self.done(item, {"error": why})
            self.process = self.start()
        return found

    def answered(self) -> dict[str, Record]:
        found: dict[str, Record] = {}
        with self.answers.open(encoding="utf-8") as file:
            file.seek(self.read)
            while (line := file.readline()).endswith("\n"):
                self.read = file.tell()
                answer = json.loads(line)
                if "found" in answer:
                    found |= self.done(answer["item"], answer["found"])
                else:
                    self.at, self.since = answer["item"], time.monotonic()
        return found

    def done(self, item: str, found: Record) -> dict[str, Record]:
        self.pending.remove(item)
        self.at = ""
        return {item: found}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def spread(
    kind: str, lanes: Sequence[Sequence[str]], folder: Path, seconds: float, found: Callable[[str, Record], None]
) -> bool:
    """Has workers of a kind do the items of each lane, and hands on what they find. Tells whether all were done.

    They stay in our process group, so whoever ends that ends them.
    """
    folder.mkdir(exist_ok=True)
    command = [*gpu_section.PROGRAM, "--worker", kind]
    running = [Lane(command, items, folder, i) for i, items in enumerate(lanes)]
    end = time.monotonic() + seconds
    try:
        while any(lane.process for lane in running) and time.monotonic() < end:
            for lane in running:
                for item, answer in lane.collect().items():
                    found(item, answer)
            time.sleep(POLL)
    finally:
        for lane in running:
            lane.end()
            shown(lane.log)
    return not any(lane.pending for lane in running)


def dealt(items: Sequence[str], count: int) -> list[list[str]]:
    """In turn, as cards are, so that every lane begins with what is worth most."""
    return [list(items[i::count]) for i in range(min(count, len(items)))]


def processes() -> int:
    """How many to have: two cores are left to the GPU's driver and to whoever waits."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable - 2)
