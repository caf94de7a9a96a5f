"""What becomes of a build that fails: shown whole, once, remembered, and the reference serves."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from workshop import USE, Workshop, finish, needs_compiler, python

from fused_elbo import build as builder
from fused_elbo.backends import cpp
from fused_elbo.backends.base import BackendUnavailable


def test_no_compiler(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(shop.root))
    monkeypatch.delenv("CXX")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler was found \(tried g\+\+, clang\+\+, c\+\+\)") as e:
        builder.build(shop.spec)
    assert "Install g++" in e.value.remedy
    monkeypatch.setenv("CXX", "no-such-g++")
    with pytest.raises(BackendUnavailable, match="no-such-g"):
        builder.build(shop.spec)


@needs_compiler
def test_max_jobs_that_is_no_number(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BackendUnavailable, match="MAX_JOBS is 'many', which is no number"):
        builder.build(shop.spec)
    assert not shop.leftovers()


def test_a_compiler_that_does_not_run(shop: Workshop) -> None:
    shop.cxx.write_text("#!/bin/sh\nexit 69\n")
    with pytest.raises(BackendUnavailable, match="does not run"):
        builder.build(shop.spec)


def test_no_ninja(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(shop.root))
    with pytest.raises(BackendUnavailable, match="ninja was not found") as caught:
        builder.build(shop.spec)
    assert "pip install ninja" in caught.value.remedy
    assert not shop.leftovers()


@needs_compiler
def test_a_compile_error_is_shown_kept_and_remembered(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    shop.write("one.cpp", "#error this is why\n" + "\n".join(f"nonsense_{i} here;" for i in range(200)))
    monkeypatch.setattr(builder, "cpu_spec", lambda: shop.spec)
    with pytest.raises(builder.BuildFailed, match="this is why") as caught:
        cpp.load()
    error = caught.value
    assert error.log is not None
    whole = error.log.read_text()
    assert "nonsense_0" in whole
    assert "nonsense_199" in whole
    assert error.output == whole
    assert whole.strip() in str(error)  # not only the first lines: what the linker missed comes last
    assert len(error.reason) < 400  # for the doctor's table
    assert str(error.log) in error.reason
    assert not shop.leftovers()
    assert not builder.resolve(shop.spec).library.exists()

    before = len(shop.calls())
    with pytest.raises(builder.BuildFailed) as again:
        cpp.load()
    assert str(again.value) == str(error)
    for build in (False, True):
        status = cpp.status(build)
        assert (status.ready, status.detail, status.remedy) == (False, error.reason, error.remedy)
    assert len(shop.calls()) == before  # no second attempt in this process

    shop.write(
        "one.cpp", 'extern "C" int one() { return 1; }\n'
    )  # a new key, so a new folder: in a new process it works
    assert builder.build(shop.spec).library.exists()


@needs_compiler
def test_a_mended_compiler_clears_the_log(shop: Workshop) -> None:
    shop.compiler(before="exit 1")
    with pytest.raises(builder.BuildFailed) as caught:
        builder.build(shop.spec)
    shop.compiler()
    builder.build(shop.spec)
    assert caught.value.log is not None
    assert not caught.value.log.exists()


@needs_compiler
def test_a_library_that_does_not_load(shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    shop.write("one.cpp", 'extern "C" int absent(); extern "C" int one() { return absent(); }\n')
    monkeypatch.setattr(builder, "cpu_spec", lambda: shop.spec)
    with pytest.raises(BackendUnavailable, match=r"tiny\.so does not load: .*absent"):
        cpp.load()


def test_a_remembered_failure_does_not_keep_the_caller_s_tensors(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    monkeypatch.setenv("CXX", "no-such-g++")

    def call() -> weakref.ref[torch.Tensor]:
        tensor = torch.ones(3)
        with pytest.raises(BackendUnavailable):
            cpp.load()
        return weakref.ref(tensor)

    assert call()() is None  # the first failure
    assert call()() is None  # and a remembered one


def test_without_a_compiler_the_reference_serves_with_one_warning(shop: Workshop) -> None:
    out, err = finish(python(USE, PATH=str(shop.root), CXX=""))
    assert out == "right\n"
    assert err.count("Warning") == 1, err
    assert "no C++ compiler was found (tried g++, clang++, c++). Install g++" in err


@needs_compiler
def test_with_a_broken_compiler_its_output_is_shown_once(shop: Workshop) -> None:
    shop.compiler(before="echo this compiler is broken >&2; exit 1")
    out, err = finish(python(USE, MAX_JOBS="1"))
    assert out == "right\n"
    assert err.count("Warning") == 1, err
    assert err.count("this compiler is broken") == 1, err
    assert len(shop.calls("compile")) == 1
