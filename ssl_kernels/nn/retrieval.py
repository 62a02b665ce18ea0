"""The losses of retrieval, and those that spread embeddings, as modules, which hold a function's options."""

from collections.abc import Sequence

import torch

from ssl_kernels import losses
from ssl_kernels.nn.losses import Loss


class SimilarityCrossEntropyLoss(Loss):
    """`ssl_kernels.similarity_cross_entropy` as a module: `SimilarityCrossEntropyLoss(20.0)(query, keys, target)`.

    Args:
        scale: A float, a tensor of one element, or an `nn.Parameter` to learn it.
        weight: None or (M,), a weight per column as target; a buffer.
        ignore_index, label_smoothing, normalize, reduction, backend: As in `similarity_cross_entropy`.
    """

    def __init__(
        self,
        scale: float | torch.Tensor = 1.0,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        target: torch.Tensor,
        *,
        target_weights: torch.Tensor | None = None,
        column_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.similarity_cross_entropy(
            query, keys, target, target_weights=target_weights, column_bias=column_bias, **self.options
        )


class MultipleNegativesRankingLoss(Loss):
    """`ssl_kernels.multiple_negatives_ranking_loss` as a module: `...(scale=20.0)(anchor, positive, *hard_negatives)`.

    Args:
        scale: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        directions, partition_mode, hardness_mode, hardness_strength: As in `multiple_negatives_ranking_loss`.
        margin, margin_mode, normalize, reduction, backend: Likewise.
    """

    def __init__(
        self,
        scale: float | torch.Tensor = 20.0,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        margin: float | None = None,
        margin_mode: str = "absolute",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
            margin=margin,
            margin_mode=margin_mode,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        anchor: torch.Tensor,
        positive: torch.Tensor,
        *hard_negatives: torch.Tensor,
        ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.multiple_negatives_ranking_loss(
            anchor, positive, *hard_negatives, ids=ids, row_weights=row_weights, **self.options
        )


class SampledSoftmaxLoss(Loss):
    """`ssl_kernels.sampled_softmax_loss` as a module: `SampledSoftmaxLoss(temperature=0.1)(query, item, candidates)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        in_batch, num_hard_negatives, normalize, reduction, backend: As in `sampled_softmax_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 1.0,
        *,
        in_batch: bool = True,
        num_hard_negatives: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            in_batch=in_batch,
            num_hard_negatives=num_hard_negatives,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: torch.Tensor,
        item: torch.Tensor,
        candidates: torch.Tensor | None = None,
        *,
        item_ids: torch.Tensor | None = None,
        candidate_ids: torch.Tensor | None = None,
        log_q: torch.Tensor | None = None,
        candidate_weights: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.sampled_softmax_loss(
            query,
            item,
            candidates,
            item_ids=item_ids,
            candidate_ids=candidate_ids,
            log_q=log_q,
            candidate_weights=candidate_weights,
            row_weights=row_weights,
            **self.options,
        )


class MILNCELoss(Loss):
    """`ssl_kernels.mil_nce_loss` as a module: `MILNCELoss(temperature=0.07)(query, keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        symmetric, normalize, reduction, backend: As in `mil_nce_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        symmetric: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return losses.mil_nce_loss(query, keys, row_weights=row_weights, **self.options)


class DistillationLoss(Loss):
    """`ssl_kernels.distillation_loss` as a module: `...(0.07)(query, keys, teacher_query, teacher_keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        teacher_temperature, normalize, reduction, backend: As in `distillation_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        teacher_temperature: float | torch.Tensor | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        teacher_query: torch.Tensor,
        teacher_keys: torch.Tensor,
        *,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.distillation_loss(
            query, keys, teacher_query, teacher_keys, row_weights=row_weights, **self.options
        )


class UniformityLoss(Loss):
    """`ssl_kernels.uniformity_loss` as a module: `UniformityLoss(t=2.0)(embeddings)`.

    Args:
        t: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, backend: As in `uniformity_loss`.
    """

    def __init__(
        self, t: float | torch.Tensor = 2.0, *, normalize: bool = True, backend: str | None = None
    ) -> None:
        super().__init__(t=t, normalize=normalize, backend=backend)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return losses.uniformity_loss(embeddings, **self.options)


class AlignmentLoss(Loss):
    """`ssl_kernels.alignment_loss` as a module: `AlignmentLoss(alpha=2.0)(x, y)`.

    Args:
        alpha: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `alignment_loss`.
    """

    def __init__(
        self,
        alpha: float | torch.Tensor = 2.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(alpha=alpha, normalize=normalize, reduction=reduction, backend=backend)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return losses.alignment_loss(x, y, **self.options)


class KoLeoLoss(Loss):
    """`ssl_kernels.koleo_loss` as a module: `KoLeoLoss()(embeddings)`.

    Args:
        normalize, reduction, backend: As in `koleo_loss`.
    """

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, backend=backend)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return losses.koleo_loss(embeddings, **self.options)
