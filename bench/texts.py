"""What the results page says beside its tables."""

HOW_TO_READ = """\
Written by `make bench-docs` from [results/results.json](results/results.json), which `make bench` measures; the same
numbers as [CSV](results/results.csv). A step is forward and backward of the loss alone, to the gradients of recon, mu
and logvar, with each provider's result checked against fp64 first. All providers take turns within a round, and ratios
are medians of the rounds' ratios, followed by the interval that holds the median with 95% confidence. **?** stands for
what the run cannot support: a ratio whose interval is wider than 25%, or has 1 in it and is wider than 5%; and whatever
was measured while others had the processors in most of the rounds ([timing.py](timing.py)). "1.3 × of the limit" is 1.3
times its time.

The limit is a plain C++ loop that moves the bytes of the step (5N + 6L for N bytes of recon and L of mu), computes
nothing, and writes to memory that is there already, on the same threads ([limit.cpp](limit.cpp)). It is no bound: code
that goes back through what the caches still hold, or reads the data once, can be below it. GB/s are those bytes over
the time, whatever a provider moved. The eager code casts half-precision tensors to fp32, as autocast does."""

LEVELS = """\
The KL of the 43 stochastic layers of VDVAE's decoder for CIFAR-10 (16 channels at 1×1 to 32×32), each with its prior,
for 8 images: `gaussian_kl` of the list of levels, beside the formula as VDVAE has it."""

NARROWER = """\
The same machine under `ATEN_CPU_CAPABILITY=avx2` or `default` (baseline: SSE2), by which the kernels, PyTorch's own and
the limit are made for narrower vectors. It is no other machine: `torch.compile`'s code is still compiled with
`-march=native`, so where it is not vectorised by PyTorch, the compiler may use what the switch forbids."""

MEMORY = """\
Kept for backward: the storage of tensors that autograd is given to save, beyond the inputs themselves; it comes on top
of what the network keeps. Peak of a step: how far the resident set of a process of its own rises in a step of the loss
alone, gradients included (on a GPU: what PyTorch's allocator gave out). That can be less than both together, where what
was kept is given back before the gradients are made: `F.mse_loss` keeps a tensor as large as recon behind its one
number, until the backward of the logarithm has had it."""

OVERHEAD = """\
One sample of one element with one latent: nothing but the cost of calling. Operators are those that PyTorch dispatches
below autograd in a step; under `torch.compile` there are kernels that it generated in their place."""

FIRST = """\
The times above are of code that is compiled already. The first call takes this long at {}, for
`torch.compile` without what it keeps on disk, and for fused_elbo with its C++ library built before:"""

SHARE = """\
The loss is a small part of the training step of a convolutional VAE, and the larger the network, the smaller. A step
taken apart where the loss begins and ends, batches of 64 images of 28×28:"""

WHERE = """\
So a faster loss does not make a large convolutional VAE train faster. It matters

- in small networks, where the loss is a good part of the step, as in the second one above;
- where memory is short: for long videos and large images the element-wise code keeps several tensors of the size of the
  reconstruction for backward, and this loss none ([memory](#memory));
- in hierarchical VAEs with eager code, whose dozens of small KLs are mostly overhead, as is any loss of small tensors;
  compiled code makes few kernels of them, as `gaussian_kl` of lists makes one ([above](#a-hierarchy-of-latents))."""

GPU = """\
No kernel has been timed on a GPU. What is known without one: a step takes three launches and moves 5N + 6L bytes within
1.1%, and `decoupled_elbo_backward` takes one launch for 3N + 6L within 1.7% where the batch fits on the chip, counted
while the compiled kernels were executed on a CPU (tests/kernels/test_traffic.py). Registers, spills and widths of
access of each kernel are in [compiled.md](proof/compiled.md) for Triton's and
[compiled_cuda.md](proof/compiled_cuda.md) for CUDA's. `make gpu-check` measures the cases of this page on a GPU."""
