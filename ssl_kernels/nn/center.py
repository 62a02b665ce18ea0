"""The running mean of a DINO teacher's logits."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from ssl_kernels.checks import check_device, check_embeddings, check_fraction, check_whole, shape_error, short
from ssl_kernels.losses._clusters import views_of
from ssl_kernels.losses._features import count_of, group_and_world, summed
from ssl_kernels.losses._shared import unit_rows


class DINOCenter(nn.Module):
    """The running mean of the teacher's logits, which `dino_loss` subtracts: `center.update_(teacher, prototypes)`.

        center = DINOCenter(65536)
        loss = dino_loss(student, teacher, prototypes, teacher_prototypes, center=center)
        center.update_(teacher, teacher_prototypes)

    The mean of logits is a logit of the mean row, so that an update costs O(N · D + K · D) and makes no logits.

    Args:
        size: K, the number of prototypes.
        momentum: In [0, 1]: the part of the old centre that stays.
        normalize, normalize_prototypes: As in the loss that the centre is for.

    Attributes:
        center: (K,) float32 buffer, 0 at first; `state_dict` has it.

    Source: Caron et al., DINO, arXiv:2104.14294, eq. 4.
    """

    def __init__(
        self, size: int, momentum: float = 0.9, *, normalize: bool = True, normalize_prototypes: bool = True
    ) -> None:
        super().__init__()
        check_whole("DINOCenter", "size", size, 1)
        check_fraction("DINOCenter", "momentum", momentum)
        self.momentum, self.normalize, self.normalize_prototypes = momentum, normalize, normalize_prototypes
        self.register_buffer("center", torch.zeros(int(size)))

    @torch.no_grad()
    def update_(
        self,
        teacher: torch.Tensor | Sequence[torch.Tensor],
        prototypes: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        group: Any = None,
    ) -> Self:
        """center ← momentum · center + (1 − momentum) · mean of the teacher's logits.

        Args:
            teacher: (A, N, T) or a sequence of A tensors (N, T), as in `dino_loss`; without prototypes logits (A, N,
                K). With a mask (A, N, L, T): patch tokens.
            prototypes: (K, T), the teacher's, or None.
            mask: (A, N, L) bool: the tokens that count, or None for all of them.
            group: A process group whose ranks' rows are one batch, or None for this process alone.

        Returns:
            The module.

        Raises:
            TypeError, ValueError: As in `dino_loss`.
        """
        op = "DINOCenter.update_"
        name, _ = group_and_world(op, group)
        if mask is not None:
            teacher = self._masked(op, teacher, mask)
        views = views_of(op, "teacher", teacher)
        width = len(self.center)
        if prototypes is None:
            if views[0].shape[1] != width:
                raise ValueError(
                    f"{op}: teacher must have width {width} as center has, got {views[0].shape[1]}"
                )
        else:
            check_embeddings(op, prototypes=prototypes)
            if tuple(prototypes.shape) != (width, views[0].shape[1]):
                raise shape_error(op, "prototypes", (width, views[0].shape[1]), prototypes)
        for given, tensor in (("teacher", views[0]), ("prototypes", prototypes)):
            if tensor is not None:
                check_device(op, given, tensor, self.center, "center")
        with torch.autocast(self.center.device.type, enabled=False):
            normalize = self.normalize and prototypes is not None
            total = sum(unit_rows(view, normalize).sum(0) for view in views)
            count = sum(count_of(view, "") for view in views)
            mean = summed(total, name) / summed(count, name)
            if prototypes is not None:
                mean = unit_rows(prototypes, self.normalize_prototypes).to(mean.dtype) @ mean
            self.center.lerp_(mean.to(self.center.dtype), 1 - self.momentum)
        return self

    @staticmethod
    def _masked(op, teacher, mask):
        """(1, M, T): the tokens that count."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            kind = short(mask.dtype) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise TypeError(f"{op}: mask must be a bool tensor, got {kind}")
        tokens = torch.stack(tuple(teacher)) if isinstance(teacher, (list, tuple)) else teacher
        if tokens.dim() != 4 or tokens.shape[:3] != mask.shape:
            raise shape_error(op, "mask", f"{tuple(tokens.shape[:3])} as teacher has tokens", mask)
        return tokens[mask][None]

    def extra_repr(self) -> str:
        return f"{len(self.center)}, momentum={self.momentum}"
