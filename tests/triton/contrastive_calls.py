"""Runs the kernels of `contrastive` on the Triton backend and holds their results to float64."""

from dataclasses import dataclass, field

import torch

from ssl_kernels.triton import contrastive as kernels
from tests.support.contrastive import GRADIENTS, RESULTS, check_results, random_call


@dataclass(frozen=True)
class Case:
    """The arguments of `random_call`, and whether the forward keeps the expectation, as the name of a test."""

    sizes: tuple
    dtype: torch.dtype
    expectation: bool = False
    options: dict = field(default_factory=dict)

    def __str__(self):
        words = ["x".join(str(size or "square") for size in self.sizes), str(self.dtype)[6:]]
        words += ["expectation"] * self.expectation
        words += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join(words).replace(" ", "_")

    def call(self, device):
        return random_call(*self.sizes, self.dtype, device=device, **self.options)

    def check(self, device):
        try:
            check(self.call(device), self.expectation)
        except AssertionError as error:
            raise AssertionError(f"{self}: {error}") from None


def case(n, m, d, dtype, *, expectation=False, **options):
    return Case((n, m, d), dtype, expectation, options)


def forward(call, expectation=False, kernels=kernels):
    return kernels.contrastive_fwd(*call.operands, *call.flags, True, not expectation, *call.additions)


def backward(call, results, upstream=None, rows=True, columns=True, biases=(True, True), kernels=kernels):
    """Gradients of rows, columns, scale, column_bias and row_bias; empty where they are not asked for."""
    lse, column_lse, _, *saved = results
    needs = [wanted and bias is not None for wanted, bias in zip(biases, call.additions[:2], strict=True)]
    return kernels.contrastive_bwd(
        *(upstream or call.upstream()), *call.operands, lse, column_lse, *saved, *call.flags, rows, columns,
        *call.additions, *needs,
    )  # fmt: skip


def run(call, expectation=False, kernels=kernels):
    """Results and gradients by name."""
    results = forward(call, expectation, kernels)
    wanted = {"columns": not expectation, "biases": [not expectation] * 2}
    found = (*results[:3], *backward(call, results, **wanted, kernels=kernels))
    return {
        name: tensor for name, tensor in zip((*RESULTS, *GRADIENTS), found, strict=True) if tensor.numel()
    }


def check(call, expectation=False, found=None, kernels=kernels):
    """About as accurate as plain PyTorch, judged by float64."""
    found = run(call, expectation, kernels) if found is None else found
    check_results(found, call, "triton", expectation=expectation, rounds_coefficients=True)
