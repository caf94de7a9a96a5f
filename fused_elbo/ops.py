"""The operators: what autograd and torch.compile see, and the contract of every backend.

    stats      reads the data once                     -> stats [3, B + 1]
    forward    stats and the O(B) arithmetic after it  -> loss, distortion, rate, sigma, stats
    grads      reads the data again, writes gradients  -> one tensor for each bit of `mask`, in the order of Gradients
    step       forward, and grads of grad_scale·loss   -> loss, distortion, rate, sigma, then as grads

What `step` returns differs from what forward and grads do by rounding alone; it exists because a backend that does both
at once can read the data once. Its loss is one number: `reduction` is not "none".

The rows of stats are S_i, KL_i and Σ_k max(KL_ik, free_bits); the last column is their sum over the batch, all that a σ
shared by several batches needs. `recon, target` or `mu, logvar` may be absent together. Where σ varies inside a sample,
log_sigma has as many dimensions as recon, each of recon's size or 1. `sigma_mode` is a `sigma.Kind`, `reduction` an
index into `reference.REDUCTIONS`. A number may come as a tensor on the device (beta, capacity, log_sigma, and the 0-d
grad_scale) or, where that is None, as a Python value; the tensor wins. Returned numbers have the compute dtype (fp64 if
any input is fp64, else fp32); gradients have their input's dtype and the strides of `torch.empty_like(input)`. Outputs
that `mask` does not ask for, and `sigma` where σ varies inside a sample, have shape (0,).

Registered here: the schemas, the fakes, the vmap rules, and the default implementation. The default gets a device's
kernels loaded at the first call and then dispatches again, to them; where there are none it runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import backends, reference
from .sigma import Kind

_INPUTS = (
    "Tensor? recon, Tensor? target, Tensor? mu, Tensor? logvar, "
    "Tensor? log_sigma, Tensor? prior_mu, Tensor? prior_logvar"
)
_KNOBS = "Tensor? beta, Tensor? capacity"
_VALUES = (
    "int sigma_mode, bool softclip, float log_sigma_value, float min_log_sigma, float free_bits, "
    "float beta_value, float? capacity_value, int reduction"
)
SCHEMAS = {
    "stats": f"({_INPUTS}, float free_bits) -> Tensor",
    "forward": f"({_INPUTS}, {_KNOBS}, {_VALUES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "grads": (
        f"(Tensor? grad_loss, Tensor? grad_distortion, Tensor? grad_rate, {_INPUTS}, {_KNOBS}, Tensor stats, "
        f"{_VALUES}, int mask) -> ({', '.join(['Tensor'] * len(reference.Gradients._fields))})"
    ),
    "step": (
        f"({_INPUTS}, {_KNOBS}, Tensor? grad_scale, {_VALUES}, float grad_scale_value, int mask) "
        f"-> ({', '.join(['Tensor'] * (4 + len(reference.Gradients._fields)))})"
    ),
}


def _library_of(namespace: str, kind: Literal["DEF", "FRAGMENT"]) -> torch.library.Library:
    """For registrations, which are the process's, not this module's: where it is imported again, as Spyder does with a
    user's modules and tests do to be alone, those of before make way, as torch.library.custom_op's do."""
    known = vars(getattr(torch.ops, namespace))  # which outlives the module
    if before := known.get("_registered"):
        # Functions of before may still be called, through operators that are freed with their last kernel: so one, for
        # tensors that nobody has, stays.
        keeper, kept = known.setdefault("_kept", (torch.library.Library(namespace, "IMPL"), set()))
        for name in {qualified.partition("::")[2] for qualified in before._op_defs} - kept:
            keeper.impl(name, print, "PrivateUse3")
            kept.add(name)
        before._destroy()
    known["_registered"] = torch.library.Library(namespace, kind)
    return known["_registered"]


_library = _library_of("fused_elbo", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

stats = torch.ops.fused_elbo.stats.default
forward = torch.ops.fused_elbo.forward.default
grads = torch.ops.fused_elbo.grads.default
step = torch.ops.fused_elbo.step.default


# ------------------------------------------------------------------------------------------------- shapes (the fakes)


def _some(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


@torch.library.register_fake("fused_elbo::stats", lib=_library)
def _stats_fake(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, free_bits):
    x = _some(recon, mu)
    return x.new_empty((3, x.shape[0] + 1), dtype=reference.compute_dtype(recon, target, mu, logvar))


@torch.library.register_fake("fused_elbo::forward", lib=_library)
def _forward_fake(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, capacity, sigma_mode, *values):
    x = _some(recon, mu)
    dtype, reduction = reference.compute_dtype(recon, target, mu, logvar), reference.REDUCTIONS[values[-1]]
    reduced = (x.shape[0],) if reduction == "none" else ()
    given = () if log_sigma is None else tuple(log_sigma.shape)
    sigma = {Kind.GIVEN: given, Kind.BATCH: (), Kind.IMAGE: (x.shape[0],), Kind.ELEMENT: (0,)}[Kind(sigma_mode)]
    shapes = (reduced, reduced, reduced, sigma, (3, x.shape[0] + 1))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("fused_elbo::grads", lib=_library)
def _grads_fake(g_loss, g_distortion, g_rate, recon, target, mu, logvar, log_sigma, p_mu, p_logvar, beta, *rest):
    inputs = (recon, target, mu, logvar, log_sigma, p_mu, p_logvar, beta)
    return _masked(inputs, rest[-1], torch.empty_like, _some(recon, mu))


@torch.library.register_fake("fused_elbo::step", lib=_library)
def _step_fake(recon, target, mu, logvar, log_sigma, p_mu, p_logvar, beta, capacity, grad_scale, *rest):
    inputs, (*values, _, mask) = (recon, target, mu, logvar, log_sigma, p_mu, p_logvar, beta), rest
    outputs = _forward_fake(*inputs, capacity, *values)[:4]
    return (*outputs, *_masked(inputs, mask, torch.empty_like, _some(recon, mu)))


def _masked(values: Sequence[Any], mask: int, make: Callable[..., Tensor], device_of: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        make(value) if mask >> i & 1 else device_of.new_empty(0, dtype=torch.float32) for i, value in enumerate(values)
    )


# -------------------------------------------------------------------------------------------- default implementations


def grads_by_reference(*args: Any) -> tuple[Tensor, ...]:
    """The reference behind the operator's contract: masked outputs, with empty_like's strides."""
    inputs, gradients, mask = args[3:11], reference.grads(*args[:-1]), args[-1]

    def with_strides(pair: tuple[Tensor, Tensor]) -> Tensor:
        wanted = torch.empty_like(pair[0])
        return pair[1] if pair[1].stride() == wanted.stride() else wanted.copy_(pair[1])

    return _masked(list(zip(inputs, gradients, strict=True)), mask, with_strides, _some(inputs[0], inputs[2]))


def step_of(forward: Callable[..., Any], grads: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`step` as the two-step call that it stands for."""

    def step(*args: Any) -> tuple[Tensor, ...]:
        tensors, grad_scale, values, grad_scale_value, mask = args[:9], args[9], args[10:-2], args[-2], args[-1]
        *outputs, stats = forward(*tensors, *values)
        grad_loss = outputs[0].new_full((), grad_scale_value) if grad_scale is None else grad_scale
        return (*outputs, *grads(grad_loss, None, None, *tensors, stats, *values, mask))

    return step


