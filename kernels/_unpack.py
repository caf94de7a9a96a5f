"""A `structs.Layout`, pointers and numbers, put together as what kernels read.

These are for the arguments of a call only: what is assigned to a variable loses its constants, which become tensors.
"""

import triton
import triton.language as tl  # noqa: F401 (which the interpreter looks for in each file of kernels)

from .structs import Batch, Broadcast, Data, GradOutputs, Latents, Options, Run, Scalar, Span, Tiles


@triton.jit
def _whole(n):
    """Returns what `structs.whole` was given."""
    if n is None:
        return None
    else:
        return (n - 3) >> 1


@triton.jit
def _span(tensor, span):
    return Span(tensor, _whole(span.stride))


@triton.jit
def _run(run):
    if run is None:
        return None
    else:
        return Run(_whole(run.divisor), _whole(run.size), _whole(run.stride))


@triton.jit
def _broadcast(tensor, log_sigma):
    return Broadcast(tensor, _whole(log_sigma.stride), _run(log_sigma.inner), _run(log_sigma.outer))


@triton.jit
def _tiles(tiles):
    return Tiles(
        _whole(tiles.length), _whole(tiles.chunks), (tiles.per_chunk + 1) >> 1, _whole(tiles.programs),
        tiles.VEC, tiles.ROWS, tiles.COLS, tiles.BY_CHUNK,
    )  # fmt: skip


@triton.jit
def _present(number, present):
    if present is None:
        return None
    else:
        return number


@triton.jit
def _scalar(tensor, number, scalar):
    if scalar.value is None:
        return Scalar(None, None, None)
    else:
        return Scalar(tensor, _whole(scalar.stride), number)


@triton.jit
def data_of(tensors, layout):
    return Data(
        _span(tensors.recon, layout.data.recon), _span(tensors.target, layout.data.target),
        _broadcast(tensors.log_sigma, layout.data.log_sigma), _tiles(layout.data.tiles),
    )  # fmt: skip


@triton.jit
def latents_of(tensors, numbers, layout):
    return Latents(
        _span(tensors.mu, layout.latents.mu), _span(tensors.logvar, layout.latents.logvar),
        _span(tensors.prior_mu, layout.latents.prior_mu), _span(tensors.prior_logvar, layout.latents.prior_logvar),
        _present(numbers.free_bits, layout.latents.free_bits), _tiles(layout.latents.tiles),
    )  # fmt: skip


@triton.jit
def batch_of(layout):
    return Batch(
        _whole(layout.batch.size), layout.batch.n, layout.batch.dims, layout.batch.scale,
        layout.batch.ACC, layout.batch.WIDE,
    )  # fmt: skip


@triton.jit
def options_of(tensors, numbers, layout):
    return Options(
        layout.options.MODE, layout.options.SOFTCLIP,
        _scalar(tensors.log_sigma, numbers.log_sigma, layout.options.log_sigma), numbers.min_log_sigma,
        _scalar(tensors.beta, numbers.beta, layout.options.beta),
        _scalar(tensors.capacity, numbers.capacity, layout.options.capacity),
    )  # fmt: skip


@triton.jit
def grad_outputs_of(given, shared_sigma_term, numbers, layout):
    """`given`: a `call.GradOutputs` of pointers. A number in the place of one is the scale of a step's loss."""
    return GradOutputs(
        _scalar(given.loss, numbers.grad_scale, layout.grad_outputs.loss),
        _scalar(given.distortion, numbers.grad_scale, layout.grad_outputs.distortion),
        _scalar(given.rate, numbers.grad_scale, layout.grad_outputs.rate), shared_sigma_term,
    )  # fmt: skip
