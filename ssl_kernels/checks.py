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
    check_all_embeddings(op, tensors, tensors.values())


def check_all_embeddings(op, names, tensors, paired=0):
    """The same of tensors and their names; the first `paired` must have as many rows as each other, too."""
    first = None
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:  # a call costs time
            check_dtype(op, name, tensor)
        shape = tensor.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{op}: {name} must have shape (N, D) with N, D >= 1, got {tuple(shape)}")
        paired -= 1
        if first is None:
            first_name, first, (rows, width) = name, tensor, shape
            continue
        if tensor.device != first.device:
            check_device(op, name, tensor, first, first_name)
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {short(first.dtype)} as {first_name} is, got {short(tensor.dtype)}"
            )
        if shape[1] != width:
            raise ValueError(f"{op}: {name} must have width {width} as {first_name} has, got {shape[1]}")
        if paired >= 0 and shape[0] != rows:
            raise ValueError(f"{op}: {name} must have {rows} rows as {first_name} has, got {shape[0]}")


def check_same_rows(op, **tensors):
    """All must have as many rows as the first."""
    first_name, first = next(iter(tensors.items()))
    rows = first.shape[0]
    for name, tensor in tensors.items():
        if tensor.shape[0] != rows:
            raise ValueError(f"{op}: {name} must have {rows} rows as {first_name} has, got {tensor.shape[0]}")


def check_reduction(op, reduction, row_weights=None, rows=0, like=None):
    """The weights of what is reduced must be None or a (rows,) floating tensor on the device of `like`."""
    if reduction not in REDUCTIONS:
        check_choice(op, "reduction", reduction, *REDUCTIONS)
    if row_weights is not None:
        check_shape(op, "row_weights", row_weights, (rows,), like)
        check_floating(op, "row_weights", row_weights)


def check_scalar(op, name, value, like, *, positive=False):
    """`value` must be a number, or a floating tensor of one element on the device of `like`.

    A number must be finite and, with `positive`, > 0, and so must be what it becomes in the accumulation dtype of
    `like`: with `positive` its inverse. A tensor with `positive` is looked at where that is free
    (`values_are_readable`).
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a number or a floating tensor of one element,"
                f" got shape {tuple(value.shape)}, {short(value.dtype)}"
            )
        check_device(op, name, value, like)
        if not positive or not values_are_readable(value):
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
        if not values_are_readable(margin):
            return
        margin = margin.item()
    if margin < 0:
        raise ValueError(f"{op}: margin must be >= 0, got {margin}")


def check_ids(op, name, value, shape, like):
    """`value` must be an integer tensor of `shape` on the device of `like`."""
    check_shape(op, name, value, shape, like)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {short(value.dtype)}")


def check_shape(op, name, value, shape, like, like_name=None):
    """`value` must be a tensor of `shape` on the device of `like`."""
    check_tensor(op, name, value)
    if tuple(value.shape) != tuple(shape):
        raise shape_error(op, name, tuple(shape), value)
    check_device(op, name, value, like, like_name)


def shape_error(op, name, shape, tensor):
    """What is raised for a tensor that has not the `shape`, in words."""
    return ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_tensor(op, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_dtype(op, name, value):
    """`value` must be a tensor of a dtype that the kernels compute with."""
    check_tensor(op, name, value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, float16 or bfloat16, got {short(value.dtype)}"
        )


def check_floating(op, name, value):
    """`value` must be a tensor of any floating dtype."""
    check_tensor(op, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {short(value.dtype)}")


def check_device(op, name, value, like, like_name=None):
    """`value` must be on the device of `like`, which the message calls `like_name`."""
    if value.device != like.device:
        source = f" as {like_name} is" if like_name else ""
        raise ValueError(f"{op}: {name} must be on {like.device}{source}, got {value.device}")


def check_choice(op, name, value, *choices):
    """`value` must be one of the strings, or None where None is among them."""
    if value not in choices:
        *others, last = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
        rule = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


def check_dense(op, name, value):
    """`value` must be a tensor whose elements lie in memory as they are: strided, not quantized."""
    check_tensor(op, name, value)
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else short(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def check_fraction(op, name, value, *, below_one=False):
    """`value` must be a number in [0, 1], or in [0, 1) with below_one."""
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{op}: {name} must be in [0, 1{')' if below_one else ']'}, got {value}")


def check_whole(op, name, value, least, *, optional=False):
    """`value` must be an integer, at least `least`; None too where it is optional."""
    if optional and value is None:
        return
    if not is_whole(value) or value < least:
        rule = f"an integer >= {least}{' or None' if optional else ''}"
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


def check_least_rows(op, name, tensor, least, why):
    if tensor.shape[0] < least:
        raise ValueError(f"{op}: {name} must have at least {least} rows, {why}, got {tensor.shape[0]}")


def check_values(op, permutation, lam=None, *, boxes=None, image=None):
    """The values of all tensors given, which are read: a GPU is waited for. `image` is (height, width)."""
    check_permutation(op, permutation)
    if lam is not None:
        check_lam(op, lam)
    if boxes is not None:
        check_boxes(op, boxes, *image)


def check_mixed_target(op, target, partner, lam, classes, ignore_index, partner_is_class):
    """Of classes to mix: `partner` holds the partners' classes or is a permutation."""
    if partner_is_class:
        check_target(op, partner, classes, ignore_index, "partner_target")
    else:
        check_permutation(op, partner)
    check_lam(op, lam)
    check_target(op, target, classes, ignore_index)


