"""The GPU check's workers: one that crashes, hangs or has a poisoned CUDA context costs the item that it was at.

A program that only speaks their protocol stands in for them.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "bench" / "proof"), str(REPO / "bench")]

import gpu_pool  # noqa: E402
import gpu_section  # noqa: E402

PROGRAM = """
    import json, os, signal, sys, time
    at = sys.argv.index("--items")
    answers, items = sys.argv[at - 1], sys.argv[at + 1 :]
    if "unable" in items:
        print("no such module", flush=True)
        sys.exit(1)
    with open(answers, "a") as file:
        for item in items:
            print(json.dumps({"item": item, "begun": True}), file=file, flush=True)
            if item == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "hang":
                time.sleep(600)
            error = {"error": "CUDA error: of a kind"} if item == "poison" else {"pid": os.getpid()}
            print(json.dumps({"item": item, "found": error}), file=file, flush=True)
            if item == "poison":
                sys.exit(3)
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setattr(gpu_section, "PROGRAM", (sys.executable, "-S", str(tmp_path / "program.py")))
    monkeypatch.setattr(gpu_pool, "STALL", 1.5)
    monkeypatch.setattr(gpu_pool, "POLL", 0.02)


def test_a_crash_a_hang_and_a_poisoned_context_cost_one_item_each(workers: None, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    lanes = [["a", "crash", "b", "hang", "c", "poison", "d", "e"], ["f", "g"], ["unable", "h"]]
    assert gpu_pool.spread("odd", lanes, tmp_path / "pool", 60.0, found.__setitem__)
    assert set(found) == {item for lane in lanes for item in lane}
    assert found["crash"] == {"error": "its process ended with -9"}
    assert found["hang"]["error"].startswith("no answer in")
    assert found["poison"] == {"error": "CUDA error: of a kind"}
    assert found["h"] == {"error": "a worker ended with 1 before it began: no such module"}
    assert len({found[item]["pid"] for item in "abcd"}) == 4  # a new process after each
    assert found["d"]["pid"] == found["e"]["pid"]


def test_workers_end_when_their_time_is_over(workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pool, "STALL", 600.0)
    found: dict[str, Any] = {}
    assert not gpu_pool.spread("odd", [["a", "hang", "b"]], tmp_path / "pool", 2.0, found.__setitem__)
    assert set(found) == {"a"}


def test_what_a_worker_answers(tmp_path: Path) -> None:
    def one(item: str) -> dict[str, Any]:
        if item != "fine":
            raise RuntimeError(f"{item}\nand more")
        return {"value": 1}

    prepared: list[list[str]] = []
    items = ["fine", "broken", "Triton Error [CUDA]: an illegal access", "never reached"]
    assert gpu_pool.work(items, tmp_path / "answers", one, prepared.append) == gpu_pool.POISONED
    assert prepared == [items]
    told = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [answer["item"] for answer in told if "begun" in answer] == items[:3]
    assert {answer["item"]: answer["found"] for answer in told if "found" in answer} == {
        "fine": {"value": 1},
        "broken": {"error": "RuntimeError: broken"},
        items[2]: {"error": f"RuntimeError: {items[2]}"},
    }


def test_a_worker_stops_at_its_end(tmp_path: Path) -> None:
    """What watches it says what it has seen when it is gone."""

    def slow(item: str) -> dict[str, Any]:
        time.sleep(0.2)
        return {}

    end = time.monotonic() + 0.1
    assert gpu_pool.work(["a", "b", "c"], tmp_path / "answers", slow, lambda items: None, end) == 0
    assert '"b"' not in (tmp_path / "answers").read_text()


def test_cards_are_dealt_in_turn() -> None:
    assert gpu_pool.dealt(list("abcde"), 2) == [["a", "c", "e"], ["b", "d"]]
    assert gpu_pool.dealt(["a"], 8) == [["a"]]
    assert 1 <= gpu_pool.processes() <= (os.cpu_count() or 1)
