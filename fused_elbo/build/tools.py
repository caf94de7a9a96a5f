"""What a build finds on the machine: the environment variables that it obeys, the compilers, ninja."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailable, sentence


@dataclass(frozen=True)
class Settings:
    """The environment variables that a build obeys."""

    cache_dir: Path
    cxx: str  # "" where unset, as are those below
    max_jobs: str
    cuda_homes: tuple[str, ...]
    cuda_arch_list: str

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
                f"the cache directory is unknown: {sentence(error)}",
                "Set FUSED_ELBO_CACHE_DIR to a directory of your own.",
            ) from error
        homes = (environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH"))
        return cls(
            cache_dir.absolute(),
            cxx=environ.get("CXX", "").strip(),
            max_jobs=environ.get("MAX_JOBS", "").strip(),
            cuda_homes=tuple(home for home in homes if home),
            cuda_arch_list=environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" \t;"),
        )


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str  # the whole output of --version
    variable: str = "CXX"  # which names another one

    def __str__(self) -> str:
        for line in self.version.splitlines():
            if line.startswith("Cuda compilation tools, "):  # nvcc's fourth
                return line.replace("Cuda compilation tools", "nvcc")
        return self.version.partition("\n")[0]


def find_compiler(language: str, settings: Settings) -> Compiler:
    """For "C++" or "CUDA". Raises BackendUnavailable where there is none, or it does not run."""
    command, variable = (_find_nvcc(settings), "CUDA_HOME") if language == "CUDA" else (_find_cxx(settings), "CXX")
    return Compiler(command, _version(language, command, settings.cache_dir), variable)


def _find_cxx(settings: Settings) -> tuple[str, ...]:
    for program, *arguments in [_words(settings.cxx)] if settings.cxx else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(program):
            return (os.path.abspath(path), *arguments)
    names = f"CXX is {settings.cxx}" if settings.cxx else "tried g++, clang++, c++"
    raise BackendUnavailable(
        f"no C++ compiler was found ({names}).",
        "Install g++ (Debian, Ubuntu: apt install g++; conda: conda install gxx), or name one in CXX.",
    )


def _words(cxx: str) -> list[str]:
    """As a shell would read them; a program's path alone needs no quotes, even with a space in it."""
    if shutil.which(cxx):
        return [cxx]
    try:
        return shlex.split(cxx)
    except ValueError as error:
        raise BackendUnavailable(f"CXX is {cxx}, which a shell cannot read: {sentence(error)}", "Mend it.") from error


_USUAL_CUDA = "/usr/local/cuda"


def _find_nvcc(settings: Settings) -> tuple[str, ...]:
    """nvcc, told which C++ compiler to use for the host's part."""
    places = [*(os.path.join(home, "bin") for home in settings.cuda_homes), None, os.path.join(_USUAL_CUDA, "bin")]
    for place in places:  # None: PATH
        if path := shutil.which("nvcc", path=place):
            programs = [found for word in _find_cxx(settings) if (found := shutil.which(word))]
            return (os.path.abspath(path), "-ccbin", programs[-1])  # of "ccache g++ -O1", g++
    raise BackendUnavailable(
        f"nvcc was not found (tried CUDA_HOME, CUDA_PATH, PATH, {_USUAL_CUDA}).",
        "Install the CUDA toolkit, or name its folder in CUDA_HOME.",
    )


def _version(language: str, command: tuple[str, ...], cache_dir: Path) -> str:
    """What --version says; asked once, and again when one of the command's files ("ccache", "g++") has changed."""
    stats = [os.stat(path) for word in command if (path := shutil.which(word))]
    identity = [command, [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]]
    remembered = cache_dir / f"compiler-{digest(identity)}.txt"
    with suppress(OSError):
        return remembered.read_text(encoding="utf-8", errors="replace")  # whatever the locale is: the key depends on it
    try:
        environ = {**os.environ, "LC_ALL": "C"}  # another language is not another compiler
        version = subprocess.check_output([*command, "--version"], env=environ, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        name = "CXX" if language == "C++" else "CUDA_HOME"
        raise BackendUnavailable(
            f"the {language} compiler does not run: {sentence(error)}", f"Mend it, or name another one in {name}."
        ) from error
    with suppress(OSError):  # a cache that is read-only may still hold the library
        part = remembered.with_suffix(f".{os.getpid()}")
        part.write_bytes(version)
        os.replace(part, remembered)
    return version.decode(errors="replace")


def find_ninja() -> str:
    with suppress(Exception):  # there are other packages of this name, and what they do when imported is their own
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    if path := shutil.which("ninja"):
        return path
    raise BackendUnavailable("ninja was not found.", "Install it: pip install ninja")


def digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def digests(files: Iterable[Path], root: Path) -> list[tuple[str, str]]:
    """Name and content of each file."""
    return [(str(file.relative_to(root)), sha256(file)) for file in sorted(files)]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
