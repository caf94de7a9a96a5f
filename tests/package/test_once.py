"""What is done once in a process, and the reasons why it failed."""

from __future__ import annotations

import threading
import time

import pytest

from fused_elbo import BackendUnavailable
from fused_elbo.errors import once


def test_threads_that_come_together_do_it_once() -> None:
    """The second of two registrations would be PyTorch's error."""
    calls, results = [], []

    @once
    def load() -> object:
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return object()

    threads = [threading.Thread(target=lambda: results.append(load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert results == [load()] * 8


def test_a_failure_is_remembered() -> None:
    calls = []

    @once
    def load() -> None:
        calls.append(1)
        raise OSError("no such library")

    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="OSError: no such library"):
            load()
    assert len(calls) == 1
