"""What the loss keeps and how it allocates: nothing for backward but references and O(B); large pages for gradients;
and what is said where memory ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import MODES, Call
from torch import Tensor
from workshop import finish, python

from fused_elbo import decoupled_elbo, log_aggregate_posterior

SMAPS = Path("/proc/self/smaps")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_saved_but_references(mode: str) -> None:
    call = Call(mode, batch=5, data=(3, 16, 16), latent=(7,))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(decoupled_elbo)
    values = [getattr(v, "nats", v) for v in call.kw.values()]
    inputs = [*call.tensors, *call.leaves(), *[v for v in values if isinstance(v, Tensor)]]
    own = saved.keys() - {t.untyped_storage().data_ptr() for t in inputs}
    rows = 4 if "weight" in call.kw else 3  # A, KL and its clamped form, in fp32, and the sum of the weights
    assert sum(saved[k] for k in own) <= rows * 6 * 4  # of five samples, and their sums
    assert own


def flags_at(address: int) -> str:
    """The kernel's flags of the mapping that holds an address."""
    holds = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(found[1], 16) <= address < int(found[2], 16)
        elif holds and line.startswith("VmFlags:"):
            return line
    raise LookupError(hex(address))


@pytest.mark.skipif(not (SMAPS.exists() and HUGE_PAGES.exists()), reason="needs Linux with transparent huge pages")
def test_large_gradients_ask_for_huge_pages(cpp: None) -> None:
    recon = torch.zeros(16, 1 << 20, requires_grad=True)  # 64 MiB: above malloc's largest threshold, so a fresh mapping
    latents = torch.zeros(16, 2)
    (g,) = torch.autograd.grad(decoupled_elbo(recon, recon.detach() + 1, latents, latents).loss, recon)
    middle = g.data_ptr() + (32 << 20)
    assert " hg" in flags_at(middle)
    assert " hg" not in flags_at(recon.data_ptr() + (32 << 20))


needs_limit = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: /proc and RLIMIT_AS")

# Everything is loaded and made first; what comes after allow() has so many MiB more than is taken now.
LIMITED = """
    import resource, torch
    from fused_elbo import backend, decoupled_elbo
    latents = torch.zeros(64, 2)
    def leaf(shape):
        return torch.rand(shape, requires_grad=True)
    def step(recon):
        z = latents[:len(recon)]
        return decoupled_elbo(recon, recon.detach()[:1].expand_as(recon), z, z).loss
    def allow(mib):
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (mib << 20),) * 2)
    with backend("cpp"):
        step(leaf((2, 3))).backward()
"""


@needs_limit
@pytest.mark.torch_versions
@pytest.mark.parametrize(
    "call",
    ["step(whole).backward()", "step(columns)", "step(columns.detach().requires_grad_()).backward()"],
    ids=["gradient", "copy", "gradient of no dense tensor"],
)
def test_out_of_memory_says_so(cpp: None, call: str) -> None:
    """In PyTorch's words, by which trainers and accelerate's find_executable_batch_size know it: as of its own loss."""
    script = (
        LIMITED
        + f"""
    whole, columns = leaf((16, 1000, 1000)), torch.rand(16, 1000, 2000)[..., ::2]
    forgotten = leaf((16, 1000, 1000))
    allow(40)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64000000 bytes"
    for call in (lambda: torch.nn.functional.mse_loss(forgotten, whole.detach()).backward(), lambda: {call}):
        try:
            call()
        except RuntimeError as error:
            print(len(error.args), words in str(error))
    """
    )
    out, _ = finish(python(script))
    assert out == "1 True\n1 True\n"


@needs_limit
def test_what_is_kept_for_later_is_given_up_first(cpp: None) -> None:
    """A pool of gradients that nobody uses is no reason to run out of memory."""
    script = (
        LIMITED
        + """
    small, large = leaf((16, 1000, 1000)), leaf((17, 1000, 1000))
    step(small).backward()
    small.grad = None
    allow(40)
    step(large).backward()
    print(large.grad.sum().isfinite().item())
    """
    )
    out, _ = finish(python(script))
    assert out == "True\n"


@needs_limit
def test_the_aggregate_makes_no_tensor_of_all_pairs(cpp: None) -> None:
    """1024 × 1024 × 128 numbers would be 512 MiB."""
    script = (
        LIMITED
        + """
    from fused_elbo import log_aggregate_posterior
    def step(z, mu, logvar):
        joint, marginals = log_aggregate_posterior(z, mu, logvar)
        (joint.sum() - marginals.sum()).backward()
    step(*(leaf((64, 128)) for _ in range(3)))
    leaves = [leaf((1024, 128)) for _ in range(3)]
    allow(64)
    step(*leaves)
    print(all(t.grad.isfinite().all() for t in leaves))
    """
    )
    out, _ = finish(python(script))
    assert out == "True\n"


@pytest.mark.usefixtures("backend")
def test_the_aggregate_saves_its_sums_alone() -> None:
    z, mu, logvar = (torch.randn(20, 7, requires_grad=True) for _ in range(3))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        log_aggregate_posterior(z, mu, logvar)
    own = saved.keys() - {t.untyped_storage().data_ptr() for t in (z, mu, logvar)}
    assert sum(saved[k] for k in own) == 4 * (20 + 20 * 7)
