"""The C++ kernels for CPU tensors: packaged, or built when first needed. And the memory that they keep."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fused_elbo import build as builder
from fused_elbo.backends.library import Library
from fused_elbo.errors import BackendUnavailable

POOL_MIB = 256  # at most, by default: gradients of a few large batches


class _Cpp(Library):
    name, stem = "cpp", "fused_elbo_cpu"

    def spec(self) -> builder.BuildSpec:
        return builder.cpu_spec()

    def check(self) -> None:
        _pool_limit()

    def chosen(self, path: Path) -> str:
        """The instruction set: csrc/cpu/library.cpp."""
        isa = ctypes.CDLL(str(path)).fused_elbo_cpu_isa
        isa.restype = ctypes.c_char_p
        return f"packaged; {isa().decode()}"

    def probe(self) -> None:
        """They run; and this is when the pool's limit can be told to it."""
        self.call("pool_limit", _pool_limit() << 20)

    def call(self, name: str, *args: int) -> int:
        """A function of csrc/cpu/memory.h, in the library that is loaded."""
        function = getattr(ctypes.CDLL(str(self.path)), f"fused_elbo_cpu_{name}")
        function.restype = ctypes.c_longlong
        return function(*map(ctypes.c_longlong, args))


library = _Cpp()
load = library.load
status = library.status


def _pool_limit() -> int:
    """In MiB. Raises BackendUnavailable where the variable cannot be read."""
    given = os.environ.get("FUSED_ELBO_POOL_MIB", "").strip()
    if given and not (given.isascii() and given.isdigit() and len(given) < 10):
        raise BackendUnavailable(
            f"FUSED_ELBO_POOL_MIB: expected a whole number of MiB, got {given!r}.",
            f"Unset it for {POOL_MIB}; 0 keeps no memory.",
        )
    return int(given or POOL_MIB)


def empty_cache() -> None:
    """Give the memory that the C++ backend keeps for large gradients back to the system.

    On a CPU, fresh memory for a large gradient costs more time than computing it. So memory of gradients of 128 KiB and
    more that nobody uses any longer is kept for the next ones, up to 256 MiB in all, or what the environment variable
    FUSED_ELBO_POOL_MIB says when the backend is loaded; 0 keeps none, and leaves gradients to PyTorch's allocator.
    Gradients in use are not touched; nor is what PyTorch's allocators keep. May be called at any time, by any thread.

    >>> fused_elbo.empty_cache()
    """
    if library.loaded is not None:
        library.call("pool_empty")


def pooled_bytes() -> int:
    """How much memory `empty_cache` would give back now."""
    return library.call("pool_held") if library.loaded is not None else 0
