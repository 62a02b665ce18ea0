"""Uses of a library's classes that run with the library itself, with its adapter and with the published formulas.

All three are namespaces of the same names. What a use returns, and the gradients of its random rows, are compared.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hypothesis import strategies as st

# Relative to the largest number of a tensor: what roundings of sums of some hundred terms leave.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

LEAST = (1.0, 1e-2)  # results and gradients below are held to the same distance: they may be rounding alone


@dataclass
class Case:
    """Sizes and random numbers of one use; the same seed draws the same again."""

    n: int
    d: int
    temperature: float
    dtype: torch.dtype
    seed: int
    leaves: list = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def rows(self, n=None, d=None, *shape, grad=True):
        """Normal numbers of various lengths, (n, d, ...)."""
        shape = (self.n if n is None else n, self.d if d is None else d, *shape)
        rows = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        rows = (rows * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=self.generator).add(0.5)).to(
            self.dtype
        )
        return self.leaf(rows) if grad else rows

    def unit_rows(self, n=None, d=None):
        rows = torch.nn.functional.normalize(self.rows(n, d, grad=False).double(), dim=1)
        return self.leaf(rows.to(self.dtype))

    def images(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape or (self.n,), generator=self.generator)

    def scalar(self, value, *shape):
        """A learned number."""
        return self.leaf(torch.full(shape, value, dtype=self.dtype))

    def leaf(self, tensor):
        self.leaves.append(tensor.requires_grad_())
        return tensor

    def pick(self, *choices):
        return choices[int(self.integers(len(choices), 1))]


@dataclass
class Use:
    """One class in one way of using it.

    Args:
        library: Name of the adapter's module.
        name: Class or function, as the table shows it.
        run: `run(space, case)` returns a tensor or several.
        way: What is special about this use, or "".
        formula: Whether the published formulas have it.
        peer: Whether it is compared with the library, where that is right.
        dtype: The one this use works in, or None for each.
        tolerance: Instead of those of the dtypes: where λ itself is float32.
    """

    library: str
    name: str
    run: Callable
    way: str = ""
    formula: bool = True
    peer: bool = True
    dtype: torch.dtype | None = None
    tolerance: float | None = None

    def fitted(self, case):
        """A copy of the case that has not drawn anything, in the dtype of this use."""
        return replace(case, dtype=self.dtype or case.dtype, leaves=[])

    def __str__(self):
        return f"{self.library}.{self.name}" + (f" {self.way}" if self.way else "")


def cases(dtypes=(torch.float32, torch.float64), least=2, most=24):
    """Hypothesis's strategy of cases."""
    return st.builds(
        Case,
        n=st.integers(least, most),
        d=st.integers(2, 20),
        temperature=st.sampled_from((0.05, 0.1, 0.5, 2.0)),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**16),
    )


def results(use, space, case):
    """What a use gives: its tensors, and the gradients of the case's leaves by a random combination of them."""
    case = use.fitted(case)
    torch.manual_seed(case.seed)
    np.random.seed(case.seed)
    out = use.run(space, case)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    smooth = [tensor for tensor in out if tensor.requires_grad]
    gradients = []
    if smooth:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.rand(t.shape, generator=generator, dtype=torch.float64) for t in smooth]
        total = sum((t.double() * w).sum() for t, w in zip(smooth, weights, strict=True))
        leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [tensor.detach() for tensor in out], list(gradients)


def largest_error(found, expected):
    """Over all tensors, relative to the largest number of each or `LEAST`; inf where shapes differ."""
    worst = 0.0
    for kind, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if len(ours) != len(theirs):
            return math.inf
        for mine, other in zip(ours, theirs, strict=True):
            if mine is None or other is None:
                given = other if mine is None else mine
                if given is not None and given.any():
                    return math.inf
                continue
            if mine.shape != other.shape:
                return math.inf
            if mine.numel() == 0:
                continue
            mine, other = mine.double(), other.double()
            error = ((mine - other).abs().max() / other.abs().max().clamp_min(LEAST[kind])).item()
            worst = max(worst, error if error == error else math.inf)
    return worst


def adapter(library):
    return importlib.import_module(f"ssl_kernels.adapters.{library}")


def formulas(library):
    """The published formulas in plain PyTorch, as far as there are any."""
    return importlib.import_module(f"tests.adapters.formulas.{library}")


def all_uses():
    """Every use, library by library."""
    found = []
    for library in importlib.import_module("ssl_kernels.adapters").LIBRARIES:
        found += importlib.import_module(f"tests.adapters.formulas.{library}").USES
    return found
