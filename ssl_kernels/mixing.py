"""Mixup and CutMix of a batch, and the cross-entropy that goes with them."""

import collections.abc
from collections.abc import Sequence

import torch

from ssl_kernels.checks import (
    check_dense,
    check_device,
    check_dtype,
    check_floating,
    check_fraction,
    check_lam,
    check_mixed_target,
    check_on_cpu,
    check_permutation,
    check_reduction,
    check_values,
    is_number,
    is_whole,
    shape_error,
    short,
    values_are_readable,
)
from ssl_kernels.ops import cutmix as cutmix_ops
from ssl_kernels.ops import mixup as mixup_ops
from ssl_kernels.ops import mixup_cross_entropy as cross_entropy_ops
from ssl_kernels.ops import mixup_normalize as normalize_ops
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.overlap import share_memory


def mixup_(
    x: torch.Tensor,
    lam: float | torch.Tensor,
    permutation: torch.Tensor,
    *,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Mix every sample with its partner in place: x_i ← λ_i x_i + (1 − λ_i) x_p(i), p the permutation.

    Any permutation; every element is read once and written once, and nothing of the batch's size is allocated. A sample
    with λ_i = 1 or p(i) = i is left bit for bit.

    Args:
        x: (B, ...), float64, float32, float16 or bfloat16, any strides that do not overlap. Must not require grad while
            gradients are recorded; a tensor that autograd has saved is noticed at backward.
        lam: λ in [0, 1]: a float, a 0-d tensor or (B,), floating.
        permutation: (B,) int64 on the device of x.
        validate: On CUDA also check the values of lam and permutation, which waits for the device. On the CPU they are
            always checked.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        x.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or devices that do not fit, an empty batch, λ outside [0, 1] or NaN, a permutation that is
            none, x that requires grad, lam or permutation in memory of x. x is untouched then.

    Source: Zhang et al., mixup, arXiv:1710.09412.
    """
    op = "mixup_"
    _check_batch(op, x)
    check_in_place(op, "x", x, "mixup is differentiable")
    _check_no_grad(op, "lam", lam, "mixup is differentiable")
    _check_permutation(op, permutation, x)
    lam = _shares(op, lam, x)
    _check_apart(op, x, permutation=permutation, lam=lam)
    _validate(op, validate, x, permutation, lam)
    mixup_ops.mixup_(x, lam, permutation, backend=backend)
    return x


def mixup(
    x: torch.Tensor,
    lam: float | torch.Tensor,
    permutation: torch.Tensor,
    *,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`mixup_` into a new tensor in the layout of x, differentiable by x and by a tensor lam.

    For hidden features too (manifold mixup). The gradient by x walks the permutation the other way round.

    Args:
        x, lam, permutation, validate, backend: As in `mixup_`; x and lam get their gradients.

    Returns:
        Tensor like x.

    Raises:
        TypeError, ValueError: As `mixup_`, except that x may require grad.

    Source: Zhang et al., mixup, arXiv:1710.09412; Verma et al., Manifold Mixup, arXiv:1806.05236.
    """
    op = "mixup"
    _check_batch(op, x)
    _check_permutation(op, permutation, x)
    lam = _shares(op, lam, x)
    _validate(op, validate, x, permutation, lam)
    return mixup_ops.mixup(x, lam, permutation, backend=backend)


def cutmix_(
    x: torch.Tensor,
    boxes: torch.Tensor,
    permutation: torch.Tensor,
    *,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Paste a box of its partner into every sample in place, as the partner was before the call.

    x_i[..., y0:y1, x0:x1] ← x_p(i)[..., y0:y1, x0:x1] with (y0, y1, x0, x1) = boxes[i]. Only pixels inside the boxes
    are read and written.

    Args:
        x: (B, ..., H, W), at least 3-d, any dtype, any strides that do not overlap: images, feature maps or masks. Must
            not require grad while gradients are recorded.
        boxes: (B, 4) int64 on the device of x, 0 <= y0 <= y1 <= H and 0 <= x0 <= x1 <= W.
        permutation, validate, backend: As in `mixup_`.

    Returns:
        x.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or devices that do not fit, an empty batch, a box outside the image, a permutation that is
            none, x that requires grad, boxes or permutation in memory of x. x is untouched then.

    Source: Yun et al., CutMix, arXiv:1905.04899.
    """
    op = "cutmix_"
    _check_images(op, x)
    check_in_place(op, "x", x, "cutmix is differentiable")
    _check_permutation(op, permutation, x)
    _check_boxes(op, boxes, x)
    _check_apart(op, x, permutation=permutation, boxes=boxes)
    _validate(op, validate, x, permutation, boxes=boxes, image=x.shape[-2:])
    cutmix_ops.cutmix_(x, boxes, permutation, backend=backend)
    return x


def cutmix(
    x: torch.Tensor,
    boxes: torch.Tensor,
    permutation: torch.Tensor,
    *,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`cutmix_` into a new tensor in the layout of x, differentiable by x.

    Args:
        x, boxes, permutation, validate, backend: As in `cutmix_`; a floating x gets its gradient.

    Returns:
        Tensor like x.

    Raises:
        TypeError, ValueError: As `cutmix_`, except that x may require grad.

    Source: Yun et al., CutMix, arXiv:1905.04899.
    """
    op = "cutmix"
    _check_images(op, x)
    _check_permutation(op, permutation, x)
    _check_boxes(op, boxes, x)
    _validate(op, validate, x, permutation, boxes=boxes, image=x.shape[-2:])
    return cutmix_ops.cutmix(x, boxes, permutation, backend=backend)


def mixup_normalize(
    x: torch.Tensor,
    lam: float | torch.Tensor,
    permutation: torch.Tensor,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """8-bit images to mixed and normalised numbers in one pass, rounded once.

    out_i = ((λ_i x_i + (1 − λ_i) x_p(i)) / 255 − mean) / std, per channel; computed in float32.

    Args:
        x: (B, C, H, W) uint8, any strides; the result has the layout of x (contiguous, channels_last, ...).
        lam, permutation, validate, backend: As in `mixup_`.
        mean, std: C finite numbers each (a sequence or a tensor) of images in [0, 1]; std > 0. Tensors on CUDA
            are checked as `validate` says.
        dtype: float32, float16 or bfloat16.

    Returns:
        (B, C, H, W) of dtype.

    Raises:
        TypeError: x is not uint8, or another argument has the wrong type.
        ValueError: Shapes or devices that do not fit, an empty batch, λ outside [0, 1], indices that are not a
            permutation, a std not > 0.

    Source: Zhang et al., mixup, arXiv:1710.09412.
    """
    op = "mixup_normalize"
    check_dense(op, "x", x)
    if x.dtype != torch.uint8:
        raise TypeError(f"{op}: x must be uint8, got {short(x.dtype)}")
    if x.dim() != 4 or 0 in x.shape:
        raise shape_error(op, "x", "(B, C, H, W) with no dimension of 0", x)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    _check_permutation(op, permutation, x)
    lam = _shares(op, lam, x)
    mean, std = (_per_channel(op, name, value, x, validate) for name, value in (("mean", mean), ("std", std)))
    _validate(op, validate, x, permutation, lam)
    return normalize_ops.mixup_normalize(x, lam, permutation, mean, std, dtype, backend=backend)


def mixup_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    permutation: torch.Tensor | None = None,
    lam: float | torch.Tensor | None = None,
    *,
    partner_target: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of mixed samples from integer targets: λ_i CE(z_i, y_i) + (1 − λ_i) CE(z_i, y_p(i)).

    Two passes over the logits in all (one read forward, one read and one write backward); no dense target is made. The
    same as `F.cross_entropy` against that target with probabilities.

        loss = mixup_cross_entropy(logits, target, permutation, lam)
        loss = mixup_cross_entropy(logits, target, lam=lam, partner_target=target[permutation])     # the same

    The second form is for a part of a mixed batch, whose partners may lie outside of it, and for pixels.

    Args:
        logits: (N, C), or (N, C, d1, ...) as for pixels; float64, float32, float16 or bfloat16, any strides. Gets its
            gradient.
        target: Classes, (N,) or (N, d1, ...), of any integer dtype: 0 to C − 1, or ignore_index.
        permutation: (N,) int64: the partner of each sample, as in `mixup_`. None with partner_target.
        lam: λ in [0, 1]: a float, a 0-d tensor or (N,), floating. Gets its gradient.
        partner_target: Instead of a permutation: the partners' classes, in the shape of target.
        weight: None, or (C,) floating, the weight of each class as in `F.cross_entropy`; a constant.
        ignore_index: An integer. Where it is the class of a sample or of its partner, that term counts nothing; the
            other one keeps its share.
        label_smoothing: In [0, 1], as `F.cross_entropy`'s: of every term that counts, also weighted per class.
        reduction: "mean", "sum", or "none". The mean is the sum divided by Σ_i λ_i w(y_i) + (1 − λ_i) w(y_p(i)) over
            the terms that count, w the weight of a class or 1: N without weights and ignored classes,
            `F.cross_entropy`'s denominator for λ = 1, and 0 / 0 where all is ignored.
        validate: On CUDA also check the values of target, permutation and lam, which waits for the device.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 logits): a scalar, or for "none" a tensor in the shape of target.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or devices that do not fit, an empty batch, λ or label_smoothing outside [0, 1], a
            permutation that is missing or not one, a target outside the classes, an unknown reduction.

    Source: Zhang et al., mixup, arXiv:1710.09412; label smoothing: Szegedy et al., arXiv:1512.00567.
    """
    op = "mixup_cross_entropy"
    _check_batch(op, logits, "logits")
    if logits.dim() < 2:
        raise shape_error(op, "logits", "(N, C) or (N, C, d1, ...)", logits)
    shape = logits.shape[:1] + logits.shape[2:]
    target = _classes(op, "target", target, shape, logits)
    if (permutation is None) == (partner_target is None):
        given = "neither" if permutation is None else "both"
        raise ValueError(f"{op}: permutation or partner_target must be given, got {given}")
    if partner_target is None:
        _check_permutation(op, permutation, logits, "logits")
    else:
        partner_target = _classes(op, "partner_target", partner_target, shape, logits)
    if weight is not None:
        weight = _class_weights(op, weight, logits)
    if not is_whole(ignore_index):
        raise TypeError(f"{op}: ignore_index must be an integer, got {type(ignore_index).__name__}")
    check_fraction(op, "label_smoothing", label_smoothing)
    check_reduction(op, reduction)
    lam = _shares(op, lam, logits, "logits")
    if logits.dim() > 2:  # one row a pixel
        if partner_target is None:
            (check_permutation if validate else check_on_cpu)(op, permutation)
            partner_target = target[permutation]
        logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        target, partner_target = target.reshape(-1), partner_target.reshape(-1)
        lam = lam.view(-1, *[1] * (len(shape) - 1)).expand(shape).reshape(-1)
    partner, is_class = (permutation, False) if partner_target is None else (partner_target, True)
    if validate and logits.device.type != "cpu":  # on the CPU the operators check values themselves
        check_mixed_target(op, target, partner, lam, logits.shape[1], ignore_index, is_class)

    def loss_of(smoothing):
        options = (weight, smoothing, int(ignore_index), is_class, reduction)
        return cross_entropy_ops.mixup_cross_entropy(logits, target, partner, lam, *options, backend=backend)

    if torch.compiler.is_compiling() and label_smoothing:
        # Linear in it: as an argument of the operator, a number that changes would have a graph for each of its values.
        smoothing = torch.ones((), dtype=lam.dtype, device=lam.device) * label_smoothing
        loss = (1 - smoothing) * loss_of(0.0) + smoothing * loss_of(1.0)
    else:
        loss = loss_of(float(label_smoothing))
    return loss.view(shape) if reduction == "none" else loss


mixup_.operation = mixup.operation = "mixup"
cutmix_.operation = cutmix.operation = "cutmix"
mixup_normalize.operation = "mixup_normalize"
mixup_cross_entropy.operation = "mixup_cross_entropy"


def _check_batch(op, x, name="x"):
    check_dense(op, name, x)
    check_dtype(op, name, x)
    if x.dim() == 0 or 0 in x.shape:
        raise shape_error(op, name, "(B, ...) with no dimension of 0", x)


def _check_images(op, x):
    check_dense(op, "x", x)
    if x.dim() < 3 or 0 in x.shape:
        raise shape_error(op, "x", "(B, ..., H, W) with no dimension of 0", x)


def check_in_place(op, name, x, instead):
    """x is overwritten: autograd must not need it, it must not be frozen, and no element may be there twice."""
    _check_no_grad(op, name, x, instead)
    if not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: {name} must not be an inference tensor outside of inference mode, got one")
    if _overlaps(x):
        raise ValueError(
            f"{op}: {name} must not overlap itself, got strides {x.stride()} for {tuple(x.shape)}"
        )


def _check_no_grad(op, name, value, instead):
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} must not require grad while gradients are recorded, got one that does; {instead}"
        )


def _check_apart(op, x, **read):
    """What is read while x is overwritten must not lie in its memory."""
    for name, value in read.items():
        if share_memory(x, value):
            raise ValueError(f"{op}: {name} must lie in memory of its own, got a view of x")


def _overlaps(x):
    """Whether some stride does not lead past all that the smaller ones reach; traced, whether one is 0."""
    if torch.compiler.is_compiling():  # symbolic strides have no order
        return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_indices(op, name, value, shape, x, like="x"):
    check_dense(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {short(value.dtype)}")
    if value.shape != shape:
        raise shape_error(op, name, tuple(shape), value)
    check_device(op, name, value, x, like)


def _check_permutation(op, permutation, x, like="x"):
    _check_indices(op, "permutation", permutation, (x.shape[0],), x, like)


def _check_boxes(op, boxes, x):
    _check_indices(op, "boxes", boxes, (x.shape[0], 4), x)


def _shares(op, lam, x, like="x"):
    """lam as (B,) in the accumulation dtype of x."""
    batch, acc = x.shape[0], accumulation_dtype(x)
    if not isinstance(lam, torch.Tensor):
        check_fraction(op, "lam", lam)
        # A number that changes stays one graph; `full` has one for each value.
        if torch.compiler.is_compiling():
            return torch.ones(batch, dtype=acc, device=x.device) * lam
        return torch.full((batch,), float(lam), dtype=acc, device=x.device)
    check_dense(op, "lam", lam)
    check_floating(op, "lam", lam)
    if lam.dim() != 0 and lam.shape != (batch,):
        raise ValueError(f"{op}: lam must be a number or have shape ({batch},), got {tuple(lam.shape)}")
    check_device(op, "lam", lam, x, like)
    if lam.dtype == torch.float64 != acc and values_are_readable(lam):
        check_lam(op, lam)  # rounding would hide what is just outside of [0, 1]
    lam = lam.to(acc)
    return lam if lam.dim() else lam.expand(batch)


def _classes(op, name, value, shape, logits):
    """Classes of any integer dtype as int64."""
    check_dense(op, name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must hold classes of an integer dtype, got {short(value.dtype)}")
    if value.shape != shape:
        raise shape_error(op, name, tuple(shape), value)
    check_device(op, name, value, logits, "logits")
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def _class_weights(op, weight, logits):
    """weight as (C,) in the accumulation dtype of logits."""
    check_dense(op, "weight", weight)
    _check_no_grad(op, "weight", weight, "it is a constant")
    check_floating(op, "weight", weight)
    if weight.shape != logits.shape[1:2]:
        raise shape_error(op, "weight", f"({logits.shape[1]},)", weight)
    check_device(op, "weight", weight, logits, "logits")
    return weight.detach().to(accumulation_dtype(logits))


def _per_channel(op, name, value, x, validate):
    channels = x.shape[1]
    if isinstance(value, torch.Tensor):
        check_dense(op, name, value)
        check_floating(op, name, value)
        check_device(op, name, value, x, "x")
        if value.shape != (channels,):
            raise ValueError(f"{op}: {name} must have {channels} numbers, got shape {tuple(value.shape)}")
        value = value.detach().to(torch.float32)
        if values_are_readable(value) or (validate and value.device.type != "cpu"):
            channel_numbers(op, name, value.tolist())
        return value
    numbers = channel_numbers(op, name, value)
    if len(numbers) != channels:
        raise ValueError(f"{op}: {name} must have {channels} numbers, got {len(numbers)}")
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(x.device, non_blocking=True)


def channel_numbers(op, name, value):
    """A list of numbers of a sequence: finite in float32, and > 0 there if the name is std."""
    if not isinstance(value, collections.abc.Iterable) or not all(is_number(number) for number in value):
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of numbers, got {value!r}")
    numbers = list(value)
    limits = torch.finfo(torch.float32)
    least = -limits.max if name == "mean" else limits.tiny
    if not all(least <= number <= limits.max for number in numbers):
        raise ValueError(f"{op}: {name} must be finite{'' if name == 'mean' else ' and > 0'}, got {numbers}")
    return numbers


def _validate(op, validate, x, *args, **options):
    """On the CPU the operators check values themselves."""
    if validate and x.device.type != "cpu":
        check_values(op, *args, **options)
