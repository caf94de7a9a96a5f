"""Bytes that the compiled kernels of a training step move, counted where a driver executes them on the CPU.

N are the bytes of recon and of target, each; L those of mu and of logvar, each. Forward reads 2N + 2L, backward reads
them again and writes the gradients of recon, mu and logvar: 5N + 6L; both in one launch, 3N + 6L. What is O(batch)
comes on top and must fit in the 2%: elbo_stats writes four bytes for each partial sum, and its last program reads them
and writes the outputs, which is checked exactly; every warp of elbo_grads reads grad_loss and the sum of squares for
its samples: 0.1 to 0.3% of what that kernel moves.

The aggregate's kernels meet every point with every component, so they read tensors again and again, a known number of
times. `Met` says how often, and their bytes are exactly that.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch

import fused_elbo
from fused_elbo import decoupled_elbo, decoupled_elbo_backward, log_aggregate_posterior

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")

pytestmark = [pytest.mark.triton, pytest.mark.ptx]
Launch = tuple[str, tuple[int, ...], int, dict[str, int]]  # kernel, grid, warps, what it did

LATENTS = 128
TILE = 4096  # elements, and a partial sum for each that a sample begins
SECTOR = 32  # bytes


@pytest.fixture
def log() -> list[Launch]:
    """Every launch so far."""
    how = fused_elbo.backends.triton.runs_on_cpu()
    if how != "a driver for the CPU":
        pytest.skip(f"compiled kernels are not executed on the CPU here: Triton runs by {how or 'no driver at all'}")
    executor = sys.modules.get("triton_emu")
    if executor is None:
        pytest.skip("Triton's driver is not triton_emu, whose LOG has the bytes that kernels move")
    return executor.LOG


def moved_since(log: list[Launch], before: int) -> tuple[dict[str, int], dict[str, Counter[str]]]:
    """Bytes read and written by each kernel, and all its counts."""
    done: dict[str, Counter[str]] = {}
    for name, _, _, counts in log[before:]:
        done.setdefault(name.removesuffix("_kernel"), Counter()).update(counts)
    return {name: c["read_bytes"] + c["written_bytes"] for name, c in done.items()}, done


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 128, 1), (2, 3, 1, 1)], ids=str)
def test_a_broadcast_sigma_is_read_where_it_lies(shape: tuple[int, ...], log: list[Launch]) -> None:
    """Forward reads 2N, and no copy of log σ as large as the data, with which it would be 3N."""
    target = torch.randn(2, 3, 128, 64)
    recon = target + 0.3 * torch.randn(2, 3, 128, 64)
    before = len(log)
    with fused_elbo.backend("triton"):
        fused_elbo.gaussian_nll(recon, target, log_sigma=torch.zeros(shape))
    moved, _ = moved_since(log, before)
    n = recon.numel() * recon.element_size()
    assert list(moved) == ["elbo_stats"]
    assert 2.0 <= moved["elbo_stats"] / n <= 2.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "dims"), [(16, 1024), (8, 2048), (7, 3072), (6, 4096), (3, 12288)])
def test_a_step_moves_five_times_its_data(batch: int, dims: int, dtype: torch.dtype, log: list[Launch]) -> None:
    target = torch.randn(batch, dims).to(dtype)
    recon = (target + 0.3 * torch.randn(batch, dims)).to(dtype).requires_grad_()
    mu, logvar = (torch.randn(batch, LATENTS).to(dtype).requires_grad_() for _ in range(2))
    before = len(log)
    with fused_elbo.backend("triton"):
        torch.autograd.grad(decoupled_elbo(recon, target, mu, logvar).loss, [recon, mu, logvar])

    moved, done = moved_since(log, before)
    assert list(done) == ["elbo_stats", "elbo_grads"]
    n, latents = recon.numel() * recon.element_size(), mu.numel() * mu.element_size()
    ratio = sum(moved.values()) / (5 * n + 6 * latents)
    used = {name: moved[name] / (SECTOR * done[name]["sectors"]) for name in ("elbo_stats", "elbo_grads")}
    print(f"{batch}x{dims} {dtype}: {ratio:.4f} of 5N + 6L; sectors used {used}; {moved}")  # with pytest -s
    assert 1.0 <= ratio <= 1.02
    assert min(used.values()) >= 0.95
    # Each kernel on its own, so that one that moves too little cannot hide one that moves too much.
    partial_sums = batch * (-(-dims // TILE) + 1)
    (programs, *_), warps = next((grid, warps) for name, grid, warps, _ in log[before:] if "stats" in name)
    # The last program has the sums of all in each of its warps. Programs add 1 to a counter, which is then set to 0.
    finalize = 4 * warps * partial_sums + 4 * (3 * (batch + 1) + 4) + 4 * (programs + 1)
    assert moved["elbo_stats"] == 2 * n + 2 * latents + 4 * partial_sums + finalize
    assert 1.0 < moved["elbo_grads"] / (3 * n + 4 * latents) < 1.005


@pytest.mark.parametrize(
    ("option", "two_launches", "one_launch"),
    [("laplace", 5.0, 3.0), ("sigmoid", 5.0, 3.0), ("bytes", 3.5, 2.25), ("mask", 5.5, 3.25)],
)
def test_what_trainers_have_moves_its_own_bytes_alone(
    option: str, two_launches: float, one_launch: float, log: list[Launch]
) -> None:
    """In units of N, for fp32: bytes are a quarter of it, and so is a mask of every element."""
    target = torch.rand(5, 4096)
    recon = (target + 0.3 * torch.randn(5, 4096)).requires_grad_()
    mu, logvar = (torch.randn(5, LATENTS).requires_grad_() for _ in range(2))
    options = {
        "laplace": {"likelihood": "laplace"},
        "sigmoid": {"activation": "sigmoid"},
        "bytes": {},
        "mask": {"weight": torch.rand(5, 4096) > 0.3},
    }[option]
    target = (255 * target).byte() if option == "bytes" else target
    n, latents = recon.numel() * 4, mu.numel() * 4
    for by, times in ((decoupled_elbo, two_launches), (decoupled_elbo_backward, one_launch)):
        before = len(log)
        with fused_elbo.backend("triton"):
            elbo = by(recon, target, mu, logvar, **options)  # type: ignore[operator]
            if by is decoupled_elbo:
                torch.autograd.grad(elbo.loss, [recon, mu, logvar])
        moved, _ = moved_since(log, before)
        ratio = sum(moved.values()) / (times * n + 6 * latents)
        print(f"{option}: {ratio:.4f} of {times}N + 6L")
        assert 1.0 <= ratio <= 1.02


def step_in_one_launch(batch: int, dims: int, sigma: str | float, dtype: torch.dtype, log: list[Launch]) -> Launch:
    """The launch of decoupled_elbo_backward, after a look at what it moved."""
    target = torch.randn(batch, dims).to(dtype)
    recon = (target + 0.3 * torch.randn(batch, dims)).to(dtype).requires_grad_()
    mu, logvar = (torch.randn(batch, LATENTS).to(dtype).requires_grad_() for _ in range(2))
    before = len(log)
    with fused_elbo.backend("triton"):
        decoupled_elbo_backward(recon, target, mu, logvar, sigma=sigma)
    moved, done = moved_since(log, before)
    n, latents = recon.numel() * recon.element_size(), mu.numel() * mu.element_size()
    ratio = moved["elbo_step"] / (3 * n + 6 * latents)
    used = moved["elbo_step"] / (SECTOR * done["elbo_step"]["sectors"])
    print(
        f"{batch}x{dims} {dtype}, {sigma}: {ratio:.4f} of 3N + 6L, in {log[before][1][0]} programs; sectors used {used}"
    )
    assert len(log) == before + 1
    assert 1.0 <= ratio <= 1.02
    assert used >= 0.95
    return log[before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sigma", ["optimal", "optimal-per-image", 0.5], ids=str)
@pytest.mark.parametrize(("batch", "dims"), [(16, 2048), (11, 3072), (5, 12288)])
def test_a_step_in_one_launch_moves_three_times_its_data(
    batch: int, dims: int, sigma: str | float, dtype: torch.dtype, log: list[Launch]
) -> None:
    step_in_one_launch(batch, dims, sigma, dtype, log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_programs_that_hold_all_that_they_can(
    dtype: torch.dtype, log: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on a GPU of two SMs, which it nearly fills."""
    from fused_elbo.kernels import _plan, operators

    monkeypatch.setattr(operators, "resident_programs", lambda device: 2)
    _plan.forget()
    _, grid, warps, _ = step_in_one_launch(5, 12288, "optimal", dtype, log)
    _plan.forget()
    assert (grid[0], warps) == (2, 32)


