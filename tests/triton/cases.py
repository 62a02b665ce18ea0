"""Calls of `contrastive` on the Triton backend, held against float64 and plain PyTorch in the same dtype."""

import math
from dataclasses import dataclass

import torch

from ssl_kernels.check import limits_between
from ssl_kernels.reference.contrastive import contrastive as reference
from ssl_kernels.triton import contrastive as kernels
from tests.helpers import product_eps

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One call; m None is the square case."""

    n: int
    m: int | None
    d: int
    dtype: torch.dtype
    temperature: float = 0.1
    positives: int = 1
    ids: bool = False
    keep_diagonal: bool = False
    both_directions: bool = False
    expectation: bool = False  # columns get no gradient, so that the forward keeps their expectation
    normalize: bool = True
    data: str = "random"  # or "zero rows", "equal rows", "uneven norms"
    layout: str = "contiguous"  # or "transposed", "strided"
    additions: str = (
        ""  # of "bias", "padding" (-inf in a third of column_bias), "limit", "exempt", "only" equal ids
    )
    seed: int = 0

    def __str__(self):
        words = [f"{self.n}x{self.m or 'square'}x{self.d}", str(self.dtype)[6:], f"T={self.temperature}"]
        flags = ("ids", "keep_diagonal", "both_directions", "expectation")
        words += [flag for flag in flags if getattr(self, flag)]
        words += [] if self.normalize else ["raw"]
        words += [word for word in (self.data, self.layout) if word not in ("random", "contiguous")]
        words += [self.additions] if self.additions else []
        return "-".join(words).replace(" ", "_")


class Call:
    """The tensors of a case, its results on the Triton backend, in float64 and in plain PyTorch."""

    def __init__(self, case, device, kernels=kernels):
        self.case, self.kernels = case, kernels
        generator = torch.Generator().manual_seed(case.seed)
        columns = case.n if case.m is None else case.m
        acc = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.rows = _vectors(case, case.n, generator).to(device)
        self.columns = None if case.m is None else _vectors(case, case.m, generator).to(device)
        self.scale = torch.tensor(1 / case.temperature, dtype=acc, device=device)
        self.positives = None
        if case.positives:
            self.positives = torch.randint(columns, (case.n, case.positives), generator=generator).to(device)
        self.row_ids = self.column_ids = None
        if case.ids:
            # Every other row and column has an id that nobody shares, so that no sum is empty.
            self.row_ids = torch.randint(3, (case.n,), generator=generator)
            self.row_ids[1::2] = torch.arange(len(self.row_ids[1::2])) + 1000
            self.row_ids = self.row_ids.to(device)
            if case.m is not None:
                self.column_ids = torch.randint(3, (case.m,), generator=generator)
                self.column_ids[0::2] = torch.arange(len(self.column_ids[0::2])) + 5000
                self.column_ids = self.column_ids.to(device)
        draw = {"generator": generator, "dtype": torch.float64}
        self.grad_lse = (torch.randn(case.n, **draw) / case.n).to(device)
        self.grad_column_lse = None
        if case.both_directions:
            self.grad_column_lse = (torch.randn(columns, **draw) / columns).to(device)
        self.grad_positive_logits = None
        if case.positives:
            self.grad_positive_logits = (torch.randn(case.n, case.positives, **draw) / case.n).to(device)
        self.column_bias = self.row_bias = self.row_limit = self.exempt = None
        if "bias" in case.additions:
            column_bias, row_bias = 2 * torch.randn(columns, **draw), torch.randn(case.n, **draw)
            if "padding" in case.additions:
                column_bias[::3] = -torch.inf
            self.column_bias = column_bias.to(device, acc)
            self.row_bias = row_bias.to(device, acc) if case.both_directions else None
        if "limit" in case.additions:
            self.row_limit = self._limits_between_logits().to(device, acc)
        if "exempt" in case.additions:
            self.exempt = (torch.rand(columns, generator=generator) < 0.3).to(device)

    def _limits_between_logits(self):
        rows, columns = (x.double() for x in (self.rows, self.rows if self.columns is None else self.columns))
        if self.case.normalize:
            rows, columns = (torch.nn.functional.normalize(x, dim=1) for x in (rows, columns))
        return limits_between(self.scale.double() * rows @ columns.T)

    @property
    def operands(self):
        return (self.rows, self.columns, self.scale, self.positives, self.row_ids, self.column_ids)

    @property
    def flags(self):
        case = self.case
        return (case.normalize, case.normalize, case.keep_diagonal, case.both_directions)

    @property
    def additions(self):
        only = "only" in self.case.additions
        return (
            (self.column_bias, self.row_bias, self.row_limit, self.exempt, only)
            if self.case.additions
            else ()
        )

    def forward(self):
        columns_need_grad = not self.case.expectation
        return self.kernels.contrastive_fwd(
            *self.operands, *self.flags, True, columns_need_grad, *self.additions
        )

    def backward(self, results, rows_need_grad=True, columns_need_grad=True, bias_needs_grad=(True, True)):
        """Gradients of rows, columns and scale, and with additions of both biases."""
        lse, column_lse, _, *saved = results
        expectation = self.case.expectation and saved[-1].dim() == 2
        bias_needs_grad = [
            wanted and bias is not None and not expectation
            for wanted, bias in zip(bias_needs_grad, (self.column_bias, self.row_bias), strict=True)
        ]
        return self.kernels.contrastive_bwd(
            self.grad_lse,
            self.grad_column_lse,
            self.grad_positive_logits,
            *self.operands,
            lse,
            column_lse,
            *saved,
            *self.flags,
            rows_need_grad,
            columns_need_grad,
            *((*self.additions, *bias_needs_grad) if self.additions else ()),
        )[: 5 if self.additions else 3]

    def triton(self):
        """lse, column_lse, positive_logits and the gradients of rows, columns, scale and with additions biases."""
        results = self.forward()
        return [*results[:3], *self.backward(results, True, not self.case.expectation)]

    def autograd(self, dtype):
        """The same of the reference computed in `dtype`, as float64."""
        rows = self.rows.to(dtype).requires_grad_()
        columns = None if self.columns is None else self.columns.to(dtype).requires_grad_()
        scale = self.scale.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        operands = (rows, columns, scale, self.positives, self.row_ids, self.column_ids)
        biases = [
            None if bias is None else bias.to(scale.dtype).requires_grad_()
            for bias in (self.column_bias, self.row_bias)
        ]
        additions = (*biases, *self.additions[2:]) if self.additions else ()
        lse, column_lse, positive_logits = reference(*operands, *self.flags, *additions)
        objective = (lse.double() * self.grad_lse).sum()
        if self.grad_column_lse is not None:
            objective = objective + (column_lse.double() * self.grad_column_lse).sum()
        if self.grad_positive_logits is not None:
            objective = objective + (positive_logits.double() * self.grad_positive_logits).sum()
        inputs = [tensor for tensor in (rows, columns, scale) if tensor is not None]
        grads = list(torch.autograd.grad(objective, inputs, retain_graph=True))
        if columns is None:
            grads.insert(1, rows.new_empty(0))
        elif self.case.expectation:
            grads[1] = rows.new_empty(0)
        if self.additions:
            wanted = [bias for bias in biases if bias is not None and not self.case.expectation]
            found = iter(torch.autograd.grad(objective, wanted) if wanted else ())
            grads += [
                next(found) if any(bias is each for each in wanted) else rows.new_empty(0) for bias in biases
            ]
        return [result.detach().double() for result in (lse, column_lse, positive_logits, *grads)]

    def units(self):
        """For each of the results the size of the terms it is a sum of: errors are counted in these."""
        truth_scale = self.scale.double()
        rows, columns = self.rows.double(), (self.rows if self.columns is None else self.columns).double()
        row_norm, column_norm = rows.norm(dim=1), columns.norm(dim=1)
        largest = 1.0 if self.case.normalize else row_norm.max() * column_norm.max()
        logit = truth_scale * largest + 1
        # An lse exceeds its logits by what the number of its terms makes.
        row_sum, column_sum = (logit + math.log(max(1, len(x))) for x in (columns, rows))
        weights = [self.grad_lse.abs().max()]
        weights += [] if self.grad_column_lse is None else [self.grad_column_lse.abs().max()]
        weights += [] if self.grad_positive_logits is None else [self.grad_positive_logits.abs().sum(1).max()]
        weight = sum(weights)
        if self.case.normalize:
            grad_rows = truth_scale * weight / row_norm.clamp_min(1e-12)[:, None]
            grad_columns = truth_scale * weight / column_norm.clamp_min(1e-12)[:, None]
        else:
            grad_rows = truth_scale * weight * column_norm.max()
            grad_columns = truth_scale * weight * row_norm.max()
        # Several rows may have one column as their positive.
        grad_columns = grad_columns * max(1, len(rows) / len(columns))
        by_biases = [weight * len(rows), weight * len(columns)] if self.additions else []
        return [row_sum, column_sum, logit, grad_rows, grad_columns, largest * weight * len(rows), *by_biases]


NAMES = (
    "lse", "column_lse", "positive_logits", "grad_rows", "grad_columns", "grad_scale", "grad_column_bias",
    "grad_row_bias",
)  # fmt: skip


def check(call, results=None):
    """About as accurate as plain PyTorch in the same dtype, judged by float64."""
    results = call.triton() if results is None else results
    truth, plain, units = call.autograd(torch.float64), call.autograd(call.case.dtype), call.units()
    acc_eps = torch.finfo(call.scale.dtype).eps
    storage_eps = torch.finfo(call.case.dtype).eps
    logit_eps = product_eps(call.case.d, call.scale.dtype)
    conditioning = units[2].item()
    for name, ours, exact, theirs, unit in zip(
        NAMES[: len(results)], results, truth, plain, units, strict=True
    ):
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        if exact.numel() == 0:
            continue
        # float64 may hold more than the dtype can: gradients of zero rows are as large as 1e12.
        infinite = exact.abs() > torch.finfo(ours.dtype).max
        assert torch.equal(ours.double()[infinite], exact[infinite] * torch.inf), f"{name}: infinities differ"
        error, plain_error = (
            ((x.double() - exact) / unit).masked_fill(infinite, 0).abs().max().item() for x in (ours, theirs)
        )
        # A softmax inherits the rounding of its logits: a few roundings of the largest, absolutely.
        slack = 4 * logit_eps if name in NAMES[:3] else 4 * storage_eps + 8 * acc_eps * conditioning
        bound = slack + (2 * plain_error if plain_error == plain_error else 0)
        errors = f"error {error:.2e}, plain PyTorch {plain_error:.2e}"
        assert error <= bound, f"{name}: {errors}, allowed {bound:.2e}"


def _vectors(case, count, generator):
    vectors = torch.randn(count, case.d, generator=generator, dtype=torch.float64)
    if case.data == "zero rows":
        vectors[::3] = 0
    elif case.data == "equal rows":
        vectors[:] = vectors[0].clone()
    elif case.data == "uneven norms":
        vectors *= torch.logspace(-2, 2, count, dtype=torch.float64)[:, None]
    vectors = vectors.to(case.dtype)
    if case.layout == "transposed":
        vectors = vectors.T.contiguous().T
    elif case.layout == "strided":
        padded = torch.full((2 * count, case.d + 3), torch.nan, dtype=case.dtype)
        padded[::2, : case.d] = vectors
        vectors = padded[::2, : case.d]
    return vectors
