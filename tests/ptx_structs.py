"""Structures as arguments of kernels, for the tool that runs PTX on a CPU, whose launcher takes numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


def leaves(kind: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """What an argument of this type in a kernel's signature holds, with the type of each."""
    if isinstance(kind, tuple):
        for inner, field in zip(kind, value, strict=True):
            yield from leaves(inner, field)
    else:
        yield kind, value


def accept_structs(executor: ModuleType) -> None:
    """`executor`: the tool's triton_emu, whose launches then flatten their arguments first. A program may then choose
    among arguments, for which the compiler takes their addresses."""
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
    take_addresses_of_parameters(executor.ptxemu)


def take_addresses_of_parameters(ptxemu: ModuleType) -> None:
    """`mov.b32 %r1, kernel_param_7`, and `ld.param.b64 %rd1, [%r1]` from one of several."""
    read, access = ptxemu.Exec.rd, ptxemu.Exec.mem

    def rd(self: Any, operand: str, kind: str, lanes: Any) -> Any:
        if operand not in self.k.params:
            return read(self, operand, kind, lanes)
        return np.full(len(lanes), self.k.params[operand][0], ptxemu.U[ptxemu.bits(kind)]).view(ptxemu.DT[kind])

    def mem(self: Any, space: str, address: Any, *how: Any) -> Any:
        if space != "param":
            return access(self, space, address, *how)
        return np.frombuffer(bytes(self.pbuf) + bytes(8), np.uint8), address

    ptxemu.Exec.rd, ptxemu.Exec.mem = rd, mem
