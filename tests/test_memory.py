"""What the loss keeps and how it allocates: nothing for backward but references and O(B); large pages for gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import MODES, Call
from torch import Tensor

from fused_elbo import decoupled_elbo

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
    inputs = [*call.tensors, *call.leaves(), *[v for v in call.kw.values() if isinstance(v, Tensor)]]
    own = saved.keys() - {t.untyped_storage().data_ptr() for t in inputs}
    assert (
        sum(saved[k] for k in own) <= 3 * 6 * 4
    )  # S, KL and its clamped form in fp32: of five samples, and their sums
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
