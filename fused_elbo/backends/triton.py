"""The Triton backend: GPU kernels, compiled by Triton at their first launch and registered at the first GPU tensor."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

import torch

from ..errors import BackendUnavailable, once, sentence, unavailable
from ..operators import aggregate, elbo, levels
from .base import Status

MINIMUM_CAPABILITY = (8, 0)  # of an NVIDIA GPU: what the kernels are compiled and tested for


@once
def operators() -> elbo.Implementation:
    """The operators on Triton kernels; importing them imports Triton, which costs a second."""
    return cast(elbo.Implementation, _imported("operators"))


def levels_operators() -> levels.Implementation:
    return cast(levels.Implementation, _imported("levels"))


def aggregate_operators() -> aggregate.Implementation:
    return cast(aggregate.Implementation, _imported("aggregate"))


def _imported(module: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed.", "Install it: pip install triton (Linux).")
    try:
        return importlib.import_module(f"fused_elbo.kernels.{module}")
    except Exception as error:  # one for another Python, say, or another package of that name
        raise BackendUnavailable(f"Triton cannot be imported: {sentence(error)}", "Install it anew.") from error


@once
def load() -> None:
    """Register the kernels for GPU tensors, for the life of the process."""
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < MINIMUM_CAPABILITY:
            raise BackendUnavailable(
                f"the Triton kernels need an NVIDIA GPU of compute capability 8.0, not {capability}."
            )
    kernels = operators()
    if torch.cuda.is_available():
        _start()
    elbo.register(kernels, "CUDA")  # the key of HIP builds too
    levels.register(levels_operators(), "CUDA")
    aggregate.register(aggregate_operators(), "CUDA")


def _start() -> None:
    """Triton's driver, which it compiles at the first look at the GPU: if it cannot, others still can serve."""
    try:
        _target()
    except Exception as error:  # whatever looking for a compiler, running it and loading what it made may raise
        raise BackendUnavailable(
            f"Triton's driver cannot start: {sentence(error)}",
            "Triton compiles it at first use: install a C compiler, or name one in CC.",
        ) from error


def runs_on_cpu() -> str | None:
    """How Triton kernels can run on CPU tensors here: by its interpreter, or by a driver whose device is the CPU."""
    try:
        import triton

        if triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
            return "its interpreter"
        device: Any = triton.runtime.driver.active.get_active_torch_device()
    except Exception:  # there is no Triton, or another package of that name, or no driver is active: there is no GPU
        return None
    return "a driver for the CPU" if device.type == "cpu" else None


def require(device: str | None = None) -> None:
    """Raise BackendUnavailable unless Triton can serve tensors of a type of device (None: of any)."""
    operators()
    has_gpu = torch.cuda.is_available()
    if device in (None, "cuda") and has_gpu:
        load()
    elif device == "cuda" or runs_on_cpu() is None:
        what = "but these are CPU tensors" if has_gpu else "but no GPU is"
        raise BackendUnavailable(
            f"Triton {_version()} is here, {what}.",
            "On CPU tensors its kernels run in its interpreter only: set TRITON_INTERPRET=1 before Python starts.",
        )


def status() -> Status:
    try:
        require()
        return Status("triton", True, f"Triton {_version()}, {_where()}")
    except Exception as error:
        found = unavailable(error)
        return Status("triton", False, found.reason, found.remedy)


def _where() -> str:
    if torch.cuda.is_available():
        return f"for {_target()}, {torch.cuda.get_device_name()}"
    if (how := runs_on_cpu()) == "its interpreter":
        return f"CPU tensors by {how}, when asked for"
    return f"for {_target()}, CPU tensors by {how}, when asked for"


def _version() -> str:
    """By the module: the distribution has other names too, as in PyTorch's builds for AMD."""
    import triton

    return triton.__version__


def _target() -> str:
    """What kernels are compiled for: sm_90, gfx942."""
    import triton

    target: Any = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
