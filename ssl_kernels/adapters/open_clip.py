"""open_clip's losses (open_clip_torch 3.3). Losses come back as float32 (float64 for float64).

As in open_clip, rows are not normalised (the model does that), logit_scale is the factor itself, and what lies on other
processes is said by `rank` and `world_size`: the default is the loss of one.
"""

from typing import Any

import torch
from torch import nn

from ssl_kernels.adapters._gather import gather_constant, gather_rows, world_size
from ssl_kernels.adapters._shared import Closed, LibraryMethod, is_plain_cross_entropy, mean, original
from ssl_kernels.checks import check_scalar
from ssl_kernels.losses import clip_loss, siglip_loss
from ssl_kernels.losses._shared import as_scalar, checked_rows
from ssl_kernels.mixing import mixup_cross_entropy
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.sigmoid_pairs import sigmoid_pairs

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss"]
ORIGINALS = {"ClipLoss": "open_clip.loss", "CoCaLoss": "open_clip.loss", "SigLipLoss": "open_clip.loss"}
HOME = "open_clip.loss"  # where `patch` looks for losses without an adapter
DIFFERENCES = {
    "ClipLoss": "the gradient of logit_bias is 0 (open_clip: rounding), and a bias of several elements raises;"
    " use_horovod runs open_clip's own",
    "CoCaLoss": "as ClipLoss",
    "SigLipLoss": "texts of other processes are gathered in any `dist_impl`",
}


def _with_bias(loss, bias):
    """loss, which a bias of all logits leaves as it is; a learned one has a gradient of 0: without one DDP stops."""
    if bias is None:
        return loss
    if isinstance(bias, torch.Tensor):
        if bias.numel() != 1:
            shape = tuple(bias.shape)
            raise ValueError(f"ClipLoss: logit_bias must be a number or have one element, got shape {shape}")
        return loss + (0 * bias).reshape(()).to(loss)
    return loss + 0 * bias  # NaN of an infinite one, as its logits are


def _check_processes(name, processes):
    if processes != world_size():
        raise ValueError(
            f"{name}: world_size must be the number of processes, {world_size()}, got {processes}"
        )


def _checked(caller, image_features, text_features, logit_scale, logit_bias=0.0):
    """The features, checked as with one process; in the widest dtype under autocast."""
    features = checked_rows(caller, 2, image_features=image_features, text_features=text_features)
    check_scalar(caller, "logit_scale", logit_scale, features[0])
    check_scalar(caller, "logit_bias", logit_bias, features[0])
    return features


