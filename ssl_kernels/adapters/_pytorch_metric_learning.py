"""pytorch-metric-learning's own classes, over the functions of `ssl_kernels.adapters.pytorch_metric_learning`."""

import torch
from pytorch_metric_learning import distances, losses

from ssl_kernels.adapters._classes import as_classes
from ssl_kernels.adapters._shared import warn_of_fallback
from ssl_kernels.adapters.pytorch_metric_learning import nt_xent_of_pairs, sup_con_of_rows, triplet_margins
from ssl_kernels.checks import DTYPES

_OVERRIDABLE = ("_compute_loss", "mat_based_loss", "pair_based_loss")


def _library_class(kind):
    """The library's own class that an adapter's class, or one of its subclasses, is derived from."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("pytorch_metric_learning."))


class _AllPairs(tuple):
    """In the place of an indices_tuple: all pairs but that of each row with its own column, `own`."""


def _plain(distance, *kinds):
    """Whether a distance is one of `kinds` with nothing about it but normalisation."""
    plain = type(distance) in kinds and distance.p == 2 and distance.power == 1 and not distance.collect_stats
    return plain and distance.is_inverted == (kinds[0] is not distances.LpDistance)


class _ByLabels:
    """The losses over all pairs by labels."""

    strict = False  # of an object that was pickled as the library's

    def _obstacle(self):
        """Why the library's own code has to run, or None."""
        if self.strict:
            return "strict=True"
        mine, theirs = type(self), _library_class(type(self))
        if any(getattr(mine, name) is not getattr(theirs, name) for name in _OVERRIDABLE):
            return "methods of a subclass"
        if not _plain(self.distance, distances.CosineSimilarity, distances.DotProductSimilarity):
            return "a distance other than CosineSimilarity and DotProductSimilarity"
        return None

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        why = self._obstacle()
        if why is None and indices_tuple is not None and not isinstance(indices_tuple, _AllPairs):
            why = "indices_tuple"
        if why is None and (labels is None or embeddings.dtype not in DTYPES):
            why = "such inputs"
        if why is not None:
            if not self.strict:
                warn_of_fallback(type(self).__name__, "pytorch_metric_learning", why)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if 0 in embeddings.shape or 0 in ref_emb.shape:
            return self.zero_losses()
        if isinstance(indices_tuple, _AllPairs):
            own = indices_tuple.own
        else:  # the library strikes out the diagonal where both labels are one object
            own = torch.arange(len(labels), device=labels.device) if ref_labels is labels else None
        square = ref_emb is embeddings
        if square:
            (classes,) = as_classes(labels)
            columns, column_classes = (None, None) if own is not None else (embeddings, classes)
        else:
            classes, column_classes = as_classes(labels, ref_labels)
            columns = ref_emb.to(embeddings.dtype)
            if isinstance(indices_tuple, _AllPairs) and embeddings.requires_grad:
                # The memory may be overwritten before backward.
                columns, column_classes = columns.clone(), column_classes.clone()
        normalize = self.distance.normalize_embeddings
        arguments = (embeddings, classes, columns, column_classes, self.temperature)
        return self._over_all(*arguments, None if columns is None else own, normalize)


class NTXentLoss(_ByLabels, losses.NTXentLoss):
    """`pytorch_metric_learning.losses.NTXentLoss`, streamed: no temporary grows with pairs times pairs.

    Where the library's loss saturates (87.34 in float32, 9.70 in float16, gradient 0) this one goes on, and a single
    pair has its loss, not 0. With indices_tuple or another distance the library's own code runs, with one warning.

    Args:
        temperature: > 0.
        strict: The library's own code always.
        kwargs: distance, reducer, ... as there.
    """

    def __init__(self, temperature=0.07, *, strict=False, **kwargs):
        super().__init__(temperature=temperature, **kwargs)
        self.strict = strict

    def _over_all(self, *arguments):
        values, anchors, positives = nt_xent_of_pairs(*arguments)
        if len(values) == 0:
            return self.zero_losses()
        found = {"losses": values, "indices": (anchors, positives), "reduction_type": "pos_pair"}
        return {"loss": found}


