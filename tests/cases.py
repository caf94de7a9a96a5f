"""The modes of the loss, as data, and inputs for them: shared by the tests of values, gradients, operators, compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_elbo import Capacity, FreeNats, backends
from fused_elbo.sigma import Optimal

REDUCTIONS = ("batchmean", "sum", "mean", "none")


def channels(data: tuple[int, ...]) -> tuple[int, ...]:
    """(C, 1, 1) for images, (1, D) for vectors, since a 1-D log_sigma means one per image."""
    return (1, *data) if len(data) == 1 else (data[0], *[1] * (len(data) - 1))


def some_mask(b: int, d: tuple[int, ...]) -> Tensor:
    """Of every element. The first sample has none: its distortion is 0."""
    mask = torch.rand(b, *d) > 0.4
    mask[0] = b == 1
    return mask


def bytes_of(b: int, d: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, (b, *d), dtype=torch.uint8)


PER_IMAGE = "optimal-per-image"
# name -> keyword arguments, from (batch, data shape, latent shape); "target" takes the target's place
BASIC: dict[str, Callable[[int, tuple[int, ...], tuple[int, ...]], dict[str, Any]]] = {
    "optimal": lambda b, d, k: {},
    "per-image": lambda b, d, k: {"sigma": "optimal-per-image"},
    "constant": lambda b, d, k: {"sigma": 0.3},
    "floor": lambda b, d, k: {"min_log_sigma": 1.0},
    "per-image-floor": lambda b, d, k: {"sigma": "optimal-per-image", "min_log_sigma": -1.2},
    "softclip": lambda b, d, k: {"sigma": Optimal(softclip=True), "min_log_sigma": -1.0},
    "per-image-softclip": lambda b, d, k: {"sigma": Optimal(per_image=True, softclip=True), "min_log_sigma": -1.0},
    "learned": lambda b, d, k: {"log_sigma": torch.tensor(-0.5)},
    "learned-one": lambda b, d, k: {"log_sigma": torch.tensor([-0.5])},
    "learned-image": lambda b, d, k: {"log_sigma": torch.linspace(-1, 0.5, b)},
    "learned-channel": lambda b, d, k: {"log_sigma": torch.linspace(-1, 0.5, d[0]).reshape(channels(d))},
    "learned-channel-image": lambda b, d, k: {"log_sigma": torch.randn(b, d[0], *[1] * (len(d) - 1)) * 0.3},
    "learned-map": lambda b, d, k: {"log_sigma": torch.randn(1, *d[1:]) * 0.3},
    "learned-last": lambda b, d, k: {"log_sigma": torch.randn(1, *[1] * (len(d) - 1), d[-1]) * 0.3},
    "learned-rows": lambda b, d, k: {"log_sigma": torch.randn(1, *d[:1], *[1] * (len(d) - 2), *d[1:][-1:]) * 0.3},
    "learned-data": lambda b, d, k: {"log_sigma": torch.randn(1, *d) * 0.3},
    "learned-pixel": lambda b, d, k: {"log_sigma": torch.randn(b, *d) * 0.3},
    "beta": lambda b, d, k: {"beta": 4.0},
    "beta-tensor": lambda b, d, k: {"beta": torch.tensor(0.5)},
    "beta-sample": lambda b, d, k: {"beta": torch.linspace(0.0, 3.0, b)},
    "free-bits": lambda b, d, k: {"free_bits": 0.3, "beta": 2.0},
    "capacity": lambda b, d, k: {"capacity": 1.0, "beta": 3.0},
    "capacity-above": lambda b, d, k: {"capacity": torch.tensor(1000.0), "beta": torch.tensor(3.0)},
    "prior": lambda b, d, k: {"prior": (torch.randn(b, *k), torch.randn(b, *k) * 0.3)},
    "prior-shared": lambda b, d, k: {"prior": (torch.randn(k), torch.randn(k) * 0.3), "free_bits": 0.2},
}
# What trainers have besides, each with a mode of σ of its own.
OF_TRAINERS: dict[str, Callable[[int, tuple[int, ...], tuple[int, ...]], dict[str, Any]]] = {
    "laplace": lambda b, d, k: {"likelihood": "laplace", "constant": False},
    "laplace-image": lambda b, d, k: {"likelihood": "laplace", "sigma": PER_IMAGE, "extra_error": torch.rand(b) * 9},
    "laplace-learned": lambda b, d, k: {"likelihood": "laplace", "log_sigma": torch.linspace(-1, 0.5, b)},
    "laplace-pixel": lambda b, d, k: {"likelihood": "laplace", "log_sigma": torch.randn(b, *d) * 0.3},
    "laplace-softclip": lambda b, d, k: {"likelihood": "laplace", "sigma": Optimal(softclip=True), "min_log_sigma": -2},
    "extra": lambda b, d, k: {"extra_error": torch.rand(b)},
    "extra-shared": lambda b, d, k: {"extra_error": torch.tensor(2.5), "log_sigma": torch.tensor(-0.5)},
    "mask": lambda b, d, k: {"weight": torch.rand(b, *[1] * (len(d) - 2), *d[-2:]) > 0.3},
    "mask-image": lambda b, d, k: {"weight": some_mask(b, d), "sigma": PER_IMAGE, "likelihood": "laplace"},
    "weight": lambda b, d, k: {"weight": torch.rand(b, *d).relu(), "extra_error": torch.rand(b)},
    "weight-channel": lambda b, d, k: {"weight": torch.rand(channels(d)) + 0.1, "log_sigma": torch.tensor(-0.5)},
    "weight-pixel": lambda b, d, k: {"weight": some_mask(b, d).float(), "log_sigma": torch.randn(b, *d) * 0.3},
    "sigmoid": lambda b, d, k: {"activation": "sigmoid"},
    "tanh": lambda b, d, k: {"activation": "tanh", "likelihood": "laplace", "sigma": 0.5},
    "tanh-mask": lambda b, d, k: {"activation": "tanh", "weight": some_mask(b, d), "sigma": PER_IMAGE},
    "sigmoid-pixel": lambda b, d, k: {"activation": "sigmoid", "log_sigma": torch.randn(b, *d) * 0.3},
    "bytes": lambda b, d, k: {"target": bytes_of(b, d)},
    "bytes-sigmoid": lambda b, d, k: {"target": bytes_of(b, d), "activation": "sigmoid", "likelihood": "laplace"},
    "bytes-pixel": lambda b, d, k: {
        "target": bytes_of(b, d), "target_range": (-1, 1), "log_sigma": torch.randn(1, *d) * 0.3,
    },
    "logvar-range": lambda b, d, k: {"logvar_range": (-0.5, 0.7), "beta": torch.tensor(2.0)},
    "logvar-range-prior": lambda b, d, k: {
        "logvar_range": (-0.5, 0.7), "prior": (torch.randn(b, *k), torch.randn(b, *k) * 0.3), "free_bits": 0.3,
    },
    "free-nats": lambda b, d, k: {"limit": FreeNats(3.55), "beta": torch.linspace(0.5, 3.0, b)},
    "free-nats-batch": lambda b, d, k: {"limit": FreeNats(torch.tensor(1.0), per="batch"), "beta": torch.tensor(2.0)},
    "free-nats-below": lambda b, d, k: {"limit": FreeNats(1000.0, per="batch"), "beta": torch.tensor(2.0)},
    "capacity-sample": lambda b, d, k: {"limit": Capacity(3.55, per="sample"), "beta": torch.tensor(2.0)},
}  # fmt: skip
INSIDE_A_SAMPLE = [
    "learned-channel", "learned-channel-image", "learned-map", "learned-last", "learned-rows", "learned-data",
    "learned-pixel", "laplace-pixel", "weight-pixel", "sigmoid-pixel", "bytes-pixel",
]  # fmt: skip


MODES = BASIC | OF_TRAINERS
# One for each way through the kernels.
FEW = ["optimal", "per-image", "learned-channel", "free-bits", "prior", "tanh-mask"]
# For tests of what is around the formulas: each option in one of them.
SOME = [
    *BASIC, "laplace-image", "weight", "tanh-mask", "bytes-sigmoid", "logvar-range-prior", "free-nats",
    "free-nats-batch",
]  # fmt: skip


def gpu_kernels_on_cpu() -> bool:
    """Whether this run is about a GPU's kernels, executed slowly on the CPU."""
    return bool(backends.triton.runs_on_cpu()) or backends.cuda.device == "cpu"


