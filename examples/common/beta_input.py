"""One model for every β: its objective, with σ chosen so that β and σ stay decoupled, or not.

A closed-form σ shared by a batch of mixed β couples them again. Its loss D/2·log Σ_i SSE_i + mean β_i·rate_i has the
gradient of mean (SSE_i + 2β_iσ̄²·rate_i)/(2σ̄²), with σ̄² the error of the mixture: sample i trains at the level β_iσ̄², as
under SSE + β'·rate, and not at β_iσ²(β_i). Hence the modes of σ below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_elbo import ELBO, decoupled_elbo

from .conditioning import BetaRange
from .data import to_unit
from .readings import HALF
from .training import EVAL_SEED

SIGMA = {
    "network": "log sigma of each sample, from a small network of log beta (a valid bound)",
    "batch": "the closed form of a batch of mixed beta, which couples sigma and beta again",
    "image": "the closed form of each image (no bound: sigma sees x)",
    "one-beta": "the closed form of a batch in which all samples have one beta",
    "half": "constant: squared error + beta * rate",
}
CONDITION = {"log-beta": "log beta", "level": "log beta * sigma², with sigma from the network"}
EVALUATION = 8  # β in the fixed set of validation
AGREE = 100  # readings at most until level and error agree; each brings them nearer by βK/D or more, for K latents


class LogSigma(nn.Module):
    """log σ [B] from n [B]. It starts at `initial` for every β."""

    def __init__(self, initial: float, hidden: int = 32) -> None:
        super().__init__()
        self.initial = initial
        last = nn.Linear(hidden, 1)
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, n: Tensor) -> Tensor:
        return self.initial + self.net(n[:, None])[:, 0]


class BetaInputObjective(nn.Module):
    """A batch -> its ELBO at β of its own drawing: one for each sample, or with "one-beta" one for all.

    `model(x, n)` returns a VAEOutput; n [B] tells it which β. In evaluation the β are those of a fixed set, in turn, or
    the one of `at(beta)`. A closed-form σ sees the target in evaluation too: read these models by `measure`.

    log_std: of the data about their mean, where log σ starts.
    """

    def __init__(
        self, model: nn.Module, betas: BetaRange, *, sigma: str = "network", condition: str = "log-beta", log_std: float
    ) -> None:
        super().__init__()
        if condition == "level" and sigma != "network":
            raise ValueError(f"the level is known beforehand only from sigma's network, got sigma={sigma!r}")
        self.model, self.betas, self.log_std = model, betas, log_std
        self.sigma, self.condition = sigma, condition
        self.log_sigma_of = LogSigma(log_std) if sigma == "network" else None
        self._fixed: float | None = None

    @contextlib.contextmanager
    def at(self, beta: float) -> Iterator[None]:
        """All samples have this β here."""
        before, self._fixed = self._fixed, beta
        try:
            yield
        finally:
            self._fixed = before

    def draw(self, x: Tensor) -> Tensor:
        """β [B]"""
        count, device = len(x), x.device
        if self._fixed is not None:
            return torch.full((count,), self._fixed, device=device)
        if not self.training:
            return self.betas.grid(EVALUATION, device=device).repeat(-(-count // EVALUATION))[:count]
        return self.betas.draw(1 if self.sigma == "one-beta" else count, device=device).expand(count)

    def log_sigma(self, beta: Tensor) -> Tensor | None:
        """The network's, [B], if there is one."""
        return None if self.log_sigma_of is None else self.log_sigma_of(self.betas.standardise(beta.log()))

    def told(self, beta: Tensor, log_sigma: Tensor | None) -> Tensor:
        """n [B]"""
        if self.condition == "level":
            assert log_sigma is not None
            return self.betas.standardise_level(beta, log_sigma, self.log_std)
        return self.betas.standardise(beta.log())

    def forward(self, x: Tensor) -> ELBO:
        beta = self.draw(x)
        log_sigma = self.log_sigma(beta)
        out = self.model(x, self.told(beta, log_sigma))
        elbo = sigma_elbo(self.sigma, out.recon, x, out.mu, out.logvar, beta, log_sigma)
        assert elbo.sigma is not None
        return elbo._replace(sigma=elbo.sigma.log().mean().exp())


def sigma_elbo(
    mode: str, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor, log_sigma: Tensor | None = None
) -> ELBO:
    """The loss of a batch whose samples have β of their own, [B], in one of the modes SIGMA."""
    if mode == "network":
        assert log_sigma is not None
        # A bare [B] could be one for each feature where there are as many of them.
        log_sigma = log_sigma.reshape(-1, *[1] * (recon.ndim - 1))
        return decoupled_elbo(recon, x, mu, logvar, beta=beta, log_sigma=log_sigma)
    kinds: dict[str, str | float] = {"image": "optimal-per-image", "half": HALF}
    return decoupled_elbo(recon, x, mu, logvar, beta=beta, sigma=kinds.get(mode, "optimal"))


@torch.no_grad()
def measure(
    objective: BetaInputObjective, x: Tensor, betas: Sequence[float], *, draws: int, batch_size: int
) -> list[dict[str, Any]]:
    """One model at these β: rate and squared error per sample, with `draws` latents for each.

    sigma_error, σ(β) = √(SSE/D), is the σ of a test time if x is what the model was trained on. sigma_network is what
    its own network says. A model that is told the level is told that of sigma_error, which depends on the level in
    turn: the two are brought to agree. rate_network and error_network = √(SSE/D) are those at the network's own level.
    """
    dims, device = x[0].numel(), next(objective.parameters()).device
    objective.eval()
    rows = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for beta in betas:
            guess = objective.log_sigma(torch.tensor([beta], device=device))
            rate, sse = errors(objective, x, beta, guess, draws, batch_size)
            row = {} if guess is None else {"sigma_network": float(guess.exp()), "rate_network": rate,
                                            "error_network": math.sqrt(sse / dims)}  # fmt: skip
            if objective.condition == "level":
                for _ in range(AGREE):
                    guess = torch.tensor([0.5 * math.log(sse / dims)], device=device)
                    before, (rate, sse) = sse, errors(objective, x, beta, guess, draws, batch_size)
                    if abs(sse / before - 1) < 1e-5:
                        break
            rows.append({"beta": beta, "rate": rate, "sse": sse, "sigma_error": math.sqrt(sse / dims), **row})
    return rows


@torch.no_grad()
def errors(
    objective: BetaInputObjective, x: Tensor, beta: float, log_sigma: Tensor | None, draws: int, batch_size: int
) -> tuple[float, float]:
    """Mean rate and squared error at one β, with the same latent noise in each call."""
    torch.manual_seed(EVAL_SEED)
    device, dims = next(objective.parameters()).device, x[0].numel()
    rate = nats = 0.0
    for chunk in x.split(batch_size):
        chunk = to_unit(torch.cat([chunk] * draws).to(device))
        told = objective.told(torch.tensor([beta], device=device), log_sigma).expand(len(chunk))
        out = objective.model(chunk, told)
        elbo = decoupled_elbo(out.recon, chunk, out.mu, out.logvar, sigma=HALF)
        rate += float(elbo.rate) * len(chunk)
        nats += float(elbo.distortion) * len(chunk)
    count = len(x) * draws
    return rate / count, nats / count - dims / 2 * math.log(math.pi)
