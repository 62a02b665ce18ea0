"""What the losses share: dtypes under autocast, scalars, reductions."""

import math

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

from ssl_kernels.backends import MULTIPLIES_BFLOAT16, choose_backend
from ssl_kernels.checks import check_all_embeddings
from ssl_kernels.ops.library import accumulation_dtype, savable

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_autocast_enabled(device):
    """Whether autocast is on for a type of device, which may have none, as "meta"."""
    # torch 2.11 compiled cannot look into is_autocast_available.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return False
    return device != "meta" and torch.is_autocast_enabled(device)


def widest_under_autocast(*tensors):
    """Under autocast, tensors of different dtypes in the widest of them; otherwise as they are."""
    dtype = getattr(tensors[0], "dtype", None)
    for tensor in tensors:
        if getattr(tensor, "dtype", None) != dtype:
            break
    else:
        return tensors
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors
    if not is_autocast_enabled(tensors[0].device.type):
        return tensors
    widest = tensors[0].dtype
    for tensor in tensors[1:]:
        widest = torch.promote_types(widest, tensor.dtype)
    return tuple(tensor.to(widest) for tensor in tensors)


def checked_rows(op, paired, check=check_all_embeddings, optional=None, **rows):
    """Embeddings by name: checked, in the widest dtype under autocast.

    paired: How many of them, the first ones, must have as many rows as each other.
    optional: The name of the last, if that may be None.
    """
    if optional is not None and rows[optional] is None:
        del rows[optional]
        return *checked_rows(op, paired, check, **rows), None
    made = widest_under_autocast(*rows.values())
    check(op, rows, made, paired)
    return made


def stacked(*rows):
    """Rows one above the other; autocast would refuse a narrow dtype that is not its own."""
    if rows[0].dtype.itemsize == 2 and is_autocast_enabled(rows[0].device.type):
        with torch.autocast(rows[0].device.type, enabled=False):
            return torch.cat(rows)
    return torch.cat(rows)


def runs_natively(backend, caller, *call, views=1):
    """Whether `contrastive` runs on the native backend, eagerly, so that nodes of autograd in C++ may follow."""
    if torch.compiler.is_compiling():
        return False
    return choose_backend("contrastive", backend, caller, *call, views=views) == "native"