def check_mixed_target_on_cpu(op, target, *args):
    """`check_mixed_target` where reading values waits for nothing, and in calls that are not being traced."""
    if values_are_readable(target):
        check_mixed_target(op, target, *args)


def check_on_cpu(op, permutation, *args, **options):
    """`check_values` where reading values waits for nothing, and in calls that are not being traced."""
    if values_are_readable(permutation):
        check_values(op, permutation, *args, **options)


def check_permutation(op, permutation):
    """Each of 0 … B − 1 must be there once."""
    from ssl_kernels import backends  # which takes its checks from here

    batch = len(permutation)
    if backends.extension is not None and values_are_readable(permutation):
        good = backends.extension.is_permutation(permutation)
    else:
        good = torch.equal(permutation.sort().values, torch.arange(batch, device=permutation.device))
    if not good:
        raise ValueError(
            f"{op}: permutation must hold each of 0 to {batch - 1} once, got {_some(permutation)}"
        )


def check_lam(op, lam):
    """Each must be in [0, 1]."""
    if not lam.numel():
        return
    least, most = (value.item() for value in lam.detach().aminmax())
    if not (0 <= least and most <= 1):
        bad = lam[~((lam >= 0) & (lam <= 1))]
        raise ValueError(f"{op}: lam must be in [0, 1], got {bad[0].item():g}")


def check_boxes(op, boxes, height, width):
    """0 <= y0 <= y1 <= height, 0 <= x0 <= x1 <= width."""
    y0, y1, x0, x1 = boxes.unbind(1)
    good = (y0 >= 0) & (y0 <= y1) & (y1 <= height) & (x0 >= 0) & (x0 <= x1) & (x1 <= width)
    if not good.all():
        raise ValueError(
            f"{op}: boxes must be (y0, y1, x0, x1) with 0 <= y0 <= y1 <= {height} and 0 <= x0 <= x1 <= {width},"
            f" got {tuple(boxes[~good][0].tolist())}"
        )


def check_target(op, target, classes, ignore_index=None, name="target"):
    """Each must be in [0, classes), or ignore_index."""
    if target.numel():
        least, most = (value.item() for value in target.aminmax())
        if 0 <= least and most < classes:
            return
    outside = (target < 0) | (target >= classes)
    if ignore_index is not None:
        outside &= target != ignore_index
    bad = target[outside]
    if len(bad):
        raise ValueError(f"{op}: {name} must be in [0, {classes}), got {bad[0].item()}")


def values_are_readable(*tensors):
    """Whether values lie in memory and looking at them waits for no device: tensors on the CPU that are no stand-ins in
    a trace, nor what is to be read with its sign turned (`c.conj().imag` of complex c)."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    if not hold_values(*tensors):
        return False
    for tensor in tensors:
        if tensor.is_neg():  # which torch.compile cannot trace
            return False
    return True


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


def _some(tensor, most=8):
    values = tensor[:most].tolist()
    return f"[{', '.join(map(str, values))}{', …' if len(tensor) > most else ''}]"
