"""Bad input: refused before any work, with a message that names the argument and shows what was passed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_elbo
from fused_elbo import DecoupledELBO, LearnedSigmaELBO, decoupled_elbo, gaussian_kl, gaussian_nll
from fused_elbo.sigma import Constant, Optimal

# ruff: noqa: E501 (a table: one case a line)

X, Z = torch.zeros(4, 3, 8, 8), torch.zeros(4, 5)
META = torch.zeros(4, 3, 8, 8, device="meta")

CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("shapes", {"target": X[:, :1]}, ValueError, r"recon and target .* \(4, 3, 8, 8\) and \(4, 1, 8, 8\)"),
    ("latent shapes", {"logvar": Z[:, :2]}, ValueError, r"mu and logvar .* \(4, 5\) and \(4, 2\)"),
    ("batch", {"mu": Z[:2], "logvar": Z[:2]}, ValueError, r"batch size, got \(4, 3, 8, 8\) and \(2, 5\)"),
    ("0-d", {"mu": torch.zeros(()), "logvar": torch.zeros(())}, ValueError, r"mu: expected a batch dimension"),
    ("no latents", {"mu": Z[:, :0], "logvar": Z[:, :0]}, ValueError, r"mu: no elements in a sample, shape \(4, 0\)"),
    ("empty batch", {"recon": X[:0], "target": X[:0]}, ValueError, r"recon: an empty batch, shape \(0, 3, 8, 8\)"),
    ("uint8", {"recon": X.to(torch.uint8)}, TypeError, r"recon: expected float32.*got torch.uint8.*x.float\(\) / 255"),
    ("int target", {"target": X.long()}, TypeError, r"target: expected float32, float64, bfloat16, float16 or uint8, got torch.int64"),
    ("likelihood", {"likelihood": "l1"}, ValueError, r"likelihood: expected one of 'gaussian', 'laplace', got 'l1'"),
    ("likelihood type", {"likelihood": 1}, TypeError, r"likelihood: expected one of 'gaussian', 'laplace', got int"),
    ("activation", {"activation": "relu"}, ValueError, r"activation: expected one of None, 'sigmoid', 'tanh', got 'relu'"),
    ("activation function", {"activation": torch.sigmoid}, TypeError, r"activation: expected one of None, .*got builtin"),
    ("target_range", {"target_range": (1.0, 0.0)}, ValueError, r"target_range: expected the least .*got \(1.0, 0.0\)"),
    ("target_range type", {"target_range": 255}, TypeError, r"target_range: expected a pair of numbers, got 255"),
    ("constant", {"constant": 0.0}, TypeError, r"constant: expected True or False, got 0.0"),
    ("weight shape", {"weight": torch.ones(4, 2, 1, 1)}, ValueError, r"weight: shape \(4, 2, 1, 1\) does not broadcast to recon's \(4, 3, 8, 8\)"),
    ("weight dtype", {"weight": torch.ones(4, 3, 8, 8).long()}, TypeError, r"weight: expected float32, .* or bool, got torch.int64"),
    ("weight gradient", {"weight": torch.ones(8, requires_grad=True)}, ValueError, r"weight: has no gradient here; pass weight.detach"),
    ("weight device", {"weight": META}, ValueError, r"weight: on meta, but recon is on cpu"),
    ("extra_error shape", {"extra_error": torch.ones(4, 1)}, ValueError, r"extra_error: expected shape \(\) or \(4,\), one per sample, got shape \(4, 1\)"),
    ("extra_error number", {"extra_error": 1.0}, TypeError, r"extra_error: expected a tensor, got float"),
    ("extra_error, σ inside", {"extra_error": torch.ones(4), "log_sigma": torch.zeros(3, 1, 1)}, ValueError, r"extra_error: has no scale .*log_sigma of shape \(3, 1, 1\)"),
    ("logvar_range", {"logvar_range": (20, -30)}, ValueError, r"logvar_range: expected the least .*got \(20, -30\)"),
    ("logvar_range inf", {"logvar_range": (-30, float("inf"))}, ValueError, r"logvar_range\[1\]: expected a finite number, got inf"),
    ("limit type", {"limit": 3.0}, TypeError, r"limit: expected FreeNats\(…\) or Capacity\(…\) .*got 3.0; free nats of each element are free_bits"),
    ("limit and capacity", {"limit": fused_elbo.FreeNats(1.0), "capacity": 2.0}, ValueError, r"capacity and limit exclude each other, got capacity=2.0"),
    ("limit negative", {"limit": fused_elbo.FreeNats(-1.0)}, ValueError, r"limit: expected a finite number of at least 0, got -1.0"),
    ("limit none", {"limit": fused_elbo.FreeNats(1.0, per="batch"), "reduction": "none"}, ValueError, r'limit: is held against the batch mean, so it excludes reduction="none"'),
    ("int", {"mu": Z.long(), "logvar": Z.long()}, TypeError, r"mu: expected float32.*got torch.int64"),
    ("complex", {"recon": X.to(torch.complex64)}, TypeError, r"recon: expected float32.*got torch.complex64"),
    ("not a tensor", {"recon": [1.0]}, TypeError, r"recon: expected a tensor, got list"),
    ("device", {"target": META}, ValueError, r"target: on meta, but recon is on cpu"),
    ("latents' device", {"recon": META, "target": META}, ValueError, r"mu: on cpu, but recon is on meta"),
    ("beta shape", {"beta": torch.ones(3)}, ValueError, r"beta: .*\(4,\), one per sample, got shape \(3,\)"),
    ("beta column", {"beta": torch.ones(4, 1)}, ValueError, r"beta: .*got shape \(4, 1\)"),
    ("beta negative", {"beta": -1.0}, ValueError, r"beta: expected a finite number of at least 0, got -1.0"),
    ("beta nan", {"beta": float("nan")}, ValueError, r"beta: expected a finite number of at least 0, got nan"),
    ("beta inf", {"beta": float("inf")}, ValueError, r"beta: .*got inf"),
    ("beta text", {"beta": "4"}, TypeError, r"beta: expected a number, got '4'"),
    ("beta int tensor", {"beta": torch.tensor(4)}, TypeError, r"beta: expected float32.*got torch.int64"),
    ("sigma name", {"sigma": "optimum"}, ValueError, r"sigma: unknown mode 'optimum'; the modes are 'optimal', 'optimal-per-image', a positive float"),
    ("sigma zero", {"sigma": 0.0}, ValueError, r"sigma: a constant σ must be positive and finite.*got 0.0"),
    ("sigma negative", {"sigma": -0.5}, ValueError, r"sigma: .* got -0.5"),
    ("sigma nan", {"sigma": float("nan")}, ValueError, r"sigma: .* got nan"),
    ("sigma tensor", {"sigma": torch.tensor(0.5)}, TypeError, r"sigma: got a tensor; pass a learned σ as log_sigma"),
    ("sigma type", {"sigma": None}, TypeError, r"sigma: expected 'optimal'.*got NoneType"),
    ("both sigmas", {"sigma": 0.5, "log_sigma": torch.zeros(())}, ValueError, r"sigma and log_sigma exclude each other, got sigma=0.5"),
    ("log_sigma 1-D", {"log_sigma": torch.zeros(3)}, ValueError, r"log_sigma: a 1-D .*\(1,\) or \(4,\), got \(3,\) for recon of \(4, 3, 8, 8\); log_sigma.reshape\(1, 3, 1, 1\) is one for each of dimension 1"),
    ("log_sigma of no dimension", {"log_sigma": torch.zeros(7)}, ValueError, r"log_sigma: a 1-D .*got \(7,\) .*no dimension of recon is as long"),
    ("log_sigma shape", {"log_sigma": torch.zeros(2, 1, 1)}, ValueError, r"log_sigma: shape \(2, 1, 1\) does not broadcast to recon's \(4, 3, 8, 8\)"),
    ("log_sigma rank", {"log_sigma": torch.zeros(1, 4, 3, 8, 8)}, ValueError, r"log_sigma: shape \(1, 4, 3, 8, 8\)"),
    ("log_sigma float", {"log_sigma": -1.0}, TypeError, r"log_sigma: expected a tensor, got float"),
    ("floor nan", {"min_log_sigma": float("nan")}, ValueError, r"min_log_sigma: expected a finite number of at least -40 and at most 40, got nan"),
    ("floor -inf", {"min_log_sigma": -float("inf")}, ValueError, r"min_log_sigma: expected a finite number of at least -40.*got -inf"),
    ("floor too low", {"min_log_sigma": -50.0}, ValueError, r"min_log_sigma: .* at least -40 and at most 40, got -50.0"),
    ("sigma too small", {"sigma": 1e-20}, ValueError, r"sigma: .* log σ within ±40, got 1e-20"),
    ("sigma bool", {"sigma": True}, TypeError, r"sigma: expected 'optimal'.*got bool"),
    ("per image and learned", {"sigma": "optimal-per-image", "log_sigma": torch.zeros(())}, ValueError, r"exclude each other"),
    ("beta bool", {"beta": True}, TypeError, r"beta: expected a number, got True"),
    ("beta huge", {"beta": 10**400}, ValueError, r"beta: expected a finite number"),
    ("sparse", {"recon": X.to_sparse()}, TypeError, r"recon: expected a dense tensor, got layout torch.sparse_coo"),
    ("capacity int", {"capacity": torch.tensor(1)}, TypeError, r"capacity: expected float32.*got torch.int64"),
    ("prior rank", {"prior": (torch.zeros(1, 4, 5), Z)}, ValueError, r"prior\[0\], mu_p: shape \(1, 4, 5\)"),
    ("free_bits", {"free_bits": -0.1}, ValueError, r"free_bits: expected a finite number of at least 0, got -0.1"),
    ("capacity negative", {"capacity": -1.0}, ValueError, r"capacity: expected a finite number of at least 0, got -1.0"),
    ("capacity none", {"capacity": 1.0, "reduction": "none"}, ValueError, r'capacity: .* excludes reduction="none"'),
    ("capacity beta", {"capacity": 1.0, "beta": torch.ones(4)}, ValueError, r"capacity: .* excludes a beta per sample, got \(4,\)"),
    ("capacity shape", {"capacity": torch.ones(4)}, ValueError, r"capacity: expected a number or a 0-d tensor, got shape \(4,\)"),
    ("capacity grad", {"capacity": torch.ones((), requires_grad=True)}, ValueError, r"capacity: has no gradient here"),
    ("one latent's device", {"mu": META}, ValueError, r"logvar: on cpu, but mu is on meta"),
    ("prior of three", {"prior": (Z, Z, Z)}, TypeError, r"prior: expected a pair .*, got tuple of 3"),
    ("prior type", {"prior": Z}, TypeError, r"prior: expected a pair \(mu_p, logvar_p\) of tensors, got Tensor"),
    ("prior shape", {"prior": (Z, torch.zeros(3))}, ValueError, r"prior\[1\], logvar_p: shape \(3,\) does not broadcast to mu's \(4, 5\)"),
    ("prior dtype", {"prior": (Z.long(), Z)}, TypeError, r"prior\[0\], mu_p: expected float32.*got torch.int64"),
    ("reduction", {"reduction": "average"}, ValueError, r"reduction: expected one of 'batchmean', 'sum', 'mean', 'none', got 'average'"),
    ("reduction type", {"reduction": ["mean"]}, ValueError, r"reduction: expected one of .*got \['mean'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"recon": X, "target": X, "mu": Z, "logvar": Z} | change
    with pytest.raises(error, match=message):
        decoupled_elbo(**arguments)


def test_the_parts_refuse_the_same() -> None:
    with pytest.raises(ValueError, match="recon and target must have the same shape"):
        gaussian_nll(X, X[:2])
    with pytest.raises(ValueError, match="log_sigma: a 1-D"):
        gaussian_nll(X, X, log_sigma=torch.zeros(3))
    with pytest.raises(ValueError, match="mu and logvar must have the same shape"):
        gaussian_kl(Z, Z[:2])
    with pytest.raises(ValueError, match="free_bits"):
        gaussian_kl(Z, Z, free_bits=-1)


def test_modules_refuse_at_construction() -> None:
    for build, message in [
        (lambda: DecoupledELBO(sigma="optimum"), "unknown mode 'optimum'"),
        (lambda: DecoupledELBO(reduction="average"), "reduction: expected one of"),
        (lambda: DecoupledELBO(beta=-1.0), "beta: expected a finite number of at least 0, got -1.0"),
        (lambda: DecoupledELBO(min_log_sigma=-1e9), "min_log_sigma: expected a finite number .*, got -1000000000.0"),
        (lambda: LearnedSigmaELBO(free_bits=-1), "free_bits: expected a finite number of at least 0, got -1"),
        (lambda: LearnedSigmaELBO(capacity=-3), "capacity: expected a finite number of at least 0, got -3"),
        (lambda: DecoupledELBO(momentum=1.5), r"momentum: expected a number in \(0, 1\], got 1.5"),
        (lambda: DecoupledELBO(sigma=0.5, momentum=0.1), "momentum: a constant σ has no running average"),
        (lambda: DecoupledELBO(momentum=0), r"momentum: expected a number in \(0, 1\], got 0"),
        (lambda: LearnedSigmaELBO(channels=True), "channels: expected None or a positive integer, got True"),
        (lambda: LearnedSigmaELBO(channels=0), "channels: expected None or a positive integer, got 0"),
        (lambda: LearnedSigmaELBO(init=float("nan")), "init: expected a finite number, got nan"),
        (lambda: Constant(-1.0), "must be positive and finite.*got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_optimal_is_not_constant() -> None:
    with pytest.raises(TypeError, match="per_image is True or False, got"):
        Optimal(0.1)  # type: ignore[arg-type]


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match="backend: unknown name 'cuda-graphs'; the backends are 'triton', 'cuda', 'cpp', 'reference'"
    ):
        fused_elbo.backend("cuda-graphs")


def test_a_backend_that_cannot_serve_the_device(cpp: None) -> None:
    meta = torch.zeros(4, 5, device="meta")
    with pytest.raises(ValueError, match='"cpp" was asked for, which serves CPU tensors, but the tensors are on meta'):
        gaussian_kl(meta, meta)


# ------------------------------------------------------------------------------------- advice that is tried as given


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.rand(3), torch.rand(2), torch.rand(3), torch.rand(1)], layout=layout)


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.rand(4, 3).to_sparse(),
        lambda: torch.rand(4, 3).to_sparse_csr(),
        lambda: torch.rand(4, 3).to_sparse_csc(),
        lambda: torch.rand(4, 4).to_sparse_bsr((2, 2)),
        lambda: torch.rand(4, 3).to_mkldnn(),
        lambda: nested(torch.strided),
        lambda: nested(torch.jagged),
    ],
    ids=["coo", "csr", "csc", "bsr", "mkldnn", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|CSR|CSC|BSR)", "ignore:Sparse:UserWarning")
def test_a_tensor_that_is_not_dense(build: Callable[[], torch.Tensor]) -> None:
    recon = build()
    with pytest.raises(TypeError, match=r"recon: expected a dense tensor, got .*layout") as caught:
        decoupled_elbo(recon, recon, Z, Z)
    advice = re.search(r"use (torch.nested.to_padded_tensor\(recon, 0.0\)|recon.to_dense\(\))", str(caught.value))
    assert advice
    dense = eval(advice[1])
    assert torch.isfinite(decoupled_elbo(dense, dense + 1, Z, Z).loss)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 8, 8), (4, 8, 3), (4, 3, 3)], ids=str)
def test_a_1d_log_sigma_along_another_dimension(shape: tuple[int, ...]) -> None:
    """Each way that the message names gives one σ for each of that dimension."""
    recon, log_sigma = torch.rand(shape), torch.tensor([-1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="log_sigma: a 1-D") as caught:
        gaussian_nll(recon, 0 * recon, log_sigma=log_sigma)
    ways = re.findall(r"(log_sigma\.reshape\([\d, ]*\)) is one for each of dimension (\d)", str(caught.value))
    assert len(ways) == shape.count(3)
    for way, dimension in ways:
        spelled = eval(way)
        assert spelled.shape[int(dimension)] == 3
        assert gaussian_nll(recon, 0 * recon, log_sigma=spelled).isfinite()


@pytest.mark.parametrize("shape", [(4, 4), (4, 2, 4)], ids=str)
def test_a_batch_of_as_many_as_features(shape: tuple[int, ...]) -> None:
    """(B,) is one per image, always; where it could be taken for (D,) the user is asked, and both ways are silent."""
    recon, log_sigma = torch.rand(shape), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    with pytest.warns(UserWarning, match="one per image, and recon of .* has as many features") as caught:
        got = gaussian_nll(recon, 0 * recon, log_sigma=log_sigma)
    ways = re.findall(r"log_sigma\.reshape\([-\d, ]*\)", str(caught[0].message))
    spelled = [eval(way, {"log_sigma": log_sigma}) for way in ways]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_image, per_feature = (gaussian_nll(recon, 0 * recon, log_sigma=way) for way in spelled)
        gaussian_nll(recon[:3], 0 * recon[:3], log_sigma=log_sigma[:3])
        gaussian_nll(torch.rand(4, 3, 4, 4), torch.rand(4, 3, 4, 4), log_sigma=log_sigma)  # a σ per column: nobody's
    torch.testing.assert_close(got, per_image)
    along = log_sigma.reshape(*[1] * (len(shape) - 1), 4)
    torch.testing.assert_close(per_feature, gaussian_nll(recon, 0 * recon, log_sigma=along.expand(shape).contiguous()))
    assert not torch.isclose(per_image, per_feature)
