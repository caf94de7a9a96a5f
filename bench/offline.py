"""A driver of Triton for a GPU that is not there: what is compiled for it is the real thing, and a launch does nothing
but call the hook that sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

H100, H100_SMS = GPUTarget("cuda", 90, 32), 132


class Offline:
    """`device`: the number under which Triton keeps what it has compiled, so one for each target."""

    def __init__(self, target: GPUTarget = H100, sms: int = H100_SMS, device: int = 0) -> None:
        self.target, self.sms, self.device, self.utils = target, sms, device, self

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:  # grid, stream, function, the kernel's metadata, the launch's, hooks, …
            metadata, enter = arguments[6:8]
            if enter is not None:
                enter(metadata)

        return launch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": self.sms, "max_shared_mem": 232448}

    def load_binary(self, *binary: object) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, module: object) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def active(driver: Offline) -> Iterator[None]:
    try:
        previous = triton.runtime.driver.active
    except RuntimeError:  # there is no GPU
        previous = None
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver.set_active(previous)
