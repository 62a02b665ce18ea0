"""torchvision's own classes, whose images are mixed by kernels."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssl_kernels.adapters.torchvision import blend, paste
from ssl_kernels.checks import DTYPES


def _is_mixed(inpt, params):
    """Whether it is a tensor of images that the kernels take; torchvision's own code says what is wrong with others."""
    is_batch = isinstance(inpt, (tv_tensors.Image, tv_tensors.Video)) or type(inpt) is torch.Tensor
    fits = is_batch and inpt.ndim == (5 if isinstance(inpt, tv_tensors.Video) else 4)
    return fits and inpt is not params["labels"] and len(inpt) == params["batch_size"] and inpt.numel() > 0


def _wrapped(output, like):
    return output if type(like) is torch.Tensor else tv_tensors.wrap(output, like=like)


def _plain(inpt):
    return inpt if type(inpt) is torch.Tensor else inpt.as_subclass(torch.Tensor)


class MixUp(v2.MixUp):
    """`torchvision.transforms.v2.MixUp`: torchvision's draws, labels and checks, the images blended in one pass.

    Args:
        alpha: > 0, of λ's Beta distribution. Unlike torchvision's, an integer is as good as a float.
        num_classes: Of integer labels.
        labels_getter: "default" or a function that finds the labels.
    """

    def __init__(self, *, alpha=1.0, num_classes=None, labels_getter="default"):
        super().__init__(alpha=float(alpha), num_classes=num_classes, labels_getter=labels_getter)

    def transform(self, inpt, params):
        if _is_mixed(inpt, params) and inpt.dtype in DTYPES:
            return _wrapped(blend(_plain(inpt), params["lam"]), inpt)
        return super().transform(inpt, params)


class CutMix(v2.CutMix):
    """`torchvision.transforms.v2.CutMix`: torchvision's draws, labels and checks, the boxes pasted by a kernel.

    Args:
        alpha, num_classes, labels_getter: As in `MixUp`.
    """

    def __init__(self, *, alpha=1.0, num_classes=None, labels_getter="default"):
        super().__init__(alpha=float(alpha), num_classes=num_classes, labels_getter=labels_getter)

    def transform(self, inpt, params):
        if _is_mixed(inpt, params):
            return _wrapped(paste(_plain(inpt), params["box"]), inpt)
        return super().transform(inpt, params)