def implied(by: str, unless: bool = False) -> Any:
    """The mark of what follows from other tests in Triton's interpreter, which is slow, if not `unless`. `make
    check-release` runs it there, too."""
    return () if unless else pytest.mark.implied(f"in Triton's interpreter, what is implied by {by}")


def modes_for_operators() -> list[str]:
    """For tests of what is around the kernels: SOME, or FEW where a GPU's kernels run on the CPU. (Tests of values and
    gradients go through all modes there, too.)"""
    return FEW if gpu_kernels_on_cpu() else SOME


def few_often(*, often: Sequence[str] = tuple(SOME)) -> list[Any]:
    """The same, of which `make test` takes FEW, and `make check` those of `often`."""
    what = "operators and compiled code in every mode"
    others = {mode: pytest.mark.check(what) if mode in often else pytest.mark.release(what) for mode in SOME}
    return [pytest.param(mode, marks=() if mode in FEW else others[mode]) for mode in modes_for_operators()]


def allowed(mode: str, reduction: str) -> bool:
    return not (mode in ("capacity", "capacity-above", "free-nats-batch", "free-nats-below") and reduction == "none")


def to(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also inside a tuple, as fresh leaves of a dtype; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype, copy=True).requires_grad_() if value.is_floating_point() else value
    return tuple(to(v, dtype) for v in value) if isinstance(value, tuple) else value


