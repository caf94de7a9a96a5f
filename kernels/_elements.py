"""How the elements of a tile are found and read, in one place for every pass over the data or the latents."""

import triton
import triton.language as tl

from ._math import activated, clamped, exp, number, whole


@triton.jit
def from_units(units, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Returns a length or a stride that came in units of VEC. It may fit 32 bits in units only."""
    if WIDE:
        n = tl.full((), whole(units), tl.int64) * VEC
    else:
        n = whole(units) * VEC
    return n


@triton.jit
def row_offsets(rows, stride, WIDE: tl.constexpr):
    if WIDE:
        offsets = rows.to(tl.int64)[:, None] * stride
    else:
        offsets = rows[:, None] * stride
    return offsets


@triton.jit
def columns(tile, COLS: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        cols = tl.full((), tile, tl.int64) * COLS + tl.arange(0, COLS)
    else:
        cols = tile * COLS + tl.arange(0, COLS)
    return cols[None, :]


@triton.jit
def size(call):
    """Returns the number of samples."""
    return whole(call.batch.size)


@triton.jit
def rows_and_chunk(pid, tiles):
    """Returns the samples of the pid-th program over these tiles, and which chunk of each it walks."""
    chunks = whole(tiles.chunks)
    return pid // chunks * tiles.ROWS + tl.arange(0, tiles.ROWS), pid % chunks


@triton.jit
def tiles_of(chunk, tiles):
    """Returns the first tile of a chunk, and the one past its last."""
    per_chunk = (tiles.per_chunk + 1) >> 1
    return chunk * per_chunk, (chunk + 1) * per_chunk


@triton.jit
def values_at(base, stride, tiles, rows, cols, inside, batch):
    """Reads a tile of a tensor whose samples are `stride` units apart, in the compute type."""
    start = row_offsets(rows, from_units(stride, tiles.VEC, batch.WIDE), batch.WIDE)
    if tiles.BY_CHUNK:  # each row has columns of its own: offsets are added first, which take half of a pointer's bits
        at = base + (start + cols)
    else:
        at = base + start + cols
    return tl.load(at, inside, 0.0).to(batch.ACC)


@triton.jit
def data_at(base, stride, call, rows, cols, inside):
    return values_at(base, stride, call.data.tiles, rows, cols, inside, call.batch)


@triton.jit
def errors_at(call, rows, cols, inside):
    """Reads x̂ − x. Returns it and ∂x̂/∂y, for y what recon holds (which is 1 where there is no activation)."""
    x, dx_dy = data_at(call.tensors.recon, call.data.recon, call, rows, cols, inside), 1.0
    target = data_at(call.tensors.target, call.data.target, call, rows, cols, inside)
    if call.data.BYTES is not None:
        low = number(call.numbers.target_low, call.batch.ACC)
        target = target * number(call.numbers.target_step, call.batch.ACC) + low
    if call.data.ACTIVATION is not None:
        x, dx_dy = activated(x, call.data.ACTIVATION)
    e = x - target
    if call.data.ACTIVATION is not None or call.data.BYTES is not None:
        e = tl.where(inside, e, 0.0)  # of what is no element, too, 0 would not stay 0
    return e, dx_dy


@triton.jit
def offsets_of(broadcast, rows, cols, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Returns where the values of a tile's elements lie in a `structs.Broadcast`."""
    if broadcast.inner is None:
        return row_offsets(rows, from_units(broadcast.stride, VEC, WIDE), WIDE) + cols
    else:
        inside = run_offsets(broadcast.inner, cols)
        if broadcast.outer is not None:
            inside += run_offsets(broadcast.outer, cols)
        return row_offsets(rows, whole(broadcast.stride), WIDE) + inside


@triton.jit
def run_offsets(run, cols):
    return cols // whole(run.divisor) % whole(run.size) * whole(run.stride)


@triton.jit
def log_sigma_at(call, rows, cols, inside):
    offsets = offsets_of(call.data.log_sigma, rows, cols, call.data.tiles.VEC, call.batch.WIDE)
    return tl.load(call.tensors.log_sigma + offsets, inside, 0.0).to(call.batch.ACC)


@triton.jit
def weights_at(call, rows, cols, inside):
    offsets = offsets_of(call.data.weight, rows, cols, call.data.tiles.VEC, call.batch.WIDE)
    return tl.load(call.tensors.weight + offsets, inside, 0).to(call.batch.ACC)


@triton.jit
def latent_at(base, stride, call, rows, cols, inside):
    return values_at(base, stride, call.latents.tiles, rows, cols, inside, call.batch)


@triton.jit
def logvar_range(call):
    return number(call.numbers.logvar_min, call.batch.ACC), number(call.numbers.logvar_max, call.batch.ACC)


@triton.jit
def latents_at(call, rows, cols, inside):
    """Reads (μ − μ_p, l − l_p, 1/σ_p²), which are μ, l and 1 against N(0, I); and l as it lies, where it has a range
    that the first ones have it in."""
    d = latent_at(call.tensors.mu, call.latents.mu, call, rows, cols, inside)
    logvar = latent_at(call.tensors.logvar, call.latents.logvar, call, rows, cols, inside)
    t = logvar
    if call.latents.RANGE is not None:
        least, most = logvar_range(call)
        t = tl.where(inside, clamped(logvar, least, most), 0.0)
    inverse_prior_variance = tl.full((call.latents.tiles.ROWS, call.latents.tiles.COLS), 1.0, call.batch.ACC)
    if call.latents.prior_mu is not None:
        p = latent_at(call.tensors.prior_logvar, call.latents.prior_logvar, call, rows, cols, inside)
        d = d - latent_at(call.tensors.prior_mu, call.latents.prior_mu, call, rows, cols, inside)
        t = t - p
        inverse_prior_variance = exp(-p)
    return d, t, inverse_prior_variance, logvar
