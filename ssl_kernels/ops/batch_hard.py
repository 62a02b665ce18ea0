"""`batch_hard`: the hardest positive and negative of each row over streamed tiles. docs/batch_hard.md has the rules."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import batch_hard as chunked
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import batch_hard as reference

DISTANCES = ("euclidean", "cosine")


def _fake(embeddings, labels, normalize, distance):
    return tuple(embeddings.new_empty(embeddings.shape[0], dtype=torch.int64) for _ in range(2))


_operation = Operation(
    "batch_hard",
    chunked,
    {
        "": (
            "(Tensor embeddings, Tensor labels, bool normalize, str distance)"
            " -> (Tensor positive_index, Tensor negative_index)",
            _fake,
        )
    },
)
(_mine,) = _operation.operators


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
