"""The limit: plain C++ loops that move the bytes of a loss and of its gradients, and compute nothing.

Forward reads every input; backward reads them again and writes the gradients, into memory that is there already, on as
many of PyTorch's threads as the losses have. No cleverness is in it: passes go upwards and stores through the cache, so
code that goes back through what the cache still holds, or stores past it, can be faster than this.

Compiled with the library's own build, into its cache.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fused_elbo import BackendUnavailable
from fused_elbo.build import build
from fused_elbo.build.spec import INSTRUCTION_SETS, BuildSpec, Part, cpu_spec, instruction_set

SYMBOL = "fused_elbo_bench_move"
MOST = 4


class Move(ctypes.Structure):
    """As in limit.cpp."""

    _fields_ = [
        ("in_", ctypes.c_void_p * MOST),
        ("out", ctypes.c_void_p * MOST),
        *((name, ctypes.c_int64) for name in ("reads", "writes", "words")),
    ]


def spec() -> BuildSpec:
    """With the flags of the CPU library, for the same instruction set."""
    flags = cpu_spec()
    level = instruction_set()
    return BuildSpec(
        name="fused_elbo_bench",
        parts=(Part("any", ("limit.cpp",), INSTRUCTION_SETS[level]),),
        cflags=flags.cflags,
        ldflags=flags.ldflags,
        label=level.lower(),
        root=Path(__file__).resolve().parent,
    )


@functools.cache
def library() -> Callable[..., int]:
    """Raises fused_elbo.BackendUnavailable where nothing can be compiled."""
    move = getattr(ctypes.CDLL(str(build(spec()).library)), SYMBOL)
    move.argtypes, move.restype = [ctypes.POINTER(Move), ctypes.c_int64], ctypes.c_int64
    return move


def available() -> bool:
    try:
        library()
    except BackendUnavailable:
        return False
    return True


def streams(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors that are walked side by side: those of equal size that follow one another, four at most."""
    groups: list[list[Tensor]] = []
    for tensor in tensors:
        if groups and groups[-1][0].shape == tensor.shape and len(groups[-1]) < MOST:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    return [group for group in groups if len(group) > 1]  # one number, a learned log σ, is nothing to move


class Limit:
    """forward() and backward() move the bytes that a loss of these tensors has to move."""

    def __init__(self, tensors: list[Tensor], sigma: str) -> None:
        order = [0, 1, 4, 2, 3] if sigma == "pixel" else range(len(tensors))  # log σ is read beside the data
        self.groups = streams([tensors[i] for i in order])
        self.outputs = [[torch.zeros_like(t) for t in group if t.requires_grad] for group in self.groups]
        self.move = library()
        self.forward_moves = self.moves([[] for _ in self.groups])
        self.backward_moves = self.moves(self.outputs)

    def moves(self, outputs: list[list[Tensor]]) -> ctypes.Array[Move]:
        moves = (Move * len(self.groups))()
        for move, group, out in zip(moves, self.groups, outputs, strict=True):
            for i, t in enumerate(group):
                move.in_[i] = t.data_ptr()
            for i, t in enumerate(out):
                move.out[i] = t.data_ptr()
            move.reads, move.writes = len(group), len(out)
            move.words = group[0].numel() * group[0].element_size() // 4
        return moves

    def run(self, moves: ctypes.Array[Move]) -> int:
        total = self.move(moves, len(moves))
        if total < 0:
            raise RuntimeError(f"limit.cpp has no loop for {[(m.reads, m.writes) for m in moves]}")
        return total

    def forward(self) -> int:
        return self.run(self.forward_moves)

    def backward(self, _: object = None) -> list[list[Tensor]]:
        self.run(self.backward_moves)
        return self.outputs
