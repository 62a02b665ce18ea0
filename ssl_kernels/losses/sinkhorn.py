"""Sinkhorn's assignment of rows to columns in equal shares."""

from typing import Any

import torch

from ssl_kernels.checks import check_embeddings, check_scalar, check_whole
from ssl_kernels.losses._shared import inverse
from ssl_kernels.ops.column_potentials import column_potentials
from ssl_kernels.ops.library import accumulation_dtype

OP = "sinkhorn"


def sinkhorn(
    scores: torch.Tensor, epsilon: float | torch.Tensor = 0.05, iterations: int = 3, *, group: Any = None
) -> torch.Tensor:
    """Soft assignments of samples to prototypes that use all prototypes alike: SwAV's codes.

    exp(scores / epsilon) with its columns scaled to equal sums and then its rows to sums of 1, `iterations` times. All
    of it is done with logarithms, so that no temperature overflows.

    Args:
        scores: (N, K) similarities of N samples to K prototypes, float64, float32, float16 or bfloat16, any strides.
        epsilon: The temperature, > 0, a float or a tensor of one element. The smaller, the harder the assignments.
        iterations: At least 1.
        group: A process group whose ranks' samples share the prototypes, with any number of rows on each, or None for
            those of this process alone. Each rank calls it and gets the assignments of its own rows.

    Returns:
        (N, K) float32 (float64 for float64 scores), each row of sum 1, without gradient.

    Raises:
        TypeError: scores is no floating tensor, epsilon no number, or group no process group.
        ValueError: scores of another shape, epsilon not > 0, fewer than 1 iteration, or a group without this rank.
        RuntimeError: A group is given and torch.distributed is not initialised.

    Source: Cuturi, arXiv:1306.0895; Caron et al., SwAV, arXiv:2006.09882, whose iterations these are.
    """
    check_embeddings(OP, scores=scores)
    check_scalar(OP, "epsilon", epsilon, scores, positive=True)
    check_iterations(OP, iterations)
    name = group_name(OP, group)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        logits = scores.detach().to(accumulation_dtype(scores)) * inverse(epsilon, scores)
        return torch.softmax(logits + column_potentials(logits, iterations=iterations, group=name), 1)


def check_iterations(op, iterations):
    check_whole(op, "iterations", iterations, 1)


def group_name(op, group):
    """By which collectives find a process group; "" for None."""
    if group is None:
        return ""
    from ssl_kernels.distributed.groups import ranks_of  # which imports the losses

    return ranks_of(op, group)[1].name
