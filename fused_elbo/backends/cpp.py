"""The C++ kernels for CPU tensors: packaged, or built when first needed."""

from __future__ import annotations

import ctypes
from pathlib import Path

from fused_elbo import build as builder
from fused_elbo.backends.library import Library


class _Cpp(Library):
    name, stem = "cpp", "fused_elbo_cpu"

    def spec(self) -> builder.BuildSpec:
        return builder.cpu_spec()

    def chosen(self, path: Path) -> str:
        """The instruction set: csrc/cpu/library.cpp."""
        level = ctypes.CDLL(str(path)).fused_elbo_cpu_level
        level.restype = ctypes.c_char_p
        return f"packaged; {level().decode()}"


library = _Cpp()
load = library.load
status = library.status
