"""What the operations share: the operator library `torch.ops.ssl_kernels`, and tensors as autograd takes them."""

import torch

library = torch.library.Library("ssl_kernels", "DEF")  # lives as long as the process


def accumulation_dtype(tensor):
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def savable(tensor):
    """An inference tensor, which autograd refuses to save for backward, as a clone; else the tensor itself.

    A teacher's features are made under `torch.inference_mode()`; they need no gradient, but the pupil's need them.
    """
    if tensor is None or torch.compiler.is_compiling():  # Dynamo cannot ask a tensor
        return tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def all_savable(*tensors):
    """Each of them `savable`."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return [tensor.clone() if tensor is not None and tensor.is_inference() else tensor for tensor in tensors]


def distinct(*operands):
    """Operands of a Function: torch.compile refuses one that is given a tensor twice, as ids of rows and columns."""
    if not torch.compiler.is_compiling():
        return operands
    made = []
    for operand in operands:
        again = operand is not None and any(operand is other for other in made)
        made.append(operand.view_as(operand) if again else operand)
    return made


# `is_grads_batched` is older than torch.func, has no public rules, and one level. A batch is known by itself: in the
# thread in which a GPU's backward runs, torch tells of no level.
_BATCHED, _LEVEL = torch._C._dispatch_key_parse("Batched"), 1


def in_turn(make, *grads):
    """make(*grads), where gradients that come as a batch (`torch.autograd.grad` with `is_grads_batched`) reach `make`
    one at a time: a batch is a stand-in that no kernel can read. Some of the results may be None."""
    if torch.compiler.is_compiling():
        return make(*grads)
    if torch._C._are_functorch_transforms_active():
        return _InTurn.apply(make, *grads)
    batched = [grad is not None and torch._C._dispatch_keys(grad).has(_BATCHED) for grad in grads]
    if not any(batched):
        return make(*grads)
    values = [
        torch._remove_batch_dim(x, _LEVEL, 1, 0) if is_one else x
        for x, is_one in zip(grads, batched, strict=True)
    ]
    made = [
        make(*(x[i] if is_one else x for x, is_one in zip(values, batched, strict=True)))
        for i in range(len(values[batched.index(True)]))
    ]
    return tuple(None if of is None else torch._add_batch_dim(of, 0, _LEVEL) for of in _stacked(made))


def _stacked(made):
    if not made:
        raise RuntimeError("a batch of gradients must hold at least one")
    return tuple(None if of[0] is None else torch.stack(of) for of in zip(*made, strict=True))


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(make, *grads):
        return make(*grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a gradient that is made inside a batch has no second derivative")

    @staticmethod
    def vmap(info, in_dims, make, *grads):
        made = [
            in_turn(
                make,
                *(x if dim is None else x.select(dim, i) for x, dim in zip(grads, in_dims[1:], strict=True)),
            )
            for i in range(info.batch_size)
        ]
        together = _stacked(made)
        return together, tuple(None if result is None else 0 for result in together)


def refuse_torch_func(op, backend):
    """Called before an autograd.Function without `setup_context`, which torch.func cannot differentiate."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f'{op}: backend "{backend}" cannot run inside torch.func; backend="reference" can'
        )
