"""The in-batch loss of FlagEmbedding's embedders. It comes back as float32 (float64 for float64)."""

import torch

from ssl_kernels.adapters._shared import mean, scale_of
from ssl_kernels.losses import info_nce_loss
from ssl_kernels.losses._shared import checked_rows
from ssl_kernels.ops.contrastive import contrastive

__all__ = ["in_batch_neg_loss"]
ORIGINALS = {}  # a method of its models
DIFFERENCES = {"in_batch_neg_loss": "a function: the original is a method that makes the scores too"}


def in_batch_neg_loss(
    q_reps: torch.Tensor, p_reps: torch.Tensor, temperature: float | torch.Tensor = 0.02
) -> torch.Tensor:
    """The loss of each query against the passages of all: cross-entropy of q · p / temperature.

    Rows are taken as they are; FlagEmbedding's models normalise theirs.

    Args:
        q_reps: (N, D) queries.
        p_reps: (N · G, D) passages, G a query, of which the first is its positive.
        temperature: > 0.

    Raises:
        ValueError: The passages are no multiple of the queries.
    """
    if len(q_reps) == 0 or len(p_reps) == 0 or len(p_reps) % len(q_reps):
        raise ValueError(
            f"in_batch_neg_loss: p_reps must have a multiple of {len(q_reps)} rows, got {len(p_reps)}"
        )
    if len(p_reps) == len(q_reps):
        return info_nce_loss(q_reps, p_reps, temperature=temperature, normalize=False)
    q_reps, p_reps = checked_rows("in_batch_neg_loss", 1, q_reps=q_reps, p_reps=p_reps)
    lse, _, positive = contrastive(
        q_reps,
        p_reps,
        scale_of("in_batch_neg_loss", temperature, q_reps),
        positives=torch.arange(0, len(p_reps), len(p_reps) // len(q_reps), device=q_reps.device),
        normalize_rows=False,
        normalize_columns=False,
        equal_weights=True,
        caller="in_batch_neg_loss",
    )
    return mean(lse - positive, q_reps)
