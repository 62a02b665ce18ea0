"""The losses by their definitions: dense N × N algebra straight from the papers, with a value per row.

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


def nt_xent_loss(z0, z1, temperature, *, ids=None, normalize=True):
    """Chen et al., SimCLR, arXiv:2002.05709, eq. 1."""
    logits, self_, partner = _two_views(z0, z1, temperature, normalize)
    allowed = ~self_
    if ids is not None:
        of_views = ids.repeat(2)
        allowed &= partner | _not_equal(of_views, of_views[None, :])
    return _cross_entropy(logits, partner.to(logits.dtype), allowed)


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


def moco_loss(query, key, queue, temperature=0.07, *, ids=None, queue_ids=None, normalize=True):
    """He et al., MoCo, arXiv:1911.05722, eq. 1: no gradient to key and queue, the queue's rows as they are."""
    q, k = _unit(query, normalize), _unit(key.detach(), normalize)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.detach().T), 1) / temperature
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if ids is not None:
        allowed[:, 1:] = _not_equal(ids, queue_ids[None, :])
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return _cross_entropy(logits, _one_hot(first, logits.shape[1], logits), allowed)


def clip_loss(
    image_features,
    text_features,
    logit_scale,
    *,
    label_smoothing=0.0,
    ids=None,
    image_index=None,
    normalize=True,
):
    """Radford et al., CLIP, arXiv:2103.00020, figure 3: mean of pair i's two cross-entropies."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T)
    n = len(logits)
    if image_index is not None:
        texts = logits.shape[1]
        of_texts = (1 - label_smoothing) * _one_hot(image_index, n, logits) + label_smoothing / n
        own = torch.arange(texts, device=logits.device)
        of_images = (1 - label_smoothing) * _one_hot(own, texts, logits) + label_smoothing / texts
        return (_cross_entropy(logits.T, of_texts) + _cross_entropy(logits[image_index], of_images)) / 2
    target = (1 - label_smoothing) * torch.eye(
        n, dtype=logits.dtype, device=logits.device
    ) + label_smoothing / n
    allowed = (
        None
        if ids is None
        else _not_equal(ids, ids[None, :]) | torch.eye(n, dtype=torch.bool, device=logits.device)
    )
    return (_cross_entropy(logits, target, allowed) + _cross_entropy(logits.T, target, allowed)) / 2


def siglip_loss(
    image_features, text_features, logit_scale, logit_bias, *, ids=None, image_index=None, normalize=True
):
    """Zhai et al., SigLIP, arXiv:2303.15343, eq. 1: the sum over the texts for each image, or with image_index over the
    images for each text."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T) + logit_bias
    if image_index is not None:
        sign = 2 * _one_hot(image_index, len(logits), logits) - 1
        return -F.logsigmoid(sign * logits.T).sum(1)
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    losses = -F.logsigmoid(sign * logits)
    if ids is not None:
        losses = losses.where((sign > 0) | _not_equal(ids, ids[None, :]), 0)
    return losses.sum(1)


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


def triplet_loss(
    embeddings, labels, margin=0.2, *, mining="batch_hard", distance="euclidean", normalize=True
):
    """Hermans et al., arXiv:1703.07737, eq. 5; 0 where an anchor has no positive or no negative.

    Semi-hard (Schroff et al., FaceNet, arXiv:1503.03832, section 3.2): the sum over an anchor's positives.
    """
    x = _unit(embeddings, normalize)
    if distance == "euclidean":
        squares = (x[:, None] - x[None]).square().sum(2)
        apart = squares > 0  # derivatives of 0 at 0
        distances = torch.where(apart, squares, 1).sqrt().where(apart, 0)
    else:
        distances = 1 - x @ x.T
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    if margin == "soft":
        margin, hinge = 0, lambda gap: -F.logsigmoid(-gap)
    else:
        hinge = torch.relu
    if mining == "semi_hard":
        # (anchor, positive, negative): the nearest negative beyond the positive, or the farthest.
        negative = (~same)[:, None, :].expand(-1, len(x), -1)
        to_negatives = distances[:, None, :].expand(-1, len(x), -1)
        beyond = negative & (to_negatives > distances[:, :, None])
        nearest = to_negatives.masked_fill(~beyond, torch.inf).min(2).values
        farthest = to_negatives.masked_fill(~negative, -torch.inf).max(2).values
        there = positive & negative.any(2)
        gaps = (distances - nearest.where(beyond.any(2), farthest)).where(there, 0)
        return hinge(gaps + margin).where(there, 0).sum(1)
    there = positive.any(1) & ~same.all(1)
    far = distances.masked_fill(~positive, -torch.inf).max(1).values
    near = distances.masked_fill(same, torch.inf).min(1).values
    return hinge((far - near + margin).where(there, 0)).where(there, 0)


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


