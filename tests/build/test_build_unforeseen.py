"""Whatever goes wrong when a backend is asked for, foreseen or not, is a reason: nobody's call ends with it."""

from __future__ import annotations

import pytest
from workshop import Workshop

from fused_elbo import backends
from fused_elbo import build as builder
from fused_elbo.backends import cpp, cuda, library, triton
from fused_elbo.build import cache
from fused_elbo.errors import BackendUnavailable, once


class Unforeseen(Exception):
    """No error that anything here knows of."""


@pytest.mark.parametrize("where", ["cpu_spec", "resolve", "build"])
def test_whatever_goes_wrong_is_a_reason_and_no_error(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None, where: str
) -> None:
    """Remembered, told by the doctor, warned about once, never raised out of the loss."""
    asked: list[object] = []

    def fails(*args: object) -> None:
        asked.append(args)
        raise Unforeseen("for once.")

    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(library, "PACKAGED", shop.folder / "lib")
    for module in (builder, cache):  # `build` asks its own module for `resolve`
        monkeypatch.setattr(module, where, fails, raising=False)
    with pytest.warns(RuntimeWarning, match=r"Unforeseen: for once\.$"):
        assert not backends.load_for("cpu")
    assert not backends.load_for("cpu")  # a second warning would be an error
    with pytest.raises(BackendUnavailable, match="Unforeseen: for once"):
        cpp.load()
    for build in (False, True):
        status = cpp.status(build)
        assert (status.ready, status.detail) == (False, "Unforeseen: for once.")
    assert len(asked) == 1


def test_a_status_that_cannot_be_had_is_one_too(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    def fails(*args: object) -> None:
        raise Unforeseen("for once")

    monkeypatch.setattr(cpp.library, "check", fails)
    monkeypatch.setattr(triton, "require", fails)
    for status in (cpp.status(), triton.status()):
        assert (status.ready, status.detail) == (False, "Unforeseen: for once.")


def test_an_unforeseen_failure_of_triton_leaves_the_place_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried once: what it costs is not paid at every call."""
    tried: list[str] = []

    @once
    def load() -> None:
        tried.append("triton")
        raise Unforeseen("for once")

    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(triton, "load", load)
    monkeypatch.setattr(cuda, "load", lambda: tried.append("cuda"))
    assert backends.load_for("cuda")
    assert backends.load_for("cuda")
    assert tried == ["triton", "cuda", "cuda"]

    def fails() -> None:
        raise Unforeseen("again")

    monkeypatch.setattr(cuda, "load", fails)
    with pytest.warns(RuntimeWarning, match="Unforeseen: again"):
        assert not backends.load_for("cuda")
    assert not backends.load_for("cuda")


def test_an_interrupt_is_none(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    """^C while it compiles ends what the user ran, and is not remembered as a failure."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp.library, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backends.load_for("cpu")
    assert cpp.library.failure is None
