"""`batch_hard`: the hardest positive and negative of each row over streamed tiles. docs/batch_hard.md has the rules."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import batch_hard as chunked
from ssl_kernels.ops.library import (
    accumulation_dtype,
    define,
    implement_in_triton,
    library,
    where_it_runs,
)
from ssl_kernels.reference import batch_hard as reference

DISTANCES = ("euclidean", "cosine")
_TRITON = "ssl_kernels.triton.batch_hard"


def _fake(overload, embeddings, labels, normalize, distance):
    return tuple(embeddings.new_empty(embeddings.shape[0], dtype=torch.int64) for _ in range(2))


_mine = define(
    "batch_hard",
    "(Tensor embeddings, Tensor labels, bool normalize, str distance)"
    " -> (Tensor positive_index, Tensor negative_index)",
    _fake,
)

library.impl("batch_hard.chunked", chunked.batch_hard, "CompositeExplicitAutograd")
implement_in_triton(("batch_hard",), _TRITON)
backends.register_operation("batch_hard", where_it_runs("batch_hard", _TRITON))


def batch_hard(
    embeddings, labels, *, normalize=True, distance="euclidean", backend=None, caller="batch_hard"
):
    """Index of each row's farthest row of its own label, and of the nearest row of another label.

    What `triplet_loss` is made of. Checks of the user's input are the loss's; docs/batch_hard.md is the contract.

    Args:
        embeddings: (N, D), float64, float32, float16 or bfloat16, any strides. Gets no gradient.
        labels: (N,) int64, on the device of embeddings.
        normalize: L2-normalise first, as F.normalize does.
        distance: One of `DISTANCES`.
        backend: One of `backends.BACKENDS`, or None.
        caller: Named in error messages.

    Returns:
        positive_index, negative_index: (N,) int64, −1 where a row has none. Of equal distances the lowest index.
    """
    chosen = backends.choose_backend("batch_hard", backend, caller, embeddings, labels)
    embeddings = embeddings.detach()
    if chosen == "reference":
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(accumulation_dtype(embeddings))
            return reference.batch_hard(embeddings, labels, normalize, distance)
    return _mine[chosen](embeddings, labels, normalize, distance)
