"""Xiao et al., C-Pack, arXiv:2309.07597: InfoNCE over the passages of the batch."""

import torch
import torch.nn.functional as F

from tests.adapters.uses import Use


def in_batch_neg_loss(q_reps, p_reps, temperature=0.02):
    target = torch.arange(len(q_reps)) * (len(p_reps) // len(q_reps))
    return F.cross_entropy(q_reps @ p_reps.T / temperature, target)


USES = [
    Use(
        "flag_embedding",
        "in_batch_neg_loss",
        lambda space, c: space.in_batch_neg_loss(
            c.unit_rows(), c.unit_rows(c.n * c.pick(1, 3)), c.temperature
        ),
    )
]
