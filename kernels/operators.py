"""The operators (fused_elbo/operators/elbo.py) on the Triton kernels.

Each has a plan for every kind of call (`_plan.py`), made at its first: which tensors must be copied into an order in
which they can be walked, what is allocated, and the launches.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fused_elbo import call
from fused_elbo.call import NONE, SUM, Gradients, GradOutputs, Outputs, Tensors
from fused_elbo.errors import sentence
from fused_elbo.sigma import Kind

from . import _layout, structs
from ._grid import Scratch, resident_programs
from ._layout import Inputs, Tiles, is_in_order
from ._plan import Key, cached, device_guard, empty, key_of, on_meta
from .elbo_finalize import EmptyOutputs, elbo_shared_sigma_term
from .elbo_grads import elbo_grads
from .elbo_stats import EmptyPartials, elbo_stats, nothing
from .elbo_step import Cut, elbo_step
from .structs import ABSENT, Batch, GradOutputsLayout, Layout, Numbers, Options, Scalar


class Plan:
    """What the plans of all operators start from."""

    def __init__(self, key: Key) -> None:
        given = Tensors._make(on_meta(shape) for shape in key.tensors)
        tensors = _layout.ordered(given, key.options)
        pairs = [(a, b) for a, b in zip(given, tensors, strict=True) if a is not None and b is not None]
        self.copies = any(a.shape != b.shape or a.stride() != b.stride() for a, b in pairs)
        self.given, self.kinds, self.device = given, key.options, key.device
        self.inputs, self.options = Inputs(tensors, key.options), Options.of(tensors, key.options)
        self.dtype, self.per_sample = self.inputs.dtype, key.options.reduction == NONE

    def layout(self, data: Tiles | None, latents: Tiles | None, grad_outputs: GradOutputsLayout) -> Layout:
        batch = Batch.of(self.inputs, self.kinds.reduction)
        return Layout(self.inputs.data(data), self.inputs.latents(latents), batch, self.options, grad_outputs)

    def ordered(self, tensors: Tensors) -> Tensors:
        return _layout.ordered(tensors, self.kinds) if self.copies else tensors


@cached
class Forward(Plan):
    def __init__(self, key: Key) -> None:
        super().__init__(key)
        inputs = self.inputs
        layout = self.layout(inputs.data_tiles, inputs.latent_tiles, GradOutputsLayout(ABSENT, ABSENT, ABSENT))
        partials = EmptyPartials(inputs, inputs.data_tiles, inputs.latent_tiles, self.device)
        self.scratch = Scratch(self.device, partials, nothing)
        self.outputs = EmptyOutputs(inputs, self.options, self.per_sample, self.device)
        self.launch = elbo_stats(inputs, layout, self.per_sample)

    def __call__(self, tensors: Tensors, options: call.Options) -> Outputs:
        tensors, numbers = self.ordered(tensors), Numbers.of(options, self.dtype)
        outputs, scratch = self.outputs(), self.scratch()
        with device_guard(self.device):
            self.launch(tensors, numbers, outputs, scratch.partials, scratch.barrier)
        return outputs


class Written:
    """Where the gradients that `mask` asks for are written, one for each bit, and what becomes of them."""

    def __init__(self, plan: Plan, mask: int) -> None:
        given, inputs = plan.given, plan.inputs
        asked = [bool(mask >> i & 1) and given[i] is not None for i in range(len(Gradients._fields))]
        self.asked, self.places = Gradients._make(asked), [i for i, wanted in enumerate(asked) if wanted]
        self.device = plan.device
        data, latents = inputs.recon, inputs.mu
        of_log_sigma = None if inputs.log_sigma is None else data  # else one value, or one for each sample
        leads = Gradients(data, data, latents, latents, of_log_sigma, latents, latents, None, None)
        # What is not as the kernels write is written to a buffer first: (the tensor whose order it has, dtype).
        self.buffers: dict[int, tuple[Tensor, torch.dtype]] = {}
        for i, lead in enumerate(leads):
            t = given[i]
            if self.asked[i] and t is not None and lead is not None:
                # log σ that is broadcast gets the gradients of segments, which PyTorch then sums in a fixed order.
                if t.shape != lead.shape:
                    self.buffers[i] = (inputs.segments if inputs.runs else lead, plan.dtype)
                elif not is_in_order(t, lead):
                    self.buffers[i] = (lead, t.dtype)

    def empty(self, tensors: Tensors) -> tuple[list[Any], Gradients]:
        """Returns the results, None where none is wanted, and what the kernels write: the same, but for buffers."""
        results: list[Any] = [None] * len(Gradients._fields)
        for i in self.places:
            results[i] = torch.empty_like(tensors[i])
        written = Gradients._make(results)
        if self.buffers:
            made = {Gradients._fields[i]: _layout.empty_in_order(*how, self.device) for i, how in self.buffers.items()}
            written = written._replace(**made)
        return results, written

    def finish(self, results: list[Any], written: Gradients) -> Gradients:
        for i in self.buffers:
            results[i].copy_(written[i].sum_to_size(results[i].shape))
        return Gradients._make(results)


@cached
class Grads(Plan):
    def __init__(self, key: Key) -> None:
        super().__init__(key)
        inputs, (loss, distortion, rate) = self.inputs, map(on_meta, key.more[1:])
        given = GradOutputsLayout(*(Scalar.of(g, False) for g in (loss, distortion, rate)))
        self.written = Written(self, key.mask)
        asked, element = self.written.asked, inputs.log_sigma is not None
        of_data = asked.recon or asked.target or (asked.log_sigma and element)
        of_latents = asked.mu or asked.logvar or asked.prior_mu or asked.prior_logvar
        data, latents = inputs.data_tiles if of_data else None, inputs.latent_tiles if of_latents else None
        layout = self.layout(data, latents, given)
        programs = sum(tiles.programs(inputs.batch) for tiles in (data, latents) if tiles is not None)
        programs += asked.beta or asked.extra_error or (asked.log_sigma and not element)  # one for what is O(B)
        self.launch = elbo_grads(inputs, layout, programs) if programs else None
        unequal = key.options.sigma_mode == Kind.BATCH and (is_unequal(loss) or is_unequal(distortion))
        self.shared_sigma_term = elbo_shared_sigma_term(inputs, layout) if unequal else None

    def __call__(self, tensors: Tensors, options: call.Options, stats: Tensor, grad_outputs: GradOutputs) -> Gradients:
        results, written = self.written.empty(tensors)
        tensors, numbers = self.ordered(tensors), Numbers.of(options, self.dtype)
        if self.launch is not None:
            with device_guard(self.device):
                given = structs.GradOutputs(*grad_outputs)
                if self.shared_sigma_term is not None:
                    term = stats.new_empty(())
                    self.shared_sigma_term(tensors, numbers, stats, given, term)
                    given = given._replace(shared_sigma_term=term)
                self.launch(tensors, numbers, stats, given, written)
        return self.written.finish(results, written)


def is_unequal(grad_output: Tensor | None) -> bool:
    """Whether it has a value for each sample, and its stride does not say that all are one."""
    return grad_output is not None and grad_output.dim() == 1 and grad_output.stride(0) != 0


class Refused(Exception):
    """A GPU does not launch programs that wait for one another, or not as many: under MPS, say, or a green context."""


_refusing: set[torch.device] = set()


def _refuses(device: torch.device, error: Refused) -> None:
    if device not in _refusing:
        _refusing.add(device)
        warnings.warn(
            f"fused_elbo: {device} refused a cooperative launch, so that decoupled_elbo_backward reads the data twice "
            f"there: {sentence(error.__cause__)}",
            RuntimeWarning,
            stacklevel=2,
        )


@cached
class Step(Plan):
    """`launch` is None where the stages must run one after another."""

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        one_slope = self.inputs.activation is None or not key.mask >> Gradients._fields.index("target") & 1
        cut = Cut.of(self.inputs, self.options, resident_programs(key.device)) if one_slope else None
        self.launch, self.waits = None, cut is not None and cut.waits
        if cut is not None:
            (grad_scale,) = map(on_meta, key.more)
            given = GradOutputsLayout(Scalar.of(grad_scale, True), ABSENT, ABSENT)
            self.written = Written(self, key.mask)
            partials = EmptyPartials(self.inputs, cut.data, cut.latents, self.device)
            totals = empty(((2 + cut.counted) * cut.programs if cut.waits else 0,), self.dtype, self.device)
            self.scratch = Scratch(self.device, partials, totals)
            self.outputs = EmptyOutputs(self.inputs, self.options, False, self.device)
            self.launch = elbo_step(self.inputs, self.layout(cut.data, cut.latents, given), cut)

    def __call__(
        self, tensors: Tensors, options: call.Options, grad_scale: Tensor | None, grad_scale_value: float
    ) -> tuple[Tensor, ...]:
        assert self.launch is not None
        results, written = self.written.empty(tensors)
        tensors, numbers = self.ordered(tensors), Numbers.of(options, self.dtype, grad_scale_value)
        outputs, scratch = self.outputs(), self.scratch()
        with device_guard(self.device):
            try:
                self.launch(
                    tensors, numbers, structs.GradOutputs(grad_scale), structs.Written(outputs, written), scratch
                )
            except Exception as error:
                if self.waits:
                    raise Refused from error
                raise
        return (*outputs[:4], *self.written.finish(results, written))


def readable(tensors: Tensors) -> Tensors:
    """A mask as the bytes that it is made of, which load as any other numbers do."""
    if tensors.weight is None or tensors.weight.dtype != torch.bool:
        return tensors
    return tensors._replace(weight=tensors.weight.view(torch.uint8))


def forward(tensors: Tensors, options: call.Options) -> Outputs:
    tensors = readable(tensors)
    return Forward(key_of(tensors, options))(tensors, options)


def stats(tensors: Tensors, options: call.Options) -> Tensor:
    plain = options._replace(limit_mode=0, reduction=SUM)
    return forward(tensors._replace(beta=None, limit=None), plain).stats


def grads(tensors: Tensors, options: call.Options, stats: Tensor, grad_outputs: GradOutputs, mask: int) -> Gradients:
    tensors = readable(tensors)
    plan = Grads(key_of(tensors, options, mask, stats, *grad_outputs))
    return plan(tensors, options, stats, grad_outputs)


def step(
    tensors: Tensors, options: call.Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
) -> tuple[Tensor, ...]:
    tensors = readable(tensors)
    plan = Step(key_of(tensors, options, mask, grad_scale))
    if plan.launch is not None and not (plan.waits and plan.device in _refusing):
        try:
            return plan(tensors, options, grad_scale, grad_scale_value)
        except Refused as error:
            _refuses(plan.device, error)
    outputs = forward(tensors, options)
    grad_loss = outputs.loss.new_full((), grad_scale_value) if grad_scale is None else grad_scale
    return (*outputs[:4], *grads(tensors, options, outputs.stats, GradOutputs(grad_loss), mask))
