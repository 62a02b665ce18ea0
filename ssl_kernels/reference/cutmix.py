"""CutMix by its definition, with a mask of the batch's size; PyTorch's own autograd differentiates it."""

import torch

from ssl_kernels.reference.mixup import inverse_permutation


def cutmix(x, boxes, permutation):
    """x_i with the pixels inside its box taken from x_p(i); docs/mixing.md is the contract.

    Args:
        x: (B, ..., H, W), any dtype.
        boxes: (B, 4) int64, rows (y0, y1, x0, x1), ends left out.
        permutation: (B,) int64.

    Returns:
        Tensor like x.
    """
    return torch.where(inside_boxes(boxes, x), x.index_select(0, permutation), x)


def cutmix_bwd(grad, boxes, permutation):
    """Gradient of `cutmix` by x, as a formula that can be differentiated again."""
    inverse = inverse_permutation(permutation)
    inside = inside_boxes(boxes, grad)
    taken = torch.where(inside, grad, 0).index_select(0, inverse)
    fixed = permutation == torch.arange(permutation.shape[0], device=permutation.device)
    fixed = fixed.view(-1, *[1] * (grad.dim() - 1))
    return torch.where(fixed, grad, torch.where(inside, 0, grad) + taken)


def inside_boxes(boxes, x, first_row=0):
    """Boolean mask that broadcasts against x (B, ..., H, W), whose rows are numbered from `first_row`."""
    height, width = x.shape[-2:]
    row = torch.arange(first_row, first_row + height, device=boxes.device)
    column = torch.arange(width, device=boxes.device)
    y0, y1, x0, x1 = boxes[:, :, None].unbind(1)  # (B, 1) each
    inside_rows = (row >= y0) & (row < y1)  # (B, H)
    inside_columns = (column >= x0) & (column < x1)  # (B, W)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]  # (B, H, W)
    return inside.view(boxes.shape[0], *[1] * (x.dim() - 3), height, width)
