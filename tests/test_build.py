"""The build machinery, on tiny sources of its own and through a compiler that keeps a log of how it is called."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo import build as builder
from fused_elbo.backends import cpp
from fused_elbo.backends.base import BackendUnavailable

REAL = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler (g++, clang++, c++) on this machine")
FAST = ("-fPIC", "-O0")


class Workshop:
    """Sources, a cache and a logging compiler in a folder of their own; the environment points to them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.root, self.cache, self.log = (
            folder,
            folder / "src",
            folder / "cache",
            folder / "logging-g++.calls",
        )
        self.root.mkdir()
        self.cxx = folder / "logging-g++"
        self.write("one.cpp", 'extern "C" int one() { return 1; }\n')
        self.write("two.cpp", '#include "two.h"\nextern "C" int two() { return TWO; }\n')
        self.write("two.h", "#define TWO 2\n")
        self.spec = builder.BuildSpec("tiny", ("one.cpp", "two.cpp"), FAST, root=self.root)
        self.compiler()
        monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(self.cache))
        monkeypatch.setenv("CXX", str(self.cxx))
        monkeypatch.delenv("MAX_JOBS", raising=False)

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(textwrap.dedent(text))

    def compiler(self, before: str = "", after: str = "", version: str = "logging g++ 1.0") -> None:
        """The compiler, doing something before or after the real one; $STEP is compile or link, $OUT what it writes."""
        log = '"$0.calls"'
        script = f"""\
            #!/bin/sh
            if [ "$*" = --version ]; then
                echo version $$ >> {log}; printf '%b\\n' {shlex.quote(version)} "$LC_ALL"; exit
            fi
            case " $* " in *" -c "*) STEP=compile;; *) STEP=link;; esac
            for OUT in "$@"; do :; done
            echo $STEP $$ >> {log}; trap 'echo end >> {log}' EXIT
            {before}
            {shlex.quote(REAL or "false")} "$@" || exit 1
            {after}
            exit 0
            """
        part = self.folder / "part"
        part.write_text(textwrap.dedent(script))
        part.chmod(0o755)
        os.replace(part, self.cxx)  # "text file busy" otherwise, while it runs

    def calls(self, *kinds: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] in (kinds or ("version", "compile", "link"))]

    def key(self, spec: builder.BuildSpec | None = None) -> str:
        return builder.resolve(spec or self.spec).folder.name

    def leftovers(self) -> list[str]:
        return [path.name for path in self.cache.rglob("scratch-*")]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


@pytest.fixture
def fresh_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_loaded", None)
    monkeypatch.setattr(cpp, "_failure", None)


