"""Radford et al., arXiv:2103.00020; Zhai et al., arXiv:2303.15343; Yu et al., CoCa, arXiv:2205.01917."""

import torch
import torch.nn.functional as F

from tests.adapters.uses import Use


class ClipLoss:
    def __call__(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        logits, own = logit_scale * (image_features @ text_features.T), torch.arange(len(image_features))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss:
    def __init__(self, caption_loss_weight, clip_loss_weight, pad_id=0):
        self.weights, self.pad_id = (clip_loss_weight, caption_loss_weight), pad_id

    def __call__(self, image_features, text_features, logits, labels, logit_scale, output_dict=False):
        clip, caption = self.weights
        contrastive = (
            clip * ClipLoss()(image_features, text_features, logit_scale) if clip else torch.tensor(0)
        )
        captioning = caption * F.cross_entropy(logits.mT, labels, ignore_index=self.pad_id)
        names = ("contrastive_loss", "caption_loss")
        return (
            dict(zip(names, (contrastive, captioning), strict=True))
            if output_dict
            else (contrastive, captioning)
        )


class SigLipLoss:
    def __call__(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        logits = logit_scale * (image_features @ text_features.T) + (0 if logit_bias is None else logit_bias)
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        loss = F.softplus(-signs * logits).sum() / len(logits)
        return {"contrastive_loss": loss} if output_dict else loss


def _clip(space, c):
    scale = c.pick(c.scalar(14.3), c.scalar(14.3, 1), 5.0)
    return space.ClipLoss()(image_features=c.unit_rows(), text_features=c.unit_rows(), logit_scale=scale)


def _clip_dict(space, c):
    bias = c.scalar(-10.0)
    features = {
        "image_features": c.unit_rows(),
        "text_features": c.unit_rows(),
        "logit_scale": c.scalar(10.0),
    }
    return space.ClipLoss()(**features, logit_bias=bias, output_dict=True)["contrastive_loss"]


def _coca(space, c):
    loss = space.CoCaLoss(2.0, c.pick(0.0, 1.0, 0.5), pad_id=1)
    logits, labels = c.rows(c.n, 5, 7), c.integers(7, c.n, 5)
    labels[0, 0] = 3
    return loss(c.unit_rows(), c.unit_rows(), logits, labels, c.scalar(10.0))


def _siglip(space, c):
    scale, bias = c.pick(
        (c.scalar(10.0), c.scalar(-10.0)), (c.scalar(3.0, 1), c.scalar(-2.0, 1)), (3.0, None)
    )
    out = space.SigLipLoss()(c.unit_rows(), c.unit_rows(), scale, bias, output_dict=True)
    return out["contrastive_loss"]


USES = [
    Use("open_clip", "ClipLoss", _clip),
    Use("open_clip", "ClipLoss", _clip_dict, "of a model's output with logit_bias"),
    Use("open_clip", "CoCaLoss", _coca),
    Use("open_clip", "SigLipLoss", _siglip),
]
