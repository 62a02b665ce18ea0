"""The losses of retrieval, and those that spread embeddings, as modules, which hold a function's options."""

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
        scale=1.0,
        *,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
        normalize=True,
        reduction="mean",
        backend=None,
    ):
        super().__init__(
            scale=scale,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, query, keys, target, *, target_weights=None, column_bias=None):
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
        scale=20.0,
        *,
        directions=("query_to_doc",),
        partition_mode="joint",
        hardness_mode=None,
        hardness_strength=0.0,
        margin=None,
        margin_mode="absolute",
        normalize=True,
        reduction="mean",
        backend=None,
    ):
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

    def forward(self, anchor, positive, *hard_negatives, ids=None, row_weights=None):
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
        temperature=1.0,
        *,
        in_batch=True,
        num_hard_negatives=None,
        normalize=True,
        reduction="mean",
        backend=None,
    ):
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
        query,
        item,
        candidates=None,
        *,
        item_ids=None,
        candidate_ids=None,
        log_q=None,
        candidate_weights=None,
        row_weights=None,
    ):
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

    def __init__(self, temperature=0.07, *, symmetric=True, normalize=True, reduction="mean", backend=None):
        super().__init__(
            temperature=temperature,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, query, keys, *, row_weights=None):
        return losses.mil_nce_loss(query, keys, row_weights=row_weights, **self.options)


class DistillationLoss(Loss):
    """`ssl_kernels.distillation_loss` as a module: `...(0.07)(query, keys, teacher_query, teacher_keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        teacher_temperature, normalize, reduction, backend: As in `distillation_loss`.
    """

    def __init__(
        self, temperature=0.07, teacher_temperature=None, *, normalize=True, reduction="mean", backend=None
    ):
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, query, keys, teacher_query, teacher_keys, *, row_weights=None):
        return losses.distillation_loss(
            query, keys, teacher_query, teacher_keys, row_weights=row_weights, **self.options
        )


class UniformityLoss(Loss):
    """`ssl_kernels.uniformity_loss` as a module: `UniformityLoss(t=2.0)(embeddings)`.

    Args:
        t: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, backend: As in `uniformity_loss`.
    """

    def __init__(self, t=2.0, *, normalize=True, backend=None):
        super().__init__(t=t, normalize=normalize, backend=backend)

    def forward(self, embeddings):
        return losses.uniformity_loss(embeddings, **self.options)


class AlignmentLoss(Loss):
    """`ssl_kernels.alignment_loss` as a module: `AlignmentLoss(alpha=2.0)(x, y)`.

    Args:
        alpha: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `alignment_loss`.
    """

    def __init__(self, alpha=2.0, *, normalize=True, reduction="mean", backend=None):
        super().__init__(alpha=alpha, normalize=normalize, reduction=reduction, backend=backend)

    def forward(self, x, y):
        return losses.alignment_loss(x, y, **self.options)


class KoLeoLoss(Loss):
    """`ssl_kernels.koleo_loss` as a module: `KoLeoLoss()(embeddings)`.

    Args:
        normalize, reduction, backend: As in `koleo_loss`.
    """

    def __init__(self, *, normalize=True, reduction="mean", backend=None):
        super().__init__(normalize=normalize, reduction=reduction, backend=backend)

    def forward(self, embeddings):
        return losses.koleo_loss(embeddings, **self.options)
