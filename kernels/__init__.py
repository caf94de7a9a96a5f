"""The Triton kernels: one file per stage of the loss, named by the stem that the stage has in every layer.

The three stages are `elbo_stats` (one read of the data), `elbo_finalize` (O(batch), by the last program of the first)
and `elbo_grads` (one read, one write); `elbo_step` is all three in one launch (one read, one write). `_plan.py` keeps
from call to call what shapes decide. This package is part of the installed library, as
`fused_elbo.kernels`. The schemas in `fused_elbo/operators/elbo.py` are the contract that a kernel has to fulfil, and
the tests run on every backend that is present.
"""
