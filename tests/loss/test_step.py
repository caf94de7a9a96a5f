"""The numbers of decoupled_elbo_backward, against those of the two calls that it replaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import BASIC, FEW, MODES, REDUCTIONS, Call, implied
from stepwise import compare, same
from torch import Tensor, nn

from fused_elbo import decoupled_elbo, decoupled_elbo_backward

pytestmark = pytest.mark.usefixtures("backend")

# -------------------------------------------------------------------------------------------------------- the numbers

scaled = 'every mode with the mean over the batch, of which "sum" and "mean" are multiples, and few modes with these'


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("mode", "reductions"),
    [
        pytest.param(mode, reductions, marks=implied(scaled, unless=mode in FEW or reductions == REDUCTIONS[:1]))
        for reductions in (REDUCTIONS[:1], REDUCTIONS[1:3])
        for mode in (MODES if reductions == REDUCTIONS[:1] else [*BASIC, "weight"])
    ],
    ids=str,
)
def test_equals_loss_backward(mode: str, reductions: tuple[str, ...]) -> None:
    for reduction in reductions:
        compare(lambda reduction=reduction: Call(mode, reduction))


OF_DTYPES = ["optimal", "per-image", "learned-image", "learned-pixel", "beta-sample", "prior"]
by_some = "every dtype in three modes, one for each way to sigma"


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=implied(by_some, unless=m in ("optimal", "per-image", "learned-pixel"))) for m in OF_DTYPES],
)
def test_dtypes(mode: str, dtype: torch.dtype) -> None:
    compare(lambda: Call(mode, dtype=dtype))


@pytest.mark.ptx
@pytest.mark.parametrize("mode", ["optimal", "per-image"])
def test_mixed_dtypes(mode: str) -> None:
    compare(lambda: Call(mode, dtype=torch.bfloat16, target_dtype=torch.float32))
    compare(lambda: Call(mode, dtype=torch.float32, target_dtype=torch.float64))

    def wide_logvar() -> Call:
        call = Call(mode, dtype=torch.float16)
        call.tensors[3] = call.tensors[3].detach().float().requires_grad_()
        return call

    compare(wide_logvar)


SMALL_SIZES = [((1,), (1,), 1), ((17,), (3,), 3), ((1025,), (130,), 2), ((3, 5, 8, 8), (), 2)]
LARGE_SIZES = [((3, 75, 150), (4, 9), 3), ((17000,), (3,), 9)]
OF_SIZES = ["optimal", "per-image", "learned", "learned-channel"]
by_two = "large samples in the two modes whose sigma is of the errors"


@pytest.mark.parametrize(
    ("mode", "data", "latent", "batch"),
    [
        *(pytest.param(mode, *sizes, marks=pytest.mark.ptx) for mode in OF_SIZES for sizes in SMALL_SIZES),
        *(
            pytest.param(mode, *sizes, marks=implied(by_two, unless=mode in OF_SIZES[:2]))
            for mode in OF_SIZES
            for sizes in LARGE_SIZES
        ),
    ],
    ids=str,
)
def test_sizes(mode: str, data: tuple[int, ...], latent: tuple[int, ...], batch: int) -> None:
    compare(lambda: Call(mode, data=data, latent=latent, batch=batch))


def laid_out(mode: str, layout: Callable[[Tensor], Tensor], data: tuple[int, ...]) -> Call:
    call = Call(mode, data=data)
    call.tensors[:2] = [layout(t.detach()).requires_grad_() for t in call.tensors[:2]]
    return call


@pytest.mark.ptx
@pytest.mark.parametrize("mode", ["optimal", "per-image", "learned-pixel"])
def test_layouts(mode: str) -> None:
    image, video = (3, 6, 10), (3, 4, 6, 10)
    for layout, data in (
        (lambda t: t.contiguous(memory_format=torch.channels_last), image),
        (lambda t: t.contiguous(memory_format=torch.channels_last_3d), video),
        (lambda t: nn.functional.pad(t, (1, 1))[..., 1:-1], image),
        (lambda t: t.repeat_interleave(2, 0)[::2], image),
    ):
        compare(lambda layout=layout, data=data: laid_out(mode, layout, data))


@pytest.mark.ptx
@pytest.mark.parametrize(
    "scale", [0.0, -1.5, 65536.0, torch.tensor(3.0), torch.tensor([0.1]), torch.tensor(2.0).half()]
)
def test_grad_scale(scale: float | Tensor) -> None:
    for mode in ("optimal", "per-image", "learned-pixel", "beta-tensor"):
        compare(lambda mode=mode: Call(mode), scale)
    call = Call("optimal")
    unscaled = Call("optimal")(decoupled_elbo).loss
    same(call(lambda *t, **kw: decoupled_elbo_backward(*t, **kw, grad_scale=scale)).loss, unscaled.detach())


@pytest.mark.ptx
def test_infinity_and_nan_come_out() -> None:
    for value in (float("inf"), float("nan")):
        for mode in ("optimal", "per-image"):

            def spoilt(mode: str = mode, value: float = value) -> Call:
                call = Call(mode)
                with torch.no_grad():
                    call.tensors[0][1, 0, 0, 0] = value
                    call.tensors[2][2, 0] = value
                return call

            compare(spoilt)
        compare(lambda: Call("optimal"), torch.tensor(value))