def may_be_one_node(*values):
    """Whether a node of autograd in C++ may stand for several operators: eagerly, without torch.func and dual tensors,
    for which it has no rule, and where it can read `values`: plain tensors on the CPU that lie there as they are."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or fwAD._current_level >= 0:
        return False
    return all(type(value) in _PLAIN and value.is_cpu and not value.is_neg() for value in values)


def takes_row_losses(backend, caller, x, *values):
    """Whether `row_losses.native` (csrc/ops/row_losses.cpp) stands for the operators after the sums of rows x."""
    return may_be_one_node(*values) and runs_natively(backend, caller, x)


def native_row_losses(rule, inputs, reduction, like, row_weights=None, constants=()):
    """`reduce` of the losses that a rule of `row_losses.native` makes of `inputs`."""
    of_rows = row_weights is not None or reduction == "none"
    loss = torch.ops.ssl_kernels.row_losses.native(
        rule, inputs, constants, "none" if of_rows else reduction, like.dtype == torch.float64
    )
    return reduce(loss, reduction, like, row_weights) if of_rows else loss


def as_scalar(value, like):
    """A number or tensor of one element as a 0-d tensor in the accumulation dtype of `like`."""
    acc = accumulation_dtype(like)
    if isinstance(value, torch.Tensor):
        return savable(_without_dimensions(value, acc))
    if torch.compiler.is_compiling():
        return _traced(value, like).to(acc)
    return torch.scalar_tensor(float(value), dtype=acc, device=like.device)


def as_operand(value, like):
    """What stands for a number or tensor of one element in arithmetic with rows: no tensor is made of a number."""
    return as_scalar(value, like) if isinstance(value, torch.Tensor) else value


def number_operand(number, like):
    """What stands for a number, or a tensor, in arithmetic: while it is traced, of a number a 0-d float64 tensor.

    torch.compile of torch 2.11 makes a constant of a number that meets another in Python, and a graph for each.
    """
    if isinstance(number, torch.Tensor) or not torch.compiler.is_compiling():
        return number
    return _traced(number, like)


def inverse(temperature, like):
    """1 / temperature as a 0-d tensor in the accumulation dtype of `like`."""
    if isinstance(temperature, torch.Tensor):
        return _without_dimensions(temperature, accumulation_dtype(like)).reciprocal()
    if torch.compiler.is_compiling():
        return (1 / _traced(temperature, like)).to(accumulation_dtype(like))
    return as_scalar(1 / float(temperature), like)


def inverse_operand(temperature, like):
    """As `inverse`, but of a number the number, where `as_scalar` makes it a tensor."""
    if isinstance(temperature, torch.Tensor) or torch.compiler.is_compiling():
        return inverse(temperature, like)
    return 1 / float(temperature)


def logarithm(number, like):
    """log(number) of a number >= 0, which may be symbolic: a float, or a 0-d float64 tensor."""
    if torch.compiler.is_compiling():
        return _traced(number, like).log()
    return math.log(number) if number else -math.inf


def _without_dimensions(tensor, dtype):
    tensor = tensor.reshape(()) if tensor.dim() else tensor
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _traced(number, like):
    """A number as a 0-d float64 tensor, by arithmetic: float(number) would have torch.compile make a graph of each."""
    return torch.ones((), dtype=torch.float64, device=like.device) * number


def unit_rows(x, normalize):
    """Rows in the accumulation dtype, L2-normalised if asked: for the terms that cost O(N · D)."""
    x = x.to(accumulation_dtype(x))
    return F.normalize(x, dim=-1) if normalize else savable(x)


def minus_log_sigmoid(logit):
    """log(1 + exp(−logit)), exact for every logit; 0 with gradient 0 at +inf."""
    return -F.logsigmoid(logit)


def rows_for_several(x, backend, caller):
    """x for several operators that differentiate by it: autograd adds their gradients before it rounds them once.

    That is x in the accumulation dtype. Kernels of a GPU get narrow rows as they are, and so do those of a CPU that
    multiplies bfloat16 numbers, since the products of wide ones take several times as long: each gradient is rounded.
    """
    narrow = x.is_cuda or (x.dtype == torch.bfloat16 and MULTIPLIES_BFLOAT16 and x.device.type == "cpu")
    if narrow and choose_backend("contrastive", backend, caller, x) in ("native", "triton"):
        return x
    return x.to(accumulation_dtype(x))


def not_below_zero(loss):
    """Losses that rounding left below 0 as 0, NaN as NaN; the gradient is that of the loss."""
    return loss - loss.detach().clamp_max(0)


def infinite_as_nan(x):
    """A logit, or the log-sum-exp of some, as the softmax over it has it: NaN where it is +inf."""
    return torch.add(x, x.detach().clamp_min(0), alpha=0)  # 0 · inf is NaN


def weighted_mean(loss, weights):
    """Σ w_i loss_i / Σ w_i; where the weights add up to 0, as they do if all are 0, it is 0 with gradient 0."""
    total = weights.sum()
    counts = total != 0
    return ((loss * weights).sum() / total.where(counts, 1)).where(counts, 0)


def loss_beside(products, scale, lse, reduction, like, row_weights=None, *, backend, caller):
    """Reduced losses of rows whose positive, of logit scale · product, stands beside the sum `lse` of the negatives."""
    if takes_row_losses(backend, caller, like, lse):
        return native_row_losses("beside", (products, scale, lse), reduction, like, row_weights)
    logit = infinite_as_nan(scale * products)
    return reduce(minus_log_sigmoid(logit - lse), reduction, like, row_weights)


def reduce(loss, reduction, like, row_weights=None):
    """Rows' losses, float64, to what the caller asked for, in the accumulation dtype of `like`.

    With weights w: w_i loss_i for "none", their sum, and for "mean" `weighted_mean`.
    """
    acc = accumulation_dtype(like)
    if row_weights is not None:
        row_weights = savable(row_weights.to(loss.dtype))
        if reduction == "mean":
            return weighted_mean(loss, row_weights).to(acc)
        loss = loss * row_weights
    if reduction == "mean":
        return loss.mean(dtype=acc)
    if reduction == "sum":
        return loss.sum(dtype=acc)
    return loss.to(acc)
