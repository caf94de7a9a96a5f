"""The cache: which folder a spec's library has, the lock around it, and the one place that runs a compiler."""

from __future__ import annotations

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

from ..errors import BackendUnavailable, sentence
from .spec import BuildSpec
from .tools import Compiler, Settings, digest, digests, find_compiler, find_ninja, sha256

# torch.utils.cpp_extension would know the include folders too, but imports setuptools (0.1 s) to say so.
_TORCH = Path(torch.__file__).resolve().parent
_HEADERS = {"C++": {".h", ".hpp", ".inc"}, "CUDA": {".h", ".hpp", ".inc", ".cuh"}}
_SILENCE = 2.0  # seconds that a build takes without a word
_TIME = "seconds, or up to a minute on a slow machine"
_LOCK_TIMEOUT = 600.0  # seconds; only a builder that is alive, but stuck or stopped, can hold the lock for so long


@dataclass(frozen=True)
class Target:
    """A spec on this machine: which compiler makes its library, and where that lies, or will."""

    spec: BuildSpec
    compiler: Compiler | None  # None: there is none any more, but the library from before
    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / f"{self.spec.name}.so"

    @property
    def digest(self) -> Path:
        return self.library.with_suffix(".sha256")

    def is_built(self) -> bool:
        """Whether the library is there, and whole."""
        with suppress(OSError):
            return self.digest.read_bytes() == sha256(self.library).encode()
        return False


class BuildFailed(BackendUnavailable):
    """The compiler refused. str() shows all that it said; `log` is the file that has it too."""

    def __init__(self, reason: str, remedy: str = "", output: str = "", log: Path | None = None) -> None:
        super().__init__(reason, remedy)
        self.output = output
        self.log = log

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.output.strip()}"


def build(spec: BuildSpec) -> Target:
    """The spec's library, compiled unless the cache has it. Any number of processes may ask at once: one compiles."""
    target = resolve(spec)
    if target.is_built():  # needs no lock: the name appears when the file is whole
        return target
    assert target.compiler is not None
    try:
        target.folder.mkdir(mode=0o755, exist_ok=True)
        with FileLock(target.folder / "lock", timeout=_LOCK_TIMEOUT):
            if not target.is_built():  # whoever held the lock before has built it
                _compile(target, target.compiler)
    except Timeout as error:
        raise _locked(target.folder / "lock") from error
    except (OSError, NotImplementedError) as error:  # the latter from filelock, where files cannot be locked
        raise BackendUnavailable(
            f"building in the cache failed: {sentence(error)}",
            "Set FUSED_ELBO_CACHE_DIR to a directory that you can write to.",
        ) from error
    return target


def resolve(spec: BuildSpec) -> Target:
    """Where the spec's library lies or will lie, without compiling: a few milliseconds, and no process when warm.

    A compiler's version is part of the key, since a better compiler may make a better library. Where there is no
    compiler, or none that runs, or the cache is root's, the library of another one is as good as ever: the latest is
    taken.
    """
    if os.name == "nt":
        raise BackendUnavailable(
            f"the {spec.language} backend needs GCC or Clang.", "Use WSL; on Windows the other backends serve."
        )
    settings = Settings.read()
    _make_private(settings.cache_dir)
    prefix = f"{spec.name}-torch{torch.__version__}-{spec.label}-{_key(spec)}"
    try:
        compiler = find_compiler(spec.language, settings)
    except BackendUnavailable:
        if latest := _latest(spec, settings.cache_dir, prefix):
            return latest
        raise
    key = digest([compiler.command, compiler.version])
    target = Target(spec, compiler, settings.cache_dir / f"{prefix}-{key}")
    if target.is_built() or os.access(settings.cache_dir, os.W_OK):
        return target
    return _latest(spec, settings.cache_dir, prefix) or target


def _latest(spec: BuildSpec, cache_dir: Path, prefix: str) -> Target | None:
    """Of the libraries of any compiler."""
    found = [Target(spec, None, folder) for folder in cache_dir.glob(f"{prefix}-*")]
    built = [target for target in found if target.is_built()]
    return max(built, key=lambda target: target.library.stat().st_mtime, default=None)


def _locked(lock: Path) -> BackendUnavailable:
    """Why there is nothing to be had from a lock. One of the kernel's ends with its process; where the file system has
    none, the file is the lock, says whose it is, and outlives a process that was killed, or its machine."""
    reason = f"another process has held {lock} for {_LOCK_TIMEOUT:.0f} seconds"
    try:
        process, host, *_ = lock.read_text(encoding="utf-8", errors="replace").split("\n")
    except (OSError, ValueError):
        process = host = ""
    another = "or set FUSED_ELBO_CACHE_DIR to another directory."
    if not (process and host):
        return BackendUnavailable(f"{reason}.", f"End the process that builds, {another}")
    mend = f"End that process; where it is gone, delete {lock}; {another}"
    return BackendUnavailable(f"{reason}: process {process} on {host}.", mend)


