"""Labels and rows of `batch_hard`, and the rules by which every backend's choices are judged."""

import torch
import torch.nn.functional as F

from ssl_kernels.reference.batch_hard import batch_hard as reference


def labels_of(n, classes, seed=0):
    """(n,) int64, some negative, that differ beyond 32 bits alone."""
    return torch.randint(-3, classes - 3, (n,), generator=torch.Generator().manual_seed(seed)) * 2**33


def check_choice(found, embeddings, labels, normalize, distance, *, tf32=False):
    """Each choice is of the right set, and within the rounding of a dot product of the best of float64."""
    labels, wide = labels.cpu(), embeddings.double().cpu()
    x = F.normalize(wide, dim=1) if normalize else wide
    keys = -(x @ x.T)
    if distance == "euclidean":
        keys = keys + x.square().sum(1) / 2
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    acc = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    rounding = 8 * torch.finfo(acc).eps * max(1, x.shape[1] ** 0.5 / 8) + 2.0**-9 * tf32
    slack = rounding * x.square().sum(1).max() + 1e-300
    for index, candidates, sign in zip(found, (positive, ~same), (1, -1), strict=True):
        assert index.dtype == torch.int64 and index.shape == labels.shape
        index, exists = index.cpu(), candidates.any(1)
        assert torch.equal(index != -1, exists)
        row, chosen = torch.arange(len(x))[exists], index[exists]
        assert ((chosen >= 0) & (chosen < len(x))).all()
        assert candidates[row, chosen].all()
        best = (sign * keys).masked_fill(~candidates, -torch.inf).amax(1)[exists]
        assert (sign * keys[row, chosen] >= best - slack).all()


def check_indices(found, embeddings, labels, distance):
    """Where every key is exact or NaN, the choice is that of the reference to the index."""
    expected = reference(embeddings.double().cpu(), labels.cpu(), False, distance)
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), right)


def small_integers(n, d, dtype, seed=3):
    """Rows whose keys are exact in every dtype, and most of them equal."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)
