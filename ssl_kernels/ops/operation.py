"""One operation: its operators, what implements them, which backend can run a call, and its derivative."""

import functools
import importlib
import importlib.util
from functools import partial

import torch

from ssl_kernels import backends
from ssl_kernels.ops.library import all_savable, distinct, in_turn, library, refuse_torch_func

OVERLOADS = ("native", "triton", "chunked")

in_triton = {}  # from the name of an operator to what runs its `triton` overload
_operations = {}


class Operation:
    """Defines the operators of an operation, with one overload for each backend, and registers what runs them.

    `native` kernels register themselves where the extension has them. `chunked` are the functions of the operators'
    names in the module `chunked`, on every device; `triton` are those of `ssl_kernels.triton.<name>`, on CUDA.

        operation = Operation("row_pairs", chunked, {"_fwd": (signature, fake), "_bwd": (signature, fake)})
        _fwd, _bwd = operation.operators        # {overload: operator} of each

    An operator that works in place declares what it mutates, `Tensor(a!) x`, and returns nothing; its calls advance the
    version counter of those tensors, so that autograd notices an overwritten tensor that it still needs.

    Args:
        name: The operation's; the operators add their suffix.
        chunked: The module of the `chunked` overloads.
        operators: {suffix: (signature, fake)}. The fake makes results without values from the operator's arguments; a
            dict has one for each overload.
        unsupported: `unsupported(backend, *tensors)`, the reason why a backend cannot run a call, or None. By default
            a backend takes every call on a device for which it has the first operator.
        preference: Which backend goes first on a GPU (see `backends.register_operation`).
        chosen_by: The operation whose choice of backend this one follows, which then has no choice of its own and no
            Triton kernels.
        forward: `forward(backend, needs, *operands, *options)` of `differentiate` returns its results and a tuple of
            the tensors that `backward` needs; `needs` tells of each operand whether it needs a gradient.
        backward: `backward(backend, needs, grads, saved, *options)` returns a gradient for each of the first operands;
            where no gradient was needed it is ignored.
    """

    def __init__(
        self,
        name,
        chunked,
        operators,
        *,
        unsupported=None,
        preference=(),
        chosen_by=None,
        forward=None,
        backward=None,
    ):
        self.name, self.forward, self.backward = name, forward, backward
        names = [name + suffix for suffix in operators]
        self.operators = tuple(
            _define(operator, *how) for operator, how in zip(names, operators.values(), strict=True)
        )
        for operator in names:
            library.impl(f"{operator}.chunked", getattr(chunked, operator), "CompositeExplicitAutograd")
        _operations[name] = self
        if chosen_by is None:
            triton_module = f"ssl_kernels.triton.{name}"
            _implement_in_triton(names, triton_module)
            unsupported = unsupported or _where_it_runs(names[0], triton_module)
            backends.register_operation(name, unsupported, preference)

    def differentiate(self, backend, operands, options):
        """Results of `forward` whose gradient is `backward`, for a backend whose operators have none of their own.

        A second derivative is refused.
        """
        refuse_torch_func(self.name, backend)
        return _Node.apply(self.name, backend, len(operands), *distinct(*operands), *options)


class _Node(torch.autograd.Function):
    """Forward and backward of an operation, by name: torch.compile takes no object of ours as an argument."""

    @staticmethod
    def forward(ctx, name, backend, operands, *args):
        results, saved = _operations[name].forward(backend, ctx.needs_input_grad[3:], *args)
        ctx.save_for_backward(*all_savable(*saved))
        ctx.name, ctx.backend, ctx.options = name, backend, args[operands:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, *grads):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(needs))

        def make(*grads):
            return _operations[ctx.name].backward(ctx.backend, needs, grads, saved, *ctx.options)

        made = once(ctx.name, ctx.backend, needs, make, grads, *saved)
        return None, None, None, *made, *[None] * (len(needs) - len(made))


