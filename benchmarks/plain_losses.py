"""The losses in plain PyTorch as their users write them: what ours are compared with."""

import torch
import torch.nn.functional as F


def plain_clip_loss(images, texts, logit_scale):
    """As open_clip forms it: features made unit, a product for either direction, two cross-entropies."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    own = torch.arange(len(images), device=images.device)
    by_image = logit_scale * images @ texts.T
    by_text = logit_scale * texts @ images.T
    return (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2


def plain_info_nce_loss(query, key, negatives, temperature=0.1):
    """As info-nce-pytorch forms it: the positive's column beside the negatives', one cross-entropy."""
    query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    logits = torch.cat(((query * key).sum(1, keepdim=True), query @ negatives.T), dim=1)
    first = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits / temperature, first)


def plain_sup_con_loss(features, labels, temperature=0.07):
    """As SupContrast forms it: a mask of equal labels, logits less their maximum, exponentials times a mask."""
    features = F.normalize(features, dim=1)
    n = len(features)
    same = (labels[:, None] == labels[None, :]).to(features.dtype)
    others = 1 - torch.eye(n, dtype=features.dtype, device=features.device)
    positives = same * others
    logits = features @ features.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_probabilities = logits - torch.log((logits.exp() * others).sum(1, keepdim=True))
    counts = positives.sum(1)
    counts = torch.where(counts < 1e-6, 1, counts)
    return -((positives * log_probabilities).sum(1) / counts).mean()


def plain_dcl_loss(z0, z1, temperature=0.1):
    """As its authors' code forms it: for either view the products with both, self and positive pushed far down."""
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    eye = torch.eye(len(z0), dtype=torch.bool, device=z0.device).repeat(1, 2)

    def one_way(own, other):
        crossed = own @ other.T
        logits = torch.cat((own @ own.T, crossed), dim=1) / temperature
        negatives = logits.masked_fill(eye, torch.finfo(logits.dtype).min)
        return (torch.logsumexp(negatives, dim=1) - crossed.diagonal() / temperature).mean()

    return (one_way(z0, z1) + one_way(z1, z0)) / 2


def plain_imix_loss(query, key, permutation, lam, temperature=0.2, negative_keys=None):
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    if negative_keys is not None:
        key = torch.cat([key, negative_keys])
    logits = query @ key.T / temperature
    own = torch.arange(len(query), device=query.device)
    by_own, by_partner = (F.cross_entropy(logits, target, reduction="none") for target in (own, permutation))
    return (lam * by_own + (1 - lam) * by_partner).mean()


def plain_triplet_margin_loss(anchor, positive, negative, margin=0.2):
    return F.triplet_margin_loss(
        *(F.normalize(x, dim=1) for x in (anchor, positive, negative)), margin, eps=0
    )


def plain_byol_loss(prediction, target):
    prediction, target = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    return (2 - 2 * (prediction * target).sum(-1)).mean()


def plain_swav_loss(features, prototypes, temperature=0.1, epsilon=0.05):
    """As its authors' code forms it: scores of all crops in one product, a log-softmax for each pair of crops."""
    crops, n = features.shape[:2]
    output = F.normalize(features.flatten(0, 1), dim=1) @ F.normalize(prototypes, dim=1).T
    loss = 0
    for own in (0, 1):
        with torch.no_grad():
            codes = torch.exp(output[own * n : (own + 1) * n] / epsilon).T
            codes /= codes.sum()
            for _ in range(3):
                codes /= codes.sum(1, keepdim=True)
                codes /= len(codes)
                codes /= codes.sum(0, keepdim=True)
                codes /= n
            codes = (codes * n).T
        for crop in range(crops):
            if crop != own:
                scores = output[crop * n : (crop + 1) * n] / temperature
                loss = loss - (codes * F.log_softmax(scores, dim=1)).sum(1).mean()
    return loss / (2 * (crops - 1))


def plain_dino_loss(student, teacher, temperature=0.1, teacher_temperature=0.04):
    """As its authors' code forms it, of logits: a log-softmax for each pair of crops."""
    student = [logits / temperature for logits in student]
    codes = F.softmax(teacher / teacher_temperature, dim=-1).detach()
    terms = [
        (-own * F.log_softmax(logits, dim=-1)).sum(-1).mean()
        for a, own in enumerate(codes)
        for v, logits in enumerate(student)
        if v != a
    ]
    return sum(terms) / len(terms)


def _off_diagonal(matrix):
    n = len(matrix)
    return matrix.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def plain_barlow_twins_loss(z0, z1, off_diagonal_weight=0.005):
    """As its authors' code forms it."""
    first, second = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    correlation = first.T @ second / len(z0)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + off_diagonal_weight * _off_diagonal(correlation).square().sum()


def plain_vicreg_loss(z0, z1, invariance=25, variance=25, covariance=1):
    """As its authors' code forms it."""
    loss = invariance * F.mse_loss(z0, z1)
    n, d = z0.shape
    for z in (z0, z1):
        z = z - z.mean(0)
        loss = loss + variance * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + covariance * _off_diagonal(z.T @ z / (n - 1)).square().sum() / d
    return loss


def plain_mae_loss(prediction, target):
    """As its authors' code forms it, of masked patches alone."""
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    return (prediction - target).square().mean(-1).mean()
