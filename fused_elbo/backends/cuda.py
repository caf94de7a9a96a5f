"""The CUDA C++ kernels, for NVIDIA GPUs that Triton does not serve: packaged, or built by nvcc when first needed.

They stand behind operators of their own, fused_elbo_cuda::stats and so on, which have the schemas of fused_elbo's; so
they can stand behind fused_elbo's operators too, or beside them where Triton's kernels do.
"""

from __future__ import annotations

import threading

import torch

from fused_elbo import build as builder
from fused_elbo.backends.base import dispatched
from fused_elbo.backends.library import Library
from fused_elbo.call import Options, Tensors
from fused_elbo.errors import BackendUnavailable, sentence
from fused_elbo.operators import aggregate, elbo, levels, registry

# Whose tensors the operators take. The tests have a library for CPU tensors: they say so here and in `library.loaded`.
device = "cuda"
NAMESPACE = "fused_elbo_cuda"

OPERATORS = (*elbo.OPERATORS, *levels.OPERATORS, *aggregate.OPERATORS)
registry.define(OPERATORS, NAMESPACE)  # known from now on; the library has the kernels
_operators = elbo.Operators(NAMESPACE)
_of_levels, _of_aggregate = levels.Operators(NAMESPACE), aggregate.Operators(NAMESPACE)


class _Cuda(Library):
    name, stem = "cuda", "fused_elbo_cuda"

    def spec(self) -> builder.BuildSpec:
        return builder.cuda_spec()

    def check(self) -> None:
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

    def fits(self, label: str) -> bool:
        """Whether what was built for "sm_80+sm_90+compute_90" has code for every GPU here."""
        words = [word.partition("_") for word in label.split("+")]
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return all(any(_runs_on(kind, number, *gpu) for kind, _, number in words) for gpu in gpus)

    def probe(self) -> None:
        """The first launch: here an older driver than the toolkit needs is found while others can still serve."""
        one = torch.ones(1, 1, device=device)
        try:
            _operators.stats(Tensors(one, one), Options())
        except RuntimeError as error:
            raise BackendUnavailable(f"the CUDA kernels do not run here: {sentence(error)}") from error


def _runs_on(kind: str, number: str, major: int, minor: int) -> bool:
    """sm_80 is for 8.x from 8.0 on; sm_90a for 9.0 alone; compute_90 is compiled by the driver for 9.0 and newer."""
    if not number.isdigit():
        return kind == "sm" and number[:-1] == f"{major}{minor}"
    return (kind == "compute" or int(number) // 10 == major) and int(number) <= 10 * major + minor


library = _Cuda()
status = library.status

_lock = threading.Lock()  # two threads may come with their first tensors


def require() -> None:
    """Get the kernels loaded."""
    library.load()


def operators() -> elbo.Operators:
    """stats, forward and so on; `require` comes first."""
    return _operators


def levels_operators() -> levels.Operators:
    return _of_levels


def aggregate_operators() -> aggregate.Implementation:
    return _of_aggregate


def load() -> None:
    """Put the operators behind fused_elbo's own for CUDA tensors, for the life of the process."""
    require()
    with _lock:
        if dispatched["cuda"] != "cuda":
            for operator in OPERATORS:
                registry.implement(operator.name, registry.find(operator.name, NAMESPACE), "CUDA")
            dispatched["cuda"] = "cuda"
