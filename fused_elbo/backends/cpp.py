"""The C++ kernels for CPU tensors: built when first needed, loaded once, and a failure is remembered."""

from __future__ import annotations

import copy
import threading

import torch

from fused_elbo import build as builder
from fused_elbo.backends.base import BackendUnavailable, Status

NAME = "cpp"

_lock = threading.Lock()
_loaded: builder.Target | None = None
_failure: BackendUnavailable | None = None


def load() -> None:
    """Registers the C++ kernels with PyTorch's dispatcher, once; the first call ever compiles them (some seconds).

    Raises BackendUnavailable where that cannot be done, and the same again on every later call, without a new attempt.
    """
    global _loaded, _failure
    with _lock:
        if _loaded is None and _failure is None:
            try:
                _loaded = _build_and_load()
            except BackendUnavailable as error:
                _failure = copy.copy(error)
    if _failure is not None:
        # A copy: a raised exception holds on to its caller's frame, and so to the tensors of the call.
        raise copy.copy(_failure)


def status(build: bool = False) -> Status:
    """Whether the backend can serve, and if not, why. Compiles nothing unless told to."""
    try:
        if build or _failure is not None:
            load()
        target = _loaded or builder.resolve(builder.cpu_spec())
    except BackendUnavailable as error:
        return Status(NAME, False, error.reason, error.remedy)
    if not target.library.exists():
        return Status(NAME, False, "not built yet.", "It is built at first use, or now: python -m fused_elbo")
    return Status(NAME, True, f"{target.library} ({target.spec.instruction_set}; {target.compiler})")


def _build_and_load() -> builder.Target:
    target = builder.build(builder.cpu_spec())
    try:
        torch.ops.load_library(target.library)
    except OSError as error:
        raise BackendUnavailable(
            f"{target.library} does not load: {error.__cause__ or error}.",
            "Delete its folder to have it built anew; where the disk is mounted noexec, set FUSED_ELBO_CACHE_DIR.",
        ) from error
    return target