def python(script: str, **environ: str) -> subprocess.Popen[str]:
    """A process of its own that imports this very fused_elbo."""
    path = os.pathsep.join([str(Path(fused_elbo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def build_script(shop: Workshop, gate: Path | None = None) -> str:
    wait = (
        f"import os, time\n(lambda: [time.sleep(0.002) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)])()"
    )
    return "\n".join(
        [
            "import ctypes, pathlib",
            "from fused_elbo.build import BuildSpec, build",
            f"print('imported', flush=True)\n{wait if gate else ''}",
            f"spec = BuildSpec('tiny', {shop.spec.sources!r}, {FAST!r}, root=pathlib.Path({str(shop.root)!r}))",
            "library = ctypes.CDLL(str(build(spec).library))",
            "print(library.one() + library.two())",
        ]
    )


# ------------------------------------------------------------------------------------------------------- building


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
    start = time.perf_counter()
    assert builder.build(shop.spec) == target
    assert time.perf_counter() - start < 0.05  # 0.5 ms measured
    assert len(shop.calls()) == 4


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
@pytest.mark.parametrize("step", ["compile", "link"])
def test_a_killed_builder_leaves_nothing_to_load(shop: Workshop, step: str) -> None:
    hold, release = shop.folder / "hold", shop.folder / "release"
    hold.touch()
    shop.compiler(  # where it is held, half an output is there
        before=f"[ $STEP = {step} ] && [ -e '{hold}' ] && {{ head -c 100 '{REAL}' > \"$OUT\"; touch '{hold}.reached'; "
        f"while [ ! -e '{release}' ]; do sleep 0.02; done; }}"
    )
    process = python(build_script(shop), MAX_JOBS="1")
    wait_for(Path(f"{hold}.reached").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    target = builder.resolve(shop.spec)
    assert shop.leftovers()  # it was in the middle of the work
    assert not target.library.exists()

    hold.unlink()
    assert builder.build(shop.spec) == target  # takes over the dead one's lock
    assert ctypes.CDLL(str(target.library)).two() == 2
    assert not shop.leftovers()

    # The dead builder's compiler is still there. Now it goes on, and must not reach the library.
    whole = target.library.read_bytes()
    assert len(shop.calls("end")) < len(shop.calls("compile", "link"))
    release.touch()
    wait_for(lambda: len(shop.calls("end")) == len(shop.calls("compile", "link")))
    assert target.library.read_bytes() == whole


@needs_compiler
def test_the_library_appears_whole(shop: Workshop) -> None:
    size = 64 << 20  # takes some 50 ms to write: long enough to be seen half written
    shop.compiler(after=f'[ $STEP = link ] && head -c {size} /dev/zero >> "$OUT"')
    library = builder.resolve(shop.spec).library
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(builder.build, shop.spec)
        wait_for(lambda: library.exists() or built.done())
        seen = library.stat().st_size if library.exists() else None
        built.result()
    assert seen == library.stat().st_size > size


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cpp: None
) -> None:
    folder = tmp_path / 'it\'s $odd: "very" & more'
    folder.mkdir()
    shop = Workshop(folder, monkeypatch)
    shop.write("one.cpp", '#include "two.h"\nextern "C" int one() { return ARGUMENT + TWO; }\n')
    monkeypatch.setenv("CXX", f"{REAL} -DARGUMENT=40")
    assert ctypes.CDLL(str(builder.build(shop.spec).library)).one() == 42


@needs_compiler
def test_operators_against_the_stable_abi(shop: Workshop, monkeypatch: pytest.MonkeyPatch, fresh_cpp: None) -> None:
    """The real flags; loaded once, however many threads ask."""
    shop.write(
        "op.cpp",
        """
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include <torch/csrc/stable/tensor.h>
        torch::stable::Tensor same(torch::stable::Tensor x) { return torch::stable::empty_like(x); }
        STABLE_TORCH_LIBRARY_FRAGMENT(fused_elbo_test_build, m) { m.def("same(Tensor x) -> Tensor"); }
        STABLE_TORCH_LIBRARY_IMPL(fused_elbo_test_build, CPU, m) { m.impl("same", TORCH_BOX(&same)); }
        """,
    )
    spec = replace(builder.cpu_spec(), name="op", sources=("op.cpp",), root=shop.root)
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
    for part in (str(builder.build(spec).library), spec.instruction_set, "logging g++ 1.0"):
        assert part in status.detail


# ------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("capability", "level"),
    [("AVX512", "AVX512"), ("AVX2", "AVX2"), ("NO AVX", "baseline"), ("DEFAULT", "baseline"), ("SVE256", "baseline")],
)
def test_instruction_set_follows_pytorch(monkeypatch: pytest.MonkeyPatch, capability: str, level: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    spec = builder.cpu_spec()
    assert spec == builder.cpu_spec(level)
    assert spec.instruction_set == level
    assert ("-mavx2" in spec.cflags, "-mavx512f" in spec.cflags) == (level != "baseline", level == "AVX512")
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


# -------------------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    "change",
    [
        lambda shop, patch: shop.write("one.cpp", 'extern "C" int one() { return 11; }\n'),
        lambda shop, patch: shop.write("two.h", "#define TWO 22\n"),
        lambda shop, patch: shop.write("new.h", ""),
        lambda shop, patch: (shop.root / "two.h").rename(shop.root / "two_.h"),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, cflags=("-fPIC", "-O1"))),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, ldflags=("-lm",))),
        lambda shop, patch: patch.setattr(shop, "spec", replace(shop.spec, sources=("one.cpp",))),
        lambda shop, patch: shop.compiler(version="logging g++ 1.1"),
        lambda shop, patch: shop.compiler(version=r"logging g++ 1.0\nconfigured otherwise"),
        lambda shop, patch: patch.setenv("CXX", f"{shop.cxx} -march=native"),
        lambda shop, patch: patch.setattr(torch, "__version__", "2.99.0+cpu"),
        lambda shop, patch: patch.setattr(torch.version, "git_version", "0" * 40),
        lambda shop, patch: patch.setattr(builder.platform, "machine", lambda: "riscv64"),
    ],
    ids=[
        *("source", "header", "new_header", "renamed_header", "cflags", "ldflags", "sources"),
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
    shop.compiler(before="true")  # another file, the same --version
    monkeypatch.setenv("MAX_JOBS", "7")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(shop.folder / "another cache"))
    assert shop.key() == before


# ------------------------------------------------------------------------------------------------------ the cache


def test_cache_is_private(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.cache = shop.folder / "new/cache"
    monkeypatch.setenv("FUSED_ELBO_CACHE_DIR", str(shop.cache))
    umask = os.umask(0)
    try:
        builder.resolve(shop.spec)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(shop.cache.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o702], ids=oct)
