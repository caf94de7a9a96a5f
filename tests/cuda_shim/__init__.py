"""csrc/cuda as CPU code: compiled by the C++ compiler against cuda_runtime.h of this folder, see there.

The library registers fused_elbo_cuda::stats and so on for CPU tensors. One process can load one of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
SCHEDULES = ("ascending", "descending", "random")

_TORCH = Path(torch.__file__).parent
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # as nvcc's -fmad=false
    "-fno-strict-aliasing",  # 128-bit accesses, which CUDA allows
    "-U_FORTIFY_SOURCE",  # it takes longjmp from fiber to fiber for an error
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-maybe-uninitialized",  # what a branch leaves unset its twin does not read; the optimiser cannot tell
    "-DUSE_CUDA",
    "-DELBO_DISPATCH_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(folder: Path, csrc: Path = CSRC, flags: tuple[str, ...] = ()) -> Path:
    """The library of a folder like csrc: the one in `folder`, if that has it, else compiled, in 10 s on two cores."""
    made_from = (compiler(), _FLAGS, flags, torch.__version__, code(csrc), code(HERE))
    library = folder / f"shim-{digest(*made_from)}.so"

    def compile_(scratch: Path) -> None:
        sources = [*sorted(csrc.glob("cuda/*.cu")), *sorted(csrc.glob("cuda/*.cpp")), *sorted(HERE.glob("*.cpp"))]
        objects = [scratch.with_name(f"{source.name}.o") for source in sources]
        words = shlex.split(compiler() or "")
        command = [*words, *_FLAGS, *flags, f"-I{HERE}", "-isystem", str(_TORCH / "include")]
        # -x c++, for the compiler takes a .cu for something to be linked
        run_all([[*command, "-x", "c++", "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)])
        link = [*words, *flags, "-shared", *map(str, objects), f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
        run_all([[*link, "-o", str(scratch)]])

    return made_once(library, compile_)


def code(folder: Path) -> list[tuple[str, bytes]]:
    """Its C++ and CUDA files, with what is in them."""
    paths = [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """The file, unless it is there made by `make(scratch)`, in a folder of its own. Several processes may ask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                make(Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
    return path


def run_all(commands: list[list[str]]) -> list[str]:
    """What they print, run at the same time. Raises RuntimeError with what those say that fail."""
    jobs = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    said = [job.communicate()[0] for job in jobs]
    if failed := [text for job, text in zip(jobs, said, strict=True) if job.returncode]:
        raise RuntimeError("the CUDA sources do not compile as C++:\n" + "\n".join(failed))
    return said


class Shim:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self._functions = ctypes.CDLL(str(library))

    def schedule(self, schedule: str) -> None:
        """In which order blocks and threads run from now on: one of SCHEDULES, or random:SEED."""
        name, _, seed = schedule.partition(":")
        self._functions.shim_schedule(SCHEDULES.index(name), int(seed or 0))

    def idle(self, on: bool = True) -> None:
        """Whether launches do nothing from now on: what is left is the host's side of a step."""
        self._functions.shim_idle(on)

    def mutant(self, number: int) -> None:
        """Which of the faults runs that mutants.with_switches has put into the code; 0: none."""
        self._functions.shim_mutant(number)

    def multiprocessors(self, count: int) -> None:
        """Sets how many the device has, which the launchers size their grids by."""
        self._functions.shim_multiprocessors(count)

    @contextmanager
    def watching(self, t: torch.Tensor) -> Iterator[list[int]]:
        """A list of where, in bytes from its beginning, the first thread of the launches until its end accesses a
        tensor by 64 or 128 bits, one after the other."""
        places, bytes_ = [], t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()
        self._functions.shim_watch(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(bytes_))
        try:
            yield places
        finally:
            room = (ctypes.c_int64 * bytes_)()
            places += room[: self._functions.shim_seen(room, ctypes.c_int64(bytes_))]
            self._functions.shim_watch(None, ctypes.c_int64(0))

    def launches(self) -> int:
        """How many there were so far."""
        return self._functions.shim_launches()
