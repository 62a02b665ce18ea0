"""`SupConLoss` of SupContrast (losses.py of github.com/HobbitLong/SupContrast)."""

import torch
from torch import nn

from ssl_kernels.adapters._classes import as_classes
from ssl_kernels.adapters._shared import mean
from ssl_kernels.checks import check_dtype, check_scalar, check_tensor, hold_values, shape_error
from ssl_kernels.losses._shared import as_operand, inverse, is_autocast_enabled
from ssl_kernels.losses.sup_con import sup_con_sum
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype

__all__ = ["SupConLoss"]
ORIGINALS = {}  # no package: a file that is copied into projects
DIFFERENCES = {
    "SupConLoss": "an anchor without a positive counts as 0 (older copies: NaN), one whose exponentials underflow has"
    " its loss (the original: −∞); a mask must be of 0 and 1"
}


class SupConLoss(nn.Module):
    """SupContrast's SupConLoss: SupCon of several views per sample, SimCLR's loss without labels.

    Rows are taken as they are: normalise them first. The result is that of the paper times
    temperature / base_temperature.

    Args:
        temperature: > 0.
        contrast_mode: "all": every view is an anchor; "one": the first view of each sample.
        base_temperature: > 0.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """features (B, V, ...); labels (B,), or mask (B, B) of 0 and 1 with mask[i, j] where j is a positive of i.

        labels and mask may be on another device than features, as in the original. Under torch.compile
        nobody looks at the mask's numbers: what is not 0 counts as 1.
        """
        check_dtype("SupConLoss", "features", features)
        if features.dim() < 3 or 0 in features.shape:
            raise shape_error("SupConLoss", "features", "(B, V, ...), each at least 1", features)
        if labels is not None and mask is not None:
            raise ValueError("SupConLoss: one of labels and mask must be None, got both")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f'SupConLoss: contrast_mode must be "all" or "one", got {self.contrast_mode!r}')
        check_scalar("SupConLoss", "temperature", self.temperature, features, positive=True)
        batch, views = features.shape[:2]
        if mask is None:
            if labels is None:
                labels = torch.arange(batch, device=features.device)
            check_tensor("SupConLoss", "labels", labels)
            (labels,) = as_classes(labels if labels.dim() == 1 else labels.reshape(-1))
            if len(labels) != batch:
                raise ValueError(f"SupConLoss: labels must have length {batch}, got {len(labels)}")
            if labels.device != features.device:
                labels = labels.to(features.device)
        else:
            mask = _checked_mask(mask, batch).to(features.device)
        factor = as_operand(self.temperature, features) / as_operand(self.base_temperature, features)
        if self.contrast_mode == "one":
            same = (labels[:, None] == labels) if mask is None else mask
            rows = features.flatten(2).transpose(0, 1).flatten(0, 1)  # view by view
            return self._of_first_views(rows, same.repeat(1, views), batch) * factor
        rows = features if features.dim() == 3 else features.flatten(2)
        if mask is not None:
            mask = mask.repeat_interleave(views, 0).repeat_interleave(views, 1)
        elif views > 1:
            labels = labels.unsqueeze(1).expand(batch, views).reshape(-1)
        options = {"positives": mask, "normalize": False}
        if isinstance(factor, torch.Tensor) or factor == 0:
            loss = sup_con_sum(rows, labels, self.temperature, batch * views, **options)
            return loss * factor
        # Over all rows: those without a positive count as 0.
        return sup_con_sum(rows, labels, self.temperature, batch * views / factor, **options)

    def _of_first_views(self, rows, positives, batch):
        # In float32, as the products are: where a row has learned its positives, the gradients of lse and means
        # nearly cancel.
        rows = rows.to(accumulation_dtype(rows))
        positives = positives.to(rows.dtype).fill_diagonal_(0)
        anchors, own = rows[:batch], torch.arange(len(rows), device=rows.device)
        scale = inverse(self.temperature, rows)
        lse = contrastive(
            anchors,
            rows,
            scale,
            row_ids=own[:batch],
            column_ids=own,
            normalize_rows=False,
            normalize_columns=False,
            caller="SupConLoss",
        ).lse
        count = positives.sum(1)
        means = (anchors * _product(positives, rows)).sum(1, dtype=torch.float64) * scale / count.clamp_min(1)
        return mean((lse - means).where(count > 0, 0), rows)


def _checked_mask(mask, batch):
    """mask as bool."""
    check_tensor("SupConLoss", "mask", mask)
    if mask.shape != (batch, batch):
        raise shape_error("SupConLoss", "mask", (batch, batch), mask)
    if mask.dtype != torch.bool and hold_values(mask):
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            raise ValueError(
                f"SupConLoss: mask must hold nothing but 0 and 1, got {mask[wrong][0].item():.6g}"
            )
    return mask.bool()


def _product(x, y):
    """x @ y in the dtype of both, under autocast as well."""
    if not is_autocast_enabled(x.device.type):
        return x @ y
    with torch.autocast(x.device.type, enabled=False):
        return x @ y
