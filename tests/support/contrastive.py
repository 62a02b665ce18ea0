"""Calls of `contrastive` with data of many kinds, and the rule by which every backend's results are judged.

The rule: a result passes when its error against float64 is about that of plain PyTorch on the same input. An
error is counted in units of the sum of the absolute values of the terms that make the number up (`term_sums`),
so that a row of tiny gradients is held as tightly as its large neighbours, and a sum that cancels is not held to
digits which no summation keeps.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssl_kernels.check import limits_between
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.reference.contrastive import contrastive as reference
from tests.helpers import FACTOR, random_rows
from tests.support.call import Tensors

RESULTS = ("lse", "column_lse", "positive_logits")
# By the operand that each is the gradient of; results and gradients without entries are left out everywhere.
GRADIENTS = ("grad_rows", "grad_columns", "grad_scale", "grad_column_bias", "grad_row_bias")


class Upstream(NamedTuple):
    """Gradients of the three results, float64, or None."""

    lse: torch.Tensor | None
    column_lse: torch.Tensor | None
    positive_logits: torch.Tensor | None


@dataclass
class Call(Tensors):
    """The operands and flags of one call of `contrastive`; None as the operators take it."""

    rows: torch.Tensor
    columns: torch.Tensor | None
    scale: torch.Tensor
    positives: torch.Tensor | None = None
    row_ids: torch.Tensor | None = None
    column_ids: torch.Tensor | None = None
    normalize_rows: bool = True
    normalize_columns: bool = True
    keep_diagonal: bool = False
    both_directions: bool = False
    column_bias: torch.Tensor | None = None
    row_bias: torch.Tensor | None = None
    row_limit: torch.Tensor | None = None
    exempt: torch.Tensor | None = None
    only_equal_ids: bool = False
    seed: int = 0

    @property
    def square(self):
        return self.columns is None

    @property
    def acc(self):
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    @property
    def sizes(self):
        """N, M."""
        return len(self.rows), len(self.rows if self.square else self.columns)

    @property
    def operands(self):
        """As the operators take them."""
        return (self.rows, self.columns, self.scale, self.positives, self.row_ids, self.column_ids)

    @property
    def flags(self):
        normalize_columns = self.normalize_rows if self.square else self.normalize_columns
        return (self.normalize_rows, normalize_columns, self.keep_diagonal, self.both_directions)

    @property
    def additions(self):
        return (self.column_bias, self.row_bias, self.row_limit, self.exempt, self.only_equal_ids)

    @property
    def has_additions(self):
        biases_and_limits = (self.column_bias, self.row_bias, self.row_limit)
        return self.only_equal_ids or any(each is not None for each in biases_and_limits)

    @property
    def options(self):
        """All but rows, columns and scale, by name."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names[3:-1]}

    def upstream(self):
        """Gradients of the results about as the mean of a loss over the rows sends them, some of the other sign."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        n, m = self.sizes

        def grad(sign, shape):
            values = (sign + torch.randn(shape, generator=generator, dtype=torch.float64)) / n
            return values.to(self.rows.device)

        return Upstream(
            grad(1, (n,)),
            grad(1, (m,)) if self.both_directions else None,
            None if self.positives is None else grad(-1, self.positives.shape),
        )

    def in_dtype(self, dtype):
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def random_call(
    n, m, d, dtype=torch.float32, *, temperature=0.1, positives=1, ids=0, seed=0, spread=0.0, data="random",
    additions="", column_dtype=None, normalize=None, device="cpu", **flags,
):  # fmt: skip
    """A call with random operands; `m` None is the square case.

    Args:
        positives: 0: none; 1: shape (N,); P: shape (N, P). Some count from the end.
        ids: 0: none; k: ids of k values; True: of a quarter as many values as there are rows.
        spread: Rows of lengths that differ by factors of exp(spread).
        data: "random", or "zero rows", "equal rows", "uneven norms".
        additions: Of "bias", "padding" (-inf in a third of column_bias), "limit", "exempt" and "only" equal ids.
        normalize: Both flags.
    """
    generator = torch.Generator().manual_seed(seed + 17)
    columns = n if m is None else m
    ids = max(2, n // 4) if ids is True else ids
    if normalize is not None:
        flags |= {"normalize_rows": normalize, "normalize_columns": normalize}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    call = Call(
        _unusual(random_rows(n, d, torch.float64, seed=seed, spread=spread), data).to(dtype),
        None
        if m is None
        else _unusual(random_rows(m, d, torch.float64, seed=seed + 5, spread=spread), data).to(
            column_dtype or dtype
        ),
        torch.tensor(1 / temperature, dtype=acc),
        seed=seed,
        **flags,
    )
    if positives:
        shape = (n,) if positives == 1 else (n, positives)
        call.positives = torch.randint(-columns, columns, shape, generator=generator)
    if ids:
        call.row_ids = torch.randint(ids, (n,), generator=generator)
        if m is not None:
            call.column_ids = torch.randint(ids, (m,), generator=generator)
    words = additions.split()
    call.only_equal_ids = "only" in words
    if "bias" in words:
        call.column_bias = 2 * torch.randn(columns, generator=generator, dtype=torch.float64).to(acc)
        if "padding" in words:
            call.column_bias[::3] = -torch.inf
        if call.both_directions:
            call.row_bias = torch.randn(n, generator=generator, dtype=torch.float64).to(acc)
    if "limit" in words:
        logits = _logits(call.in_dtype(torch.float64))
        call.row_limit = (limits_between(logits) if columns > 1 else logits[:, 0] + 0.5).to(acc)
    if "exempt" in words:
        call.exempt = torch.rand(columns, generator=generator) < 0.3
    return call.map(lambda tensor: tensor.to(device))


def _unusual(rows, data):
    if data == "zero rows":
        rows[::3] = 0
    elif data == "equal rows":
        rows[:] = rows[0].clone()
    elif data == "uneven norms":
        rows *= torch.logspace(-2, 2, len(rows), dtype=torch.float64)[:, None]
    return rows


def results_and_gradients(run, call):
    """Results and gradients, by name, of run(rows, columns, scale, **call.options), which is autograd code."""
    leaves = {
        name.removeprefix("grad_"): tensor.detach().requires_grad_()
        for name in GRADIENTS
        if (tensor := getattr(call, name.removeprefix("grad_"))) is not None
    }
    given = {name: leaves.get(name, value) for name, value in call.options.items()}
    results = run(leaves["rows"], leaves.get("columns"), leaves["scale"], **given)
    named = dict(zip(RESULTS, results, strict=True))
    upstream = call.upstream()._asdict()
    named = {name: result for name, result in named.items() if result.numel()}
    seeds = [upstream[name].to(result.dtype) for name, result in named.items()]
    grads = torch.autograd.grad(list(named.values()), list(leaves.values()), seeds)
    named = {name: result.detach() for name, result in named.items()}
    return named | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def on_backend(backend):
    """`contrastive` on one backend, for `results_and_gradients`."""

    def run(*operands, **options):
        return contrastive(*operands, backend=backend, **options)

    return run


def exact(call):
    """What float64 gives for the same input."""
    return results_and_gradients(reference, call.in_dtype(torch.float64))


def plain(call):
    """Plain PyTorch in the accumulation dtype from the same input, gradients rounded to the input's dtype.

    For float16 and bfloat16 this is much more accurate than plain PyTorch in that dtype.
    """
    found = results_and_gradients(reference, call.in_dtype(call.acc))
    for name in ("rows", "columns"):
        if f"grad_{name}" in found:
            found[f"grad_{name}"] = found[f"grad_{name}"].to(getattr(call, name).dtype)
    return found


def term_sums(call):
    """For each result and gradient the sum of the absolute values of its terms, float64, in its leading shape."""
    info = torch.finfo(call.acc)
    call = call.in_dtype(torch.float64)
    x, x_rnorm = _unit_rows(call.rows, call.normalize_rows)
    y, y_rnorm = (x, x_rnorm) if call.square else _unit_rows(call.columns, call.normalize_columns)
    with torch.no_grad():
        options = {**call.options, "both_directions": True}
        lse, column_lse, _ = reference(call.rows, call.columns, call.scale, **options)
    g, h, q = call.upstream()
    n, m = call.sizes
    scale = call.scale.abs().item()
    logits = call.scale * (x @ y.T)
    allowed = _allowed(call, logits)
    column_bias, row_bias = (
        x.new_zeros(1) if bias is None else bias for bias in (call.column_bias, call.row_bias)
    )
    underflow = info.tiny / info.eps  # what an exponential that underflows leaves does not count
    by_rows = _softmax(logits + column_bias, lse[:, None], allowed) * g[:, None].abs()
    by_columns = torch.zeros_like(by_rows)
    if call.both_directions:
        by_columns = _softmax(logits + row_bias[:, None], column_lse[None, :], allowed) * h[None, :].abs()
    coefficients = by_rows + by_columns + underflow
    length_x, length_y = x.norm(dim=1), y.norm(dim=1)
    lengths = scale * length_x[:, None] * length_y[None, :]
    row_terms, column_terms = lengths + _finite(column_bias), lengths + _finite(row_bias)[:, None]
    sums = {"lse": 1 + math.log(m) + row_terms.amax(1), "column_lse": 1 + math.log(n) + column_terms.amax(0)}
    if call.positives is not None:
        index = call.positives.reshape(n, -1) % m
        sums["positive_logits"] = 1 + lengths.gather(1, index).view(call.positives.shape)
        coefficients.scatter_add_(1, index, q.view(n, -1).abs())
    sums["grad_scale"] = (coefficients * lengths).sum() / scale if scale else coefficients.sum()
    sums["grad_column_bias"] = by_rows.sum(0) + underflow
    sums["grad_row_bias"] = by_columns.sum(1) + underflow
    if call.square:
        coefficients = coefficients + coefficients.T
    sums["grad_rows"] = scale * x_rnorm * (coefficients @ length_y)
    sums["grad_columns"] = scale * y_rnorm * (coefficients.T @ length_x)
    return sums


def _unit_rows(x, normalize):
    norm = x.norm(dim=1).clamp_min(1e-12)
    return (F.normalize(x, dim=1), 1 / norm) if normalize else (x, torch.ones_like(norm))


def _logits(call):
    x, _ = _unit_rows(call.rows, call.normalize_rows)
    return call.scale * (x @ (x if call.square else _unit_rows(call.columns, call.normalize_columns)[0]).T)


def _allowed(call, logits):
    n, m = call.sizes
    allowed = torch.ones(n, m, dtype=torch.bool)
    diagonal = torch.eye(n, m, dtype=torch.bool)
    if call.row_ids is not None:
        equal = call.row_ids[:, None] == (call.row_ids if call.square else call.column_ids)[None, :]
        allowed = equal == call.only_equal_ids
        if call.keep_diagonal:
            allowed |= diagonal
    if call.row_limit is not None:
        above = logits > call.row_limit[:, None]
        if call.exempt is not None:
            above &= ~call.exempt
        if call.positives is not None:
            above.scatter_(1, call.positives.reshape(n, -1) % m, False)
        allowed &= ~above
    return allowed & ~diagonal if call.square else allowed


def _finite(bias):
    return torch.where(bias.isfinite(), bias.abs(), 0)


def _softmax(logits, lse, allowed):
    return torch.where(allowed & (logits != -torch.inf), torch.exp(logits - lse), 0)


def rounding_floor(call, name, sums, *, rounds_coefficients=False, tf32=False):
    """The relative error that rounding to the accumulation dtype, and of gradients to the input's, may leave.

    A logit is off by the roundings of its dot product and its scale, and with it lse and the exponential's exponent.
    A gradient's sum over n vectors is off by sqrt(n) roundings, however it is ordered. Those of a dot product's terms
    to TF32, and of the coefficients of all rows, are of either sign.
    """
    eps = torch.finfo(call.acc).eps
    product = 4 * 2.0**-11 * min(1, 2 / call.rows.shape[1] ** 0.5) if tf32 else 0.0
    if name in RESULTS:
        return eps * (4 + call.rows.shape[1] ** 0.5 / 4) + product
    largest_logit = sums["lse"].max().item()
    floor = eps * (4 + 2 * largest_logit + max(call.sizes) ** 0.5) + product * (1 + largest_logit)
    if "bias" in name:
        return floor
    narrow = torch.finfo(call.rows.dtype).eps if call.rows.dtype != call.acc else 0
    coefficients = 2 * narrow * rounds_coefficients
    if name == "grad_scale":
        return floor + coefficients / len(call.rows) ** 0.5
    return floor + coefficients + narrow / 2


def relative_errors(found, truth, sums):
    """Largest error of each tensor in units of `term_sums`."""
    errors = {}
    for name, value in truth.items():
        unit = sums[name].clamp_min(torch.finfo(torch.float64).tiny)
        if value.dim() > unit.dim():
            unit = unit[:, None]
        # What the result's dtype cannot hold is infinite in it, or half a step of its subnormal numbers off.
        info = torch.finfo(found[name].dtype)
        value = torch.where(value.abs() > info.max, value.sign() * torch.inf, value)
        same = (found[name] == value) | (found[name].isnan() & value.isnan())
        error = (found[name].double() - value).abs() - info.smallest_normal * info.eps / 2
        errors[name] = torch.where(same, 0, error.clamp_min(0) / unit).max().item()
    return errors


def check_against_float64(backend, call):
    """Every result and gradient of `backend` is about as accurate as plain PyTorch's, judged by float64."""
    check_results(results_and_gradients(on_backend(backend), call), call, backend)


