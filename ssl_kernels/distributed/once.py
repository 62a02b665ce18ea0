"""Backward passes that cannot be differentiated again."""

import functools

import torch

from ssl_kernels.ops.library import in_turn


class _Once(torch.autograd.Function):
    """Gradients in a graph of their own, so that differentiating them is an error."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("ssl_kernels.distributed: the losses over several ranks have no second derivative")


def once(backward):
    """`backward` of an autograd.Function, such that a second derivative raises instead of being left out."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        return in_turn(functools.partial(run_once, ctx), *grads)

    def run_once(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        made = [result for result in results if result is not None]
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.is_floating_point()]
        made = iter(_Once.apply(len(made), *made, *depends_on))
        return tuple(None if result is None else next(made) for result in results)

    return run
