"""The build: the spec as data, what the key depends on, one compilation for any number of processes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import workshop
from workshop import REAL, Workshop, build_script, finish, needs_compiler, python, tiny

from fused_elbo import build as builder
from fused_elbo.backends import cpp
from fused_elbo.build import cache
from fused_elbo.build import spec as build_spec
from fused_elbo.errors import BackendUnavailable


@needs_compiler
def test_builds_and_then_starts_warm_without_any_process(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    target = builder.build(shop.spec)
    library = ctypes.CDLL(str(target.library))
    assert (library.one(), library.two()) == (1, 2)
    assert [len(shop.calls(kind)) for kind in ("version", "compile", "link")] == [1, 2, 1]
    assert not shop.leftovers()

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a warm start ran {args}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert builder.build(shop.spec) == target
    assert len(shop.calls()) == 4


@needs_compiler
@pytest.mark.parametrize("silence", [0.2, 60.0])
def test_a_long_build_says_so_once(
    silence: float, shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "_SILENCE", silence)
    shop.compiler(before="sleep 0.5")
    target = builder.build(shop.spec)
    said = f"fused_elbo: compiling the C++ kernels, once, into {target.folder}: "
    assert capsys.readouterr().err.partition(said)[:2] == (("", said) if silence < 1 else ("", ""))
    builder.build(shop.spec)
    assert capsys.readouterr().err == ""


@needs_compiler
def test_a_long_build_needs_no_stderr(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SILENCE", 0.0)
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert builder.build(shop.spec).library.exists()


def test_import_builds_nothing(shop: Workshop) -> None:
    finish(python("import fused_elbo, fused_elbo.build, fused_elbo.backends.cpp"))
    assert not shop.cache.exists()
    assert not shop.calls()


@needs_compiler
def test_many_processes_at_once_compile_once(shop: Workshop) -> None:
    shop.compiler(before="sleep 0.3")
    gate = shop.folder / "gate"
    processes = [python(build_script(shop, gate)) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "imported\n"
    gate.touch()
    assert [finish(process)[0] for process in processes] == ["3\n"] * 3
    assert len(shop.calls("compile")) == 2
    assert len(shop.calls("link")) == 1
    assert not shop.leftovers()


@needs_compiler
@pytest.mark.parametrize(("jobs", "overlap"), [("1", False), ("2", True)])
def test_max_jobs(shop: Workshop, monkeypatch: pytest.MonkeyPatch, jobs: str, overlap: bool) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    shop.compiler(before="sleep 0.3")
    builder.build(shop.spec)
    steps = [line.split()[0] for line in shop.calls("compile", "end")]
    assert (steps[:2] == ["compile", "compile"]) == overlap


@needs_compiler
def test_odd_paths_and_a_compiler_with_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    folder = tmp_path / 'it\'s $odd: "very" & more'
    folder.mkdir()
    shop = Workshop(folder, monkeypatch)
    shop.write("one.cpp", '#include "two.h"\nextern "C" int one() { return ARGUMENT + TWO; }\n')
    monkeypatch.setenv("CXX", f"{REAL} -DARGUMENT=40")
    assert ctypes.CDLL(str(builder.build(shop.spec).library)).one() == 42


@needs_compiler
@pytest.mark.parametrize(
    "spelling",
    ["{folder}/my tools/g++", "'{folder}/my tools/g++' -DARGUMENT=40", r"{folder}/my\ tools/g++ '-DARGUMENT=4 * 10'"],
)
def test_a_compiler_is_named_as_a_shell_reads_it(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Quoted, or with a backslash; and a path alone, which a shell would take apart."""
    shop.write("one.cpp", '#ifndef ARGUMENT\n#define ARGUMENT 40\n#endif\nextern "C" int one() { return ARGUMENT; }\n')
    (shop.folder / "my tools").mkdir()
    shop.cxx.rename(shop.folder / "my tools/g++")
    monkeypatch.setenv("CXX", spelling.format(folder=shop.folder))
    assert ctypes.CDLL(str(builder.build(shop.spec).library)).one() == 40