def has_cpu_kernel(name):
    """Whether the extension that was loaded has a kernel of this name for the CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ssl_kernels::{name}", "CPU")


def overload_of(backend, like, has_kernel):
    """The overload of an operator that has compiled kernels for the CPU alone, and else runs in plain PyTorch."""
    return "native" if backend == "native" and has_kernel and like.device.type == "cpu" else "chunked"


def once(op, backend, needs, make, grads, *dependencies):
    """make(*grads), gradients by kernels on `backend`, None in the place of those that nobody needs.

    Differentiating them again by `grads` and the other dependencies is refused.
    """

    def run(*grads):
        if not torch.is_grad_enabled():
            return make(*grads)
        return _Once.apply(op, backend, partial(make, *grads), *grads, *dependencies)

    made = in_turn(run, *grads)
    return [grad if need else None for grad, need in zip(made, needs, strict=False)]


class _Once(torch.autograd.Function):
    """Gradients inside a graph of their own, so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx, name, backend, make, *dependencies):
        ctx.name, ctx.backend = name, backend
        return make()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f'{ctx.name}: backend "{ctx.backend}" has no second derivative; backend="reference" has one'
        )


def _define(name, signature, fake):
    """{overload: operator} of one name."""
    overloads = {}
    for overload in OVERLOADS:
        qualified = f"{name}.{overload}"
        library.define(f"{qualified}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        own = fake[overload] if isinstance(fake, dict) else fake
        torch.library.register_fake(f"ssl_kernels::{qualified}", own, lib=library)
        op = overloads[overload] = getattr(getattr(torch.ops.ssl_kernels, name), overload)
        if op._schema.is_mutable:
            aliases = [argument.alias_info for argument in op._schema.arguments]
            written = [place for place, alias in enumerate(aliases) if alias is not None and alias.is_write]
            kernel = partial(_advance_versions, op, written)
            library.impl(qualified, kernel, "ADInplaceOrView", with_keyset=True)
    return overloads


def _advance_versions(op, written, keyset, *args):
    """Kernel of an in-place operator between autograd and the backends; `Library.define` alone has none.

    `written` are the places of the arguments that it overwrites.
    """
    op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
    for place in written:
        torch.autograd.graph.increment_version(args[place])


def _where_it_runs(name, triton_module):
    """`unsupported` of an operation whose kernels take every call on a device that has them.

    Args:
        name: An operator whose `native` overload has a kernel on CPU or CUDA where it was compiled.
        triton_module: Its Triton kernels, with an `unsupported(*tensors)` of its own.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    native = {key.lower() for key in ("CPU", "CUDA") if has_kernel(f"ssl_kernels::{name}.native", key)}
    has_triton = importlib.util.find_spec(triton_module) is not None

    def unsupported(backend, *tensors):
        device = tensors[0].device.type
        if backend in ("chunked", "reference"):
            return None
        if backend == "native":
            if backends.extension is None:
                return backends.extension_missing
            if device in native:
                return backends.native_unsupported(tensors[0].device) if device == "cuda" else None
            if device in ("cpu", "cuda"):
                return f"the extension was built without its kernel for {device}"
            return f"it runs on cpu and cuda, not on {device}"
        if device != "cuda":
            return f"it runs on cuda, not on {device}"
        if not has_triton:
            return "it has no Triton kernel"
        return backends.triton_unsupported(tensors[0].device) or importlib.import_module(
            triton_module
        ).unsupported(*tensors)

    return unsupported


def _implement_in_triton(names, triton_module):
    """Register functions of `triton_module` as the `triton` overloads of the operators of their names, on CUDA.

    Triton launches on the current device, so each runs with the device of its tensors as the current one.
    """
    for name in names:

        def run(*args, name=name):
            with torch.cuda.device_of(_first_tensor(args)):
                return _triton_function(triton_module, name)(*args)

        library.impl(f"{name}.triton", run, "CUDA")
        in_triton[name] = run


@functools.cache
def _triton_function(triton_module, name):
    importlib.import_module("ssl_kernels.triton.loading")
    return getattr(importlib.import_module(triton_module), name)


def _first_tensor(args):
    for argument in args:
        if isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, list) and argument:
            return argument[0]