class ByReference:
    """The operators in plain PyTorch."""

    stats = staticmethod(reference.stats)
    forward = staticmethod(reference.forward)
    grads = staticmethod(grads_by_reference)
    step = staticmethod(step_of(reference.forward, grads_by_reference))


def _default(name: str) -> Callable[..., Any]:
    operator, by_reference = globals()[name], getattr(ByReference, name)
    tensor_at = [i for i, argument in enumerate(operator._schema.arguments) if argument.name in ("recon", "mu")]

    def implementation(*args: Any) -> Any:
        device = _some(*(args[i] for i in tensor_at)).device
        return operator(*args) if backends.load_for(device.type) else by_reference(*args)

    return implementation


# ------------------------------------------------------------------------------------------------------------- vmap


def vmap_rule(operator: Any) -> Callable[..., Any]:
    """One fused call per slice of the mapped dimension: every slice is a batch with sums and a σ of its own."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if isinstance(info.batch_size, torch.SymInt):  # the slices of this one call would be all that a graph has
            raise RuntimeError(f"vmap over {operator}: a tracer keeps the mapped dimension's size open; make it static")
        if info.batch_size == 0:
            raise ValueError(f"vmap over {operator}: the mapped dimension has size 0")
        (flat, spec), dims = tree_flatten(args), tree_leaves(in_dims)

        def at(i: int) -> Any:
            return tree_unflatten([a if d is None else a.select(d, i) for a, d in zip(flat, dims, strict=True)], spec)

        slices = [operator(*at(i)) for i in range(info.batch_size)]
        return tree_map(lambda *each: torch.stack(each), *slices), tree_map(lambda _: 0, slices[0])

    return rule


def register(implementations: Any, key: str) -> None:
    """Python kernels for a dispatch key: a module, or what else has a callable for each operator's name."""
    for name in SCHEMAS:
        _library.impl(name, getattr(implementations, name), key)


def describe(namespace: str) -> None:
    """Tell torch.compile and vmap about the operators of another namespace that have these schemas."""
    library = _library_of(namespace, "FRAGMENT")
    for name in SCHEMAS:
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.register_fake(f"{namespace}::{name}", globals()[f"_{name}_fake"], lib=library)
        torch.library.register_vmap(f"{namespace}::{name}", vmap_rule(operator), lib=library)


for _name in SCHEMAS:
    _library.impl(_name, _default(_name), "CompositeExplicitAutograd")
    torch.library.register_vmap(f"fused_elbo::{_name}", vmap_rule(globals()[_name]), lib=_library)