def similarity_cross_entropy(
    query,
    keys,
    target,
    scale=1.0,
    *,
    target_weights=None,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    column_bias=None,
    normalize=True,
):
    """torch.nn.functional.cross_entropy of scale · q̂ k̂ᵀ + column_bias with class probabilities; 0 for ignored rows."""
    logits = scale * (_unit(query, normalize) @ _unit(keys, normalize).T)
    if column_bias is not None:
        logits = logits + column_bias
    targets = target.reshape(len(logits), -1)
    counts = targets != ignore_index
    shares = (
        counts / counts.sum(1, keepdim=True).clamp_min(1) if target_weights is None else target_weights
    ).to(logits.dtype)
    shares = shares.masked_fill(~counts, 0)
    probabilities = torch.zeros_like(logits).scatter_add(1, targets.masked_fill(~counts, 0), shares)
    if label_smoothing:
        smooth = torch.full_like(logits, label_smoothing / logits.shape[1])
        probabilities = (1 - label_smoothing) * probabilities + smooth.where(counts.any(1, keepdim=True), 0)
    if weight is not None:
        probabilities = probabilities * weight
    empty = (logits == -torch.inf).all(1, keepdim=True)
    return _cross_entropy(logits.masked_fill(empty, 0), probabilities.masked_fill(empty, 0))


