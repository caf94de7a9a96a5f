"""The loss as nn.Modules: they hold the configuration, a learned log σ, or a running σ for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks, distributed
from . import sigma as modes
from .functional import ELBO, decoupled_elbo, decoupled_elbo_backward
from .options import CriterionOptions, LossOptions, complete, defaults_of, shown
from .rate import Capacity, FreeNats
from .sigma import Constant, Optimal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self, Unpack

_CRITERION, _LEARNED = defaults_of(CriterionOptions), defaults_of(LossOptions)


class _Criterion(nn.Module):
    """What both have in common: a call with the options that the module holds, each a plain attribute."""

    beta: float | Tensor
    capacity: float | Tensor | None
    limit: FreeNats | Capacity | None
    reduction: str
    process_group: ProcessGroup | None

    def _hold(self, options: Mapping[str, Any], names: tuple[str, ...]) -> None:
        checks.configuration(options)
        self._held = names
        for name in names:
            setattr(self, name, options[name])

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior: tuple[Tensor, Tensor] | None = None,
        *,
        weight: Tensor | None = None,
        extra_error: Tensor | None = None,
    ) -> ELBO:
        options = self._options(recon) | {"prior": prior, "weight": weight, "extra_error": extra_error}
        return self._seen(decoupled_elbo(recon, target, mu, logvar, **options))

    def backward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior: tuple[Tensor, Tensor] | None = None,
        *,
        weight: Tensor | None = None,
        extra_error: Tensor | None = None,
        grad_scale: float | Tensor | None = None,
        retain_graph: bool = False,
    ) -> ELBO:
        """`criterion(…).loss.backward()` in one go: see `fused_elbo.decoupled_elbo_backward`. Runs no forward hooks."""
        options = self._options(recon) | {"prior": prior, "weight": weight, "extra_error": extra_error}
        options |= {"grad_scale": grad_scale, "retain_graph": retain_graph}
        return self._seen(decoupled_elbo_backward(recon, target, mu, logvar, **options))

    def reset_parameters(self) -> None:
        """Set the module's state, if it has any, as its constructor does: for modules made on the meta device."""

    def _options(self, recon: Tensor) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._held}

    def _seen(self, elbo: ELBO) -> ELBO:
        return elbo

    def __setattr__(self, name: str, value: Any) -> None:
        # torch registers a Parameter that is assigned, and from then on refuses a number in its place.
        if name in ("beta", "capacity") and name in self._parameters and not isinstance(value, nn.Parameter):
            del self._parameters[name]
        super().__setattr__(name, value)


