"""The CUDA C++ kernels, for NVIDIA GPUs that Triton does not serve: packaged, or built by nvcc when first needed.

The library defines operators of its own, fused_elbo_cuda::stats and so on, with the schemas of ops.py; so it can stand
behind fused_elbo's operators, or beside them where Triton's kernels do.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fused_elbo import build as builder
from fused_elbo.backends.base import BackendUnavailable
from fused_elbo.backends.library import Library

# Whose tensors the operators take. The tests have a library for CPU tensors: they say so here and in `library.loaded`.
device = "cuda"


def _check() -> None:
    """In the order in which a user would mend it."""
    if torch.version.hip is not None:
        raise BackendUnavailable("the CUDA kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's.")
    if torch.version.cuda is None:
        raise BackendUnavailable(
            f"this PyTorch, {torch.__version__}, is built without CUDA.",
            "Install a CUDA build: https://pytorch.org/get-started/locally",
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable("no GPU is visible to PyTorch.")


def _fits(label: str) -> bool:
    """Whether a library built for "sm_80+sm_90+compute_90" has code for the GPU here: sm_80 is for 8.x from 8.0 on,
    and the driver compiles compute_90 for 9.0 and all that is newer."""
    major, minor = torch.cuda.get_device_capability()
    for kind, _, number in (word.partition("_") for word in label.split("+")):
        if not number.isdigit():  # sm_90a is for 9.0 alone
            if number[:-1] == f"{major}{minor}" and kind == "sm":
                return True
        elif (kind == "compute" or int(number) // 10 == major) and int(number) <= 10 * major + minor:
            return True
    return False


library = Library("cuda", "fused_elbo_cuda", lambda: builder.cuda_spec(), check=_check, fits=_fits)
status = library.status

_operators: SimpleNamespace | None = None


def require() -> None:
    """Get the operators loaded, and known to torch.compile and vmap."""
    global _operators
    from fused_elbo import ops

    library.load()
    if _operators is None:
        ops.describe("fused_elbo_cuda")
        namespace = torch.ops.fused_elbo_cuda
        _operators = SimpleNamespace(**{name: getattr(namespace, name).default for name in ops.SCHEMAS})


def operators() -> SimpleNamespace:
    """stats, forward and so on; `require` comes first. Traced by torch.compile."""
    assert _operators is not None
    return _operators


def load() -> None:
    """Put the operators behind fused_elbo's own for CUDA tensors, for the life of the process."""
    from fused_elbo import backends, ops

    if backends.dispatched["cuda"] != "cuda":
        require()
        ops.register(operators(), "CUDA")
        backends.dispatched["cuda"] = "cuda"