# ---------------------------------------------------------------------------------------------- the aggregate posterior

WARPS, LANES = 4, 32  # of a program
ROWS, COMPONENTS = 8, 128  # of a tile for the joint density: each warp has a quarter of the components, and all rows
OWNED, OWNED_GRADS = 16, 8  # points, or components, of a thread that walks what they meet
BLOCK = 256  # sums that a program adds up


def blocks(count: int, size: int) -> int:
    return -(-count // size)


class Met(NamedTuple):
    """Sizes, and how a plan splits them up; z, mu and logvar have elements of `size` bytes, sums of four.

    A thread of a walk owns some points for one latent, and meets one component after the other, or the other way round.
    So what is met is read once for each block of owners, and what is owned once in every program by each warp that has
    its latents. A point's share in a component is one number for all latents: whatever the latents of a warp, it reads
    it once.
    """

    points: int
    components: int
    latents: int
    width: int  # latents of a program
    forward_splits: int  # programs that share a walk along components
    point_splits: int  # the same backward
    component_splits: int  # along points
    size: int = 4

    @property
    def z(self) -> int:
        """Bytes, as those that follow."""
        return self.points * self.latents * self.size

    @property
    def mu_and_logvar(self) -> int:
        return 2 * self.components * self.latents * self.size

    @property
    def marginals(self) -> int:
        return 4 * self.points * self.latents

    @property
    def tiles(self) -> tuple[int, int]:
        """For the joint density: of points, of components."""
        return blocks(self.points, ROWS), blocks(self.components, COMPONENTS)

    @property
    def warps(self) -> int:
        """Of a program, that have the same latents."""
        return WARPS * LANES // max(LANES, self.width)

    def joint(self) -> int:
        """All components for each tile of points. A tile's points, the last one in the place of those that are not
        there, for each tile of components by every warp."""
        rows, columns = self.tiles
        return rows * self.mu_and_logvar + columns * WARPS * rows * ROWS * self.latents * self.size

    def forward(self) -> list[tuple[str, int, int, int]]:
        """Of each launch: its kernel, programs, bytes read, bytes written."""
        rows, columns = self.tiles
        owners = blocks(self.points, OWNED)
        programs = owners * blocks(self.latents, self.width) * self.forward_splits + rows * columns
        read = owners * self.mu_and_logvar + self.forward_splits * self.warps * self.z + self.joint()
        joint = 4 * self.points
        parts = self.forward_splits * self.marginals + columns * joint
        totals = blocks(self.marginals // 4, BLOCK) + blocks(self.points, BLOCK)
        return [
            ("aggregate_sums_kernel", programs, read, parts),
            ("aggregate_totals_kernel", totals, parts, self.marginals + joint),
        ]

    def backward(self) -> list[tuple[str, int, int, int]]:
        rows, columns = self.tiles
        point_owners, component_owners = blocks(self.points, OWNED_GRADS), blocks(self.components, OWNED_GRADS)
        # log q̂, and the gradient that comes in, of a tile's points.
        of_joint = columns * WARPS * 2 * 4 * self.points
        of_points = self.z + 2 * self.marginals
        by_points = point_owners * self.mu_and_logvar + self.point_splits * self.warps * of_points
        by_components = component_owners * of_points + self.component_splits * self.warps * self.mu_and_logvar
        # Those that fill up the last block of owners have room for their shares, and read them, too.
        shares = 4 * OWNED_GRADS * (point_owners * self.components + component_owners * self.points)
        shares *= blocks(self.latents, min(self.width, LANES))
        programs = point_owners * self.point_splits + component_owners * self.component_splits
        gradients = [(self.z, self.point_splits), *2 * [(self.mu_and_logvar // 2, self.component_splits)]]
        parts = [4 * (n // self.size) * splits for n, splits in gradients if splits > 1]
        whole = [n for n, splits in gradients if splits == 1]
        totals = [n for n, splits in gradients if splits > 1]
        return [
            (
                "aggregate_shares_kernel",
                rows * columns,
                self.joint() + of_joint,
                4 * rows * ROWS * columns * COMPONENTS,
            ),
            (
                "aggregate_grads_kernel",
                programs * blocks(self.latents, self.width),
                by_points + by_components + shares,
                sum(parts + whole),
            ),
            (
                "aggregate_grads_totals_kernel",
                sum(blocks(n // self.size, BLOCK) for n in totals),
                sum(parts),
                sum(totals),
            ),
        ]


@pytest.mark.parametrize(
    "met",
    [
        Met(40, 300, 20, 32, 9, 9, 1),
        Met(17, 140, 40, 16, 2, 2, 1),
        Met(34, 130, 64, 64, 8, 8, 2),
        Met(20, 150, 32, 32, 4, 4, 1, size=2),
    ],
    ids=lambda met: "x".join(map(str, met[:3])),
)
def test_the_aggregate_reads_as_often_as_points_and_components_meet(met: Met, log: list[Launch]) -> None:
    mu, logvar = torch.randn(2, met.components, met.latents).unbind()
    z = mu[: met.points] + 0.3 * torch.randn(met.points, met.latents)
    dtype = torch.float32 if met.size == 4 else torch.bfloat16
    tensors = [t.to(dtype).requires_grad_() for t in (z, mu, logvar)]
    before = len(log)
    with fused_elbo.backend("triton"):
        sums = log_aggregate_posterior(*tensors, dataset_size=1000)
        torch.autograd.grad(sums, tensors, [torch.randn_like(t) for t in sums])
    found = [(name, grid[0], c["read_bytes"], c["written_bytes"]) for name, grid, _, c in log[before:]]
    print(*found, sep="\n")  # with pytest -s
    assert found == [*met.forward(), *met.backward()]
