"""What tests of all rooms share: backends, dtypes, random rows, bits of tensors, saved memory, a Python of its own."""

import os
import subprocess
import sys

import torch

BACKENDS = ("reference", "chunked", "native")  # those that run on the CPU
OPERATORS = ("chunked", "native")  # those that are operators of torch.ops.ssl_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A kernel's largest error may be this many times plain PyTorch's, which may be lucky in a small tensor, plus what the
# judge of the operation in tests/support says that rounding leaves.
FACTOR = 3.0


def random_rows(n, d, dtype=torch.float32, *, seed=0, spread=0.0):
    """(n, d) normal numbers; with `spread`, rows of lengths that differ by factors of exp(spread)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    lengths = torch.exp(spread * torch.randn(n, 1, generator=generator, dtype=torch.float64))
    return (rows * lengths).to(dtype)


def same_bits(first, second):
    """Whether two tensors are equal bit for bit, NaN where NaN."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second)))


def saved_bytes(function, *arguments, **options):
    """Bytes of the tensors that `function` saves for its backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor.detach()  # the tensor itself could be held by its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*arguments, **options)
    return sum(sizes)


def run_python(code, *arguments, **environment):
    """Standard output of `code` run by a Python of its own, with `environment` added; fails with its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
