"""MAE: the pixels of masked patches."""

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import (
    check_device,
    check_dtype,
    check_reduction,
    check_scalar,
    check_tensor,
    shape_error,
    short,
)
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import as_scalar, may_be_one_node, reduce
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func
from ssl_kernels.ops.patch_errors import patch_errors

OP = "mae_loss"


def mae_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    normalize_target: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Masked autoencoding: the mean squared error of each patch, of patches normalised one by one.

        loss_p = 1 / C · Σ_c (prediction_pc − t̂_pc)²,  t̂_p = (target_p − mean_p) / sqrt(variance_p + eps)

    with mean and variance (divided by C − 1) over the C numbers of the patch. The target goes by in blocks: the
    normalised one is never in memory as a whole.

    Args:
        prediction: (..., C), such as (N, L, C): L patches of N images. float64, float32, float16 or bfloat16, of any
            strides. Gets its gradient.
        target: The patches' pixels in the same shape, of any floating dtype. No gradient.
        mask: (...), bool or floating weights of the patches, 1 where a patch was hidden and counts; None counts all.
            "none" and "sum" take mask · loss, "mean" divides their sum by that of the mask, 0 where that is 0.
        normalize_target: Normalise each patch of the target, for which C >= 2. False takes it as it is.
        eps: Added to the variances, > 0.
        reduction: "mean" over the patches, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 predictions): a scalar, or (...) for "none".

    Raises:
        TypeError: prediction or target is no floating tensor, or mask neither bool nor floating.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, eps not > 0, an unknown reduction or backend,
            or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: He et al., MAE, arXiv:2111.06377, section 3 ("Reconstruction target") and its published code.
    """
    _check(prediction, target, mask, normalize_target)
    check_scalar(OP, "eps", eps, prediction, positive=True)
    check_reduction(OP, reduction)
    width = prediction.shape[-1]
    rows, target = prediction.reshape(-1, width), target.detach().reshape(-1, width)
    chosen = choose_backend("row_pairs", backend, OP, rows, target)
    if chosen == "native" and reduction != "none" and _is_one_node(prediction, target, mask, eps):
        return torch.ops.ssl_kernels.mae_loss.native(
            prediction, target, mask, eps, normalize_target, reduction == "mean"
        )
    eps = as_scalar(eps, prediction).detach()
    if chosen == "reference":
        with torch.autocast(prediction.device.type, enabled=False):
            acc = accumulation_dtype(prediction)
            if normalize_target:
                target = _normalized(target.to(acc), eps)
            loss = (rows.to(acc) - target.to(acc)).square().mean(1)
    else:
        refuse_torch_func(OP, chosen)
        loss = patch_errors(rows, target, eps, normalize_target, caller=OP, chosen=chosen)
    loss = loss.double()
    if mask is not None:
        mask = mask.to(loss.dtype).reshape(-1)
    loss = reduce(loss, reduction, prediction, mask)
    return loss.reshape(prediction.shape[:-1]) if reduction == "none" else loss


mae_loss.operation = "row_pairs"


def _is_one_node(prediction, target, mask, eps):
    """Whether `mae_loss.native` (csrc/ops/patch_errors.cpp) stands for what follows."""
    if isinstance(eps, torch.Tensor) or (mask is not None and mask.requires_grad):
        return False
    if (target.dtype == torch.float64) != (prediction.dtype == torch.float64):
        return False
    return may_be_one_node(prediction, target) and (mask is None or may_be_one_node(mask))


def _normalized(target, eps):
    centred = target - target.mean(1, keepdim=True)
    return centred * (centred.square().sum(1, keepdim=True) / (target.shape[1] - 1) + eps).rsqrt()


def _check(prediction, target, mask, normalize_target):
    for name, tensor in (("prediction", prediction), ("target", target)):
        check_dtype(OP, name, tensor)
    if prediction.dim() < 2 or 0 in prediction.shape:
        raise shape_error(OP, "prediction", "(..., C) with no dimension of 0", prediction)
    if target.shape != prediction.shape:
        raise shape_error(OP, "target", f"{tuple(prediction.shape)} as prediction has", target)
    if normalize_target and prediction.shape[-1] < 2:
        raise ValueError(f"{OP}: prediction must have patches of C >= 2 with normalize_target, got 1")
    check_device(OP, "target", target, prediction, "prediction")
    if mask is None:
        return
    check_tensor(OP, "mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{OP}: mask must be bool or floating, got {short(mask.dtype)}")
    if mask.shape != prediction.shape[:-1]:
        raise shape_error(OP, "mask", f"{tuple(prediction.shape[:-1])} as prediction has patches", mask)
    check_device(OP, "mask", mask, prediction)


class MAELoss(Loss):
    """`ssl_kernels.mae_loss` as a module: `MAELoss()(prediction, target, mask)`.

    Args:
        normalize_target, eps, reduction, backend: As in `mae_loss`.
    """

    def __init__(
        self,
        *,
        normalize_target: bool = True,
        eps: float = 1e-6,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return mae_loss(prediction, target, mask, **self.options)
