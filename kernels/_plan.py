"""What of a call depends on shapes, strides, dtypes, alignment, device and kinds of options alone, worked out once.

A training step calls the same kernels on tensors of the same shapes again and again. Cutting batches into tiles and
finding the compiled kernel among those that Triton has takes ten times as long as the launch itself. So both are kept:
an operator's plan is looked up by a `Key`, allocates, and launches what is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from fused_elbo.call import Options, Tensors

from . import _layout
from .structs import Call, Layout, Numbers

MOST = 1024  # plans of an operator that are kept, the latest used: some trainers have batches of ever new shapes
ALIGNED = 16  # bytes: what Triton compiles a pointer's accesses for, or else for single elements


Shape = tuple[Any, ...]  # of a tensor: sizes, strides, dtype, whether it is aligned


class Key(NamedTuple):
    """What a plan depends on. Two calls with equal keys launch the same compiled kernels with the same grids."""

    tensors: tuple[Shape | None, ...]
    more: tuple[Shape | None, ...]  # of the other tensors
    options: Options  # with numbers that are the same for all
    device: torch.device
    mask: int  # of the gradients


def key_of(tensors: Tensors, options: Options, mask: int = 0, *more: Tensor | None) -> tuple[Any, ...]:
    """What `cached` takes: a `Key` before it has names, which take longer than all the rest of a look-up, and what else
    decides what Triton would compile and launch: its knobs, and its driver where no tensor tells."""
    first = tensors.recon if tensors.recon is not None else tensors.mu
    assert first is not None
    logvar_range = None if options.logvar_min is None else 0.0
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return (
        tuple([
            None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNED == 0)
            for t in (*tensors, *more)
        ]),
        (
            options.exponent, options.activation, options.constant, 0.0, 1.0, options.sigma_mode, options.softclip, 0.0,
            0.0, float(options.free_bits > 0), 1.0, options.limit_mode, 0.0, logvar_range, logvar_range,
            options.reduction,
        ),
        first.device, mask,
        None if _INTERPRETED or first.is_cuda else triton.runtime.driver.active,
        _layout.FORCE_WIDE, runtime.debug, runtime.add_stages_inspection_hook, compilation.instrumentation_mode,
    )  # fmt: skip


_INTERPRETED = triton.knobs.runtime.interpret  # read when the kernels are imported, as by Triton for each of them


def on_meta(shape: tuple[Any, ...] | None) -> Tensor | None:
    return None if shape is None else torch.empty_strided(shape[0], shape[1], dtype=shape[2], device="meta")


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Returns what makes a contiguous tensor. torch.empty_strided takes half of torch.empty's time on the host, and
    called by functools.partial it would take as long again."""
    size, strides = tuple(shape), torch.empty(shape, device="meta").stride()
    return lambda: torch.empty_strided(size, strides, dtype=dtype, device=device)


class AnyLaunch:
    """A kernel with its grid. `options`: those that Triton compiles by."""

    def __init__(self, kernel: Any, programs: int, **options: Any) -> None:
        self._kernel, self._grid, self._options = kernel, (programs, 1, 1), options
        self._run: Callable[..., None] | None = None  # without looking for the compiled kernel
        self._globals: list[tuple[dict[str, Any], str, Any]] = []  # that it was compiled with

    def __call__(self, *arguments: Any) -> None:
        if self._run is not None and self._is_as_compiled():
            self._run(*arguments)
        else:
            self._by_triton(*arguments)

    def _by_triton(self, *arguments: Any) -> None:
        """Compiles the kernel, or finds it, and launches it."""
        compiled = self._kernel[self._grid](*arguments, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            used = {(name, id(values)): values for (name, _), (_, values) in self._kernel.used_global_vals.items()}
            self._globals = [(values, name, values[name]) for (name, _), values in used.items()]
            self._run = compiled[self._grid]

    def _is_as_compiled(self) -> bool:
        """Whether nothing is left for Triton to see to, which has hooks, and an error for constants that change."""
        for values, name, value in self._globals:
            if values.get(name) is not value:
                return False
        return not self._kernel.pre_run_hooks


class Launch(AnyLaunch):
    """With what stays the same: the layout of the `structs.Call` that is the first argument, and the last arguments."""

    def __init__(self, kernel: Any, programs: int, layout: Layout, *fixed: Any, **options: Any) -> None:
        super().__init__(kernel, programs, **options)
        self._layout, self._fixed = layout, fixed

    def __call__(self, tensors: Tensors, numbers: Numbers, *changing: Any) -> None:
        super().__call__(Call(tensors, numbers, *self._layout), *changing, *self._fixed)


def at_most(registers: int) -> dict[str, int]:
    """Returns Triton's option that limits the registers of a thread, for GPUs that know it. Left alone, ptxas may spill
    some so that one program more fits on an SM."""
    if triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": registers}


P = TypeVar("P")
_caches: list[Any] = []


def cached(plan: Callable[[Key], P]) -> Callable[[tuple[Any, ...]], P]:
    """A plan for each `key_of`. Threads may make one twice; both are right."""

    @functools.lru_cache(maxsize=MOST)
    def kept(key: tuple[Any, ...]) -> P:
        shapes, kinds, device, mask, *_ = key
        count = len(Tensors._fields)
        return plan(Key(shapes[:count], shapes[count:], Options._make(kinds), device, mask))

    _caches.append(kept)
    return kept


def forget() -> None:
    for cache in _caches:
        cache.cache_clear()


if hasattr(os, "register_at_fork"):  # a child has no right to its parent's GPU modules
    os.register_at_fork(after_in_child=forget)


_NOTHING = contextlib.nullcontext()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, on which Triton launches. (A CPU has no index, and to ask for it is quicker than to
    ask for the type.)"""
    if device.index is None or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