class DecoupledELBO(_Criterion):
    """`decoupled_elbo` with its configuration kept: `DecoupledELBO(beta=4.0)(recon, x, mu, logvar)`.

    beta, sigma and all options that are not below: as in `fused_elbo.decoupled_elbo`. Each is a plain attribute: set
    `beta` and `capacity` to follow a schedule. A tensor there stays on its device when the module moves. `forward(...,
    prior=…, weight=…, extra_error=…)` passes on what belongs to one batch, and `backward(…, grad_scale=…)` stands for
    `criterion(…).loss.backward()`, in one pass. Make a module with a process_group after `dist.init_process_group`:
    before it, dist.group.WORLD is None. It cannot be deep-copied, as SyncBatchNorm with a group of its own cannot.

    momentum: with a number (0.1, say) and an optimal σ, training keeps a running average of σ² (of the Laplace
        likelihood b²) in the buffer
        `running_var` (the first batch sets it, batches that are not finite are left out), and eval mode uses it as one
        constant σ. The optimal σ is computed from the target, so a likelihood reported on test data must not use it: σ
        has to come from training. None (the default) uses the optimal σ in both modes. With a process_group the average
        is the same on all ranks. Before any training step `running_var` is 1, as in BatchNorm, and `reset_parameters`
        and `reset_running_stats` make it 1 again. It is fp32, in modules of half precision too, since an average that
        moves by less than half an ulp stands still; in a module that is `.double()` it is fp64.
    device, dtype: of the running σ²; a dtype of half precision leaves it in fp32.

    Raises as `decoupled_elbo` does; ValueError for a momentum outside (0, 1] or beside a constant σ.

    >>> criterion = DecoupledELBO(beta=2.0, momentum=0.1)
    >>> x, mu, logvar = torch.rand(8, 784), torch.zeros(8, 16), torch.zeros(8, 16)
    >>> trained = criterion(x + 0.1, x, mu, logvar)
    >>> criterion.eval()(x + 0.3, x, mu, logvar).sigma
    tensor(0.1000)
    """

    running_var: Tensor
    batches_seen: Tensor

    @shown(CriterionOptions)
    def __init__(
        self,
        beta: float | Tensor = 1.0,
        sigma: str | float | Constant | Optimal = "optimal",
        *,
        momentum: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[CriterionOptions],
    ) -> None:
        super().__init__()
        mode = modes.resolve(sigma)
        given = {**complete(options, _CRITERION, "DecoupledELBO"), "beta": beta, "sigma": sigma}
        self._hold(given, ("beta", "sigma", *_CRITERION))
        checks.dtype(dtype)
        if momentum is not None:
            checks.number("momentum", momentum)
            if not 0 < momentum <= 1:
                raise ValueError(f"momentum: expected a number in (0, 1], got {momentum!r}")
            if isinstance(mode, Constant):
                raise ValueError(f"momentum: a constant σ has no running average, got sigma={sigma!r}")
            wide = _wide(torch.float32 if dtype is None else dtype)  # whatever the default dtype is just now
            self.register_buffer("running_var", torch.empty((), device=device, dtype=wide))
            self.register_buffer("batches_seen", torch.empty((), device=device, dtype=torch.long))
        self.momentum = momentum
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """As before any training step: `running_var` 1, `batches_seen` 0."""
        if self.momentum is not None:
            self.running_var.fill_(1)
            self.batches_seen.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `bfloat16` and so on go through: to half precision the state is not rounded on the way."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._widen(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen(self._buffers)  # with assign=True the buffers have the checkpoint's dtypes

    def _widen(self, values: dict[str, Tensor | None]) -> None:
        """Give the state a dtype that it can accumulate in, with these values, where it has lost it."""
        for name in ("running_var", "batches_seen"):  # and not what a subclass has besides
            buffer, value = self._buffers.get(name), values.get(name)
            if buffer is None or value is None:
                continue
            dtype = torch.long if name == "batches_seen" else _wide(buffer.dtype)
            if buffer.dtype != dtype:
                self._buffers[name] = value.to(buffer.device, dtype)

    def _options(self, recon: Tensor) -> dict[str, Any]:
        self._widen(self._buffers)  # a trainer may cast them by other ways than `_apply`
        options = super()._options(recon)
        if self.momentum is not None and not self.training:
            options |= {"sigma": "optimal", "log_sigma": 0.5 * self.running_var.log()}
        return options

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
        names = [name for name in self._held if name != "process_group"] + ["momentum"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What an average is kept in, in a module of this dtype."""
    return dtype if dtype == torch.float64 else torch.float32


class LearnedSigmaELBO(_Criterion):
    """`decoupled_elbo` with a learned log σ as a parameter of its own.

    channels: None for one shared σ, parameter shape (); an integer C for one per channel, parameter shape (C, 1, 1).
        Channels are dimension 1 of recon, whatever its rank: (B, C), (B, C, L), (B, C, H, W), (B, C, T, H, W). C = 1 is
        one shared σ again, for data of any shape.
    init: the initial log σ. 0 (σ = 1) is the slow, safe start; near ½ log MSE is the fast one. `reset_parameters` sets
        it again.
    All other options: as in `fused_elbo.decoupled_elbo`. The gradient of log_sigma is averaged over the ranks if the
        module lies inside the one that is wrapped. FSDP2 refuses scalar parameters: give it channels=1.
    device, dtype: of log_sigma. It follows `.half()` and the like, as any weight: where steps of half precision are too
        coarse for it (2⁻⁷ near −1 in bf16), call `criterion.float()` afterwards; the loss takes mixed dtypes.

    Give the optimiser `criterion.parameters()` beside the model's. A frozen parameter (requires_grad=False) is warned
    about once, since σ then stays where it is.

    >>> criterion = LearnedSigmaELBO(channels=3)
    >>> x, mu, logvar = torch.rand(2, 3, 8, 8), torch.zeros(2, 4), torch.zeros(2, 4)
    >>> criterion(x, x, mu, logvar).loss.backward()
    >>> criterion.log_sigma.grad.flatten()  # D/C nats for every unit of log σ while σ is too large
    tensor([64., 64., 64.])
    """

    @shown(LossOptions)
    def __init__(
        self,
        channels: int | None = None,
        init: float = 0.0,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        checks.number("init", init)
        self._hold(complete(options, _LEARNED, "LearnedSigmaELBO"), tuple(_LEARNED))
        checks.dtype(dtype)
        self.channels = checks.channels(channels)
        self.init = float(init)
        shape = () if self.channels is None else (self.channels, 1, 1)
        self.log_sigma = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()
        self._warned = False

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_sigma, self.init)

    def _options(self, recon: Tensor) -> dict[str, Any]:
        # Inside torch.func's transforms requires_grad tells of the innermost one alone: vmap hides that σ is trained.
        tells = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        frozen = tells and self.training and not self.log_sigma.requires_grad
        if frozen and not self._warned:
            self._warned = True
            warnings.warn("LearnedSigmaELBO: log_sigma is frozen (requires_grad=False): σ stays as it is", stacklevel=3)
        return {**super()._options(recon), "log_sigma": self._along_channels(recon)}

    def _along_channels(self, recon: Tensor) -> Tensor:
        """log σ as it broadcasts against recon; left to itself, (C, 1, 1) would broadcast from the right."""
        if self.channels is None:
            return self.log_sigma
        if self.channels == 1:
            return self.log_sigma.reshape(())
        checks.has_channels(self.channels, recon)
        return self.log_sigma.reshape(1, self.channels, *[1] * (recon.dim() - 2))

    def extra_repr(self) -> str:
        return f"log_sigma={tuple(self.log_sigma.shape)}, beta={self.beta!r}, reduction={self.reduction!r}"
