"""What the public functions refuse, before any work: every message names the argument and shows what was passed.

Only what the host knows is checked (shapes, dtypes, devices, Python numbers); values inside tensors never are, since
looking at them would wait for the device.
"""

from .aggregate import aggregate, dataset_size, samples_of
from .options import (
    ascending,
    beta,
    channels,
    configuration,
    dtype,
    flag,
    grad_scale,
    limit,
    nats,
    number,
    numbers,
    of_batch,
    process_group,
    reduction,
)
from .tensors import (
    data,
    element_weight,
    extra_error,
    has_channels,
    levels,
    log_sigma,
    of_one_level,
    pair,
    per_level,
    prior,
    same_batch,
    shape,
    tensor,
    usual_level,
)

__all__ = [
    "aggregate",
    "ascending",
    "beta",
    "channels",
    "configuration",
    "data",
    "dataset_size",
    "dtype",
    "element_weight",
    "extra_error",
    "flag",
    "grad_scale",
    "has_channels",
    "levels",
    "limit",
    "log_sigma",
    "nats",
    "number",
    "numbers",
    "of_batch",
    "of_one_level",
    "pair",
    "per_level",
    "prior",
    "process_group",
    "reduction",
    "same_batch",
    "samples_of",
    "shape",
    "tensor",
    "usual_level",
]
