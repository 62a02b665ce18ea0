"""The losses in plain PyTorch as their users write them: what ours are compared with."""

import math

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
    return plain_sup_con_of_units(F.normalize(features, dim=1), labels, temperature)


def plain_sup_con_of_units(features, labels, temperature=0.07):
    """As SupContrast forms it: a mask of equal labels, logits less their maximum, exponentials times a mask."""
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


def plain_dino_of_features_loss(student, teacher, prototypes, teacher_prototypes):
    """As its authors' head and loss form it: unit features times unit prototypes, and a log-softmax for each pair."""
    student, prototypes = F.normalize(student, dim=-1), F.normalize(prototypes, dim=1)
    with torch.no_grad():
        codes = F.normalize(teacher, dim=-1) @ F.normalize(teacher_prototypes, dim=1).T
    return plain_dino_loss(student @ prototypes.T, codes)


def plain_moco_loss(query, key, queue, temperature=0.07):
    """As its authors' code forms it: the positive's column beside the queue's, one cross-entropy."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat(((query * key).sum(1, keepdim=True), query @ queue.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def plain_debiased_nt_xent_loss(z0, z1, temperature=0.5, positive_prior=0.1):
    """As its authors' code forms it: exponentials of all pairs, those of a sample's own views left out."""
    rows = F.normalize(torch.cat((z0, z1)), dim=1)
    others = ~torch.eye(len(z0), dtype=torch.bool, device=z0.device).repeat(2, 2)
    exponentials = torch.exp(rows @ rows.T / temperature) * others
    positive = torch.exp((rows[: len(z0)] * rows[len(z0) :]).sum(1) / temperature).repeat(2)
    negatives = 2 * len(z0) - 2
    expected = (exponentials.sum(1) - negatives * positive_prior * positive) / (1 - positive_prior)
    expected = expected.clamp(min=negatives * math.exp(-1 / temperature))
    return -torch.log(positive / (positive + expected)).mean()


def plain_similarity_cross_entropy(query, keys, target, scale=20.0):
    return F.cross_entropy(scale * F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T, target)


def plain_multiple_negatives_ranking_loss(anchor, positive, *hard_negatives, scale=20.0):
    """As sentence-transformers forms it, of queries against documents."""
    documents = F.normalize(torch.cat((positive, *hard_negatives)), dim=1)
    own = torch.arange(len(anchor), device=anchor.device)
    return F.cross_entropy(scale * F.normalize(anchor, dim=1) @ documents.T, own)


def plain_ranking_in_all_directions(anchor, positive, scale=20.0):
    """As sentence-transformers forms it with all four directions at once."""
    query, document = F.normalize(anchor, dim=1), F.normalize(positive, dim=1)
    itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
    across = scale * query @ document.T
    logits = torch.cat(
        (
            across,
            across.T,
            (scale * query @ query.T).masked_fill(itself, -torch.inf),
            (scale * document @ document.T).masked_fill(itself, -torch.inf),
        ),
        dim=1,
    )
    return (logits.logsumexp(1) - across.diagonal()).mean()


def plain_sampled_softmax_loss(query, item, candidates, log_q, temperature=0.05):
    columns = F.normalize(torch.cat((item, candidates)), dim=1)
    logits = F.normalize(query, dim=1) @ columns.T / temperature - log_q
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def plain_mil_nce_loss(query, keys, temperature=0.07):
    """As its authors' code forms it, with the own pairs in the sum once."""
    n, positives, _ = keys.shape
    columns = F.normalize(keys, dim=-1).flatten(0, 1)
    logits = (F.normalize(query, dim=1) @ columns.T / temperature).view(n, n, positives)
    own = torch.eye(n, dtype=torch.bool, device=query.device)
    nominator = torch.logsumexp(logits.diagonal(), dim=0)
    by_key = logits.transpose(0, 1).masked_fill(own[:, :, None], -torch.inf)
    return (torch.logsumexp(torch.cat((logits, by_key), dim=1).flatten(1), dim=1) - nominator).mean()


def plain_distillation_loss(query, keys, teacher_query, teacher_keys, temperature=0.07):
    logits = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / temperature
    with torch.no_grad():
        wanted = F.normalize(teacher_query, dim=1) @ F.normalize(teacher_keys, dim=1).T / temperature
        wanted = F.log_softmax(wanted, dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), wanted, reduction="batchmean", log_target=True)


def plain_uniformity_loss(embeddings, t=2.0):
    """Its authors' formula over the matrix of products; their `torch.pdist` has no faster gradient."""
    x = F.normalize(embeddings, dim=1)
    n = len(x)
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    exponents = (2 * t * (x @ x.T) - 2 * t).masked_fill(itself, -torch.inf)
    return torch.logsumexp(exponents.flatten(), dim=0) - math.log(n * (n - 1))


def plain_alignment_loss(x, y, alpha=2):
    """As its authors' code forms it."""
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(alpha).mean()


def plain_koleo_loss(embeddings):
    """As DINOv2 forms it."""
    x = F.normalize(embeddings, dim=1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=0) + 1e-8).mean()


def plain_semi_hard_triplet_loss(embeddings, rows_of_a_label, margin=0.2):
    """Semi-hard triplets from the dense matrix of distances, of rows that lie label by label, equally many of each."""
    x = F.normalize(embeddings, dim=1)
    squares = x.square().sum(1)
    squared = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    zero = squared == 0
    distances = (squared + zero * 1e-16).sqrt() * ~zero
    row = torch.arange(len(x), device=x.device)
    label = row // rows_of_a_label
    negatives = distances.masked_fill(label[:, None] == label, torch.inf)
    farthest = distances.masked_fill(label[:, None] == label, -torch.inf).max(1).values
    total = 0
    for shift in range(1, rows_of_a_label):
        partner = label * rows_of_a_label + (row + shift) % rows_of_a_label
        positive = distances.gather(1, partner[:, None])
        nearest = negatives.masked_fill(negatives <= positive, torch.inf).min(1).values
        nearest = torch.where(nearest.isinf(), farthest, nearest)
        total = total + F.relu(positive[:, 0] - nearest + margin).mean()
    return total / (rows_of_a_label - 1)


def plain_soft_margin_triplet_loss(embeddings, labels):
    """Batch-hard triplets, the softplus of their gaps."""
    x = F.normalize(embeddings, dim=1)
    squares = x.square().sum(1)
    squared = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    zero = squared == 0
    distances = (squared + zero * 1e-16).sqrt() * ~zero
    same = labels[:, None] == labels
    farthest = (distances * same).max(1).values
    return F.softplus(farthest - distances.masked_fill(same, torch.inf).min(1).values).mean()
