"""Whether tensors lie in each other's memory."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def share_memory(x, other):
    """Whether an element of one lies in memory of an element of the other, exactly; False of stand-ins in a trace."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if x.is_meta or other.is_meta or isinstance(x, FakeTensor) or isinstance(other, FakeTensor):
        return False
    distance = other.data_ptr() - x.data_ptr()
    first, between = (x, distance) if distance >= 0 else (other, -distance)
    if _extent(first) <= between:
        return False
    return other.numel() > 0 and _meet(x, other, distance + _extent(other) - 1)


def _extent(tensor):
    """Bytes from the begin of the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (reach + 1) * tensor.element_size()


def _meet(x, other, total):
    """Whether steps through x and, from its end, through other can add up to `total` bytes."""
    counts = {}  # how many steps of each length there are
    for tensor in (x, other):
        width = tensor.element_size()
        steps = [
            (stride * width, size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ]
        for length, count in (*steps, (1, width - 1)):
            counts[length] = counts.get(length, 0) + count
    reach = sum(length * count for length, count in counts.items())
    rests = {total}
    for length, count in sorted(counts.items(), reverse=True):
        if length > 0:
            reach -= length * count
            rests = {
                rest - length * taken
                for rest in rests
                for taken in range(max(0, -((reach - rest) // length)), min(count, rest // length) + 1)
            }
    return 0 in rests
