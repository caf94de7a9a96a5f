"""The C++ kernels for CPU tensors: packaged, or built when first needed."""

from __future__ import annotations

import ctypes
from pathlib import Path

from fused_elbo import build as builder
from fused_elbo.backends.library import Library


def _level(path: Path) -> str:
    """Which instruction set a packaged library chose: csrc/cpu/library.cpp."""
    chosen = ctypes.CDLL(str(path)).fused_elbo_cpu_level
    chosen.restype = ctypes.c_char_p
    return f"; {chosen().decode()}"


library = Library("cpp", "fused_elbo_cpu", lambda: builder.cpu_spec(), level=_level)
load = library.load
status = library.status