def check_results(found, call, backend="native", *, expectation=False, **roundings):
    """The same for results that are there.

    Args:
        expectation: The columns and biases get no gradient.
        roundings: Of `rounding_floor`: coefficients rounded to the rows' dtype before they are multiplied by vectors,
            and products in TF32, as GPUs make them.
    """
    found = {name: tensor.cpu() for name, tensor in found.items()}
    call = call.map(torch.Tensor.cpu)
    check_types(found, call)
    truth, sums, theirs = exact(call), term_sums(call), plain(call)
    if expectation:
        truth = {name: value for name, value in truth.items() if name not in _BESIDE_THE_EXPECTATION}
    assert found.keys() == truth.keys()
    errors, plain_errors = (relative_errors(each, truth, sums) for each in (found, theirs))
    for name, error in errors.items():
        allowed = FACTOR * plain_errors[name] + rounding_floor(call, name, sums, **roundings)
        assert error <= allowed, (
            f"{backend} {name}: error {error:.2e}, plain PyTorch {plain_errors[name]:.2e}, allowed {allowed:.2e}"
        )


_BESIDE_THE_EXPECTATION = ("grad_columns", "grad_column_bias", "grad_row_bias")


def check_types(found, call):
    """Shapes and dtypes of docs/contrastive.md."""
    n, m = call.sizes
    for name, tensor in found.items():
        if name in RESULTS:
            shape = {"lse": (n,), "column_lse": (m,)}.get(name)
            shape = tuple(call.positives.shape) if shape is None else shape
            dtype = torch.float64
        else:
            operand = getattr(call, name.removeprefix("grad_"))
            shape, dtype = operand.shape, operand.dtype
        assert tensor.shape == shape, name
        assert tensor.dtype == dtype, name
