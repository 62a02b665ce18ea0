"""Inputs for the CUDA launchers of `contrastive`, and the comparison with float64."""

import math
from typing import NamedTuple

import torch

from ssl_kernels.check import limits_between
from ssl_kernels.reference.contrastive import contrastive as reference
from tests.cuda.contrastive_calls import Call, accumulation_dtype, contrastive_bwd, contrastive_fwd
from tests.helpers import product_eps


class Upstream(NamedTuple):
    """Gradients of the three results, float64 or None."""

    lse: torch.Tensor | None
    column_lse: torch.Tensor | None
    positive_logits: torch.Tensor | None


class Gradients(NamedTuple):
    rows: torch.Tensor
    columns: torch.Tensor | None
    scale: torch.Tensor
    column_bias: torch.Tensor | None
    row_bias: torch.Tensor | None


def random_call(
    n, d, dtype, *, m=None, temperature=0.1, positives=1, ids=False, both_directions=False,
    keep_diagonal=False, normalize=True, seed=0, device="cpu", column_dtype=None, additions="",
):  # fmt: skip
    """A random call: m columns, of the rows' dtype unless given, or None for the square case.

    `additions`: of "bias", "padding" (-inf in a third of column_bias), "limit", "exempt" and "only" equal ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows_of(count, dtype=dtype):
        return torch.randn(count, d, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def ids_of(count):
        return torch.randint(0, max(2, n // 4), (count,), generator=generator).to(device)

    columns = n if m is None else m
    call = Call(
        rows=rows_of(n),
        columns=None if m is None else rows_of(m, column_dtype or dtype),
        scale=torch.tensor(1 / temperature, dtype=accumulation_dtype(dtype), device=device),
        positives=torch.randint(-columns, columns, (n, positives), generator=generator).to(device)
        if positives
        else None,
        row_ids=ids_of(n) if ids else None,
        column_ids=ids_of(m) if ids and m is not None else None,
        normalize_rows=normalize,
        normalize_columns=normalize,
        keep_diagonal=keep_diagonal,
        both_directions=both_directions,
    )
    return with_additions(call, additions.split(), generator) if additions else call


def with_additions(call, words, generator):
    n, m = len(call.rows), len(call.rows if call.columns is None else call.columns)
    acc, device = call.scale.dtype, call.rows.device
    column_bias = row_bias = row_limit = exempt = None
    if "bias" in words:
        column_bias = 2 * torch.randn(m, generator=generator, dtype=torch.float64)
        row_bias = torch.randn(n, generator=generator, dtype=torch.float64) if call.both_directions else None
        if "padding" in words:
            column_bias[::3] = -torch.inf
    if "limit" in words:
        x, y = (
            each.double().cpu() for each in (call.rows, call.rows if call.columns is None else call.columns)
        )
        x = torch.nn.functional.normalize(x) if call.normalize_rows else x
        y = torch.nn.functional.normalize(y) if call.normalize_columns else y
        row_limit = limits_between(call.scale.double().cpu() * x @ y.T)
    if "exempt" in words:
        exempt = (torch.rand(m, generator=generator) < 0.3).to(device)
    vectors = [None if each is None else each.to(device, acc) for each in (column_bias, row_bias, row_limit)]
    added = dict(zip(("column_bias", "row_bias", "row_limit"), vectors, strict=True))
    return call._replace(**added, exempt=exempt, only_equal_ids="only" in words)


def random_upstream(call, seed=1):
    """Gradients as a mean loss over rows would send them."""
    generator = torch.Generator().manual_seed(seed)
    n = len(call.rows)
    m = n if call.columns is None else len(call.columns)

    def grad(*shape):
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) / n).to(call.rows.device)

    return Upstream(
        grad(n),
        grad(m) if call.both_directions else None,
        None if call.positives is None else -grad(*call.positives.shape),
    )


def plain(call, upstream, dtype):
    """The reference in `dtype`: (lse, column_lse, positive_logits), Gradients, float64 on the CPU."""
    call = Call(*(value.cpu() if isinstance(value, torch.Tensor) else value for value in call))
    rows = call.rows.to(dtype, copy=True).requires_grad_()
    columns = None if call.columns is None else call.columns.to(dtype, copy=True).requires_grad_()
    scale = call.scale.to(accumulation_dtype(dtype), copy=True).requires_grad_()
    positives = call.positives
    if positives is not None:
        positives = positives % len(rows if columns is None else columns)
    biases = [
        None if bias is None else bias.to(scale.dtype, copy=True).requires_grad_()
        for bias in (call.column_bias, call.row_bias)
    ]
    given = call._replace(column_bias=biases[0], row_bias=biases[1])
    results = reference(rows, columns, scale, positives, *given[4:])
    loss = scale.double() * 0
    for result, grad in zip(results, upstream, strict=True):
        if grad is not None:
            finite = torch.isfinite(result)  # rows whose columns are all left out
            loss = loss + (result[finite].double() * grad.cpu()[finite]).sum()
    loss.backward()
    gradients = [None if leaf is None else leaf.grad.double() for leaf in (rows, columns, scale, *biases)]
    return [result.detach().double() for result in results], Gradients(*gradients)


def run(library, call, upstream, *, expectation=False, **options):
    """Fwd, Bwd and the launches of both; with `expectation` the backward is the one without a walk."""
    fwd, forward_launches = contrastive_fwd(library, call, expectation=expectation, **options)
    bwd, backward_launches = contrastive_bwd(library, call, fwd, *upstream, **options)
    return fwd, bwd, forward_launches + backward_launches


def check_parity(library, call, *, seed=1, tf32=False, **options):
    """Holds forward and backward to float64; returns what `run` does.

    The forward must be about as accurate as plain PyTorch on the same values in acc_t, whatever the dtype;
    the gradients about as accurate as plain PyTorch in the dtype. Errors are measured in the size of what is
    added up: of the logits, and of the coefficients through scale and 1 / norm.
    """
    upstream = random_upstream(call, seed)
    fwd, bwd, launches = run(library, call, upstream, tf32=tf32, **options)
    truth, gradients = plain(call, upstream, torch.float64)
    acc = accumulation_dtype(call.rows.dtype)
    near, _ = plain(call, upstream, acc)
    _, near_gradients = plain(call, upstream, call.rows.dtype)

    unit = 2.0**-11 if tf32 else product_eps(call.rows.shape[1], acc)
    scale = call.scale.double().abs().item()
    largest, largest_bias = max(_largest_logit(call), 1.0), _largest_bias(call)
    for ours, exact, other in zip(fwd[:3], truth, near, strict=True):
        if ours is not None:
            _check(ours, exact, other, scale * largest + largest_bias + math.log(exact.numel()) + 1, 4 * unit)

    unit = 2.0**-11 if tf32 else torch.finfo(call.rows.dtype).eps
    bias_unit = unit if tf32 else torch.finfo(acc).eps  # their gradients are sums of exponentials in acc_t
    bias_unit *= 1 + scale * largest + largest_bias
    if tf32 or acc == torch.float64:  # what the products' rounding makes of the exponentials
        unit *= 1 + scale * largest + largest_bias
    if acc == torch.float64:  # sums over rows and columns, rounded in the truth as well
        unit *= math.sqrt(max(len(call.rows), 0 if call.columns is None else len(call.columns)))
    sizes = [grad.abs() for grad in upstream if grad is not None]
    weight = 2 * sum(size.max().item() * (size.shape[1] if size.dim() == 2 else 1) for size in sizes)
    row_norm, column_norm = _norms(call.rows, call.normalize_rows), None
    if call.columns is not None:
        column_norm = _norms(call.columns, call.normalize_columns)
    for ours, exact, other, own, across in (
        (bwd.grad_rows, gradients.rows, near_gradients.rows, row_norm, column_norm or row_norm),
        (bwd.grad_columns, gradients.columns, near_gradients.columns, column_norm, row_norm),
    ):
        if ours is not None:
            _check(ours, exact, other, scale * weight * across[1] * own[0][:, None] + 1e-300, 4 * unit)
    total = sum(size.sum().item() for size in sizes)
    _check(bwd.grad_scale, gradients.scale, near_gradients.scale, total * largest, 4 * unit)
    for name in ("column_bias", "row_bias"):
        ours = getattr(bwd, f"grad_{name}")
        if ours is not None:
            exact = getattr(gradients, name)
            _check(ours, exact, exact, weight * math.sqrt(len(call.rows)), 8 * bias_unit)
    return fwd, bwd, launches


def _check(ours, exact, other, size, floor):
    """Holds |ours - exact|, in units of size, to twice that of `other` plus a floor; inf must agree."""
    ours, exact, other = ours.cpu(), exact.to(ours.dtype).double(), other.to(ours.dtype).double()
    assert ours.shape == exact.shape
    ours = ours.double()
    finite = torch.isfinite(exact)
    assert torch.equal(ours[~finite], exact[~finite])

    def error(values):
        return ((values - exact).abs() / size)[finite].max().item() if finite.any() else 0.0

    other_error = error(other) if torch.isfinite(other[finite]).all() else 0.0
    assert error(ours) <= 2 * other_error + floor


def _largest_bias(call):
    biases = [
        bias[bias.isfinite()].abs().max() for bias in (call.column_bias, call.row_bias) if bias is not None
    ]
    return max((bias.item() for bias in biases), default=0.0)


def _norms(x, normalize):
    """Factor of each row in its gradient, largest norm of a row as the products see it."""
    norm = x.double().cpu().norm(dim=1)
    if normalize:
        return 1 / norm.clamp_min(1e-12), 1.0
    return torch.ones_like(norm), norm.max().item()


def _largest_logit(call):
    columns = call.rows if call.columns is None else call.columns
    return _norms(call.rows, call.normalize_rows)[1] * _norms(columns, call.normalize_columns)[1]
