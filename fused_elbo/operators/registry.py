"""How operators become known to PyTorch: defined once, with a schema, a fake and a vmap rule each; then implemented.

A family of operators is a list of `Operator`. This package stands below the backends: it knows the contract, and not
who fulfils it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


@dataclass(frozen=True)
class Operator:
    """name and schema: as PyTorch's; fake: from the arguments to empty tensors as the operator returns them."""

    name: str
    schema: str
    fake: Callable[..., Any]


def define(operators: Iterable[Operator], namespace: str = "fused_elbo") -> None:
    """Tell PyTorch, torch.compile and vmap of these operators."""
    library = _library(namespace)
    for operator in operators:
        name = f"{namespace}::{operator.name}"
        library.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, operator.fake, lib=library)
        torch.library.register_vmap(name, _vmap_rule(find(operator.name, namespace)), lib=library)


def find(name: str, namespace: str = "fused_elbo") -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """A Python kernel for a dispatch key."""
    _library("fused_elbo").impl(name, kernel, key)


_libraries: dict[str, torch.library.Library] = {}


def _library(namespace: str) -> torch.library.Library:
    """For registrations, which are the process's, not this module's: where it is imported again, as Spyder does with a
    user's modules and tests do to be alone, those of before make way, as torch.library.custom_op's do."""
    if namespace in _libraries:
        return _libraries[namespace]
    known = vars(getattr(torch.ops, namespace))  # which outlives the module
    if before := known.get("_registered"):
        # Functions of before may still be called, through operators that are freed with their last kernel: so one, for
        # tensors that nobody has, stays.
        keeper, kept = known.setdefault("_kept", (torch.library.Library(namespace, "IMPL"), set()))
        for name in {qualified.partition("::")[2] for qualified in before._op_defs} - kept:
            keeper.impl(name, print, "PrivateUse3")
            kept.add(name)
        before._destroy()
    _libraries[namespace] = known["_registered"] = torch.library.Library(namespace, "DEF")
    return _libraries[namespace]


def _vmap_rule(operator: Any) -> Callable[..., Any]:
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