def test_a_compiler_that_no_shell_could_read(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'/opt/my tools/g++")
    with pytest.raises(BackendUnavailable, match=r"CXX is '/opt/my tools/g\+\+, which a shell cannot read: No closing"):
        builder.build(shop.spec)


@needs_compiler
def test_another_torch_in_cpath_does_not_hide_ours(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    header = shop.folder / "other/torch/headeronly/macros/Macros.h"
    header.parent.mkdir(parents=True)
    header.write_text("#error another torch\n")
    shop.write("one.cpp", '#include <torch/headeronly/macros/Macros.h>\nextern "C" int one() { return 1; }\n')
    monkeypatch.setenv("CPATH", str(shop.folder / "other"))
    assert builder.build(shop.spec).library.exists()


def test_the_locale_is_no_part_of_the_key(shop: Workshop) -> None:
    """What the compiler says is written in one process and read in another."""
    shop.compiler(version="g++ für alle")
    key = shop.key()
    script = f"""
        import pathlib, sys
        sys.path.insert(0, {str(Path(workshop.__file__).parent)!r})
        from fused_elbo.build import resolve
        from workshop import tiny
        print(resolve(tiny(pathlib.Path({str(shop.root)!r}))).folder.name)
    """
    out, _ = finish(python(script, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert out.strip() == key
    assert len(shop.calls("version")) == 1


@needs_compiler
def test_operators_against_the_stable_abi(shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    """The real flags; loaded once, however many threads ask."""
    shop.write(
        "op.cpp",
        """
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include <torch/csrc/stable/tensor.h>
        torch::stable::Tensor same(torch::stable::Tensor x) { return torch::stable::empty_like(x); }
        extern "C" __attribute__((visibility("default"))) void fused_elbo_cpu_pool_limit(long long) {}
        STABLE_TORCH_LIBRARY_FRAGMENT(fused_elbo_test_build, m) { m.def("same(Tensor x) -> Tensor"); }
        STABLE_TORCH_LIBRARY_IMPL(fused_elbo_test_build, CPU, m) { m.impl("same", TORCH_BOX(&same)); }
        """,
    )
    spec = replace(builder.cpu_spec(), name="op", parts=(build_spec.Part("op", ("op.cpp",)),), root=shop.root)
    monkeypatch.setattr(builder, "cpu_spec", lambda: spec)
    assert not cpp.status().ready
    assert not shop.calls("compile")  # asking compiles nothing

    loads: list[object] = []
    load_library = torch.ops.load_library
    monkeypatch.setattr(torch.ops, "load_library", lambda path: (loads.append(path), load_library(path)))
    threads = [threading.Thread(target=cpp.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert torch.ops.fused_elbo_test_build.same(torch.ones(3)).shape == (3,)
    status = cpp.status()
    assert status.ready
    for part in (str(builder.build(spec).library), spec.label, "logging g++ 1.0"):
        assert part in status.detail


@pytest.mark.parametrize(
    ("capability", "level"),
    [("AVX512", "AVX512"), ("AVX2", "AVX2"), ("NO AVX", "baseline"), ("DEFAULT", "baseline"), ("SVE256", "baseline")],
)
def test_instruction_set_follows_pytorch(monkeypatch: pytest.MonkeyPatch, capability: str, level: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    spec = builder.cpu_spec()
    assert spec == builder.cpu_spec((level,))
    assert spec.label == level.lower()
    flags = spec.parts[-1].cflags
    assert ("-mavx2" in flags, "-mavx512f" in flags) == (level != "baseline", level == "AVX512")
    assert "-ffp-contract=off" in spec.cflags  # the same bits on all of them


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache_dir(**environ: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "linux")
            patch.setenv("HOME", str(tmp_path))
            for name in ("FUSED_ELBO_CACHE_DIR", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in environ.items():
                patch.setenv(name, value)
            return builder.Settings.read().cache_dir

    assert cache_dir() == tmp_path / ".cache/fused_elbo"
    assert cache_dir(XDG_CACHE_HOME="/xdg") == Path("/xdg/fused_elbo")
    assert cache_dir(XDG_CACHE_HOME="relative") == tmp_path / ".cache/fused_elbo"
    assert cache_dir(XDG_CACHE_HOME="/xdg", FUSED_ELBO_CACHE_DIR="/mine") == Path("/mine")
    assert cache_dir(FUSED_ELBO_CACHE_DIR="~/mine") == tmp_path / "mine"
    assert cache_dir(FUSED_ELBO_CACHE_DIR="here") == Path.cwd() / "here"


@pytest.mark.parametrize(
    "change",
    [
        lambda shop, patch: shop.write("one.cpp", 'extern "C" int one() { return 11; }\n'),
        lambda shop, patch: shop.write("two.h", "#define TWO 22\n"),
        lambda shop, patch: shop.write("new.h", ""),
        lambda shop, patch: (shop.root / "two.h").rename(shop.root / "two_.h"),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, cflags=("-fPIC", "-O1"))),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, ldflags=("-lm",))),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, label="avx512")),
        lambda shop, patch: patch.setattr(shop, "spec", tiny(shop.root, "one.cpp")),
        lambda shop, patch: shop.compiler(version="logging g++ 1.1"),
        lambda shop, patch: shop.compiler(version=r"logging g++ 1.0\nconfigured otherwise"),
        lambda shop, patch: patch.setenv("CXX", f"{shop.cxx} -march=native"),
        lambda shop, patch: patch.setattr(torch, "__version__", "2.99.0+cpu"),
        lambda shop, patch: patch.setattr(torch.version, "git_version", "0" * 40),
        lambda shop, patch: patch.setattr(platform, "machine", lambda: "riscv64"),
    ],
    ids=[
        *("source", "header", "new_header", "renamed_header", "cflags", "ldflags", "label", "sources"),
        *("compiler_version", "compiler_version_second_line", "compiler_arguments"),
        *("torch_version", "torch_build", "machine"),
    ],
)
def test_key_changes_with(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, change: Callable[[Workshop, pytest.MonkeyPatch], object]
) -> None:
    before = shop.key()
    change(shop, monkeypatch)
    assert shop.key() != before


def test_key_changes_with_nothing_else(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shop.key()
    os.utime(shop.root / "one.cpp", (0, 0))
    shop.write("README.md", "no source")
    shop.write("other.cpp", "not one of the spec's sources\n")
    shop.write("device.cuh", "no C++ includes it\n")
    shop.compiler(before="true")  # another file, the same --version
    monkeypatch.setenv("MAX_JOBS", "7")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(shop.folder / "another cache"))
    assert shop.key() == before
