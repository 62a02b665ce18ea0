"""`queue_push_`: keys written into the ring of a MoCo queue. docs/moco.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_device, check_dtype, check_tensor, shape_error, values_are_readable
from ssl_kernels.chunked import queue_push as chunked
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import queue_push as reference

_operation = Operation(
    "queue_push",
    chunked,
    {
        "_": (
            "(Tensor(a!) storage, Tensor keys, Tensor(b!) position, Tensor(c!) filled, bool normalize) -> ()",
            lambda *_: None,
        )
    },
)
(_in_place,) = _operation.operators


def queue_push_(storage, keys, position, filled, *, normalize=True, backend=None):
    """Write `keys` into the ring `storage` in place, from `position` on, and advance `position` and `filled`.

    With more keys than rows the last ones stay, where they would have come to lie. The version counters of the three
    tensors advance: a backward that still needs the overwritten rows raises.

    Args:
        storage: (K, D) contiguous, float64, float32, float16 or bfloat16.
        keys: (B, D), any of these dtypes and any strides, oldest first; B may be 0. No gradient flows into the ring.
        position: 0-d int64, the row the next key goes to.
        filled: 0-d int64, how many rows hold keys.
        normalize: L2-normalise the keys first, as F.normalize does.
        backend: "native", "triton", "chunked" or "reference"; None picks.

    Raises:
        TypeError, ValueError: A shape, dtype or device that does not fit; keys that share memory with storage; storage
            that requires grad while gradients are recorded, or that was made under torch.inference_mode and is written
            outside of it. On the CPU also a position or fill count out of range. Nothing was written then.
    """
    _check(storage, keys, position, filled)
    chosen = backends.choose_backend("queue_push", backend, "queue_push_", storage, keys)
    with torch.no_grad():
        if chosen == "reference":
            reference.queue_push_(storage, keys, position, filled, normalize)
        else:
            _in_place[chosen](storage, keys.detach(), position, filled, normalize)


def _check(storage, keys, position, filled):
    for name, tensor in (("storage", storage), ("keys", keys), ("position", position), ("filled", filled)):
        check_tensor("queue_push_", name, tensor)
        check_device("queue_push_", name, tensor, storage, "storage")
    for name, tensor in (("storage", storage), ("keys", keys)):
        check_dtype("queue_push_", name, tensor)
    if storage.dim() != 2 or 0 in storage.shape or not storage.is_contiguous():
        raise ValueError(
            f"queue_push_: storage must be contiguous with shape (K, D), K, D >= 1, got {tuple(storage.shape)}"
        )
    if keys.dim() != 2 or keys.shape[1] != storage.shape[1]:
        raise shape_error("queue_push_", "keys", f"(B, {storage.shape[1]})", keys)
    for name, tensor in (("position", position), ("filled", filled)):
        if tensor.dtype != torch.int64 or tensor.dim() != 0:
            raise TypeError(
                f"queue_push_: {name} must be 0-d int64, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if storage.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "queue_push_: storage must not require grad while gradients are recorded, got one that does"
        )
    if torch.compiler.is_compiling():
        return
    if not torch.is_inference_mode_enabled():
        for name, tensor in (("storage", storage), ("position", position), ("filled", filled)):
            if tensor.is_inference():
                raise ValueError(
                    f"queue_push_: {name} must not be written outside torch.inference_mode, under which it was made"
                )
    if torch._C._is_alias_of(keys, storage):
        raise ValueError("queue_push_: keys must not share memory with storage; pass a clone")
    if values_are_readable(position, filled):
        size, begin, rows = storage.shape[0], position.item(), filled.item()
        if not 0 <= begin < size:
            raise ValueError(f"queue_push_: position must be in [0, {size}), got {begin}")
        if not 0 <= rows <= size:
            raise ValueError(f"queue_push_: filled must be in [0, {size}], got {rows}")
