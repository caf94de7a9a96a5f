"""The CUDA library: how it is built, what is said where it cannot serve, and its place behind Triton.

There need be no GPU: nvcc compiles for one that is not here, and operators on the CPU stand in for the library's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshop import Workshop, finish, python

from fused_elbo import __main__ as doctor
from fused_elbo import backends, build_spec, build_tools
from fused_elbo import build as builder
from fused_elbo.backends import cuda, triton
from fused_elbo.backends.base import BackendUnavailable, Status

NVCC = next((path for place in (None, "/usr/local/cuda/bin") if (path := shutil.which("nvcc", path=place))), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine (PATH, /usr/local/cuda)")


def architectures(monkeypatch: pytest.MonkeyPatch, listed: str) -> tuple[str, ...]:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    return build_spec.architectures()


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("9.0", ("9.0",)),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 9.0a  10.0f;", ("8.0", "9.0a", "10.0f")),
        ("Ampere;8.0", ("8.0", "8.6+PTX")),
    ],
)
def test_architectures_as_pytorch_writes_them(
    monkeypatch: pytest.MonkeyPatch, listed: str, found: tuple[str, ...]
) -> None:
    assert architectures(monkeypatch, listed) == found


@pytest.mark.parametrize("listed", ["Amper", "90", "sm_90", "9.0-PTX", "9.0,8.0"])
def test_what_is_no_architecture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"TORCH_CUDA_ARCH_LIST: '{listed}' is no architecture") as caught:
        architectures(monkeypatch, f"8.0 {listed}")
    assert "10.0+PTX" in caught.value.remedy


def test_architectures_of_the_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert architectures(monkeypatch, "") == ("8.6", "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"):
        architectures(monkeypatch, " ")


def test_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0a+PTX")
    spec = builder.cuda_spec()
    assert [flag for flag in spec.cflags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100a,code=compute_100a",
    ]
    assert spec.label == "sm_80+sm_100a+compute_100a"
    assert {"-DUSE_CUDA", "-fmad=false", "-std=c++17"} <= set(spec.cflags)
    assert "-cudart=static" in spec.ldflags


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop: Workshop) -> None:
    def install(folder: str) -> Path:
        program = tmp_path / folder / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.1, V99.1.2\n")
        program.chmod(0o755)
        return program

    def found() -> Path:
        return Path(build_tools.find_compiler("CUDA", build_tools.Settings.read()).command[0])

    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setattr(build_tools, "_USUAL_CUDA", str(tmp_path / "usual"))
    with pytest.raises(BackendUnavailable, match="nvcc was not found") as caught:
        found()
    assert "CUDA_HOME" in caught.value.remedy
    for folder in ("usual", "on_path", "cuda_path", "cuda_home"):  # each comes before those before it
        program = install(folder)
        assert found() == program
    compiler = build_tools.find_compiler("CUDA", build_tools.Settings.read())
    assert compiler.command[1:] == ("-ccbin", str(shop.cxx))
    assert str(compiler) == "nvcc, release 99.1, V99.1.2"


KERNEL = """
    #include <torch/csrc/inductor/aoti_torch/c/shim.h>
    #include <torch/csrc/stable/library.h>
    #include <torch/csrc/stable/ops.h>
    #include <torch/csrc/stable/tensor.h>

    __global__ void fill(float* p) { p[threadIdx.x] = 1.0f; }

    torch::stable::Tensor ones(torch::stable::Tensor x) {
      void* stream;
      aoti_torch_get_current_cuda_stream(-1, &stream);
      auto y = torch::stable::empty_like(x);
      fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<float*>(y.data_ptr()));
      return y;
    }
    STABLE_TORCH_LIBRARY_FRAGMENT(fused_elbo_test_cuda, m) { m.def("ones(Tensor x) -> Tensor"); }
    STABLE_TORCH_LIBRARY_IMPL(fused_elbo_test_cuda, CUDA, m) { m.impl("ones", TORCH_BOX(&ones)); }
"""


@needs_nvcc
def test_nvcc_builds_it_without_a_gpu_and_a_cpu_torch_is_told_why_it_does_not_load(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    shop.write("op.cu", KERNEL)
    spec = replace(builder.cuda_spec(), parts=(build_spec.Part("cuda", ("op.cu",)),), root=shop.root)
    target = builder.build(spec)
    assert b"sm_90" in target.library.read_bytes()
    assert "nvcc, release" in str(target.compiler)
    if torch.version.cuda is None:
        monkeypatch.setattr(cuda.library, "_spec", lambda: spec)
        monkeypatch.setattr(cuda.library, "_check", lambda: None)
        with pytest.raises(BackendUnavailable, match=r"fused_elbo_cuda\.so does not load: .*cuda_stream"):
            cuda.require()


@needs_nvcc
def test_nvcc_s_errors_are_shown(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    shop.write("op.cu", "__global__ void f() { this_is_why(); }\n")
    spec = replace(builder.cuda_spec(), parts=(build_spec.Part("cuda", ("op.cu",)),), root=shop.root)
    with pytest.raises(builder.BuildFailed, match="this_is_why") as caught:
        builder.build(spec)
    assert "CUDA_HOME" in caught.value.remedy


# ------------------------------------------------------------------------------------------- what it says of itself


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cuda._fits(label) == fits


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
    from fused_elbo import backend, backends, decoupled_elbo, ops
    from fused_elbo.backends import cuda

    # The library's operators, on the CPU, by the reference; `called` sees them run.
    library, called = torch.library.Library("fused_elbo_cuda", "DEF"), []
    for name, schema in ops.SCHEMAS.items():
        def implementation(*args, name=name):
            called.append(name)
            return getattr(ops.ByReference, name)(*args)
        library.define(name + schema)
        library.impl(name, implementation, "CPU")
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
    for name in ops.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_elbo::{name}", "CUDA")
    print("right")
"""


def test_its_operators_serve_when_asked_for() -> None:
    out, _ = finish(python(STAND_IN))
    assert out == "right\n"
