"""Losses against prototypes, of correlations and of patches by their definitions, as those in definitions.py."""

import torch
import torch.nn.functional as F


def _unit(x, normalize):
    return F.normalize(x, dim=-1) if normalize else x


def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Caron et al., SwAV, arXiv:2006.09882, as its published code has it, in logarithms."""
    logits = scores.detach() / epsilon
    for _ in range(iterations):
        logits = logits - torch.logsumexp(logits, 0)
        logits = logits - torch.logsumexp(logits, 1, keepdim=True)
    return logits.exp()


def _cross_entropies(teacher, student):
    """−Σ_k p_k log softmax(s)_k of each sample."""
    return -(teacher * torch.log_softmax(student, -1)).sum(-1)


def swav_loss(
    features,
    prototypes,
    temperature=0.1,
    *,
    epsilon=0.05,
    iterations=3,
    assign=(0, 1),
    queue=None,
    normalize=True,
    normalize_prototypes=True,
):
    """Caron et al., SwAV, arXiv:2006.09882, eq. 2 and 6: a value for each image."""
    prototypes = _unit(prototypes, normalize_prototypes)
    scores = [_unit(view, normalize) @ prototypes.T for view in features]
    total, pairs = 0, 0
    for a in assign:
        known = scores[a] if queue is None else torch.cat((queue @ prototypes.T, scores[a]))
        codes = sinkhorn(known, epsilon, iterations)[-len(scores[a]) :]
        for v, score in enumerate(scores):
            if v != a:
                total, pairs = total + _cross_entropies(codes, score / temperature), pairs + 1
    return total / pairs


def dino_loss(
    student,
    teacher,
    prototypes=None,
    teacher_prototypes=None,
    temperature=0.1,
    teacher_temperature=0.04,
    *,
    center=None,
    centering="center",
    iterations=3,
    mask=None,
    normalize=True,
    normalize_prototypes=True,
):
    """Caron et al., DINO, arXiv:2104.14294, algorithm 1; with a mask, Zhou et al., iBOT, arXiv:2111.07832, eq. 3."""
    if isinstance(teacher_temperature, torch.Tensor):
        teacher_temperature = teacher_temperature.detach()
    if prototypes is not None:
        teacher_prototypes = prototypes if teacher_prototypes is None else teacher_prototypes
        student = [_unit(x, normalize) @ _unit(prototypes, normalize_prototypes).T for x in student]
        teacher = [_unit(x, normalize) @ _unit(teacher_prototypes, normalize_prototypes).T for x in teacher]
    if mask is not None:
        of_tokens = []
        for a, logits in enumerate(teacher):
            masked = mask[a]
            if centering == "sinkhorn":
                known = torch.cat([each[m] for each, m in zip(teacher, mask, strict=True)])
                before = sum(int(m.sum()) for m in mask[:a])
                codes = sinkhorn(known, teacher_temperature, iterations)[before : before + int(masked.sum())]
            else:
                codes = _centred(logits[masked], center, teacher_temperature)
            ours = _cross_entropies(codes, student[a][masked] / temperature)
            tokens = ours.new_zeros(masked.shape).masked_scatter(masked, ours)
            of_tokens.append(tokens.sum(1) / masked.sum(1).clamp_min(1))
        return sum(of_tokens) / len(teacher)
    if centering == "sinkhorn":
        codes = sinkhorn(torch.cat(list(teacher)), teacher_temperature, iterations).chunk(len(teacher))
    else:
        codes = [_centred(logits, center, teacher_temperature) for logits in teacher]
    pairs = [(a, v) for a in range(len(teacher)) for v in range(len(student)) if v != a]
    return sum(_cross_entropies(codes[a], student[v] / temperature) for a, v in pairs) / len(pairs)


def _centred(logits, center, temperature):
    logits = logits.detach() if center is None else logits.detach() - center
    return torch.softmax(logits / temperature, -1)


def barlow_twins_loss(z0, z1, off_diagonal_weight=0.005, *, eps=1e-5):
    """Zbontar et al., Barlow Twins, arXiv:2103.03230, eq. 1: a value for each feature, whose sum is the loss."""
    width = z0.shape[1]
    covariance = torch.cov(torch.cat((z0, z1), 1).T, correction=0)
    deviation = (covariance.diagonal() + eps).sqrt()
    correlation = (covariance / deviation[:, None] / deviation)[:width, width:]
    wanted = torch.eye(width, dtype=z0.dtype, device=z0.device)
    weights = wanted + off_diagonal_weight * (1 - wanted)
    return (weights * (correlation - wanted).square()).sum(1)


def vicreg_loss(z0, z1, invariance=25.0, variance=25.0, covariance=1.0, *, eps=1e-4):
    """Bardes et al., VICReg, arXiv:2105.04906, eq. 1 to 6: a value for each feature, whose mean is the loss."""
    width = z0.shape[1]
    total = invariance * F.mse_loss(z0, z1, reduction="none").mean(0)
    for z in (z0, z1):
        of_features = torch.cov(z.T).reshape(width, width)
        others = of_features.masked_fill(torch.eye(width, dtype=torch.bool, device=z0.device), 0)
        deviation = (of_features.diagonal() + eps).sqrt()
        total = total + variance * (1 - deviation).clamp_min(0) / 2 + covariance * others.square().sum(1)
    return total


def mae_loss(prediction, target, mask=None, *, normalize_target=True, eps=1e-6):
    """He et al., MAE, arXiv:2111.06377, section 3 and its published code: a value for each patch."""
    target = target.detach()
    if normalize_target:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps).sqrt()
    return (prediction - target).square().mean(-1)
