"""Checks of what a user passes: each names the argument, the rule and the value, before anything runs."""

import math
import numbers

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")
_HOLDING_VALUES = (torch.Tensor, torch.nn.Parameter)
_LARGEST_FLOAT32, _LARGEST_FLOAT64 = 2.0**127, 2.0**1023  # a power of two below the largest


def check_embeddings(op, **tensors):
    """Each must be a (N, D) floating tensor, N and D at least 1; all of one dtype, device and width."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float64, float32, float16 or bfloat16, got {short(tensor.dtype)}"
            )
        shape = tensor.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{op}: {name} must have shape (N, D) with N, D >= 1, got {tuple(shape)}")
        if tensor is first:
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} as {first_name} is, got {tensor.device}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {short(first.dtype)} as {first_name} is, got {short(tensor.dtype)}"
            )
        if shape[1] != first.shape[1]:
            raise ValueError(
                f"{op}: {name} must have width {first.shape[1]} as {first_name} has, got {shape[1]}"
            )


def check_same_rows(op, **tensors):
    """All must have as many rows as the first."""
    first_name, first = next(iter(tensors.items()))
    rows = first.shape[0]
    for name, tensor in tensors.items():
        if tensor.shape[0] != rows:
            raise ValueError(f"{op}: {name} must have {rows} rows as {first_name} has, got {tensor.shape[0]}")


def check_reduction(op, reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f'{op}: reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_scalar(op, name, value, like, *, positive=False):
    """`value` must be a number, or a floating tensor of one element on the device of `like`.

    A number must be finite and, with `positive`, > 0, and so must be what it becomes in the accumulation dtype of
    `like`: with `positive` its inverse. A tensor with `positive` is looked at where that is free (`can_be_read`).
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a number or a floating tensor of one element,"
                f" got shape {tuple(value.shape)}, {short(value.dtype)}"
            )
        if value.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
        if not positive or not can_be_read(value):
            return
        value = value.item()
        if value != value or value == math.inf:  # reaches the loss, as NaN and inf in the rows do
            return
    elif not is_number(value):
        raise TypeError(
            f"{op}: {name} must be a number or a tensor of one element, got {type(value).__name__}"
        )
    elif type(value) is not float and not torch.compiler.is_compiling():
        try:
            value = float(value)  # numpy would compare in the narrower type
        except OverflowError:  # an integer beyond float64
            value = math.inf
    # Comparisons, not math.isfinite, which torch.compile cannot trace of a number that changes.
    largest = _LARGEST_FLOAT64 if like.dtype == torch.float64 else _LARGEST_FLOAT32
    if positive:
        if not 0 < value <= _LARGEST_FLOAT64:
            raise ValueError(f"{op}: {name} must be finite and > 0, got {value}")
        if value < 1 / largest:
            raise ValueError(
                f"{op}: {name} must be at least {1 / largest:.3g} with {short(like.dtype)} rows, got {value}"
            )
    elif not -largest <= value <= largest:
        rule = f"at most {largest:.3g} in size with {short(like.dtype)} rows"
        if not -_LARGEST_FLOAT64 <= value <= _LARGEST_FLOAT64:
            rule = "finite"
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")


def check_margin(op, margin, like):
    """`margin` must be a scalar as `check_scalar` says, and >= 0; a tensor is looked at where that is free."""
    check_scalar(op, "margin", margin, like)
    if isinstance(margin, torch.Tensor):
        if not can_be_read(margin):
            return
        margin = margin.item()
    if margin < 0:
        raise ValueError(f"{op}: margin must be >= 0, got {margin}")


def check_ids(op, name, value, shape, like):
    """`value` must be an integer tensor of `shape` on the device of `like`."""
    check_shape(op, name, value, shape, like)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {short(value.dtype)}")


def check_row_weights(op, name, value, rows, like):
    """`value` must be None or a (rows,) floating tensor on the device of `like`."""
    if value is None:
        return
    check_shape(op, name, value, (rows,), like)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {short(value.dtype)}")


def check_shape(op, name, value, shape, like):
    """`value` must be a tensor of `shape` on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")


def check_dense(op, name, value):
    """`value` must be a tensor whose elements lie in memory as they are: strided, not quantized."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else short(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def check_fraction(op, name, value, *, below_one=False):
    """`value` must be a number in [0, 1], or in [0, 1) with below_one."""
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{op}: {name} must be in [0, 1{')' if below_one else ']'}, got {value}")


def check_least_rows(op, name, tensor, least, why):
    if tensor.shape[0] < least:
        raise ValueError(f"{op}: {name} must have at least {least} rows, {why}, got {tensor.shape[0]}")


def can_be_read(*tensors):
    """Whether looking at values waits for no device: tensors on the CPU that are no stand-ins in a trace."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return hold_values(*tensors)


def hold_values(*tensors):
    """Whether tensors are no stand-ins in a trace."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _HOLDING_VALUES:
            return False
    return (
        not torch._C._len_torch_dispatch_stack()  # of fake tensors, or make_fx
        and not torch._C._are_functorch_transforms_active()
    )


def is_number(value):
    """A real number of Python or numpy, no bool."""
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def is_whole(value):
    """An integer of Python or numpy, no bool."""
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def short(dtype):
    return str(dtype).removeprefix("torch.")
