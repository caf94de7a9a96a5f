"""What becomes of a build that fails: shown whole, once, remembered, and the reference serves."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from workshop import USE, Workshop, finish, needs_compiler, python, tiny

import fused_elbo
from fused_elbo import build as builder
from fused_elbo.backends import cpp
from fused_elbo.build import tools as build_tools
from fused_elbo.errors import BackendUnavailable


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
@pytest.mark.parametrize("jobs", ["many", "0", "00", "-1", "1e3", "٣", "9" * 30])
def test_max_jobs_that_is_no_number(shop: Workshop, monkeypatch: pytest.MonkeyPatch, jobs: str) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(BackendUnavailable, match=f"MAX_JOBS is '{jobs}', which is no number"):
        builder.build(shop.spec)
    assert not shop.leftovers()


def test_a_compiler_that_does_not_run(shop: Workshop) -> None:
    shop.cxx.write_text("#!/bin/sh\nexit 69\n")
    with pytest.raises(BackendUnavailable, match=r"does not run: .* exit status 69\. Mend it"):
        builder.build(shop.spec)


def test_no_ninja(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(shop.root))
    with pytest.raises(BackendUnavailable, match="ninja was not found") as caught:
        builder.build(shop.spec)
    assert "pip install ninja" in caught.value.remedy
    assert not shop.leftovers()


@needs_compiler
@pytest.mark.parametrize("package", ["", "BIN_DIR = None", "BIN_DIR = 3", "raise ValueError('settings')"])
def test_another_package_called_ninja(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    """django-ninja, say. A ninja on the PATH serves all the same."""
    real = build_tools.find_ninja()
    (tmp_path / "site/ninja").mkdir(parents=True)
    (tmp_path / "site/ninja/__init__.py").write_text(package)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "ninja", raising=False)
    monkeypatch.setenv("PATH", str(shop.root))
    with pytest.raises(BackendUnavailable, match="ninja was not found"):
        builder.build(shop.spec)
    monkeypatch.setenv("PATH", f"{Path(real).parent}:/usr/bin:/bin")
    assert builder.build(shop.spec).is_built()
    monkeypatch.delitem(sys.modules, "ninja", raising=False)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF_8, LATIN_1 = r"f\303\274r nicht deklariert", r"f\374r nicht deklariert"
every_way = pytest.mark.check("every way in which a build, or what it looks for, can fail")
seldom = pytest.mark.release("a compiler that speaks as the locale does, and one whose words no locale has")


@needs_compiler
@pytest.mark.parametrize(
    ("locale", "said"),
    [
        pytest.param({}, LATIN_1, marks=every_way, id="UTF-8, Latin-1"),
        pytest.param(C_LOCALE, UTF_8, marks=every_way, id="C, UTF-8"),
        pytest.param({}, UTF_8, marks=seldom, id="UTF-8, UTF-8"),
        pytest.param(C_LOCALE, LATIN_1, marks=seldom, id="C, Latin-1"),
    ],
)
def test_a_compiler_s_words_in_any_encoding(shop: Workshop, locale: dict[str, str], said: str) -> None:
    shop.compiler(before=f"printf '{said}\\n'; exit 1")
    out, err = finish(python(USE, MAX_JOBS="1", **locale))
    assert out == "right\n"
    assert err.count("Warning") == 1, err
    assert "r nicht deklariert" in err
    (log,) = shop.cache.rglob("build.log")
    assert "r nicht deklariert" in log.read_text(encoding="utf-8")


@needs_compiler
def test_a_path_of_any_bytes(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Python has as surrogates, and UTF-8 does not know."""
    odd = shop.folder / os.fsdecode(b"caf\xe9")
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(odd / "cache"))
    odd.mkdir()
    shop.root.rename(odd / "src")
    assert builder.build(tiny(odd / "src")).is_built()  # not loaded: its path would stay in this process's maps


@needs_compiler
def test_where_every_process_seems_to_succeed(shop: Workshop) -> None:
    """A daemon that ignores SIGCHLD gets exit status 0 of all: what there is not says that it failed, and why."""
    shop.compiler(before="echo this compiler is broken >&2; exit 1")
    ignoring = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    out, err = finish(python(ignoring + textwrap.dedent(USE), MAX_JOBS="1"))
    assert out == "right\n"
    assert err.count("Warning") == 1, err
    assert "this compiler is broken" in err
    assert "FUSED_ELBO_CACHE_DIR" not in err


@pytest.mark.parametrize(
    "how", ["zip", *(pytest.param(how, marks=every_way) for how in ("no sources", "no folder", "unreadable"))]
)
def test_without_sources_that_can_be_read(tmp_path: Path, how: str) -> None:
    package = tmp_path / "site/fused_elbo"
    shutil.copytree(Path(fused_elbo.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    site = package.parent
    if how == "zip":
        site = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", package.parent))
    elif how == "no sources":
        shutil.rmtree(package / "csrc/cpu")
    elif how == "no folder":
        shutil.rmtree(package / "csrc/cpu")
        shutil.rmtree(package / "csrc/cuda")
        (package / "csrc/layout.h").unlink()
    else:
        source = package / "csrc/cpu/elbo_stats.cpp"
        source.unlink()
        source.mkdir()  # unlike permissions, this stops root, too
    environ = {"PYTHONPATH": str(site), "FUSED_ELBO_CACHE_DIR": str(tmp_path / "cache")}
    there = "import sys; sys.path.remove('')\nimport fused_elbo\n"  # not what lies in the working directory
    there += f"assert fused_elbo.__file__.startswith({str(site)!r}), fused_elbo.__file__\n"
    doctor = "from fused_elbo.__main__ import main; main()"
    in_one = how != "zip"  # a process that has not called the loss looks for itself: once is enough
    out, err = finish(python(there + textwrap.dedent(USE) + (doctor if in_one else ""), **environ))
    assert out.startswith("right\n")
    assert err.count("Warning") == 1, err
    assert "the sources cannot be read" in err
    assert "Install fused_elbo anew" in err
    if not in_one:
        out, _ = finish(python(there + doctor, **environ))
    assert "the sources cannot be read" in out
    assert out.endswith("CPU tensors are served by: reference\n")


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
