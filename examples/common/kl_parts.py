"""A VAE's KL taken apart, over a whole data set of N images, and the four terms of Esmaeili et al. (AISTATS 2019).

    rate = MI + TC + DW        MI = I(x; z), TC = KL(q(z) ‖ Π_k q(z_k)), DW = Σ_k KL(q(z_k) ‖ N(0, 1))

q(z) is the mixture of all N posteriors. The rate has a closed form and DW is a sum of integrals over a line. MI alone
is estimated, from samples, and TC is what is left.

MI is at most log N. Where the N images are all that there are, that is true of the information itself. Where they are a
sample of more, it is a saturation: each z is told from those of the other N − 1 images, and log N is all that this can
show. With its own component in the mixture, the reading is a lower bound of the population's MI in expectation, and
without it an upper one (Poole et al., ICML 2019): a bracket.

The four terms, with L = ELBO + H(x):

    L = E log p(x|z)/p(x) − E log q(z|x)/q(z) − KL(q(x) ‖ p(x)) − KL(q(z) ‖ p(z))  =  ① − ② − ③ − ④
    ① − ③ = H − D,  ② = MI,  ② + ④ = rate,  ④ = TC + DW
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_elbo import kl_decomposition, log_aggregate_posterior

from . import linear
from .data import to_unit
from .latents import decode, draw, rates
from .quadrature import channel_kl
from .tc_runs import BATCH_SIZE

BATCHES = 16  # whose estimates are averaged


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, exp(logvar)), summed over the last dimension."""
    mu, logvar = torch.as_tensor(mu), torch.as_tensor(logvar)
    return -0.5 * ((z - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


@torch.no_grad()
def decompose(mu: Tensor, logvar: Tensor, rows: int) -> dict[str, Any]:
    """The parts in nats, of posteriors [N, K]; MI from one sample of each of `rows` images, taken at random.

    mi_upper is MI with the mixture of the images that are not among the rows; mi_se is the standard error of mi.
    batch_* are what a batch of BATCH_SIZE would make of them, with the weights that training uses.
    """
    count = len(mu)
    rate, channels = rates(mu, logvar), channel_kl(mu, logvar)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    mu, logvar = mu[order], logvar[order]
    rows = min(rows, count // 2)
    z = draw(mu[:rows], logvar[:rows])
    conditional = log_normal(z, mu[:rows], logvar[:rows])
    information = conditional - log_aggregate_posterior(z, mu, logvar)[0]
    others = log_aggregate_posterior(z, mu[rows:], logvar[rows:], own=False)[0]
    of_batches = torch.stack([
        torch.stack(kl_decomposition(*part, dataset_size=count))
        for part in zip(*(t.split(BATCH_SIZE)[:BATCHES] for t in (z, mu[:rows], logvar[:rows])), strict=True)
        if len(part[0]) == BATCH_SIZE
    ]).mean(0).tolist()  # fmt: skip
    mi, total, dim_wise = float(information.mean()), float(rate.sum()), float(channels.sum())
    return {
        "rate": total,
        "mi": mi,
        "mi_se": float(information.std()) / math.sqrt(rows),
        "mi_upper": float((conditional - others).mean()),
        "tc": total - mi - dim_wise,
        "dim_wise": dim_wise,
        **dict(zip(("batch_mi", "batch_tc", "batch_dim_wise"), of_batches, strict=True)),
        "channels": channels.sort(descending=True).values.tolist(),
    }


class FourTerms(NamedTuple):
    likelihood: float  # ① E_q(x,z) log p(x|z)/p(x)
    information: float  # ② I(x; z) under q
    data: float  # ③ KL(q(x) ‖ p(x))
    prior: float  # ④ KL(q(z) ‖ p(z))


def linear_terms(eigenvalues: Tensor, latents: int, beta: float) -> FourTerms:
    """Exactly, of the best linear VAE (see `linear`), whose p(x) is Gaussian and whose q(z) is the prior.

    In the direction of an active dimension p(x) has the variance w² + σ² = λ − βσ² + σ², in any other one σ².
    """
    best = linear.optimum(eigenvalues, latents, beta)
    variance = torch.full_like(eigenvalues, best.level / beta)
    variance[: best.active] += eigenvalues[: best.active] - best.level
    ratio = eigenvalues / variance
    data = 0.5 * float((ratio - 1 - ratio.log()).sum())
    entropy = 0.5 * float((2 * math.pi * math.e * eigenvalues).log().sum())
    return FourTerms(entropy - best.distortion + data, best.rate, data, 0.0)


@torch.no_grad()
def importance_terms(
    model: nn.Module, images: Tensor, mu: Tensor, logvar: Tensor, sigma: float, samples: int
) -> dict[str, float]:
    """① and −E log p(x) = H + ③ of these images, with p(x) from `samples` of q(z|x) each (Burda et al., ICLR 2016).

    p(x) is underestimated, so both are bounds from above. ① is the rate less E KL(q(z|x) ‖ p(z|x)); one sample finds
    nothing of that divergence, and more of them the more.
    """
    x = to_unit(images).flatten(1)
    generator = torch.Generator().manual_seed(1)
    likelihood = evidence = 0.0
    for one, m, l in zip(x, mu, logvar, strict=True):
        z = m + torch.exp(0.5 * l) * torch.randn(samples, len(m), generator=generator)
        sse = (decode(model, z) - one).square().sum(1)
        given_z = -(sse / (2 * sigma**2) + x.shape[1] / 2 * math.log(2 * math.pi * sigma**2))
        likelihood += float(given_z.mean()) / len(x)
        weights = given_z + log_normal(z) - log_normal(z, m, l)
        evidence += (float(weights.logsumexp(0)) - math.log(samples)) / len(x)
    return {"likelihood": likelihood - evidence, "data": -evidence}
