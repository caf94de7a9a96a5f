"""Structures as arguments of kernels, for the tool that runs PTX on a CPU, whose launcher takes numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any


def leaves(kind: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """What an argument of this type in a kernel's signature holds, with the type of each."""
    if isinstance(kind, tuple):
        for inner, field in zip(kind, value, strict=True):
            yield from leaves(inner, field)
    else:
        yield kind, value


def accept_structs(executor: ModuleType) -> None:
    """`executor`: the tool's triton_emu, whose launches then flatten their arguments first."""
    launch: Callable[..., None] = executor.Launcher.__call__
    if launch.__name__ == "launch_flat":
        return

    def launch_flat(self: Any, *args: Any) -> None:
        how, arguments = args[:9], args[9:]  # grid, stream, function, metadata and hooks; what the kernel is passed
        pairs = [pair for both in zip(self.src.signature.values(), arguments, strict=True) for pair in leaves(*both)]
        signature = dict(enumerate(kind for kind, _ in pairs))
        flat = SimpleNamespace(src=SimpleNamespace(signature=signature), md=self.md)
        launch(flat, *how, *(value for _, value in pairs))

    executor.Launcher.__call__ = launch_flat
