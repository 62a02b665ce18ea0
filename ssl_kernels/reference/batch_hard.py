"""`batch_hard` by its definition, with the N × N matrix of keys in memory."""

import torch
import torch.nn.functional as F


def batch_hard(embeddings, labels, normalize=True, distance="euclidean"):
    """Each row's farthest row of its own label and nearest of another; docs/batch_hard.md is the contract.

    Args:
        embeddings: (N, D) floating.
        labels: (N,) int64.
        normalize: L2-normalise the rows first.
        distance: "euclidean" or "cosine".

    Returns:
        positive_index, negative_index: (N,) int64, −1 where a row has none.
    """
    x = F.normalize(embeddings, dim=1) if normalize else embeddings
    keys = -(x @ x.T)
    if distance == "euclidean":
        # Half the squared distance, less what is the same for all columns.
        keys = x.square().sum(1) / 2 + keys
    finite = torch.finfo(keys.dtype)
    keys = keys.clamp(finite.min, finite.max)  # what is left out below is beyond every key; NaN stays NaN
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    farthest = keys.masked_fill(~positive, -torch.inf).argmax(1)
    nearest = keys.masked_fill(same, torch.inf).argmin(1)
    return farthest.where(positive.any(1), -1), nearest.where(~same.all(1), -1)