class SupConLoss(_ByLabels, losses.SupConLoss):
    """`pytorch_metric_learning.losses.SupConLoss`, streamed.

    Rows whose loss underflows in the library leave its mean; here they stay. Rows of one label alone have a loss.
    With indices_tuple or another distance the library's own code runs, with one warning.

    Args:
        temperature: > 0.
        strict: The library's own code always.
        kwargs: distance, reducer, ... as there.
    """

    def __init__(self, temperature=0.1, *, strict=False, **kwargs):
        super().__init__(temperature=temperature, **kwargs)
        self.strict = strict

    def _over_all(self, rows, *arguments):
        values = sup_con_of_rows(rows, *arguments)
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": values, "indices": indices, "reduction_type": "element"}}


class TripletMarginLoss(losses.TripletMarginLoss):
    """`pytorch_metric_learning.losses.TripletMarginLoss` of given triplets, as a miner gives them.

    The rows of triplets are gathered and each distance computed from their difference; the library takes all distances
    by a matrix product, whose digits cancel for rows that are close. All triplets (no indices_tuple), more triplets
    than a matrix of distances is worth, swap and other distances run the library's own code, with one warning.

    Args:
        margin, swap, smooth_loss, triplets_per_anchor, kwargs: As there.
        strict: The library's own code always.
    """

    strict = False

    def __init__(self, margin=0.05, swap=False, smooth_loss=False, triplets_per_anchor="all", **kwargs):
        self.strict = kwargs.pop("strict", False)
        super().__init__(margin, swap, smooth_loss, triplets_per_anchor, **kwargs)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        why = None
        if self.strict or self.swap or not _plain(self.distance, distances.LpDistance):
            why = "swap or its distance"
        elif indices_tuple is None or len(indices_tuple) != 3:
            why = "all triplets or pairs"
        elif len(indices_tuple[0]) * embeddings.shape[1] > 4 * len(embeddings) * len(ref_emb) + 2**22:
            why = "so many triplets"
        if why is None and embeddings.dtype not in DTYPES:
            why = "such inputs"
        if why is not None:
            if not self.strict:
                warn_of_fallback("TripletMarginLoss", "pytorch_metric_learning", why)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if len(indices_tuple[0]) == 0:
            return self.zero_losses()
        values = triplet_margins(
            embeddings,
            ref_emb.to(embeddings.dtype),
            indices_tuple,
            self.margin,
            self.distance.normalize_embeddings,
            self.smooth_loss,
        )
        return {"loss": {"losses": values, "indices": indices_tuple, "reduction_type": "triplet"}}


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """`pytorch_metric_learning.losses.SelfSupervisedLoss`: two views of a batch, under a loss of this module."""


class CrossBatchMemory(losses.CrossBatchMemory):
    """`pytorch_metric_learning.losses.CrossBatchMemory`, whose pairs are not listed for the losses of this module.

    As there, `queue_idx` and `has_been_filled` are no part of the state_dict. Where an enqueue_mask has no True, the
    library takes its memory, still empty, for full; this one does not. In a batch of one row the library counts the
    row's own entry among its positives (it takes the batch for one that goes round the ring); here, under a loss of
    this module without `strict`, no row is its own positive.
    """

    def add_to_memory(self, embeddings, labels, batch_size):
        if batch_size:
            return super().add_to_memory(embeddings, labels, batch_size)
        self.curr_batch_idx = torch.empty(0, dtype=torch.long, device=labels.device)

    def create_indices_tuple(self, embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove):
        streams = isinstance(self.loss, _ByLabels) and self.loss._obstacle() is None
        if streams and self.miner is None and input_indices_tuple is None and embeddings.dtype in DTYPES:
            pairs = _AllPairs()
            pairs.own = self.curr_batch_idx if do_remove else None
            return pairs
        if len(E_mem) == 0 and input_indices_tuple is None:
            return tuple(torch.empty(4, 0, dtype=torch.long, device=labels.device))  # miners want rows
        return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove)
