"""fused_elbo: the ELBO of a Gaussian VAE, σ and β decoupled, as one fused call.

>>> from fused_elbo import decoupled_elbo
>>> x, recon, mu, logvar = torch.rand(8, 784), torch.rand(8, 784), torch.randn(8, 16), torch.randn(8, 16)
>>> loss, distortion, rate, sigma = decoupled_elbo(recon, x, mu, logvar, beta=4.0)
"""

from importlib.metadata import PackageNotFoundError, version

from . import rate, sigma
from .aggregate import KLTerms, kl_decomposition, log_aggregate_posterior
from .backends import backend
from .backends.cpp import empty_cache
from .errors import BackendUnavailable
from .functional import ELBO, decoder_nll, decoupled_elbo, decoupled_elbo_backward, gaussian_kl, gaussian_nll
from .modules import DecoupledELBO, LearnedSigmaELBO
from .rate import Capacity, FreeNats

try:
    __version__ = version("fused-elbo")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ELBO",
    "BackendUnavailable",
    "Capacity",
    "DecoupledELBO",
    "FreeNats",
    "KLTerms",
    "LearnedSigmaELBO",
    "backend",
    "decoder_nll",
    "decoupled_elbo",
    "decoupled_elbo_backward",
    "empty_cache",
    "gaussian_kl",
    "gaussian_nll",
    "kl_decomposition",
    "log_aggregate_posterior",
    "rate",
    "sigma",
]
