"""Batches as the mixing kernels take them: each sample F consecutive elements, in any order of its dimensions."""

import torch


def has_dense_samples(x):
    """Whether each sample of x (B, ...) fills consecutive elements of memory."""
    expected = 1
    for size, stride in sorted(zip(x.shape[1:], x.stride()[1:], strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def samples_like(x, layout):
    """x as it is where its samples lie in memory as those of `layout` do, else a copy."""
    sizes = zip(x.shape[1:], x.stride()[1:], layout.stride()[1:], strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in sizes):
        return x
    return torch.empty_like(layout, dtype=x.dtype).copy_(x)


def dense_result(result):
    """`result` itself where its samples are dense, else contiguous memory to be copied to it."""
    return (
        result
        if has_dense_samples(result)
        else torch.empty_like(result, memory_format=torch.contiguous_format)
    )


def vector_of(*batches):
    """Elements of the widest access, 16 bytes at most, that every sample of batches of one dtype consists of.

    Kernels get strides and sizes in such vectors: Triton sees from that how wide it may read.
    """
    vector = 16 // batches[0].element_size()
    counts = [sample_size(batches[0]), *(batch.stride(0) for batch in batches)]
    while any(count % vector for count in counts):
        vector //= 2
    return vector


def sample_size(x):
    """Elements of one sample."""
    return x.numel() // len(x)
