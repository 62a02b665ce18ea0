"""Matrix products that autocast leaves alone, in backward too, which may run inside a block of its own."""

import torch


class _Product(torch.autograd.Function):
    """a @ b; its derivatives are such products again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        by_a, by_b = ctx.needs_input_grad
        return product(grad, b.mT) if by_a else None, product(a.mT, grad) if by_b else None

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, b = ctx.saved_tensors
        terms = [product(tangent_a, b)] if tangent_a is not None else []
        terms += [product(a, tangent_b)] if tangent_b is not None else []
        return sum(terms[1:], terms[0])


def product(a, b):
    """a @ b of two matrices, or of two batches of matrices of one size."""
    if torch.compiler.is_compiling():  # which traces backward as it traces forward
        return a @ b
    return _Product.apply(a, b)
