"""Calls of `contrastive` with data of many kinds, and the rule by which a backend's results are judged.

The rule: a result passes when its error against float64 is about that of plain PyTorch on the same input. An
error is counted in units of the sum of the absolute values of the terms that make the number up (`term_sums`),
so that a row of tiny gradients is held as tightly as its large neighbours, and a sum that cancels is not held to
digits which no summation keeps.
"""

import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.reference.contrastive import contrastive as reference

BACKENDS = ("reference", "chunked", "native")  # those that run on the CPU
OPERATORS = ("chunked", "native")  # those that are operators of torch.ops.ssl_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A kernel's largest error may be this many times plain PyTorch's, which may be lucky in a small tensor, plus
# `rounding_floor`.
FACTOR = 3.0

RESULTS = ("lse", "column_lse", "positive_logits")
GRADIENTS = ("grad_rows", "grad_columns", "grad_scale")


@dataclass
class Call:
    """The operands and flags of one call of `contrastive`, and the gradients that come back into it."""

    rows: torch.Tensor
    columns: torch.Tensor | None = None
    scale: float = 10.0
    positives: torch.Tensor | None = None
    row_ids: torch.Tensor | None = None
    column_ids: torch.Tensor | None = None
    normalize_rows: bool = True
    normalize_columns: bool = True
    keep_diagonal: bool = False
    both_directions: bool = False
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
    def scale_tensor(self):
        return torch.tensor(self.scale, dtype=self.acc)

    @property
    def options(self):
        names = ("positives", "row_ids", "column_ids", "keep_diagonal", "both_directions")
        return {name: getattr(self, name) for name in (*names, "normalize_rows", "normalize_columns")}

    @property
    def operands(self):
        """As the operators take them."""
        return (self.rows, self.columns, self.scale_tensor, self.positives, self.row_ids, self.column_ids)

    @property
    def flags(self):
        normalize_columns = self.normalize_rows if self.square else self.normalize_columns
        return (self.normalize_rows, normalize_columns, self.keep_diagonal, self.both_directions)

    def cotangents(self):
        """Gradients of lse, column_lse and positive_logits, float64 of either sign."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        n, m = self.sizes
        shapes = [
            (n,),
            (m if self.both_directions else 0,),
            (0,) if self.positives is None else self.positives.shape,
        ]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def in_dtype(self, dtype):
        columns = None if self.square else self.columns.to(dtype)
        return dataclasses.replace(self, rows=self.rows.to(dtype), columns=columns)


def random_rows(n, d, dtype=torch.float32, *, seed=0, spread=0.0):
    """(n, d) normal numbers; with `spread`, rows of lengths that differ by factors of exp(spread)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    lengths = torch.exp(spread * torch.randn(n, 1, generator=generator, dtype=torch.float64))
    return (rows * lengths).to(dtype)


def random_call(
    n,
    m,
    d,
    dtype=torch.float32,
    *,
    temperature=0.1,
    positives_per_row=1,
    ids=0,
    seed=0,
    spread=0.0,
    **options,
):
    """A call with random operands; `m` None is the square case.

    Args:
        positives_per_row: 0: none; 1: shape (N,); P: shape (N, P). Some count from the end.
        ids: 0: none; k: ids drawn from k values, of which the last half are row's or column's own.
    """
    generator = torch.Generator().manual_seed(seed + 17)
    columns = n if m is None else m
    call = Call(
        random_rows(n, d, dtype, seed=seed, spread=spread),
        None if m is None else random_rows(m, d, dtype, seed=seed + 5, spread=spread),
        1 / temperature,
        seed=seed,
        **options,
    )
    if positives_per_row:
        shape = (n,) if positives_per_row == 1 else (n, positives_per_row)
        call.positives = torch.randint(-columns, columns, shape, generator=generator)
    if ids:
        call.row_ids = torch.randint(ids, (n,), generator=generator)
        if m is not None:
            call.column_ids = torch.randint(ids, (m,), generator=generator)
    return call


def results_and_gradients(run, call):
    """The three results and the three gradients, by name, of run(rows, columns, scale, **call.options).

    `run` is autograd code. Tensors without entries are left out.
    """
    rows = call.rows.detach().requires_grad_()
    columns = None if call.square else call.columns.detach().requires_grad_()
    scale = call.scale_tensor.requires_grad_()
    results = run(rows, columns, scale, **call.options)
    seen = [(result, seed) for result, seed in zip(results, call.cotangents(), strict=True) if result.numel()]
    leaves = [rows, scale] if call.square else [rows, columns, scale]
    outputs = [result for result, _ in seen]
    grads = list(torch.autograd.grad(outputs, leaves, [seed.to(result.dtype) for result, seed in seen]))
    named = dict(zip(RESULTS, (result.detach() for result in results), strict=True))
    named |= dict(
        zip(GRADIENTS, grads if not call.square else [grads[0], rows.new_empty(0), grads[1]], strict=True)
    )
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


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
    return {
        name: t.to(call.rows.dtype) if name in ("grad_rows", "grad_columns") else t
        for name, t in found.items()
    }


