"""What an error says to pass instead, for the options that belong to the data of one call, and to lists of levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_elbo import FreeNats, decoupled_elbo, gaussian_kl

X, Z = torch.zeros(4, 3, 8, 6), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error", "hint"),
    [
        ("weight", X.byte(), TypeError, "a mask is weight.bool()"),
        ("weight", X.long(), TypeError, "a mask is weight.bool()"),
        ("weight", torch.ones(4), ValueError, "weight.reshape(4, 1, 1, 1) is one for each sample"),
        ("weight", torch.ones(4, 8, 6), ValueError, "weight.reshape(4, 1, 8, 6) is one for each sample"),
        ("weight", torch.ones(7), ValueError, "does not broadcast to recon's (4, 3, 8, 6)"),
        ("weight", torch.ones(1, 4, 3, 8, 6), ValueError, "does not broadcast to recon's (4, 3, 8, 6)"),
        ("extra_error", torch.ones(4, 1, 1, 1), ValueError, "pass extra_error.flatten()"),
        ("extra_error", torch.ones(8), ValueError, "got shape (8,)"),
    ],
)
def test_error_ends_with_a_hint_where_there_is_one(name: str, value: Tensor, error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=rf"^{name}: ") as raised:
        decoupled_elbo(X, X, Z, Z, **{name: value})
    assert str(raised.value).endswith(hint)


@pytest.mark.parametrize("option", [{"limit": FreeNats(3.0)}, {"logvar_range": (-30, 20)}], ids=["limit", "range"])
def test_lists_of_levels_do_not_ignore_it(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}: is not for lists of levels, got .*; clamp "):
        gaussian_kl([Z], [Z], **option)
