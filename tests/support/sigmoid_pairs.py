"""Calls of `sigmoid_pairs`, and the rule by which every backend's results are judged, as in contrastive.py beside it.

An error is counted in units of what the rounding errors of a number are made of (`term_sums`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssl_kernels.ops.sigmoid_pairs import sigmoid_pairs
from ssl_kernels.reference.sigmoid_pairs import sigmoid_pairs as reference
from tests.helpers import FACTOR, random_rows
from tests.support.call import Tensors

LEAVES = ("rows", "columns", "scale", "bias")
NAMES = ("losses", "grad_rows", "grad_columns", "grad_scale", "grad_bias")


@dataclass
class Call(Tensors):
    """The operands of one call, and the gradient that comes back into it."""

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    diagonal: int = 0
    normalize_rows: bool = True
    normalize_columns: bool = True
    row_ids: torch.Tensor | None = None
    column_ids: torch.Tensor | None = None
    equal_ids_are_positive: bool = False
    total: bool = False
    grad_losses: torch.Tensor | None = None  # None: random ones

    @property
    def acc(self):
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    @property
    def cotangent(self):
        if self.grad_losses is not None:
            return self.grad_losses
        if self.total:
            return torch.tensor(-0.7, dtype=torch.float64, device=self.rows.device)
        return random_rows(len(self.rows), 1, torch.float64, seed=3)[:, 0].to(self.rows.device) / len(
            self.rows
        )

    @property
    def options(self):
        """All but the leaves, by name."""
        return {name: getattr(self, name) for name in list(self.__dataclass_fields__)[4:-1]}

    @property
    def operands(self):
        """As the operators take them."""
        flags = (self.diagonal, self.normalize_rows, self.normalize_columns)
        return (self.rows, self.columns, self.scale, self.bias, *flags)

    @property
    def marks(self):
        return (self.row_ids, self.column_ids, self.equal_ids_are_positive)

    def in_dtype(self, dtype):
        acc = torch.promote_types(dtype, torch.float32)
        dtypes = dict.fromkeys(("rows", "columns"), dtype) | dict.fromkeys(("scale", "bias"), acc)
        return self.replace(**{name: getattr(self, name).to(each) for name, each in dtypes.items()})


def random_call(
    n, m, d, dtype=torch.float32, *, scale=10.0, bias=-8.0, ids=None, seed=0, spread=0.0, device="cpu", **options
):  # fmt: skip
    """`ids`: whether equal ones are "positive" or "left out", or None."""
    if ids is not None:
        generator = torch.Generator().manual_seed(n + m)
        sides = (("row_ids", n), ("column_ids", m))
        options |= {
            name: torch.randint(-3, 4, (count,), generator=generator) * 2**33 for name, count in sides
        }
        options["equal_ids_are_positive"] = ids == "positive"
    rows = random_rows(n, d, dtype, seed=seed, spread=spread)
    columns = random_rows(m, d, dtype, seed=seed + 5, spread=spread)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = (torch.tensor(value, dtype=acc) for value in (scale, bias))
    return Call(rows, columns, *scalars, **options).map(lambda tensor: tensor.to(device))


def on_backend(backend):
    return lambda *operands, **options: sigmoid_pairs(*operands, backend=backend, **options)


def leaves_of(call):
    return [getattr(call, name).detach().clone().requires_grad_() for name in LEAVES]


def results(run, call):
    """Losses and gradients by name."""
    leaves = leaves_of(call)
    losses = run(*leaves, **call.options)
    grads = torch.autograd.grad(losses, leaves, call.cotangent.to(losses.dtype))
    return dict(zip(NAMES, (losses.detach(), *grads), strict=True))


def exact(call):
    return results(reference, call.in_dtype(torch.float64))


def term_sums(call):
    """For each result the sum of the absolute values of what its rounding errors are made of, float64."""
    call = call.in_dtype(torch.float64)
    g = call.cotangent.abs().expand(len(call.rows))[:, None]
    x, y = (
        rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalize else rows
        for rows, normalize in ((call.rows, call.normalize_rows), (call.columns, call.normalize_columns))
    )
    scale, bias = call.scale.abs(), call.bias.abs()
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    logits = call.scale * (x @ y.T) + call.bias
    positive = torch.arange(len(y)) == torch.arange(len(x))[:, None] + call.diagonal
    if call.row_ids is not None:
        equal = call.row_ids[:, None] == call.column_ids
        positive, left_out = (
            (equal, ~equal & equal) if call.equal_ids_are_positive else (positive, equal & ~positive)
        )
        logits = logits.masked_fill(left_out, -torch.inf)
    logits = torch.where(positive, -logits, logits)
    sizes = 1 + scale * lengths + bias  # a logit is off by the rounding of these
    coefficients = g * torch.sigmoid(logits) * sizes
    losses = (-F.logsigmoid(-logits) + torch.sigmoid(logits) * sizes).sum(1)
    x_rnorm, y_rnorm = (
        1 / rows.norm(dim=1).clamp_min(1e-12) if normalize else torch.ones(len(rows), dtype=torch.float64)
        for rows, normalize in ((call.rows, call.normalize_rows), (call.columns, call.normalize_columns))
    )
    return {
        "losses": losses.sum() if call.total else losses,
        "grad_rows": (scale * x_rnorm * (coefficients @ y.norm(dim=1)))[:, None],
        "grad_columns": (scale * y_rnorm * (coefficients.T @ x.norm(dim=1)))[:, None],
        "grad_scale": (coefficients * lengths).sum(),
        "grad_bias": coefficients.sum(),
    }


def errors(found, truth, sums, scale):
    """In units of `sums`, and of underflow in a result's dtype and, times scale, in float32's exponential."""
    info = torch.finfo(torch.float32)
    underflow = max(1.0, abs(float(scale))) * info.tiny / info.eps
    found_errors = {}
    for name, value in truth.items():
        held = torch.finfo(found[name].dtype)
        value = torch.where(value.abs() > held.max, value.sign() * torch.inf, value)
        error = (found[name].double() - value).abs() / (sums[name] + held.tiny + underflow)
        found_errors[name] = torch.where(found[name] == value, 0, error).max().item()
    return found_errors


def check_against_float64(backend, call):
    """About as accurate as plain PyTorch in the accumulation dtype, and of the contract's shapes and dtypes."""
    check_results(results(on_backend(backend), call), call, backend)