def term_sums(call):
    """For each result and gradient the sum of the absolute values of its terms, float64, in its leading shape."""
    info = torch.finfo(call.acc)
    call = call.in_dtype(torch.float64)
    x, x_rnorm = _unit_rows(call.rows, call.normalize_rows)
    y, y_rnorm = (x, x_rnorm) if call.square else _unit_rows(call.columns, call.normalize_columns)
    with torch.no_grad():
        options = {**call.options, "both_directions": True}
        lse, column_lse, _ = reference(call.rows, call.columns, call.scale_tensor, **options)
    g, h, q = call.cotangents()
    n, m = call.sizes
    logits = call.scale * (x @ y.T)
    allowed = _allowed(call)
    coefficients = _softmax(logits, lse[:, None], allowed) * g[:, None].abs()
    if call.both_directions:
        coefficients += _softmax(logits, column_lse[None, :], allowed) * h[None, :].abs()
    coefficients += info.tiny / info.eps  # what an exponential that underflows leaves does not count
    length_x, length_y = x.norm(dim=1), y.norm(dim=1)
    lengths = abs(call.scale) * length_x[:, None] * length_y[None, :]
    sums = {"lse": 1 + math.log(m) + lengths.amax(1), "column_lse": 1 + math.log(n) + lengths.amax(0)}
    if call.positives is not None:
        index = call.positives.reshape(n, -1) % m
        sums["positive_logits"] = 1 + lengths.gather(1, index).view(call.positives.shape)
        coefficients.scatter_add_(1, index, q.view(n, -1).abs())
    sums["grad_scale"] = (
        (coefficients * lengths).sum() / abs(call.scale) if call.scale else coefficients.sum()
    )
    if call.square:
        coefficients = coefficients + coefficients.T
    sums["grad_rows"] = abs(call.scale) * x_rnorm * (coefficients @ length_y)
    sums["grad_columns"] = abs(call.scale) * y_rnorm * (coefficients.T @ length_x)
    return sums


def _unit_rows(x, normalize):
    norm = x.norm(dim=1).clamp_min(1e-12)
    return (F.normalize(x, dim=1), 1 / norm) if normalize else (x, torch.ones_like(norm))


def _allowed(call):
    n, m = call.sizes
    allowed = torch.ones(n, m, dtype=torch.bool)
    diagonal = torch.eye(n, m, dtype=torch.bool)
    if call.row_ids is not None:
        allowed = call.row_ids[:, None] != (call.row_ids if call.square else call.column_ids)[None, :]
        if call.keep_diagonal:
            allowed |= diagonal
    return allowed & ~diagonal if call.square else allowed


def _softmax(logits, lse, allowed):
    return torch.where(allowed, torch.exp(logits - lse), 0)


def rounding_floor(call, name, sums):
    """The relative error that rounding to the accumulation dtype, and of gradients to the input's, may leave.

    A logit is off by the roundings of its dot product and its scale, and with it lse and the exponential's exponent.
    A gradient's sum over n vectors is off by sqrt(n) roundings, however it is ordered.
    """
    eps = torch.finfo(call.acc).eps
    if name in RESULTS:
        return 4 * eps
    largest_logit = sums["lse"].max().item()
    stored = 0 if name == "grad_scale" else torch.finfo(call.rows.dtype).eps / 2
    return eps * (4 + 2 * largest_logit + max(call.sizes) ** 0.5) + (
        stored if call.rows.dtype != call.acc else 0
    )


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


def check_results(found, call, backend="native"):
    """The same for results that are there."""
    check_types(found, call)
    truth, sums = exact(call), term_sums(call)
    assert found.keys() == truth.keys()
    errors, plain_errors = relative_errors(found, truth, sums), relative_errors(plain(call), truth, sums)
    for name, error in errors.items():
        allowed = FACTOR * plain_errors[name] + rounding_floor(call, name, sums)
        assert error <= allowed, (
            f"{backend} {name}: error {error:.2e}, plain PyTorch {plain_errors[name]:.2e}"
        )


def check_types(found, call):
    """Shapes and dtypes of docs/contrastive.md."""
    n, m = call.sizes
    shapes = {
        "lse": (n,),
        "column_lse": (m,),
        "positive_logits": () if call.positives is None else tuple(call.positives.shape),
        "grad_rows": tuple(call.rows.shape),
        "grad_columns": () if call.square else tuple(call.columns.shape),
        "grad_scale": (),
    }
    dtypes = dict.fromkeys(RESULTS, torch.float64) | dict.fromkeys(GRADIENTS, call.rows.dtype)
    dtypes["grad_scale"] = call.acc
    for name, tensor in found.items():
        assert tensor.shape == shapes[name], name
        assert tensor.dtype == dtypes[name], name


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


def product_eps(d, acc):
    """What a dot product over d is off by, relative to the sum of its terms' sizes.

    Kernels add products up along d one after the other, torch in blocks: most of all this shows in <x, x>, whose terms
    have one sign. For float64 the truth is rounded like that too.
    """
    return torch.finfo(acc).eps * (math.sqrt(d) if acc == torch.float64 else max(1.0, math.sqrt(d) / 8))