class Call:
    """The four tensors and the keyword arguments of one call, with all leaves that a gradient can be asked of."""

    def __init__(
        self,
        mode: str = "optimal",
        reduction: str = "batchmean",
        batch: int = 4,
        data: tuple[int, ...] = (3, 8, 8),
        latent: tuple[int, ...] = (5,),
        dtype: torch.dtype = torch.float32,
        target_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        target = torch.randn(batch, *data)
        # Every sample its own error, so that a σ per image differs from the batch's.
        scale = torch.linspace(0.1, 0.6, batch).reshape(-1, *[1] * len(data))
        tensors = (
            target + scale * torch.randn(batch, *data),
            target,
            torch.randn(batch, *latent),
            torch.randn(batch, *latent),
        )
        # What low precision rounds away is part of the input, not of the error.
        dtypes = (dtype, target_dtype or dtype, dtype, dtype)
        kw = MODES[mode](batch, data, latent)
        tensors = [to(t, d) for t, d in zip(tensors, dtypes, strict=True)]
        tensors[1] = kw.pop("target", tensors[1])
        self._set(tensors, kw, reduction)

    def _set(self, tensors: list[Tensor], kw: dict[str, Any], reduction: str) -> None:
        self.tensors, self.reduction = tensors, reduction
        wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        self.kw = {name: to(value, wide) for name, value in kw.items()}
        for name in {"capacity", "weight"} & kw.keys():  # which have no gradient
            if isinstance(self.kw[name], Tensor):
                self.kw[name] = self.kw[name].detach()

    def leaves(self) -> list[Tensor]:
        extra: list[Tensor] = []
        for value in self.kw.values():
            extra += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Tensor)]
        return [t for t in [*self.tensors, *extra] if t.requires_grad]

    def double(self) -> Call:
        """The same numbers in fp64."""
        other = object.__new__(Call)
        other._set([to(t, torch.float64) for t in self.tensors], self.kw, self.reduction)
        return other

    def __call__(self, function: Callable[..., Any]) -> Any:
        return function(*self.tensors, **self.kw, reduction=self.reduction)

    def with_leaves(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one of the leaves, for gradcheck."""

        def of_leaves(*leaves: Tensor) -> Any:
            rest = iter(leaves)

            def swap(value: Any) -> Any:
                if isinstance(value, tuple):
                    return tuple(swap(v) for v in value)
                return next(rest) if isinstance(value, Tensor) and value.requires_grad else value

            tensors = [swap(t) for t in self.tensors]
            return function(*tensors, **{k: swap(v) for k, v in self.kw.items()}, reduction=self.reduction)

        return of_leaves

    def gradients(self, outputs: Any, weights: tuple[float, float, float] = (1.0, 0.5, -0.7)) -> list[Tensor]:
        """The gradients of all leaves, for grad_outputs that are unequal per output and per sample."""
        grad_outputs = [
            (w * (1 + torch.arange(o.numel(), dtype=torch.float64) / 4)).reshape(o.shape).to(o.dtype)
            for w, o in zip(weights, outputs[:3], strict=True)
        ]
        return list(torch.autograd.grad(outputs[:3], self.leaves(), grad_outputs))
