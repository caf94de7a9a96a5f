"""Each recipe is its trainer's loss: the value, up to the constant that its docstring names, and all gradients."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import recipes_theirs as theirs
import torch
from on_examples import ROOT, one_thread  # noqa: F401

# isort: split
from recipes import latent_diffusion, rates, sequences, squared_error
from torch import Tensor

from fused_elbo import ELBO, FreeNats, decoupled_elbo, decoupled_elbo_backward, gaussian_kl

RECIPES: dict[str, Callable[..., Any]] = {
    name: recipe
    for module in (latent_diffusion, squared_error, sequences, rates)
    for name, recipe in inspect.getmembers(module, inspect.isfunction)
    if recipe.__module__ == module.__name__ and name != "adversarial"
}
ALONE = [name for name, recipe in RECIPES.items() if recipe.__annotations__["return"] == "ELBO"]  # one call, no more
CLIPS = {"open_sora", "open_sora_plan", "vidtok"}
CLAMPED = {"latent_diffusion", "diffusers", "open_sora", "open_sora_plan", "va_vae", "pyg_vgae"}
STEPS = {"planet", "dreamer", "torchrl_dreamer", "dreamer_v2"}
TABLES = {"scvi", "tvae"}
HIERARCHIES = {"vdvae", "nvae", "ladder_vae"}
B, D, K = 3, 48, 8  # the shapes below all have these
PI = math.log(math.pi) / 2
# What ours is more than theirs. Everything else is the same number.
MORE = {
    **dict.fromkeys(("diffusers", "beta_vae", "disentanglement_lib", "world_models_experiments"), D * PI),
    **dict.fromkeys(("pytorch_vae", "pytorch_vae_beta", "lightning_bolts", "cryodrgn", "pyod"), PI),
    "torchrl_dreamer": D // 4 * PI,
    "world_models": B * D * PI,
    "disvae": D * (PI - math.log(255) / 2),
    "disvae_laplace": D * math.log(2 / 3),
    "mosaic": -2.0,
}


def shapes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of x and of mu."""
    if name in CLIPS:
        return (B, 3, 4, 2, 2), (B, 2, 2, 2, 1)
    if name in STEPS | {"act", "lerobot_act"}:
        return (B, 4, D // 4), (B, 4, K // 4) if name in STEPS else (B, K)
    if name == "stable_audio":
        return (B, D), (B, 2, 4)
    return ((B, D), (B, K)) if name in TABLES | {"pyg_vgae"} else ((B, 3, 4, 4), (B, K))


def arguments(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What the recipe takes, by the names of its parameters; leaves where there may be a gradient."""
    torch.manual_seed(0)
    data, latent = shapes(name)
    x = torch.rand(data)
    spread = torch.linspace(0.3, 1.5, B).reshape(-1, *[1] * (len(latent) - 1))  # some rates below a limit, some above
    every: dict[str, Any] = {
        "recon": (x + 0.3 * torch.randn(data)).clamp(0.01, 0.99),
        "mu": spread * torch.randn(latent),
        "logvar": spread * torch.randn(latent),
        "std": torch.rand(latent) + 0.2,
        "log_std": torch.randn(latent) / 2,
        "var": torch.rand(latent) + 0.2,
        "prior_mu": torch.randn(latent),
        "prior_std": torch.rand(latent) / 2 + 0.3,
        "lpips": torch.rand(B * data[2] if name in CLIPS else B),
        "lpips_mean": torch.rand(()),
        "s": torch.tensor(-0.4),
        "log_sigma": torch.tensor(-5.0),
        "px_r": torch.randn(D) / 2,
        "sigma": torch.rand(D) / 2 + 0.5,
    }
    if name in CLAMPED:
        every["logvar"].view(-1)[0] = -31.0
        every["log_std"].view(-1)[0] = 10.5
    if name in HIERARCHIES:
        levels = [(B, 2, 1, 1), (B, 2, 2, 2)]
        keys = ("mu", "logvar", "log_std", "prior_mu", "prior_logvar", "prior_log_std")
        every = {key: [torch.randn(shape) / 2 for shape in levels] for key in keys}
        every |= {key: [torch.rand(shape) + 0.4 for shape in levels] for key in ("std", "prior_std")}
    constants = {
        "x": x.to(dtype),
        "pixel_weight": (torch.rand(1, *data[1:]) + 0.5).to(dtype),
        "alpha": torch.tensor([1.0, 4.0], dtype=dtype),
        "continuous": torch.arange(D) % 3 > 0,
        "is_pad": torch.arange(4) >= torch.tensor([[4], [3], [1]]),
    }
    given = {key: leaf(value, dtype) for key, value in every.items()} | constants
    return {key: given[key] for key in inspect.signature(RECIPES[name]).parameters if key in given}


def leaf(value: Any, dtype: torch.dtype) -> Any:
    return [leaf(v, dtype) for v in value] if isinstance(value, list) else value.to(dtype).requires_grad_()


def double(value: Any) -> Any:
    """The same numbers, as leaves of their own."""
    if isinstance(value, list):
        return [double(v) for v in value]
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def leaves(given: dict[str, Any]) -> list[Tensor]:
    flat = [t for value in given.values() for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if t.requires_grad]


def value_and_gradients(loss: ELBO | Tensor, given: dict[str, Any]) -> list[Tensor]:
    loss = loss.loss if isinstance(loss, ELBO) else loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves(given))]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-6)], ids=["fp64", "fp32"])
def test_recipe_is_its_trainers_loss(name: str, dtype: torch.dtype, tolerance: float) -> None:
    given = arguments(name, dtype)
    ours = value_and_gradients(RECIPES[name](**given), given)
    wide = {key: double(value) for key, value in given.items()}
    expected = value_and_gradients(getattr(theirs, name)(**wide), wide)
    expected[0] = expected[0] + MORE.get(name, 0.0)
    for of_ours, of_theirs in zip(ours, expected, strict=True):
        assert of_theirs.abs().max() > 0
        torch.testing.assert_close(of_ours.double(), of_theirs, rtol=0, atol=tolerance * float(of_theirs.abs().max()))


@pytest.mark.parametrize("name", ALONE)
def test_one_call_may_be_loss_and_backward_in_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(name)
    expected = value_and_gradients(RECIPES[name](**given), given)
    monkeypatch.setattr(sys.modules[RECIPES[name].__module__], "decoupled_elbo", decoupled_elbo_backward)
    loss = RECIPES[name](**given).loss
    for ours, of_two in zip([loss, *[t.grad for t in leaves(given)]], expected, strict=True):
        torch.testing.assert_close(ours, of_two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reached", [False, True])
def test_delayed_clamp_of_torchrl(reached: bool) -> None:
    given = arguments("torchrl_dreamer")
    if reached:  # the mean rate is below the free nats
        given |= {"std": given["prior_std"], "mu": given["prior_mu"]}
    of_steps = theirs.kl_between(*(given[key] for key in ("mu", "std", "prior_mu", "prior_std")))
    assert bool(of_steps.mean() < 3) == reached
    expected = ((given["recon"] - given["x"]) ** 2).sum(-1).mean() + of_steps.mean().clamp(min=3)
    loss = sequences.torchrl_dreamer(**given, per="batch").loss - MORE["torchrl_dreamer"]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def autoencoder(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    encoder = torch.nn.Conv2d(3, 2 * 2, 2, stride=2, dtype=dtype)
    return encoder, torch.nn.ConvTranspose2d(2, 3, 2, stride=2, dtype=dtype), torch.rand(B, 3, 4, 4, dtype=dtype)


def test_adversarial_term_balances_the_gradients_of_the_last_layer() -> None:
    encoder, decoder, x = autoencoder(torch.float64)
    mu, logvar = encoder(x).chunk(2, dim=1)
    recon = decoder(mu)
    lpips, g_loss = ((recon - x) ** 2).mean((1, 2, 3)), -recon.tanh().mean()
    elbo = latent_diffusion.latent_diffusion(recon, x, mu, logvar, lpips)
    loss = elbo.loss + latent_diffusion.adversarial(elbo.distortion, g_loss, decoder.weight)

    nll = theirs.nll((recon - x).abs(), lpips, 0.0)
    last = [torch.autograd.grad(t, decoder.weight, retain_graph=True)[0].norm() for t in (nll, g_loss)]
    balance = (0.5 * last[0] / (last[1] + 1e-4)).detach()
    expected = theirs.latent_diffusion(recon, x, mu, logvar, lpips) + balance * g_loss
    parameters = [*encoder.parameters(), *decoder.parameters()]
    gradients = torch.autograd.grad(expected, parameters, retain_graph=True)
    loss.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_in_autocast_nothing_is_rounded_but_the_tensors() -> None:
    encoder, decoder, x = autoencoder(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = encoder(x).detach().requires_grad_()
        mu, logvar = moments.chunk(2, dim=1)
        recon = decoder(mu).detach().requires_grad_()
        lpips = torch.rand(B, requires_grad=True)
        elbo = latent_diffusion.latent_diffusion(recon, x, mu, logvar, lpips)
    assert (recon.dtype, moments.dtype, elbo.loss.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    recon64, moments64, lpips64 = map(double, (recon, moments, lpips))
    expected = theirs.latent_diffusion(recon64, x.double(), *moments64.chunk(2, dim=1), lpips64)
    torch.testing.assert_close(elbo.loss.double(), expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(elbo.loss, (recon, moments, lpips))
    exact = torch.autograd.grad(expected, (recon64, moments64, lpips64))
    for ours, of_theirs, rounding in zip(gradients, exact, (2**-8, 2**-8, 1e-6), strict=True):  # two are bf16
        torch.testing.assert_close(ours.double(), of_theirs, rtol=rounding, atol=0)


def test_in_bf16_a_third_of_a_small_kl_is_lost() -> None:
    torch.manual_seed(0)
    mu, logvar = (0.03 * torch.randn(2, 4, 4, 32, 32)).bfloat16()
    exact = theirs.kl(mu.double(), logvar.double())
    assert float((theirs.kl(mu, logvar).sum() / exact.sum() - 1).abs()) > 0.3
    torch.testing.assert_close(gaussian_kl(mu, logvar, reduction="none").double(), exact, rtol=1e-6, atol=0)


def test_readme_has_the_losses_that_it_says_it_replaces() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| `([^`]+kl[^`]+)` \| `([^`]+)` \|$", (ROOT / "README.md").read_text("utf-8"), flags=re.M
    )
    assert len(rows) == 5
    given = arguments("latent_diffusion")
    valid = torch.arange(B * 3 * 4).reshape(B, 3, 4) % 3 > 0  # as many in each sample: β of a count is exact in fp32
    given |= {"kl": theirs.kl(given["mu"], given["logvar"]), "valid": valid}
    names = {**given, "B": B, "D": D, "w": 0.1, "F": torch.nn.functional, "FreeNats": FreeNats}
    names["decoupled_elbo"] = decoupled_elbo
    for replaced, options in rows:
        wanted = [given[name] for name in ("recon", "mu", "logvar", *["lpips"] * ("lpips" in replaced))]
        ours = torch.autograd.grad(eval(f"decoupled_elbo(recon, x, mu, logvar, {options}).loss", names), wanted)
        expected = torch.autograd.grad(eval(replaced, names), wanted, retain_graph=True)
        for of_ours, of_theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-14)


def test_the_page_has_each_recipe_and_what_stands_in_its_call() -> None:
    page = (ROOT / "examples" / "recipes" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S.*) \| \[`(\w+)`\]\((\w+)\.py\) \| (.*) \|$", page, flags=re.M)
    assert sorted(name for _, name, _, _ in rows) == sorted(RECIPES)
    trainers: set[str] = set()
    for row, name, file, cell in rows:
        source = " ".join(inspect.getsource(RECIPES[name]).split())
        named = re.findall(r"[\w.-]+/[\w.-]+", source.partition(":")[2].partition('"""')[2].partition(" Loss:")[0])
        assert RECIPES[name].__module__.endswith(file)
        for trainer in re.findall(r"[\w.-]+/[\w.-]+", row):
            assert trainer in named, name
            trainers.add(trainer)
        for code in re.findall(r"`([^`]+)`", cell):
            assert code in source, name
    for said in (page, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"{len(trainers)} trainers" in said
    assert f"{len(ALONE)} of the {len(RECIPES)} recipes" in page
