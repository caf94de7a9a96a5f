"""The backends: which there are, which serves a device, and the one explicit choice, `with fused_elbo.backend(…)`.

Left alone, PyTorch's dispatcher chooses by device: GPU tensors go to the Triton kernels, or where Triton cannot serve
to the CUDA ones, CPU tensors to the C++ ones; CUDA and C++ are built at the first call, unless a wheel brought them
along. Where no kernel serves a device, the reference does.
"""

from __future__ import annotations

import warnings
from types import TracebackType

import torch

from ..errors import BackendUnavailable, unavailable
from . import cpp, cuda, triton
from .base import Status
from .base import dispatched as dispatched

NAMES = ("triton", "cuda", "cpp", "reference")  # in the order of choice

# Read once, in forward. A plain global, since Dynamo guards on it, but cannot trace a ContextVar and silently ignores a
# thread-local.
forced: str | None = None


class backend:
    """Force one backend: `with fused_elbo.backend("reference"): …`

    name: "triton" (GPU tensors; CPU tensors too where Triton's interpreter or a driver for the CPU is active), "cuda"
        (the CUDA C++ kernels, for tensors on NVIDIA GPUs), "cpp" (the C++ kernels, for CPU tensors) or "reference"
        (plain PyTorch, any device).

    The choice is made in forward and holds for its backward. It is one setting of the whole process, every thread
    included, and works inside and outside torch.compile.

    Raises ValueError for an unknown name, and `fused_elbo.BackendUnavailable` (at once, not at the first call) if the
    backend cannot serve here.

    >>> with fused_elbo.backend("reference"):
    ...     nats = fused_elbo.gaussian_kl(torch.zeros(2, 8), torch.zeros(2, 8))
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend: unknown name {name!r}; the backends are {', '.join(map(repr, NAMES))}")
        self.name = name
        self.before: list[str | None] = []  # one instance may be entered again while it is entered

    def __enter__(self) -> None:
        global forced
        if not torch.compiler.is_compiling():
            if self.name == "cpp":
                cpp.load()
            elif self.name == "cuda":
                cuda.require()
            elif self.name == "triton":
                triton.require()
        self.before.append(forced)
        forced = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global forced
        forced = self.before.pop()


_warned: set[str] = set()


def load_for(device: str) -> bool:
    """Get the kernels for a type of device registered; False if there are none, told to the user once."""
    if device == "meta":  # shapes only
        return False
    try:
        if device == "cuda":
            _load_for_gpu()
        elif device == "cpu":
            cpp.load()
        else:
            raise BackendUnavailable(f"there are none for {device} tensors.")
    except Exception as error:  # of any kind: the loss goes on without them
        if device not in _warned:
            _warned.add(device)
            warnings.warn(
                "fused_elbo runs in plain PyTorch, slower, because its compiled kernels cannot be used "
                f"(`python -m fused_elbo` tells more): {unavailable(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True


def _load_for_gpu() -> None:
    """Triton's kernels, or the CUDA ones; the error says why neither."""
    try:
        triton.load()
    except BackendUnavailable as no_triton:
        try:
            cuda.load()
        except BackendUnavailable as no_cuda:
            raise BackendUnavailable(f"{no_triton} And {no_cuda}") from no_cuda


def statuses() -> list[Status]:
    """Every backend with its state, for the doctor. Builds what can be built."""
    reference = Status("reference", True, "plain PyTorch, any device")
    return [triton.status(), cuda.status(build=True), cpp.status(build=True), reference]