def test_a_cache_that_others_can_write_is_refused(shop: Workshop, mode: int) -> None:
    builder.build(shop.spec)  # a library that is there is refused, too: it may have been planted
    shop.cache.chmod(mode)
    with pytest.raises(BackendUnavailable, match="writable by others") as caught:
        builder.build(shop.spec)
    assert "chmod go-w" in caught.value.remedy
    shop.cache.chmod(0o755)
    builder.build(shop.spec)


def test_a_cache_of_another_user_is_refused(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: shop.folder.stat().st_uid + 1)
    with pytest.raises(BackendUnavailable, match="belongs to another user"):
        builder.resolve(shop.spec)


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_cache_that_cannot_be_written(shop: Workshop, where: str) -> None:
    obstacle = shop.cache if where == "cache" else builder.resolve(shop.spec).folder
    obstacle.touch()  # unlike permissions, a file in the folder's place stops root, too
    with pytest.raises(BackendUnavailable) as caught:
        builder.build(shop.spec)
    assert str(obstacle) in caught.value.reason
    assert "FUSED_ELBO_CACHE_DIR" in caught.value.remedy


def test_a_lock_that_is_never_released(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_LOCK_TIMEOUT", 0.1)
    folder = builder.resolve(shop.spec).folder
    folder.mkdir()
    with builder.FileLock(folder / "lock"), pytest.raises(BackendUnavailable, match="another process has held"):
        builder.build(shop.spec)


@needs_compiler
def test_a_library_that_is_there_needs_no_lock(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_LOCK_TIMEOUT", 5.0)
    target = builder.build(shop.spec)
    with builder.FileLock(target.folder / "lock"):
        assert builder.build(shop.spec) == target


# ------------------------------------------------------------------------------------------------------- failures


def test_no_compiler(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(shop.root))
    monkeypatch.delenv("CXX")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler was found \(tried g\+\+, clang\+\+, c\+\+\)") as e:
        builder.build(shop.spec)
    assert "Install g++" in e.value.remedy
    monkeypatch.setenv("CXX", "no-such-g++")
    with pytest.raises(BackendUnavailable, match="no-such-g"):
        builder.build(shop.spec)


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
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, fresh_cpp: None
) -> None:
    shop.write("one.cpp", "#error this is why\n" + "\n".join(f"nonsense_{i} here;" for i in range(200)))
    monkeypatch.setattr(builder, "cpu_spec", lambda: shop.spec)
    with pytest.raises(builder.BuildFailed, match="this is why") as caught:
        cpp.load()
    error = caught.value
    assert error.log is not None
    whole = error.log.read_text()
    assert "nonsense_0" in whole
    assert "nonsense_199" in whole  # all of it is in the log …
    assert error.output == whole
    assert len(error.reason) < 400  # … the first lines are in the message, the reason says where
    assert str(error.log) in error.reason
    assert len(str(error)) < 5000
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
def test_a_library_that_does_not_load(shop: Workshop, monkeypatch: pytest.MonkeyPatch, fresh_cpp: None) -> None:
    shop.write("one.cpp", 'extern "C" int absent(); extern "C" int one() { return absent(); }\n')
    monkeypatch.setattr(builder, "cpu_spec", lambda: shop.spec)
    with pytest.raises(BackendUnavailable, match=r"tiny\.so does not load: .*absent"):
        cpp.load()


def test_a_remembered_failure_does_not_keep_the_caller_s_tensors(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, fresh_cpp: None
) -> None:
    monkeypatch.setenv("CXX", "no-such-g++")

    def call() -> weakref.ref[torch.Tensor]:
        tensor = torch.ones(3)
        with pytest.raises(BackendUnavailable):
            cpp.load()
        return weakref.ref(tensor)

    assert call()() is None  # the first failure
    assert call()() is None  # and a remembered one


# ------------------------------------------------------------------------------------------------- for the user

USE = """
    import warnings, torch
    warnings.simplefilter("always")
    from fused_elbo import decoupled_elbo
    torch.manual_seed(0)
    recon, x = torch.rand(4, 3, 5, requires_grad=True), torch.rand(4, 3, 5)
    mu, logvar = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    for _ in range(3):
        decoupled_elbo(recon, x, mu, logvar, beta=4.0).loss.backward()
    mse = torch.nn.functional.mse_loss(recon, x)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / 4
    expected = torch.autograd.grad(15 / 2 * mse.log() + 4 * kl, (recon, mu, logvar))
    for leaf, gradient in zip((recon, mu, logvar), expected):
        torch.testing.assert_close(leaf.grad, 3 * gradient)
    print("right")
"""


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