def multiple_negatives_ranking_loss(
    anchor,
    positive,
    *,
    scale=20.0,
    directions=("query_to_doc",),
    partition_mode="joint",
    hardness_mode=None,
    hardness_strength=0.0,
    margin=None,
    margin_mode="absolute",
    ids=None,
    normalize=True,
    **hard_negatives,
):
    """sentence-transformers 6.2; hard negatives by any keyword, each row by row a query's own."""
    n, kinds = len(anchor), 1 + len(hard_negatives)
    q, p = _unit(anchor, normalize), _unit(positive, normalize)
    d = torch.cat((p, *(_unit(rows, normalize) for rows in hard_negatives.values())))
    cosines = {
        "query_to_doc": q @ d.T,
        "doc_to_query": p @ q.T,
        "query_to_query": q @ q.T,
        "doc_to_doc": p @ d.T,
    }
    own = torch.eye(n, dtype=torch.bool, device=q.device)
    own_documents = own.repeat(1, kinds)
    own_positive = torch.cat((own, torch.zeros_like(own_documents[:, n:])), 1)
    logits = {name: scale * cosine for name, cosine in cosines.items()}
    if hardness_mode is not None:
        raised = {
            "in_batch_negatives": ~own_documents,
            "hard_negatives": own_documents & ~own_positive,
            "all_negatives": ~own_positive,
        }[hardness_mode]
        penalty = hardness_strength * cosines["query_to_doc"].detach()
        logits["query_to_doc"] = logits["query_to_doc"] + penalty.where(raised, 0)
    left_out = {"query_to_query": own, "doc_to_doc": own_documents}
    stays = {"query_to_doc": own_documents, "doc_to_query": own}
    curated = torch.arange(n * kinds, device=q.device) >= n
    terms = []
    for name in [each for each in cosines if each in directions]:
        out = left_out.get(name, torch.zeros_like(cosines[name], dtype=torch.bool))
        keep = stays.get(name, torch.zeros_like(out))
        if ids is not None:
            equal = ids[:, None] == ids
            out = out | (equal.repeat(1, out.shape[1] // n) & ~keep)
        if margin is not None:
            of_pair = cosines["query_to_doc"].detach().diagonal()
            limit = of_pair - margin if margin_mode == "absolute" else of_pair * (1 - margin)
            above = cosines[name] > limit[:, None]
            if out.shape[1] == len(curated):
                above = above & ~curated
            out = out | (above & ~(keep & ~curated if out.shape[1] == len(curated) else keep))
        terms.append(logits[name].masked_fill(out, -torch.inf))
    if partition_mode == "joint":
        terms = [torch.cat(terms, 1)]  # the own positive is among the first columns
    index = torch.arange(n, device=q.device)
    return sum(_cross_entropy(term, _one_hot(index, term.shape[1], term)) for term in terms) / len(terms)


def sampled_softmax_loss(
    query,
    item,
    candidates=None,
    *,
    temperature=1.0,
    item_ids=None,
    candidate_ids=None,
    log_q=None,
    candidate_weights=None,
    in_batch=True,
    num_hard_negatives=None,
    normalize=True,
):
    """TensorFlow Recommenders, tasks.Retrieval: logits less log Q, accidental hits removed, the hardest negatives."""
    n = len(query)
    columns = item if candidates is None else torch.cat((item, candidates))
    logits = _unit(query, normalize) @ _unit(columns, normalize).T / temperature
    if log_q is not None:
        logits = logits - log_q
    if candidate_weights is not None:
        logits = logits + candidate_weights.log()
    own = torch.eye(*logits.shape, dtype=torch.bool, device=query.device)
    out = torch.zeros_like(own)
    if item_ids is not None:
        ids = item_ids if candidates is None else torch.cat((item_ids, candidate_ids))
        out = ~own & (item_ids[:, None] == ids)
    if not in_batch:
        out[:, :n] |= ~own[:, :n]
    logits = logits.masked_fill(out, -torch.inf)
    if num_hard_negatives is not None:
        negatives = logits.masked_fill(own, -torch.inf)
        least = negatives.topk(min(num_hard_negatives, logits.shape[1]), 1).values[:, -1:]
        logits = logits.masked_fill(~own & (negatives < least), -torch.inf)
    return _cross_entropy(logits, own.to(logits.dtype))


def mil_nce_loss(query, keys, temperature=0.07, *, symmetric=True, normalize=True):
    """Miech et al., MIL-NCE, arXiv:1912.06430, eq. 1."""
    logits = torch.einsum("id,jpd->ijp", _unit(query, normalize), _unit(keys, normalize)) / temperature
    own = torch.eye(len(query), dtype=torch.bool, device=query.device)[:, :, None]
    everything = [logits.flatten(1)]
    if symmetric:
        everything.append(logits.masked_fill(own, -torch.inf).transpose(0, 1).flatten(1))
    probabilities = torch.log_softmax(torch.cat(everything, 1), 1)
    return -torch.logsumexp(
        probabilities[:, : logits[0].numel()].masked_fill(~own.expand_as(logits).flatten(1), -torch.inf), 1
    )


def distillation_loss(
    query, keys, teacher_query, teacher_keys, temperature=0.07, teacher_temperature=None, *, normalize=True
):
    """Hinton et al., arXiv:1503.02531: KL divergence of softmaxes over the keys."""
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    if isinstance(teacher_temperature, torch.Tensor):
        teacher_temperature = teacher_temperature.detach()
    teacher = _unit(teacher_query.detach(), normalize) @ _unit(teacher_keys.detach(), normalize).T
    teacher = torch.log_softmax(teacher / teacher_temperature, 1)
    pupil = torch.log_softmax(_unit(query, normalize) @ _unit(keys, normalize).T / temperature, 1)
    return (teacher.exp() * (teacher - pupil)).sum(1)


def uniformity_loss(embeddings, t=2.0, *, normalize=True):
    """Wang & Isola, arXiv:2005.10242, figure 5; one value for all rows."""
    x = _unit(embeddings, normalize)
    squares = (x[:, None] - x).square().sum(2)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (-t * squares[others]).exp().mean().log()


def alignment_loss(x, y, alpha=2.0, *, normalize=True):
    """Wang & Isola, arXiv:2005.10242, figure 5."""
    return torch.linalg.vector_norm(_unit(x, normalize) - _unit(y, normalize), dim=1) ** alpha


def koleo_loss(embeddings, *, normalize=True):
    """Sablayrolles et al., arXiv:1806.03198, eq. 4, with the epsilon of DINOv2."""
    x = _unit(embeddings, normalize)
    squares = (x[:, None] - x).square().sum(2)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    nearest = squares.masked_fill(itself, torch.inf).min(1).values
    apart = nearest > 0
    return -(torch.where(apart, nearest, 1).sqrt().where(apart, 0) + 1e-8).log()
