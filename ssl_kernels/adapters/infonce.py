"""`infonce` (0.3). Losses come back as float32 (float64 for float64)."""

import torch
from torch import nn

from ssl_kernels.adapters._classes import as_classes
from ssl_kernels.adapters._shared import mean
from ssl_kernels.checks import check_embeddings, check_scalar, check_shape
from ssl_kernels.losses._shared import inverse, inverse_operand, minus_log_sigmoid
from ssl_kernels.losses._softmax import is_one_node, one_node, views_loss
from ssl_kernels.ops.contrastive import contrastive

__all__ = ["InfoNCE", "SupervisedInfoNCE"]
ORIGINALS = {"InfoNCE": "infonce.infonce", "SupervisedInfoNCE": "infonce.infonce"}
DIFFERENCES = {"SupervisedInfoNCE": "exact below temperature 0.002, where the original's −1000 is no −∞"}


class InfoNCE(nn.Module):
    """`infonce.InfoNCE`: NT-Xent of (2B, D) rows, those of the first view above those of the second.

    Args:
        temperature: > 0.
    """

    def __init__(self, temperature: float | torch.Tensor = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_embeddings("InfoNCE", features=features)
        if len(features) % 2:
            raise ValueError(f"InfoNCE: features must have an even number of rows, got {len(features)}")
        check_scalar("InfoNCE", "temperature", self.temperature, features, positive=True)
        scale = inverse_operand(self.temperature, features)
        return views_loss(features, None, scale, "mean", None, normalize=True, backend=None, caller="InfoNCE")


class SupervisedInfoNCE(nn.Module):
    """`infonce.SupervisedInfoNCE`: the mean of log(1 + Σ_n exp s_in) − log(1 + Σ_p exp s_ip).

    p are the other rows of i's class and n the rows of other classes. The original marks what a sum leaves out
    with −1000, which below a temperature of about 0.002 is a number like others; here it is left out.

    Args:
        temperature: > 0.
        supervised: Not used, as in the original.
    """

    def __init__(self, temperature: float | torch.Tensor = 0.07, supervised: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.supervised = supervised

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """features (N, D), target (N,)."""
        check_embeddings("SupervisedInfoNCE", features=features)
        check_shape("SupervisedInfoNCE", "target", target, features.shape[:1], features)
        (classes,) = as_classes(target)
        check_scalar("SupervisedInfoNCE", "temperature", self.temperature, features, positive=True)
        if is_one_node(None, "SupervisedInfoNCE", "mean", None, features, classes, self.temperature):
            scale = inverse_operand(self.temperature, features)
            options = {"classes": classes, "classes_apart": True, "normalize": True, "reduction": "mean"}
            return one_node(features, None, scale, **options)[0]
        scale = inverse(self.temperature, features)
        options = {"row_ids": classes, "caller": "SupervisedInfoNCE"}
        negatives = contrastive(features, None, scale, **options).lse
        positives = contrastive(features, None, scale, only_equal_ids=True, **options).lse
        return mean(minus_log_sigmoid(-negatives) - minus_log_sigmoid(-positives), features)
