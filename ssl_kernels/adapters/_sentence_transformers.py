"""sentence-transformers' own classes, over `multiple_negatives_ranking_loss`."""

import warnings

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score

from ssl_kernels.adapters._gather import world_size
from ssl_kernels.adapters._shared import warn_of_fallback
from ssl_kernels.losses import multiple_negatives_ranking_loss


class _Ranking:
    def _loss(self, embeddings):
        """The loss of columns of embeddings, or None where the library's own code has to run."""
        why = None
        if self.similarity_fct not in (cos_sim, dot_score):
            why = "similarity_fct"
        elif self.gather_across_devices and world_size() > 1:
            why = "gather_across_devices"
        elif len({len(rows) for rows in embeddings}) > 1:
            why = "columns of several lengths"
        elif not all(rows.is_floating_point() and rows.dim() == 2 and rows.numel() for rows in embeddings):
            why = "such embeddings"
        if why is not None:
            warn_of_fallback(type(self).__name__, "sentence_transformers", why)
            return None
        widest = embeddings[0].dtype
        for rows in embeddings[1:]:
            widest = torch.promote_types(widest, rows.dtype)
        return multiple_negatives_ranking_loss(
            *(rows.to(widest) for rows in embeddings),
            scale=self.scale,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            normalize=self.similarity_fct is cos_sim,
        )


class _Plain(_Ranking):
    def compute_loss_from_embeddings(self, embeddings, labels):
        loss = self._loss(embeddings) if len(embeddings) > 1 else None
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class _Cached(_Ranking):
    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        loss = self._loss([torch.cat(column) for column in reps]) if len(reps) > 1 else None
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class MultipleNegativesRankingLoss(_Plain, losses.MultipleNegativesRankingLoss):
    """sentence-transformers' MultipleNegativesRankingLoss, streamed, with all its directions and hardness modes.

    The loss is float32. With a similarity_fct other than cos_sim and dot_score, columns of several lengths, or several
    processes and gather_across_devices, the library's own code runs, with one warning.
    """


class CachedMultipleNegativesRankingLoss(_Cached, losses.CachedMultipleNegativesRankingLoss):
    """The same with gradient caching: the model runs in mini-batches, the loss is of all rows at once."""


with warnings.catch_warnings():  # of their deprecation, which their constructors say
    warnings.simplefilter("ignore")

    class MultipleNegativesSymmetricRankingLoss(_Plain, losses.MultipleNegativesSymmetricRankingLoss):
        """MultipleNegativesRankingLoss of both directions, each with a softmax of its own."""

    class CachedMultipleNegativesSymmetricRankingLoss(
        _Cached, losses.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """CachedMultipleNegativesRankingLoss of both directions, each with a softmax of its own."""
