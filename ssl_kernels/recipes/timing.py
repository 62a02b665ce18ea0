"""The time that a loss takes within a step."""

import time

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class TimedLoss:
    """A loss that is differentiated by itself as it is called, so that its time can be read: `seconds`, forward and
    backward, of all calls since they were set to 0. Under autocast it computes in float32.

    Args:
        loss: A function of tensors, and of anything else, to a scalar.
    """

    def __init__(self, loss):
        self.loss = loss
        self.seconds = 0.0

    def __call__(self, *args, **options):
        values, shape = tree_flatten((args, options))
        return _Differentiated.apply(self, shape, *values)


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, timed, shape, *values):
        learned = [
            at
            for at, value in enumerate(values)
            if isinstance(value, torch.Tensor) and value.requires_grad and ctx.needs_input_grad[at + 2]
        ]
        device = next(value.device for value in values if isinstance(value, torch.Tensor))
        values = [value.detach() if isinstance(value, torch.Tensor) else value for value in values]
        for at in learned:
            values[at].requires_grad_()
        start = read_clock(device)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            args, options = tree_unflatten([_widened(value) for value in values], shape)
            value = timed.loss(*args, **options)
            gradients = torch.autograd.grad(value, [values[at] for at in learned], allow_unused=True)
        timed.seconds += read_clock(device) - start
        ctx.gradients = dict(zip(learned, gradients, strict=True))
        ctx.inputs = len(values)
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = [ctx.gradients.get(at) for at in range(ctx.inputs)]
        return None, None, *(None if each is None else each * grad.to(each.dtype) for each in gradients)


def _widened(value):
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if narrow else value


def read_clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
