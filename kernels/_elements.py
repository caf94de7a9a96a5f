"""How the elements of a tile are found and read, in one place for every pass over the data or the latents."""

import triton
import triton.language as tl

from ._math import exp


@triton.jit
def from_units(units, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Returns a length or a stride that came in units of VEC. It may fit 32 bits in units only."""
    if WIDE:
        n = tl.full((), units, tl.int64) * VEC
    else:
        n = units * VEC
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
def rows_and_chunk(pid, tiles):
    """Returns the samples of the pid-th program over these tiles, and which chunk of each it walks."""
    return pid // tiles.chunks * tiles.ROWS + tl.arange(0, tiles.ROWS), pid % tiles.chunks


@triton.jit
def values_at(span, tiles, rows, cols, inside, batch):
    """Reads a tile of a `structs.Span`, in the compute type."""
    start = row_offsets(rows, from_units(span.stride, tiles.VEC, batch.WIDE), batch.WIDE)
    if tiles.BY_CHUNK:  # each row has columns of its own: offsets are added first, which take half of a pointer's bits
        at = span.base + (start + cols)
    else:
        at = span.base + start + cols
    return tl.load(at, inside, 0.0).to(batch.ACC)


@triton.jit
def difference(data, rows, cols, inside, batch):
    """Reads x̂ − x."""
    recon = values_at(data.recon, data.tiles, rows, cols, inside, batch)
    return recon - values_at(data.target, data.tiles, rows, cols, inside, batch)


@triton.jit
def log_sigma_offsets(log_sigma, rows, cols, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Returns where the log σ of a tile's elements lie in a `structs.Broadcast`."""
    if log_sigma.inner is None:
        return row_offsets(rows, from_units(log_sigma.stride, VEC, WIDE), WIDE) + cols
    else:
        inside = cols // log_sigma.inner.divisor % log_sigma.inner.size * log_sigma.inner.stride
        if log_sigma.outer is not None:
            inside += cols // log_sigma.outer.divisor % log_sigma.outer.size * log_sigma.outer.stride
        return row_offsets(rows, log_sigma.stride, WIDE) + inside


@triton.jit
def log_sigma_at(data, rows, cols, inside, batch):
    offsets = log_sigma_offsets(data.log_sigma, rows, cols, data.tiles.VEC, batch.WIDE)
    return tl.load(data.log_sigma.base + offsets, inside, 0.0).to(batch.ACC)


@triton.jit
def latents_at(latents, rows, cols, inside, batch):
    """Reads (μ − μ_p, l − l_p, 1/σ_p²), which are μ, l and 1 against N(0, I)."""
    d = values_at(latents.mu, latents.tiles, rows, cols, inside, batch)
    t = values_at(latents.logvar, latents.tiles, rows, cols, inside, batch)
    inverse_prior_variance = tl.full((latents.tiles.ROWS, latents.tiles.COLS), 1.0, batch.ACC)
    if latents.prior_mu.base is not None:
        p = values_at(latents.prior_logvar, latents.tiles, rows, cols, inside, batch)
        d = d - values_at(latents.prior_mu, latents.tiles, rows, cols, inside, batch)
        t = t - p
        inverse_prior_variance = exp(-p)
    return d, t, inverse_prior_variance
