"""`info_nce` of info-nce-pytorch (0.1.4). Losses come back as float32 (float64 for float64)."""

import torch
import torch.nn.functional as F
from torch import nn

from ssl_kernels.checks import (
    check_choice,
    check_embeddings,
    check_reduction,
    check_same_rows,
    check_scalar,
    check_shape,
)
from ssl_kernels.losses import info_nce_loss
from ssl_kernels.losses._shared import as_operand
from ssl_kernels.ops.library import accumulation_dtype

__all__ = ["InfoNCE", "info_nce"]
ORIGINALS = {"InfoNCE": "info_nce", "info_nce": "info_nce"}
DIFFERENCES = {
    "InfoNCE": "temperature <= 0 and an unknown negative_mode with negatives raise",
    "info_nce": "as InfoNCE",
}


def info_nce(
    query: torch.Tensor,
    positive_key: torch.Tensor,
    negative_keys: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> torch.Tensor:
    """`info_nce.info_nce`: `info_nce_loss`, and 0 where there is not one negative.

    Args:
        query, positive_key: (N, D).
        negative_keys: None: the other positives. "unpaired": (M, D). "paired": (N, M, D).
        temperature: > 0.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" or "paired".
    """
    if negative_keys is not None and negative_keys.dim() > 1 and negative_keys.shape[-2] == 0:
        return _without_negatives(query, positive_key, negative_keys, temperature, reduction, negative_mode)
    return info_nce_loss(query, positive_key, negative_keys, temperature, reduction, negative_mode)


def _without_negatives(query, positive_key, negative_keys, temperature, reduction, negative_mode):
    """0, to which everything has a gradient."""
    check_embeddings("info_nce", query=query, positive_key=positive_key)
    check_same_rows("info_nce", query=query, positive_key=positive_key)
    check_scalar("info_nce", "temperature", temperature, query, positive=True)
    check_reduction("info_nce", reduction)
    check_choice("info_nce", "negative_mode", negative_mode, "unpaired", "paired")
    rows, width = query.shape
    shape = (0, width) if negative_mode == "unpaired" else (rows, 0, width)
    check_shape("info_nce", "negative_keys", negative_keys, shape, query)
    query, positive_key, negative_keys = (
        F.normalize(keys.to(accumulation_dtype(query)), dim=-1)
        for keys in (query, positive_key, negative_keys)
    )
    negatives = (query.unsqueeze(1) @ negative_keys.mT).squeeze(1)
    logits = torch.cat(((query * positive_key).sum(1, keepdim=True), negatives), 1)
    return F.cross_entropy(
        logits / as_operand(temperature, query),
        torch.zeros_like(logits[:, 0], dtype=torch.long),
        reduction=reduction,
    )


class InfoNCE(nn.Module):
    """`info_nce.InfoNCE`: the function as a module.

    Args:
        temperature, reduction, negative_mode: As in `info_nce`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: torch.Tensor, positive_key: torch.Tensor, negative_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        return info_nce(
            query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode
        )
