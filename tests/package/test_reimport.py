"""fused_elbo imported a second time in one process, as Spyder does with a user's modules, and tests that isolate."""

from __future__ import annotations

from pathlib import Path

import pytest
from workshop import finish, needs_compiler, python

AGAIN = """
    import gc, sys, torch

    def use(package):
        mu, logvar = torch.full((2, 3), 2.0, requires_grad=True), torch.zeros(2, 3)
        rates = [package.gaussian_kl(mu, logvar), package.gaussian_kl([mu], [logvar])]
        rates += torch.vmap(package.gaussian_kl)(mu.detach()[None], logvar[None])
        sum(rates[:2]).backward()
        with package.backend("reference"):
            rates.append(package.gaussian_kl(mu, logvar))
        torch.testing.assert_close([rate.item() for rate in rates], [6.0] * 4)
        torch.testing.assert_close(mu.grad, torch.full((2, 3), 2.0))

    packages = []
    for _ in range(3):
        import fused_elbo
        packages.append(fused_elbo)
        for package in packages:  # those of before still work for who holds on to them
            use(package)
        for name in [name for name in sys.modules if name.split(".")[0] == "fused_elbo"]:
            del sys.modules[name]
    assert len(set(map(id, packages))) == 3
    del packages[:], package, fused_elbo
    gc.collect()
    import fused_elbo
    use(fused_elbo)
    compiled = torch.compile(fused_elbo.gaussian_kl, backend="aot_eager", fullgraph=True)
    print(compiled(torch.ones(2, 3), torch.zeros(2, 3)))
"""


@needs_compiler
@pytest.mark.torch_versions
def test_with_the_compiled_kernels() -> None:
    out, err = finish(python(AGAIN))
    assert (out, err) == ("tensor(1.5000)\n", "")


@pytest.mark.torch_versions
def test_without(tmp_path: Path) -> None:
    """Where nothing but Python's registrations keeps the operators alive."""
    out, err = finish(python(AGAIN, PATH=str(tmp_path), CXX="", FUSED_ELBO_CACHE_DIR=f"{tmp_path}/cache"))
    assert out == "tensor(1.5000)\n"
    assert err.count("Warning") == 4  # once for each import
