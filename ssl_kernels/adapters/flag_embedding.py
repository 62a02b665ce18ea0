"""The in-batch loss of FlagEmbedding's embedders. It comes back as float32 (float64 for float64)."""

import torch

from ssl_kernels.losses import similarity_cross_entropy

__all__ = ["in_batch_neg_loss"]
ORIGINALS = {}  # a method of its models
DIFFERENCES = {"in_batch_neg_loss": "a function: the original is a method that makes the scores too"}


def in_batch_neg_loss(q_reps, p_reps, temperature=0.02):
    """The loss of each query against the passages of all: cross-entropy of q · p / temperature.

    Rows are taken as they are; FlagEmbedding's models normalise theirs.

    Args:
        q_reps: (N, D) queries.
        p_reps: (N · G, D) passages, G a query, of which the first is its positive.
        temperature: > 0.

    Raises:
        ValueError: The passages are no multiple of the queries.
    """
    if len(p_reps) == 0 or len(p_reps) % len(q_reps):
        raise ValueError(
            f"in_batch_neg_loss: p_reps must have a multiple of {len(q_reps)} rows, got {len(p_reps)}"
        )
    target = torch.arange(len(q_reps), device=q_reps.device) * (len(p_reps) // len(q_reps))
    return similarity_cross_entropy(q_reps, p_reps, target, scale=1 / temperature, normalize=False)
