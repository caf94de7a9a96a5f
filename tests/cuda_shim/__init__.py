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
from pathlib import Path

import torch

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
    """The library, compiled from a folder like csrc; 10 s on two cores. Objects are kept beside `folder`, so that one
    which differs in a line compiles only what that line is part of."""
    sources = [*sorted(csrc.glob("cuda/*.cu")), *sorted(csrc.glob("cuda/*.cpp")), *sorted(HERE.glob("*.cpp"))]
    # -x c++, for the compiler takes a .cu for something to be linked
    words = shlex.split(compiler() or "")
    command = [*words, *_FLAGS, *flags, f"-I{HERE}", "-isystem", str(_TORCH / "include")]
    command += ["-x", "c++"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = run_all([[*command, "-E", "-P", str(source)] for source in sources])
    keys = [hashlib.sha256(repr((flags, text)).encode()).hexdigest()[:16] for text in texts]
    objects = [folder.parent / f"{source.name}-{key}.o" for source, key in zip(sources, keys, strict=True)]
    todo = [(s, o) for s, o in zip(sources, objects, strict=True) if not o.exists()]
    run_all([[*command, "-c", str(source), "-o", str(o)] for source, o in todo])
    library = folder / "fused_elbo_cuda_shim.so"
    link = [*words, *flags, "-shared", *map(str, objects), f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
    run_all([[*link, "-o", str(library)]])
    return library


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

    def schedule(self, name: str, seed: int = 0) -> None:
        """In which order blocks and threads run: one of SCHEDULES."""
        self._functions.shim_schedule(SCHEDULES.index(name), seed)

    def multiprocessors(self, count: int) -> None:
        """Of the device, which the launchers size their grids by."""
        self._functions.shim_multiprocessors(count)

    def launches(self) -> int:
        """How many there were so far."""
        return self._functions.shim_launches()
