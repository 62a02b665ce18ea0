"""Checks of what a user passes: each names the argument, the rule and the value, before anything runs."""

import math
import numbers

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")


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
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(f"{op}: {name} must have shape (N, D) with N, D >= 1, got {tuple(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} as {first_name} is, got {tensor.device}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {short(first.dtype)} as {first_name} is, got {short(tensor.dtype)}"
            )
        if tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"{op}: {name} must have width {first.shape[1]} as {first_name} has, got {tensor.shape[1]}"
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


def check_scalar(op, name, value, like, *, positive):
    """`value` must be a number, or a 0-d floating tensor on the device of `like`. A number must be finite (and > 0)."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a number or a 0-d floating tensor,"
                f" got shape {tuple(value.shape)}, {short(value.dtype)}"
            )
        if value.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
    elif not is_number(value):
        raise TypeError(f"{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
    elif not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{op}: {name} must be finite{' and > 0' if positive else ''}, got {value}")


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
        raise ValueError(f"{op}: {name} must lie in [0, 1{')' if below_one else ']'}, got {value}")


def check_least_rows(op, name, tensor, least, why):
    if len(tensor) < least:
        raise ValueError(f"{op}: {name} must have at least {least} rows, {why}, got {len(tensor)}")


def is_number(value):
    """A real number of Python or numpy, no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def short(dtype):
    return str(dtype).removeprefix("torch.")
