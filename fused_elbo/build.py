"""Turns a build spec, which is data, into a shared library in a private cache: at first use, never at import.

    library = build(cpu_spec()).library

Layout of the cache, one folder for each key (see `_key`: PyTorch, compiler, flags, machine and every source file):

    <cache>/fused_elbo_cpu-torch2.13.0-avx512-0123456789abcdef/
        fused_elbo_cpu.so     appears by one atomic rename, so that what has this name is whole
        scratch-*/            a build at work, or what a killed one left; the next builder removes it
        lock                  held by the one process that builds
        build.log             what the compiler said, after a failed build
    <cache>/compiler-*.txt    what `$CXX --version` answered, so that a warm start spawns no process

Environment variables, all read in `Settings.read`, when a library is asked for:

    FUSED_ELBO_CACHE_DIR   the cache; else $XDG_CACHE_HOME/fused_elbo, else fused_elbo in ~/.cache or ~/Library/Caches
    CXX                    the compiler, with arguments if need be ("ccache g++"); else g++, clang++, c++ on the PATH
    MAX_JOBS               how many compilers run at once

PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) chooses the instruction set. GCC and Clang only; the flags for
macOS are untested.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from fused_elbo import csrc
from fused_elbo.backends.base import BackendUnavailable

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"baseline": (), "AVX2": _AVX2, "AVX512": _AVX2 + _AVX512}

# torch.utils.cpp_extension would know the include folders too, but imports setuptools (0.1 s) to say so.
_TORCH = Path(torch.__file__).resolve().parent
_SOURCE_SUFFIXES = {".h", ".hpp", ".cuh", ".inc", ".c", ".cc", ".cpp", ".cu"}
_LOCK_TIMEOUT = 600.0  # seconds; only a builder that is alive, but stuck or stopped, can hold the lock for so long
_SHOWN = 4000  # characters of a compiler's output that a warning carries; the log has them all


@dataclass(frozen=True)
class BuildSpec:
    """What a library is made of, and with which flags: nothing of the machine that builds it, but its `root`."""

    name: str
    sources: tuple[str, ...]  # relative to root
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    instruction_set: str = "baseline"
    root: Path = csrc.ROOT


@dataclass(frozen=True)
class Settings:
    """The environment variables that a build obeys."""

    cache_dir: Path
    cxx: str  # "" where unset, as is
    max_jobs: str

    @classmethod
    def read(cls) -> Settings:
        environ = os.environ
        explicit, xdg = environ.get("FUSED_ELBO_CACHE_DIR"), environ.get("XDG_CACHE_HOME", "")
        try:
            if explicit:
                cache_dir = Path(explicit).expanduser()
            elif Path(xdg).is_absolute():  # the XDG specification: "all paths must be absolute", others are ignored
                cache_dir = Path(xdg) / "fused_elbo"
            else:
                cache_dir = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fused_elbo"
        except RuntimeError as error:  # a user without an entry in the password database, as in some containers
            raise BackendUnavailable(
                f"the cache directory is unknown: {error}", "Set FUSED_ELBO_CACHE_DIR to a directory of your own."
            ) from error
        return cls(cache_dir.absolute(), environ.get("CXX", "").strip(), environ.get("MAX_JOBS", "").strip())


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str  # the whole output of --version

    def __str__(self) -> str:
        return self.version.partition("\n")[0]


@dataclass(frozen=True)
class Target:
    """A spec on this machine: which compiler makes its library, and where that lies, or will."""

    spec: BuildSpec
    compiler: Compiler
    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / f"{self.spec.name}.so"


class BuildFailed(BackendUnavailable):
    """The compiler refused. `log` is the file with all that it said; str() shows up to a few thousand characters."""

    def __init__(self, reason: str, remedy: str = "", output: str = "", log: Path | None = None) -> None:
        super().__init__(reason, remedy)
        self.output = output
        self.log = log

    def __str__(self) -> str:
        output = self.output.strip()
        if len(output) > _SHOWN:  # the first errors say most, the last lines what the linker missed
            output = f"{output[: _SHOWN - 1000]}\n[… the rest is in the log …]\n{output[-1000:]}"
        return f"{super().__str__()}\n{output}"


def instruction_set() -> str:
    """The widest one that PyTorch itself uses on this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in INSTRUCTION_SETS else "baseline"


