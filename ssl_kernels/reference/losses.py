"""The losses by their definitions: dense N × N algebra straight from the papers, a value a row, PyTorch's own autograd.

Each computes in the dtype of its input (the tests pass float64) and reduces nothing; arguments are those of the
public function of the same name.
"""

import torch
import torch.nn.functional as F


def _unit(x, normalize):
    return F.normalize(x, dim=-1) if normalize else x


def _cross_entropy(logits, target_probabilities, allowed=None):
    """−Σ_j target_ij log softmax(logits_i)_j over the allowed entries."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    log_probabilities = torch.log_softmax(logits, dim=1)
    return -(target_probabilities * log_probabilities.masked_fill(target_probabilities == 0, 0)).sum(1)


def _one_hot(index, classes, like):
    return F.one_hot(index, classes).to(like.dtype)


def _not_equal(row_ids, column_ids):
    return row_ids[:, None] != column_ids


def _two_views(z0, z1, temperature, normalize):
    """Logits of the 2B rows, self, and whether j is the other view of i."""
    z = _unit(torch.cat((z0, z1)), normalize)
    identity = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return z @ z.T / temperature, identity, identity.roll(len(z0), 1)


def nt_xent_loss(z0, z1, temperature, *, normalize=True):
    """Chen et al., SimCLR, arXiv:2002.05709, eq. 1."""
    logits, self_, partner = _two_views(z0, z1, temperature, normalize)
    return _cross_entropy(logits, partner.to(logits.dtype), allowed=~self_)


def info_nce_loss(
    query,
    positive_key,
    negative_keys=None,
    temperature=0.1,
    negative_mode="unpaired",
    *,
    symmetric=False,
    query_ids=None,
    key_ids=None,
    normalize=True,
):
    """van den Oord et al., CPC, arXiv:1807.03748."""
    q, k = _unit(query, normalize), _unit(positive_key, normalize)
    if negative_keys is None:
        allowed = torch.eye(len(q), dtype=torch.bool, device=q.device)
        key_ids = query_ids if key_ids is None else key_ids
        allowed |= True if query_ids is None else _not_equal(query_ids, key_ids[None, :])
        own = torch.eye(len(q), dtype=q.dtype, device=q.device)
        logits = q @ k.T / temperature
        loss = _cross_entropy(logits, own, allowed)
        return (loss + _cross_entropy(logits.T, own, allowed.T)) / 2 if symmetric else loss
    negatives = _unit(negative_keys, normalize)
    if negative_mode == "unpaired":
        negatives = negatives.expand(len(q), *negatives.shape)
    logits = torch.cat(((q * k).sum(1, keepdim=True), torch.einsum("nd,nmd->nm", q, negatives)), 1)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if query_ids is not None:
        allowed[:, 1:] = _not_equal(query_ids, key_ids)
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return _cross_entropy(logits / temperature, _one_hot(first, logits.shape[1], logits), allowed)


def moco_loss(query, key, queue, temperature=0.07, *, normalize=True):
    """He et al., MoCo, arXiv:1911.05722, eq. 1: no gradient to key and queue, the queue's rows as they are."""
    q, k = _unit(query, normalize), _unit(key.detach(), normalize)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.detach().T), 1) / temperature
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return _cross_entropy(logits, _one_hot(first, logits.shape[1], logits))


def clip_loss(image_features, text_features, logit_scale, *, label_smoothing=0.0, ids=None, normalize=True):
    """Radford et al., CLIP, arXiv:2103.00020, figure 3: mean of pair i's two cross-entropies."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T)
    n = len(logits)
    target = (1 - label_smoothing) * torch.eye(
        n, dtype=logits.dtype, device=logits.device
    ) + label_smoothing / n
    allowed = (
        None
        if ids is None
        else _not_equal(ids, ids[None, :]) | torch.eye(n, dtype=torch.bool, device=logits.device)
    )
    return (_cross_entropy(logits, target, allowed) + _cross_entropy(logits.T, target, allowed)) / 2


def siglip_loss(image_features, text_features, logit_scale, logit_bias, *, normalize=True):
    """Zhai et al., SigLIP, arXiv:2303.15343, eq. 1: the sum over the texts for each image."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T) + logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum(1)


