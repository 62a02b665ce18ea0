"""Mixup, CutMix and mixup with normalisation in plain PyTorch, a block of every sample at a time.

docs/mixing.md is the contract. Nothing of the batch's size is made beside the result: a block holds about
`ELEMENTS_PER_BLOCK` elements of each sample.
"""

import torch

from ssl_kernels.checks import check_on_cpu
from ssl_kernels.reference import cutmix as cutmix_by_definition
from ssl_kernels.reference import mixup as mixup_by_definition
from ssl_kernels.reference.mixup_normalize import mixup_normalize as mixup_normalize_by_definition

ELEMENTS_PER_BLOCK = 1 << 13


def _blocks(dim, *tensors):
    """The same blocks of tensors of one shape, as views, cut along `dim`."""
    size = tensors[0].shape[dim]
    per_index = max(1, tensors[0][0].numel() // max(1, size))
    step = max(1, ELEMENTS_PER_BLOCK // per_index)
    for start in range(0, size, step):
        yield tuple(tensor.narrow(dim, start, min(step, size - start)) for tensor in tensors)


def _longest_dim(x):
    """Of a sample; a batch of numbers gets a dimension of size 1."""
    return 1 + max(range(x.dim() - 1), key=lambda dim: x.shape[1 + dim])


def _with_features(x):
    return x.unsqueeze(1) if x.dim() == 1 else x


def mixup_(x, lam, permutation):
    check_on_cpu("mixup_", permutation, lam)
    _mix(x, x, lam, permutation)


def mixup_fwd(x, lam, permutation):
    check_on_cpu("mixup", permutation, lam)
    out = torch.empty_like(x)
    _mix(out, x, lam, permutation)
    return out


def _mix(out, x, lam, permutation):
    out, x = _with_features(out), _with_features(x)
    for out_block, x_block in _blocks(_longest_dim(x), out, x):
        out_block.copy_(mixup_by_definition.mixup(x_block.to(lam.dtype), lam, permutation))


def mixup_bwd(grad, x, lam, permutation, x_needs_grad):
    check_on_cpu("mixup", permutation, lam)
    grad_x = torch.empty_like(grad) if x_needs_grad else grad.new_empty(0)
    grad_lam = lam.new_zeros(0 if x is None else len(lam), dtype=torch.float64)
    operands = [_with_features(t) for t in (grad, *[x] * (x is not None), *[grad_x] * x_needs_grad)]
    for blocks in _blocks(_longest_dim(operands[0]), *operands):
        g = blocks[0].to(lam.dtype)
        x_block = None if x is None else blocks[1].to(lam.dtype)
        to_x, to_lam = mixup_by_definition.mixup_bwd(g, x_block, lam, permutation)
        if x_needs_grad:
            blocks[-1].copy_(to_x)
        if x is not None:
            grad_lam += to_lam
    return grad_x, grad_lam.to(lam.dtype)


def cutmix_(x, boxes, permutation):
    check_on_cpu("cutmix_", permutation, boxes=boxes, image=x.shape[-2:])
    _paste(x, x, boxes, permutation)


def cutmix_fwd(x, boxes, permutation):
    check_on_cpu("cutmix", permutation, boxes=boxes, image=x.shape[-2:])
    out = torch.empty_like(x)
    _paste(out, x, boxes, permutation)
    return out


def _paste(out, x, boxes, permutation):
    first_row = 0
    for out_block, x_block in _blocks(x.dim() - 2, out, x):
        inside = cutmix_by_definition.inside_boxes(boxes, x_block, first_row)
        out_block.copy_(torch.where(inside, x_block.index_select(0, permutation), x_block))
        first_row += x_block.shape[-2]


def cutmix_bwd(grad, boxes, permutation):
    check_on_cpu("cutmix", permutation, boxes=boxes, image=grad.shape[-2:])
    grad_x = torch.empty_like(grad)
    acc = torch.float64 if grad.dtype == torch.float64 else torch.float32
    first_row = 0
    for out_block, block in _blocks(grad.dim() - 2, grad_x, grad):
        moved = boxes - boxes.new_tensor([first_row, first_row, 0, 0])
        out_block.copy_(cutmix_by_definition.cutmix_bwd(block.to(acc), moved, permutation))
        first_row += block.shape[-2]
    return grad_x


def mixup_normalize(x, lam, permutation, mean, std, dtype):
    check_on_cpu("mixup_normalize", permutation, lam)
    out = torch.empty_like(x, dtype=dtype)
    for out_block, x_block in _blocks(x.dim() - 2, out, x):
        out_block.copy_(mixup_normalize_by_definition(x_block, lam, permutation, mean, std, lam.dtype))
    return out
