"""What goes wrong around compilers, GPUs and caches: a reason why a backend cannot serve, never the end of a call."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class BackendUnavailable(RuntimeError):
    """A backend cannot serve here. `reason` says why, `remedy` what the user can do about it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".strip())
        self.reason = reason
        self.remedy = remedy


def unavailable(error: Exception) -> BackendUnavailable:
    """Whatever goes wrong while a backend is looked for, built or loaded is a reason for the next one to serve.

    One that is such a reason already is copied: a raised exception holds on to its caller's frame, and so to the
    tensors of the call.
    """
    if isinstance(error, BackendUnavailable):
        return copy.copy(error)
    return BackendUnavailable(f"{type(error).__name__}: {sentence(error)}")


def sentence(text: object) -> str:
    """With one full stop at the end, whether the text has one or not."""
    return f"{str(text).strip().rstrip('.')}."


def once(function: Callable[[], T]) -> Callable[[], T]:
    """As functools.cache, but with one call alone, however many threads come at the same time; and a failure is
    remembered too, as a BackendUnavailable, and not tried again at every call."""
    results: list[T] = []
    failures: list[BackendUnavailable] = []
    lock = threading.Lock()

    @functools.wraps(function)
    def remembered() -> T:
        if not results and not failures:
            with lock:
                if not results and not failures:
                    try:
                        results.append(function())
                    except Exception as error:
                        failures.append(unavailable(error))
        if failures:
            raise unavailable(failures[0])
        return results[0]

    return remembered
