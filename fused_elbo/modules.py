"""The loss as nn.Modules: they hold the configuration, a learned log σ, or a running σ for evaluation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks, distributed
from . import sigma as modes
from .functional import ELBO, decoupled_elbo, decoupled_elbo_backward
from .sigma import Constant, Optimal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Criterion(nn.Module):
    """What both have in common: a call with the options that the module holds."""

    def forward(
        self, recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None = None
    ) -> ELBO:
        return self._seen(decoupled_elbo(recon, target, mu, logvar, prior=prior, **self._options()))

    def backward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior: tuple[Tensor, Tensor] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
        retain_graph: bool = False,
    ) -> ELBO:
        """`criterion(…).loss.backward()` in one go: see `fused_elbo.decoupled_elbo_backward`. Runs no forward hooks."""
        options = self._options() | {"grad_scale": grad_scale, "retain_graph": retain_graph}
        return self._seen(decoupled_elbo_backward(recon, target, mu, logvar, prior=prior, **options))

    def _options(self) -> dict[str, Any]:
        raise NotImplementedError

    def _seen(self, elbo: ELBO) -> ELBO:
        return elbo


class DecoupledELBO(_Criterion):
    """`decoupled_elbo` with its configuration kept: `DecoupledELBO(beta=4.0)(recon, x, mu, logvar)`.

    beta, sigma, min_log_sigma, free_bits, capacity, reduction, process_group: as in `fused_elbo.decoupled_elbo`. `beta`
    and `capacity` are plain attributes: set them to follow a schedule. A tensor there stays on its device when the
    module moves. `forward(..., prior=…)` passes a prior on, and `backward(…, prior=…, grad_scale=…)` stands for
    `criterion(…).loss.backward()`, in one pass. Make a module with a process_group after `dist.init_process_group`:
    before it, dist.group.WORLD is None. It cannot be deep-copied, as SyncBatchNorm with a group of its own cannot.

    momentum: with a number (0.1, say) and an optimal σ, training keeps a running average of σ² in the buffer
        `running_var` (the first batch sets it, batches that are not finite are left out), and eval mode uses it as one
        constant σ. The optimal σ is computed from the target, so a likelihood reported on test data must not use it: σ
        has to come from training. None (the default) uses the optimal σ in both modes. With a process_group the average
        is the same on all ranks. Before any training step `running_var` is 1, as in BatchNorm.

    Raises as `decoupled_elbo` does; ValueError for a momentum outside (0, 1] or beside a constant σ.

    >>> criterion = DecoupledELBO(beta=2.0, momentum=0.1)
    >>> x, mu, logvar = torch.rand(8, 784), torch.zeros(8, 16), torch.zeros(8, 16)
    >>> trained = criterion(x + 0.1, x, mu, logvar)
    >>> criterion.eval()(x + 0.3, x, mu, logvar).sigma
    tensor(0.1000)
    """

    running_var: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        sigma: str | float | Constant | Optimal = "optimal",
        *,
        min_log_sigma: float = -7.0,
        free_bits: float = 0.0,
        capacity: float | Tensor | None = None,
        reduction: str = "batchmean",
        process_group: ProcessGroup | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        checks.criterion(reduction, process_group)
        checks.configuration(beta, free_bits, capacity, min_log_sigma)
        mode = modes.resolve(sigma)
        if momentum is not None:
            checks.number("momentum", momentum)
            if not 0 < momentum <= 1:
                raise ValueError(f"momentum: expected a number in (0, 1], got {momentum!r}")
            if isinstance(mode, Constant):
                raise ValueError(f"momentum: a constant σ has no running average, got sigma={sigma!r}")
            self.register_buffer("running_var", torch.ones(()))
            self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
        self.beta = beta
        self.sigma = sigma
        self.min_log_sigma = min_log_sigma
        self.free_bits = free_bits
        self.capacity = capacity
        self.reduction = reduction
        self.process_group = process_group
        self.momentum = momentum

    def _options(self) -> dict[str, Any]:
        evaluating = self.momentum is not None and not self.training
        return {
            "beta": self.beta,
            "sigma": "optimal" if evaluating else self.sigma,
            "log_sigma": 0.5 * self.running_var.log() if evaluating else None,
            "min_log_sigma": self.min_log_sigma,
            "free_bits": self.free_bits,
            "capacity": self.capacity,
            "reduction": self.reduction,
            "process_group": self.process_group,
        }

    def _seen(self, elbo: ELBO) -> ELBO:
        if self.momentum is not None and self.training and elbo.sigma is not None:
            self._update(elbo.sigma)
        return elbo

    @torch.no_grad()
    def _update(self, sigma: Tensor) -> None:
        assert self.momentum is not None
        var = sigma.square()
        if self.process_group is not None and var.dim():  # per image: each rank has those of its own
            var = distributed.mean(var, self.process_group)
        var = var.mean().to(self.running_var.dtype)
        kept = torch.where(self.batches_seen == 0, 0.0, 1.0 - self.momentum)  # the first batch replaces the initial 1
        # A batch that overflowed, as happens under loss scaling, is left out, or it would stay in the average for ever.
        usable = torch.isfinite(var)
        self.running_var.copy_(torch.where(usable, var + kept * (self.running_var - var), self.running_var))
        self.batches_seen.add_(usable)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("beta", "sigma", "min_log_sigma", "free_bits", "capacity", "reduction", "momentum")
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class LearnedSigmaELBO(_Criterion):
    """`decoupled_elbo` with a learned log σ as a parameter of its own.

    channels: None for one shared σ, parameter shape (); an integer C for one per channel, shape (C, 1, 1), which
        broadcasts against images (B, C, H, W) from the right.
    init: the initial log σ. 0 (σ = 1) is the slow, safe start; near ½ log MSE is the fast one.
    beta, free_bits, capacity, reduction, process_group: as in `fused_elbo.decoupled_elbo`. The gradient of log_sigma is
        averaged over the ranks if the module lies inside the one that is wrapped. FSDP2 refuses scalar parameters:
        give it channels.

    Give the optimiser `criterion.parameters()` beside the model's. A frozen parameter (requires_grad=False) is warned
    about once, since σ then stays where it is.

    >>> criterion = LearnedSigmaELBO(channels=3)
    >>> x, mu, logvar = torch.rand(2, 3, 8, 8), torch.zeros(2, 4), torch.zeros(2, 4)
    >>> criterion(x, x, mu, logvar).loss.backward()
    >>> criterion.log_sigma.grad.flatten()  # D/C nats for every unit of log σ while σ is too large
    tensor([64., 64., 64.])
    """

    def __init__(
        self,
        channels: int | None = None,
        init: float = 0.0,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        capacity: float | Tensor | None = None,
        reduction: str = "batchmean",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.number("init", init)
        checks.criterion(reduction, process_group)
        checks.configuration(beta, free_bits, capacity)
        if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise ValueError(f"channels: expected None or a positive integer, got {channels!r}")
        self.log_sigma = nn.Parameter(torch.full(() if channels is None else (channels, 1, 1), float(init)))
        self.beta = beta
        self.free_bits = free_bits
        self.capacity = capacity
        self.reduction = reduction
        self.process_group = process_group
        self._warned = False

    def _options(self) -> dict[str, Any]:
        # Inside torch.func's transforms requires_grad tells of the innermost one alone: vmap hides that σ is trained.
        tells = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        frozen = tells and self.training and not self.log_sigma.requires_grad
        if frozen and not self._warned:
            self._warned = True
            warnings.warn("LearnedSigmaELBO: log_sigma is frozen (requires_grad=False): σ stays as it is", stacklevel=3)
        return {
            "beta": self.beta,
            "log_sigma": self.log_sigma,
            "free_bits": self.free_bits,
            "capacity": self.capacity,
            "reduction": self.reduction,
            "process_group": self.process_group,
        }

    def extra_repr(self) -> str:
        return f"log_sigma={tuple(self.log_sigma.shape)}, beta={self.beta!r}, reduction={self.reduction!r}"