class ClipLoss(Closed, nn.Module):
    """`open_clip.loss.ClipLoss`: `clip_loss` of features as they are.

    logit_bias, which is one number, changes nothing and has a gradient of 0; open_clip's is 0 up to rounding.
    use_horovod with several processes runs open_clip's own, and so do calls of get_logits and get_ground_truth.

    Args:
        local_loss, gather_with_grad: With several processes: only the rows of this one; gradients through the
            gathered rows. DDP's averaged gradient is as open_clip's, which without both is 1 / world_size of the true
            one.
        cache_labels: Accepted; there is nothing to cache.
        rank, world_size: Of the processes.
        use_horovod: Gather with Horovod.
    """

    get_ground_truth, get_logits = LibraryMethod(), LibraryMethod()

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits, self.labels = 0, {}  # of get_ground_truth

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: float | torch.Tensor,
        logit_bias: float | torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """(N, D) features of pairs; logit_scale and logit_bias a number or a tensor of one element.

        Raises:
            ValueError: logit_bias has several elements, or torch.distributed has not world_size processes.
        """
        loss = _with_bias(self._contrastive(image_features, text_features, logit_scale), logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive(self, image_features, text_features, logit_scale):
        if self.world_size == 1:
            return clip_loss(image_features, text_features, logit_scale, normalize=False)
        if self.use_horovod:
            whole = original("open_clip.loss", "ClipLoss", "ClipLoss: use_horovod")
            options = (self.local_loss, self.gather_with_grad, False, self.rank, self.world_size, True)
            return whole(*options)(image_features, text_features, logit_scale)
        image_features, text_features = _checked("ClipLoss", image_features, text_features, logit_scale)
        _check_processes("ClipLoss", self.world_size)
        images, texts = (self._gathered(rows) for rows in (image_features, text_features))
        if not self.local_loss:
            return clip_loss(images, texts, logit_scale, normalize=False)
        own = torch.arange(len(image_features), device=images.device) + self.rank * len(image_features)
        scale = as_scalar(logit_scale, images)
        losses = 0
        for rows, columns in ((image_features, texts), (text_features, images)):
            lse, _, positive = contrastive(
                rows,
                columns,
                scale,
                positives=own,
                normalize_rows=False,
                normalize_columns=False,
                caller="ClipLoss",
            )
            losses = losses + (lse - positive) / 2
        return mean(losses, images)

    def _gathered(self, rows):
        if self.gather_with_grad:
            return gather_rows(rows)
        parts = list(gather_constant(rows.detach()).chunk(self.world_size))
        if not self.local_loss:
            parts[self.rank] = rows
        return torch.cat(parts)


def _cross_entropy(module, logits, labels):
    """What a module says of (N, L, C) logits and (N, L) labels.

    Where it is `nn.CrossEntropyLoss`, without a copy of the logits: λ = 1 of a mixed batch.
    """
    paired = logits.dim() == 3 and labels.shape == logits.shape[:2] and logits.numel()
    if not paired or not is_plain_cross_entropy(module):
        return module(logits.permute(0, 2, 1), labels)
    classes = labels.flatten()
    loss = mixup_cross_entropy(
        logits.flatten(0, 1),
        classes,
        lam=1.0,
        partner_target=classes,
        weight=module.weight,
        ignore_index=module.ignore_index,
        label_smoothing=module.label_smoothing,
        reduction=module.reduction,
    )
    return loss.view(labels.shape) if module.reduction == "none" else loss


class CoCaLoss(ClipLoss):
    """`open_clip.loss.CoCaLoss`: ClipLoss and the caption's cross-entropy, each with its weight.

    Args:
        caption_loss_weight, clip_loss_weight: Their weights; with clip_loss_weight 0 the first is an integer 0.
        pad_id: The class that the caption's loss leaves out.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: As in `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        logit_scale: float | torch.Tensor,
        output_dict: bool = False,
    ) -> Any:
        """(clip loss, caption loss) of (N, L, C) logits and (N, L) labels, or a dict of both."""
        if self.clip_loss_weight:
            clip = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            clip = torch.tensor(0, device=logits.device)
        caption = _cross_entropy(self.caption_loss, logits, labels)
        caption = caption * self.caption_loss_weight
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class SigLipLoss(Closed, nn.Module):
    """`open_clip.loss.SigLipLoss`: `siglip_loss` of features as they are.

    With several processes the texts of all are gathered, whichever way `dist_impl` names: all give one loss and
    gradient.

    Args:
        cache_labels: Accepted; there is nothing to cache.
        rank, world_size: Of the processes.
        dist_impl: "bidir", "shift", "reduce" or "gather".
    """

    get_ground_truth, get_logits, _loss = LibraryMethod(), LibraryMethod(), LibraryMethod()

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.prev_num_logits, self.labels = 0, {}
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            names = '"bidir", "shift", "reduce" or "gather"'
            raise AssertionError(f"SigLipLoss: dist_impl must be {names}, got {dist_impl!r}")

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: float | torch.Tensor,
        logit_bias: float | torch.Tensor,
        output_dict: bool = False,
    ) -> Any:
        """(N, D) features of pairs; logit_scale and logit_bias a number or a tensor of one element, or no bias."""
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = siglip_loss(image_features, text_features, logit_scale, bias, normalize=False)
        else:
            loss = self._gathered(image_features, text_features, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _gathered(self, image_features, text_features, logit_scale, bias):
        images, texts = _checked("SigLipLoss", image_features, text_features, logit_scale, bias)
        _check_processes("SigLipLoss", self.world_size)
        total = sigmoid_pairs(
            images,
            gather_rows(texts),
            as_scalar(logit_scale, images),
            as_scalar(bias, images),
            diagonal=self.rank * len(texts),
            normalize_rows=False,
            normalize_columns=False,
            total=True,
            caller="SigLipLoss",
        )
        return (total / len(images)).to(accumulation_dtype(images))
