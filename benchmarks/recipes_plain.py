"""The losses of the recipes in plain PyTorch, called as the recipes call ours."""

import torch
import torch.nn.functional as F

from benchmarks import plain_losses
from ssl_kernels.recipes.baseline import plain_moco_loss, plain_nt_xent_loss


def _moco_v3(query, key, queue, temperature, *, symmetric):
    """Of the predictions of view 0 above those of view 1: each view's against the other view's keys."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    own = torch.arange(len(query) // 2)
    pairs = zip(query.chunk(2), key.chunk(2)[::-1], strict=True)
    return sum(F.cross_entropy(queries @ keys.T / temperature, own) for queries, keys in pairs) / 2


def _clip(images, texts, logit_scale, *, ids):
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    equal = (ids[:, None] == ids).fill_diagonal_(False)
    logits = (logit_scale * images @ texts.T).masked_fill(equal, float("-inf"))
    own = torch.arange(len(images))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _swav(features, prototypes, temperature, *, epsilon):
    return plain_losses.plain_swav_loss(torch.stack(features), prototypes, temperature, epsilon)


def _dino(student, teacher, prototypes, teacher_prototypes, temperature, teacher_temperature, *, center):
    columns = F.normalize(prototypes, dim=1)
    teacher_columns = F.normalize(teacher_prototypes, dim=1)
    students = [F.normalize(rows, dim=1) @ columns.T for rows in student]
    teachers = [F.normalize(rows, dim=1) @ teacher_columns.T - center.center for rows in teacher]
    return plain_losses.plain_dino_loss(students, torch.stack(teachers), temperature, teacher_temperature)


def _mae(prediction, target, mask):
    return plain_losses.plain_mae_loss(prediction[mask], target[mask])


def _triplet(embeddings, labels, margin, *, mining):
    """For each pair of one label the nearest negative that is farther away, else the farthest: all pairs sorted."""
    assert mining == "semi_hard"
    x = F.normalize(embeddings, dim=1)
    distances = torch.cdist(x, x)
    same = labels[:, None] == labels
    with torch.no_grad():
        ordered, order = distances.masked_fill(same, torch.inf).sort(1)
        farthest = (~same).sum(1, keepdim=True) - 1
        place = torch.searchsorted(ordered, distances.contiguous(), right=True)
        negative = order.gather(1, torch.minimum(place, farthest))
    gaps = F.relu(distances - distances.gather(1, negative) + margin)
    return gaps[same & ~torch.eye(len(x), dtype=torch.bool)].mean()


def _mixed_cross_entropy(logits, labels, permutation, lam):
    by_own, by_partner = (
        F.cross_entropy(logits, target, reduction="none") for target in (labels, labels[permutation])
    )
    return (lam * by_own + (1 - lam) * by_partner).mean()


# supervised, rotation and jigsaw have F.cross_entropy as they are.
PLAIN = {
    "simclr": plain_nt_xent_loss,
    "moco": plain_moco_loss,
    "mocov3": _moco_v3,
    "byol": plain_losses.plain_byol_loss,
    "simsiam": plain_losses.plain_byol_loss,
    "swav": _swav,
    "dino": _dino,
    "barlow": plain_losses.plain_barlow_twins_loss,
    "vicreg": plain_losses.plain_vicreg_loss,
    "mae": _mae,
    "supcon": plain_losses.plain_sup_con_loss,
    "triplet": _triplet,
    "imix": plain_losses.plain_imix_loss,
    "mixco": plain_losses.plain_imix_loss,
    "clip": _clip,
    "mixup": _mixed_cross_entropy,
    "cutmix": _mixed_cross_entropy,
    "manifold-mixup": _mixed_cross_entropy,
}
