"""The CUDA backend: what is said where it cannot serve, and its place behind Triton.

There need be no GPU: operators on the CPU stand in for the library's.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cuda_shim
import pytest
import torch
from workshop import finish, needs_compiler, python

from fused_elbo import __main__ as doctor
from fused_elbo import backends
from fused_elbo.backends import cuda, triton
from fused_elbo.backends.base import Status
from fused_elbo.errors import BackendUnavailable


@pytest.mark.parametrize(
    ("hip", "version", "available", "reason"),
    [
        ("6.4", None, True, "for NVIDIA GPUs, and this PyTorch is built for AMD's"),
        (None, None, False, "is built without CUDA"),
        (None, "13.0", False, "no GPU is visible"),
    ],
)
def test_why_it_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, unloaded: None, hip: str | None, version: str | None, available: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    status = cuda.status(build=True)
    assert (status.name, status.ready) == ("cuda", False)
    assert reason in status.detail
    with pytest.raises(BackendUnavailable, match=reason):
        backends.backend("cuda").__enter__()
    assert backends.forced != "cuda"


@pytest.mark.parametrize(
    ("capability", "label", "fits"),
    [
        ((9, 0), "sm_80+sm_90", True),
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((10, 0), "sm_80+sm_90", False),
        ((10, 0), "sm_80+compute_90", True),
        ((8, 0), "sm_90+compute_90", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100", True),
    ],
)
def test_which_gpus_a_packaged_library_fits(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], label: str, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    assert cuda.library.fits(label) == fits


def test_a_packaged_library_fits_every_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert cuda.library.fits("sm_75+sm_90")
    assert not cuda.library.fits("sm_80+compute_90")


def test_kernels_that_do_not_run_leave_the_place_to_others(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    """A driver that is too old, say. Asked once: what a launch costs is not paid again."""
    launches: list[object] = []

    def stats(*args: object) -> None:
        launches.append(args)
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(cuda, "device", "cpu")
    monkeypatch.setattr(cuda.library, "_load", lambda: "a library")
    monkeypatch.setattr(cuda, "_operators", SimpleNamespace(stats=stats))
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="do not run here: CUDA driver version is insufficient"):
            cuda.require()
    assert not cuda.status(build=True).ready
    assert len(launches) == 1


CHECK = """
#include <cuda_runtime.h>

#include <iostream>

#include "cuda/launch.h"

const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

int main() {
  try {
    elbo::check(cudaErrorLaunchFailure, "elbo_stats");
  } catch (const std::runtime_error& error) {
    std::cout << error.what();
  }
}
"""


@needs_compiler
def test_an_error_of_cuda_is_told_as_pytorch_tells_it(tmp_path: Path) -> None:
    """Trainers look for "CUDA" and "out of memory"."""
    (tmp_path / "check.cpp").write_text(CHECK)
    includes = [f"-I{cuda_shim.HERE}", f"-I{cuda_shim.CSRC}", f"-I{Path(torch.__file__).parent / 'include'}"]
    command = [*shlex.split(cuda_shim.compiler() or ""), "-std=c++17", *includes, "check.cpp", "-o", "check"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=True).stdout
    assert said == "CUDA error: out of memory (fused_elbo: elbo_stats)"


# ------------------------------------------------------------------------------------------------ the order of choice


def refuse(reason: str) -> Callable[[], None]:
    def load() -> None:
        raise BackendUnavailable(reason)

    return load


def test_triton_then_cuda_then_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(triton, "load", lambda: asked.append("triton"))
    monkeypatch.setattr(cuda, "load", lambda: asked.append("cuda"))
    assert backends.load_for("cuda")
    assert asked == ["triton"]
    monkeypatch.setattr(triton, "load", refuse("no Triton."))
    assert backends.load_for("cuda")
    assert asked == ["triton", "cuda"]
    monkeypatch.setattr(cuda, "load", refuse("no nvcc."))
    with pytest.warns(RuntimeWarning, match=r"no Triton\. And no nvcc\."):
        assert not backends.load_for("cuda")
    assert not backends.load_for("cuda")  # a second warning would be an error


def test_a_triton_that_cannot_be_imported_is_none(tmp_path: Path) -> None:
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')\n")
    out, _ = finish(
        python(
            f"""
            import sys
            sys.path.insert(0, {str(tmp_path)!r})
            from fused_elbo import backends
            print(backends.triton.runs_on_cpu(), backends.triton.status())
            """
        )
    )
    assert out.startswith("None Status(name='triton', ready=False, detail='Triton cannot be imported: libtriton.so")


def test_a_gpu_too_old_for_triton_is_cuda_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(triton, "load", triton.load.__wrapped__)  # the real one, not what it remembers
    monkeypatch.setattr(triton, "operators", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(cuda, "load", lambda: asked.append("cuda"))
    assert backends.load_for("cuda")
    assert asked == ["cuda"]


@pytest.mark.parametrize(
    ("ready", "line"),
    [
        (("triton", "cuda"), "GPU tensors are served by: triton"),
        (("cuda",), "GPU tensors are served by: cuda"),
        ((), "GPU tensors are served by: reference"),
    ],
)
def test_the_doctor_says_who_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ready: tuple[str, ...], line: str
) -> None:
    rows = [Status(name, name in ready or name == "reference", "") for name in backends.NAMES]
    monkeypatch.setattr(doctor, "statuses", lambda: rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    doctor.main()
    assert capsys.readouterr().out.endswith(f"\n{line}\nCPU tensors are served by: reference\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.main()
    assert "GPU tensors: PyTorch sees no GPU here\n" in capsys.readouterr().out


STAND_IN = """
    import warnings, torch
    from fused_elbo import backend, backends, decoupled_elbo, reference
    from fused_elbo.backends import cuda
    from fused_elbo.operators import elbo

    # The library's operators, on the CPU, by the reference; `called` sees them run.
    library, called = torch.library.Library(cuda.NAMESPACE, "IMPL"), []
    for name, kernel in elbo.kernels_of(reference).items():
        def seen(*args, name=name, kernel=kernel):
            called.append(name)
            return kernel(*args)
        library.impl(name, seen, "CPU")
    cuda.device, cuda.library.loaded = "cpu", "a stand-in"

    torch.manual_seed(0)
    tensors = [torch.rand(4, 3, 5).requires_grad_() for _ in range(4)]

    def step(*tensors):
        return torch.autograd.grad(decoupled_elbo(*tensors, beta=4.0).loss, tensors)

    with backend("reference"):
        expected = step(*tensors)

    def check(got):
        torch.testing.assert_close(got, expected)
        assert called == ["forward", "grads"], called
        called.clear()

    with backend("cuda"):
        check(step(*tensors))
        compiled = torch.compile(lambda *t: decoupled_elbo(*t, beta=4.0).loss, fullgraph=True, backend="aot_eager")
        check(torch.autograd.grad(compiled(*tensors), tensors))
        torch.vmap(lambda *t: decoupled_elbo(*t).loss)(*(torch.rand(2, 4, 5) for _ in range(4)))
        assert called == ["forward"] * 2, called
        try:
            decoupled_elbo(*(t.to("meta") for t in tensors))
        except ValueError as error:
            assert '"cuda" was asked for, which serves CUDA tensors' in str(error)

    # And behind fused_elbo's own operators.
    cuda.load()
    assert backends.dispatched["cuda"] == "cuda"
    for name in elbo.NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_elbo::{name}", "CUDA")
    print("right")
"""


def test_its_operators_serve_when_asked_for() -> None:
    out, _ = finish(python(STAND_IN))
    assert out == "right\n"