def sup_con_loss(features, labels, temperature=0.07, *, normalize=True):
    """Khosla et al., SupCon, arXiv:2004.11362, eq. 2 (L_out); 0 where i has no positive."""
    z = _unit(features, normalize)
    identity = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = ((labels[:, None] == labels[None, :]) & ~identity).to(z.dtype)
    count = positive.sum(1, keepdim=True)
    return _cross_entropy(z @ z.T / temperature, positive / count.clamp_min(1), allowed=~identity)


def dcl_loss(z0, z1, temperature=0.1, *, normalize=True):
    """Yeh et al., decoupled contrastive learning, arXiv:2110.06848."""
    logits, self_, partner = _two_views(z0, z1, temperature, normalize)
    negatives = logits.masked_fill(self_ | partner, -torch.inf)
    return torch.logsumexp(negatives, 1) - logits[partner]


def debiased_nt_xent_loss(z0, z1, temperature=0.5, *, positive_prior=0.1, normalize=True):
    """Chuang et al., debiased contrastive learning, arXiv:2007.00224, with one positive."""
    logits, self_, partner = _two_views(z0, z1, temperature, normalize)
    negatives = len(logits) - 2
    # Relative to the largest of a row, which changes no loss and keeps the exponentials finite.
    largest = logits.detach().masked_fill(self_, -torch.inf).amax(1, keepdim=True)
    logits = logits - largest
    similarity = logits.masked_fill(self_, -torch.inf).exp()
    positive = similarity[partner]
    mean_negative = similarity.masked_fill(self_ | partner, 0).sum(1) / negatives
    estimate = (mean_negative - positive_prior * positive) / (1 - positive_prior)
    least = (
        -1 / torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device) - largest[:, 0]
    ).exp()
    return torch.log(positive + negatives * torch.maximum(estimate, least)) - logits[partner]


def imix_loss(query, key, permutation, lam, temperature=0.2, *, negative_keys=None, normalize=True):
    """Lee et al., i-Mix, arXiv:2010.08887: cross-entropy against virtual labels, mixed as the inputs are."""
    k = _unit(key, normalize)
    if negative_keys is not None:
        k = torch.cat((k, _unit(negative_keys, normalize)))
    logits = _unit(query, normalize) @ k.T / temperature
    lam = torch.as_tensor(lam, dtype=logits.dtype, device=logits.device).expand(len(query))[:, None]
    own, partner = (
        _one_hot(index, len(k), logits)
        for index in (torch.arange(len(query), device=query.device), permutation)
    )
    return _cross_entropy(logits, lam * own + (1 - lam) * partner)


def triplet_loss(embeddings, labels, margin=0.2, *, distance="euclidean", normalize=True):
    """Hermans et al., arXiv:1703.07737, eq. 5; 0 where an anchor has no positive or no negative."""
    x = _unit(embeddings, normalize)
    if distance == "euclidean":
        squares = (x[:, None] - x[None]).square().sum(2)
        apart = squares > 0  # derivatives of 0 at 0
        distances = torch.where(apart, squares, 1).sqrt().where(apart, 0)
    else:
        distances = 1 - x @ x.T
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    far = distances.masked_fill(~positive, -torch.inf).max(1).values
    near = distances.masked_fill(same, torch.inf).min(1).values
    return torch.relu((far - near + margin).where(positive.any(1) & ~same.all(1), 0))


def triplet_margin_loss(anchor, positive, negative, margin=0.2, *, distance="euclidean", normalize=True):
    """Schroff et al., FaceNet, arXiv:1503.03832, with plain distances, not their squares."""
    a, p, n = (_unit(x, normalize) for x in (anchor, positive, negative))
    if distance == "euclidean":
        farther = torch.linalg.vector_norm(a - p, dim=1) - torch.linalg.vector_norm(a - n, dim=1)
    else:
        farther = (1 - (a * p).sum(1)) - (1 - (a * n).sum(1))
    return torch.relu(farther + margin)


def byol_loss(prediction, target, *, normalize=True):
    """Grill et al., BYOL, arXiv:2006.07733, eq. 2: ‖p̂ − t̂‖² = 2 − 2 <p̂, t̂> of unit rows, no gradient to the target."""
    return 2 - 2 * (_unit(prediction, normalize) * _unit(target.detach(), normalize)).sum(1)
