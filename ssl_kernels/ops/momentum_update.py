"""`momentum_update_`: float32 averages and their half-precision shadows in one pass. docs/moco.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_fraction, short
from ssl_kernels.chunked import momentum_update as chunked
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import momentum_update as reference

HALF = (torch.float16, torch.bfloat16)
_ROLES = (
    ("masters", (torch.float32,), "float32"),
    ("shadows", HALF, "float16 or bfloat16"),
    ("sources", (torch.float32, *HALF), "float32, float16 or bfloat16"),
)

_operation = Operation(
    "momentum_update",
    chunked,
    {
        "_": (
            "(Tensor(a!)[] masters, Tensor(b!)[] shadows, Tensor[] sources, Tensor weight) -> ()",
            lambda *_: None,
        )
    },
)
(_in_place,) = _operation.operators


def momentum_update_(masters, shadows, sources, momentum, *, backend=None):
    """master ← momentum · master + (1 − momentum) · source in float32 and shadow ← master rounded, for each triple.

    A master that its shadow is not the rounding of is replaced by the shadow first, element by element: somebody wrote
    into the shadow. The version counters of masters and shadows advance.

    Args:
        masters: Tensors of float32, dense, of any shapes.
        shadows: As many, float16 or bfloat16, each of its master's shape and strides.
        sources: As many, float32, float16 or bfloat16, each of its master's shape.
        momentum: In [0, 1]: a number, or a 0-d floating tensor on the device of the masters, whose value is not read.
        backend: "native", "triton", "chunked" or "reference"; None picks.

    Raises:
        TypeError, ValueError: A shape, layout, dtype or device that does not fit; momentum outside [0, 1]; masters or
            shadows that require grad while gradients are recorded, or that were made under torch.inference_mode and
            are written outside of it. Nothing was written then.
    """
    masters, shadows, sources = list(masters), list(shadows), list(sources)
    _check(masters, shadows, sources, momentum)
    if not masters:
        return
    chosen = backends.choose_backend("momentum_update", backend, "momentum_update_", masters[0])
    with torch.no_grad():
        weight = _weight(momentum, masters[0].device)
        sources = [
            source if source.stride() == master.stride() else _laid_out_as(master, source)
            for master, source in zip(masters, sources, strict=True)
        ]
        if chosen == "reference":
            reference.momentum_update_(masters, shadows, sources, weight)
        else:
            _in_place[chosen](masters, shadows, sources, weight)


momentum_update_.operation = "momentum_update"


def _weight(momentum, device):
    """1 − momentum as a 0-d float32 tensor."""
    if not isinstance(momentum, torch.Tensor):
        if not torch.compiler.is_compiling():
            return torch.full((), 1 - momentum, dtype=torch.float32, device=device)
        # What full takes is compiled once for each of its values.
        momentum = torch.ones((), dtype=torch.float64, device=device) * momentum
    return (1 - momentum).float()


def _laid_out_as(master, source):
    return torch.empty_like(master, dtype=source.dtype).copy_(source)


def _check(masters, shadows, sources, momentum):
    op = "momentum_update_"
    if not len(masters) == len(shadows) == len(sources):
        raise ValueError(
            f"{op}: masters, shadows and sources must have one length,"
            f" got {len(masters)}, {len(shadows)} and {len(sources)}"
        )
    _check_momentum(op, momentum, masters)
    recorded = torch.is_grad_enabled()
    frozen = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    for i, triple in enumerate(zip(masters, shadows, sources, strict=True)):
        master, shadow, _ = triple
        for tensor, (name, dtypes, rule) in zip(triple, _ROLES, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{op}: {name}[{i}] must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in dtypes:
                raise TypeError(f"{op}: {name}[{i}] must be {rule}, got {tensor.dtype}")
            if tensor.shape != master.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] must have the shape {tuple(master.shape)} of its master,"
                    f" got {tuple(tensor.shape)}"
                )
            if tensor.device != masters[0].device:
                raise ValueError(
                    f"{op}: {name}[{i}] must be on {masters[0].device} as masters[0] is, got {tensor.device}"
                )
        if not _is_dense(master):
            raise ValueError(
                f"{op}: masters[{i}] must be dense, got shape {tuple(master.shape)}"
                f" with strides {master.stride()}"
            )
        if shadow.stride() != master.stride():
            raise ValueError(
                f"{op}: shadows[{i}] must have the strides {master.stride()} of its master, got {shadow.stride()}"
            )
        if recorded and (master.requires_grad or shadow.requires_grad):
            raise ValueError(
                f"{op}: masters[{i}] and shadows[{i}] must not require grad while gradients are recorded,"
                " got one that does"
            )
        if frozen and (master.is_inference() or shadow.is_inference()):
            raise ValueError(
                f"{op}: masters[{i}] and shadows[{i}] must not be written outside torch.inference_mode, under which"
                " they were made"
            )


def _check_momentum(op, momentum, masters):
    if isinstance(momentum, torch.Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"{op}: momentum must be a number or a 0-d floating tensor,"
                f" got shape {tuple(momentum.shape)}, {short(momentum.dtype)}"
            )
        if masters and momentum.device != getattr(masters[0], "device", None):
            raise ValueError(f"{op}: momentum must be on the device of the masters, got {momentum.device}")
    else:
        check_fraction(op, "momentum", momentum)


def _is_dense(tensor):
    """Whether its elements fill a piece of memory, each once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