def cpu_spec(level: str | None = None) -> BuildSpec:
    """The CPU library, for the named instruction set (a key of INSTRUCTION_SETS) or the one of this machine."""
    level = level or instruction_set()
    return BuildSpec(
        name="fused_elbo_cpu",
        sources=(
            "cpu/bindings.cpp",
            "cpu/elbo_stats.cpp",
            "cpu/elbo_finalize.cpp",
            "cpu/elbo_grads.cpp",
            "cpu/elbo_step.cpp",
        ),
        cflags=(
            "-O3",
            "-std=c++17",  # all that the stable headers need, and what the oldest compilers offer
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",  # a fused multiply-add rounds once: instruction sets would differ in the last bit
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *INSTRUCTION_SETS[level],
        ),
        # libtorch_cpu brings its own OpenMP runtime; a second one in the process would fight it for the cores.
        ldflags=("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-ltorch_cpu",),
        instruction_set=level,
    )


def build(spec: BuildSpec) -> Target:
    """The spec's library, compiled unless the cache has it. Any number of processes may ask at once: one compiles."""
    target = resolve(spec)
    if target.library.exists():  # needs no lock: the name appears when the file is whole
        return target
    try:
        target.folder.mkdir(mode=0o700, exist_ok=True)
        with FileLock(target.folder / "lock", timeout=_LOCK_TIMEOUT):
            if not target.library.exists():  # whoever held the lock before has built it
                _compile(target)
    except Timeout as error:
        raise BackendUnavailable(
            f"another process has held {target.folder / 'lock'} for {_LOCK_TIMEOUT:.0f} seconds.",
            "End the process that builds, or set FUSED_ELBO_CACHE_DIR to another directory.",
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter from filelock, where files cannot be locked
        raise BackendUnavailable(
            f"building in the cache failed: {error}.", "Set FUSED_ELBO_CACHE_DIR to a directory that you can write to."
        ) from error
    return target


def resolve(spec: BuildSpec) -> Target:
    """Where the spec's library lies or will lie, without compiling: a few milliseconds, and no process when warm."""
    if os.name == "nt":
        raise BackendUnavailable("the C++ backend needs GCC or Clang.", "Use WSL; on Windows the reference serves.")
    settings = Settings.read()
    _make_private(settings.cache_dir)
    compiler = _find_compiler(settings)
    label = f"{spec.name}-torch{torch.__version__}-{spec.instruction_set.lower()}-{_key(spec, compiler)}"
    return Target(spec, compiler, settings.cache_dir / label)


def _make_private(cache_dir: Path) -> None:
    """Whoever can write to the cache can plant a library that we would load and run."""
    remedy = "Set FUSED_ELBO_CACHE_DIR to a directory of your own."
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cache_dir.stat()
    except OSError as error:
        raise BackendUnavailable(f"the cache directory cannot be made: {error}.", remedy) from error
    if found.st_uid != os.geteuid():
        raise BackendUnavailable(f"the cache directory {cache_dir} belongs to another user.", remedy)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BackendUnavailable(
            f"the cache directory {cache_dir} is writable by others, who could plant a library in it.",
            f"Run chmod go-w {shlex.quote(str(cache_dir))}, or set FUSED_ELBO_CACHE_DIR to a directory of your own.",
        )


def _find_compiler(settings: Settings) -> Compiler:
    for program, *arguments in [settings.cxx.split()] if settings.cxx else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(program):
            command = (os.path.abspath(path), *arguments)
            return Compiler(command, _compiler_version(command, settings.cache_dir))
    names = f"CXX is {settings.cxx}" if settings.cxx else "tried g++, clang++, c++"
    raise BackendUnavailable(
        f"no C++ compiler was found ({names}).",
        "Install g++ (Debian, Ubuntu: apt install g++; conda: conda install gxx), or name one in CXX.",
    )


def _compiler_version(command: tuple[str, ...], cache_dir: Path) -> str:
    """What --version says; asked once, and again when one of the command's files ("ccache", "g++") has changed."""
    stats = [os.stat(path) for word in command if (path := shutil.which(word))]
    identity = [command, [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]]
    remembered = cache_dir / f"compiler-{_hash(identity)}.txt"
    with suppress(OSError):
        return remembered.read_text(errors="replace")
    try:
        environ = {**os.environ, "LC_ALL": "C"}  # another language is not another compiler
        version = subprocess.check_output([*command, "--version"], env=environ, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendUnavailable(
            f"the C++ compiler does not run: {error}.", "Mend it, or name another one in CXX."
        ) from error
    with suppress(OSError):  # a cache that is read-only may still hold the library
        part = remembered.with_suffix(f".{os.getpid()}")
        part.write_bytes(version)
        os.replace(part, remembered)
    return version.decode(errors="replace")


def _key(spec: BuildSpec, compiler: Compiler) -> str:
    """A hash over everything that the library's bytes depend on."""
    files = sorted(path for path in spec.root.rglob("*") if path.suffix in _SOURCE_SUFFIXES)
    contents = [(str(path.relative_to(spec.root)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    versions = [torch.__version__, torch.version.git_version, compiler.version]
    # A home may be shared by unlike machines. The ninja file names the compiler, every flag and every folder.
    return _hash([versions, sys.platform, platform.machine(), ninja_file(spec, compiler), contents])


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _compile(target: Target) -> None:
    """Compiles in a scratch folder and renames the finished library into place. The caller holds the lock."""
    for stale in target.folder.glob("scratch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    # A new name each time: a killed builder's compilers may live on, and on NFS their open files defy removal.
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=target.folder))
    try:
        (scratch / "build.ninja").write_text(ninja_file(target.spec, target.compiler))
        max_jobs = Settings.read().max_jobs
        command = [_find_ninja(), *(["-j", max_jobs] if max_jobs else [])]
        run = subprocess.run(
            command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, log = run.stdout.decode(errors="replace"), target.folder / "build.log"
        if run.returncode:
            log.write_text(output)
            raise BuildFailed(
                f"compiling {target.spec.name} failed; all that the compiler said is in {log}.",
                "Mend what it complains of, or name another compiler in CXX.",
                output,
                log,
            )
        with open(scratch / target.library.name, "rb") as finished:
            os.fsync(finished.fileno())  # else a power cut may leave the new name with nothing behind it
        os.replace(scratch / target.library.name, target.library)
        log.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ninja_file(spec: BuildSpec, compiler: Compiler) -> str:
    """The build as ninja reads it: one object for each source, one library."""
    includes = (f"-I{spec.root}", "-isystem", f"{_TORCH / 'include'}")
    compile_ = _command(*compiler.command, *spec.cflags, *includes)
    link = _command(*compiler.command, "-shared", f"-L{_TORCH / 'lib'}")
    lines = [
        f"rule compile\n  command = {compile_} -c $in -o $out\n  description = compile $in",
        f"rule link\n  command = {link} $in {_command(*spec.ldflags)} -o $out\n  description = link $out",
    ]
    for source in spec.sources:
        lines.append(f"build {_path(source)}.o: compile {_path(str(spec.root / source))}")
    objects = " ".join(f"{_path(source)}.o" for source in spec.sources)
    return "\n".join([*lines, f"build {_path(spec.name)}.so: link {objects}", ""])


def _command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")  # quoted for the shell, then for ninja


def _path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _find_ninja() -> str:
    with suppress(ImportError):
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    if path := shutil.which("ninja"):
        return path
    raise BackendUnavailable("ninja was not found.", "Install it: pip install ninja")