def _make_private(cache_dir: Path) -> None:
    """Whoever can write to the cache can plant a library that we would load and run. To read it harms nobody, and what
    root has built, in an image, say, serves its users: who distrusts root cannot trust the interpreter either."""
    remedy = "Set FUSED_ELBO_CACHE_DIR to a directory of your own."
    try:
        cache_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = cache_dir.stat()
    except OSError as error:
        raise BackendUnavailable(f"the cache directory cannot be made: {sentence(error)}", remedy) from error
    if found.st_uid not in (os.geteuid(), 0):
        raise BackendUnavailable(f"the cache directory {cache_dir} belongs to another user.", remedy)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BackendUnavailable(
            f"the cache directory {cache_dir} is writable by others, who could plant a library in it.",
            f"Run chmod go-w {shlex.quote(str(cache_dir))}, or set FUSED_ELBO_CACHE_DIR to a directory of your own.",
        )


def _key(spec: BuildSpec) -> str:
    """A hash over everything that the library's bytes depend on, but the compiler."""
    files = {path for path in spec.root.rglob("*") if path.suffix in _HEADERS[spec.language]}
    files |= {spec.root / source for part in spec.parts for source in part.sources}
    versions = [torch.__version__, torch.version.git_version]
    try:
        contents = digests(files, spec.root)
    except OSError as error:
        raise BackendUnavailable(
            f"the sources cannot be read: {sentence(error)}", "Install fused_elbo anew, as files: not in a zip."
        ) from error
    # A home may be shared by unlike machines. The ninja file names every flag and every folder.
    return digest([versions, sys.platform, platform.machine(), ninja_file(spec, ()), contents])


def _compile(target: Target, compiler: Compiler) -> None:
    """Compiles in a scratch folder and renames the finished library into place. The caller holds the lock."""
    for stale in target.folder.glob("scratch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    # A new name each time: a killed builder's compilers may live on, and on NFS their open files defy removal.
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=target.folder))
    try:
        text = ninja_file(target.spec, compiler.command)
        (scratch / "build.ninja").write_text(text, encoding="utf-8", errors="surrogateescape")  # the bytes of the paths
        max_jobs = Settings.read().max_jobs
        if max_jobs and not (max_jobs.isascii() and max_jobs.isdigit() and 0 < int(max_jobs) < 1 << 31):
            raise BackendUnavailable(
                f"MAX_JOBS is {max_jobs!r}, which is no number of compilers.", "Set it to 1 or more, or unset it."
            )
        command = [find_ninja(), *(["-j", max_jobs] if max_jobs else [])]
        (status, output), log = _run(command, scratch, target), target.folder / "build.log"
        finished = scratch / target.library.name
        if status or not finished.exists():  # where SIGCHLD is ignored, all that runs seems to succeed
            log.write_text(output, encoding="utf-8")
            raise BuildFailed(
                f"compiling {target.spec.name} failed; what the compiler said is in {log} too.",
                f"Mend what it complains of, or name another compiler in {compiler.variable}.",
                output,
                log,
            )
        (scratch / target.digest.name).write_bytes(sha256(finished).encode())
        for name in (target.digest.name, target.library.name):  # the library last: its name says that all is there
            with open(scratch / name, "rb") as written:
                os.fsync(written.fileno())  # else a power cut may leave the new name with nothing behind it
            os.replace(scratch / name, target.folder / name)
        log.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str], scratch: Path, target: Target) -> tuple[int, str]:
    """Exit status and output of ninja. A build that takes long says so: it stands between a user and a first result."""
    with subprocess.Popen(
        command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as ninja:
        try:
            try:
                output, _ = ninja.communicate(timeout=_SILENCE)
            except subprocess.TimeoutExpired:
                said = f"fused_elbo: compiling the {target.spec.language} kernels, once, into {target.folder}: {_TIME}"
                with suppress(Exception):  # stderr may be closed, which is no reason to stop
                    print(said, file=sys.stderr, flush=True)
                output, _ = ninja.communicate()
        except BaseException:  # such as Ctrl-C; as subprocess.run does
            ninja.kill()
            raise
    return ninja.returncode, output.decode(errors="replace")


def ninja_file(spec: BuildSpec, compiler: tuple[str, ...]) -> str:
    """The build as ninja reads it: an object for each source of each part, one library."""
    includes = (f"-I{spec.root}", f"-I{_TORCH / 'include'}")  # -isystem would come after another torch in CPATH
    link = _command(*compiler, "-shared", f"-L{_TORCH / 'lib'}")
    lines = [f"rule link\n  command = {link} $in {_command(*spec.ldflags)} -o $out\n  description = link $out"]
    objects = []
    for part in spec.parts:
        compile_ = _command(*compiler, *spec.cflags, *part.cflags, *includes)
        lines.append(
            f"rule {part.name}\n  command = {compile_} -c $in -o $out\n  description = compile $in, {part.name}"
        )
        for source in part.sources:
            objects.append(f"{part.name}/{_path(source)}.o")
            lines.append(f"build {objects[-1]}: {part.name} {_path(str(spec.root / source))}")
    return "\n".join([*lines, f"build {_path(spec.name)}.so: link {' '.join(objects)}", ""])


def _command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")  # quoted for the shell, then for ninja


def _path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