def check_results(found, call, backend, *, rounds_coefficients=False, tf32=False):
    """The same for results that are there.

    Args:
        rounds_coefficients, tf32: As in tests/support/contrastive.
    """
    found, call = {name: tensor.cpu() for name, tensor in found.items()}, call.map(torch.Tensor.cpu)
    truth, sums = exact(call), term_sums(call)
    plain = errors(results(reference, call.in_dtype(call.acc)), truth, sums, call.scale)
    assert found.keys() == truth.keys()
    narrow = torch.finfo(call.rows.dtype).eps if call.rows.dtype != call.acc else 0
    for name, error in errors(found, truth, sums, call.scale).items():
        by_operand = name in ("grad_rows", "grad_columns")
        assert found[name].shape == truth[name].shape, name
        dtype = torch.float64 if name == "losses" else call.rows.dtype if by_operand else call.acc
        assert found[name].dtype == dtype, name
        allowed = FACTOR * plain[name] + 4 * torch.finfo(call.acc).eps + narrow / 2 * by_operand
        allowed += 4 * 2.0**-11 * tf32
        allowed += 2 * narrow * (rounds_coefficients and (by_operand or name == "grad_scale"))
        assert error <= allowed, (
            f"{backend} {name}: error {error:.2e}, plain PyTorch {plain[name]:.2e}, allowed {allowed:.2e}"
        )
